"""Compares the errors that ``record_filter`` estimates with those of the whole gradients.

    python research/measured_error.py HIDDEN_STATES.pt... [--tokens 8192] [--classes V] [--out FILE]

The input is what ``python -m research.hidden`` writes. Each file gives 24 problems: four kinds of
upstream gradients, three temperatures, the default filter and one with 16 times its tolerance. With
fewer tokens or classes than the file has, each problem takes others. Without a GPU, set
``TRITON_INTERPRET=1`` and take ``--tokens 256 --classes 2048 --sampled 32 128``: the same kernels
on the CPU, in float32. Results: docs/numerics.md.
"""

import argparse
import itertools
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from cut_cross_entropy import linear_cross_entropy, record_filter
from cut_cross_entropy.kernels.filtered import backward, measure

WEIGHTS = ("equal", "normal", "sure", "sparse")
TEMPERATURES = (0.7, 1.0, 1.5)
FILTERS = ("auto", 2.0**-8)


def subset(saved: dict[str, Tensor], num_tokens: int, num_classes: int, seed: int) -> list[Tensor]:
    """Return e, c and targets of consecutive tokens, and of their targets and random classes."""
    random = torch.Generator().manual_seed(seed)
    e, c, targets = saved["e"], saved["c"], saved["t"].long()
    first = int(torch.randint(0, e.shape[0] - num_tokens + 1, (), generator=random))
    e, targets = e[first : first + num_tokens], targets[first : first + num_tokens]
    if num_classes < c.shape[0]:
        order = torch.randperm(c.shape[0], generator=random)
        is_target = torch.zeros(c.shape[0], dtype=torch.bool).scatter_(0, targets, True)
        order = torch.cat([order[is_target[order]], order[~is_target[order]]])
        classes = order[:num_classes].sort().values
        c, targets = c[classes], torch.searchsorted(classes, targets)
    return [e, c, targets]


def upstream(kind: str, loss: Tensor, seed: int) -> Tensor:
    """Return the gradients of the losses, (N,)."""
    random = torch.Generator().manual_seed(seed)
    if kind == "normal":
        return torch.randn(loss.shape, generator=random).to(loss)
    if kind == "sure":
        return (loss < 0.3).to(loss)
    if kind == "sparse":
        return (torch.rand(loss.shape, generator=random) < 0.1).to(loss)
    return torch.ones_like(loss)


def exact(e: Tensor, c: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return dE and dC by full logits in float32, a chunk of tokens at a time."""
    wide = c.float()
    grad_e, grad_c = torch.empty(e.shape, device=e.device), torch.zeros_like(wide)
    for start in range(0, e.shape[0], 1024):
        part = slice(start, start + 1024)
        grad = torch.softmax(e[part].float() @ wide.T, 1)
        grad[torch.arange(grad.shape[0], device=e.device), targets[part]] -= 1
        grad *= weights[part, None].float()
        grad_e[part] = grad @ wide
        grad_c.addmm_(grad.T, e[part].float())
    return grad_e, grad_c


def cosines(got: Tensor, exact: Tensor) -> list[float]:
    """Return percentiles 1, 10 and 50 of the cosines of all rows."""
    values = []
    for a, b in zip(got.split(16384), exact.split(16384), strict=True):
        a, b = a.double(), b.double()
        sizes = a.norm(dim=1) * b.norm(dim=1)
        values.append(torch.where(sizes > 0, (a * b).sum(1) / sizes, (a == b).all(1).double()))
    ordered = torch.cat(values).sort().values
    return [float(ordered[len(ordered) * p // 100]) for p in (1, 10, 50)]


def compare(e: Tensor, c: Tensor, targets: Tensor, kind: str, eps: object, seed: int) -> dict:
    """Return estimates and truth of one problem, errors in roundings."""
    e, c = e.detach().requires_grad_(), c.detach().requires_grad_()
    loss = linear_cross_entropy(e, c, targets, impl="cce", reduction="none", filter_eps=eps)
    weights = upstream(kind, loss.detach(), seed)
    with record_filter() as records:
        grads = torch.autograd.grad(loss, (e, c), weights)
    (record,) = records
    truth = exact(e.detach(), c.detach(), targets, weights)
    errors = [
        float((got.float() - right).norm() / right.norm()) / measure.ROUNDING
        for got, right in zip(grads, truth, strict=True)
    ]
    return {
        "path": record.path,
        "kept": record.strips_kept,
        "estimates": [record.error_e, record.error_c],
        "truth": errors,
        "cosines": [record.cosines_c, cosines(grads[1], truth[1])],
    }


def scatter(rows: list[dict], index: int) -> str:
    """Return the distribution of estimate over truth, and the range of the truth."""
    pairs = [(row["estimates"][index], row["truth"][index]) for row in rows]
    ratios = sorted(estimate / truth for estimate, truth in pairs)
    at = lambda share: ratios[round(share * (len(ratios) - 1))]
    truths = [truth for _, truth in pairs]
    return (
        f"{len(ratios)} problems, truth {min(truths):.2f} to {max(truths):.2f}; estimate / truth: "
        f"least {ratios[0]:.3f}, 5 % {at(0.05):.3f}, 50 % {at(0.5):.3f}, 95 % {at(0.95):.3f}, "
        f"most {ratios[-1]:.3f}"
    )


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hidden_states", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--classes", type=int, default=2**30)
    parser.add_argument("--sampled", type=int, nargs=2, default=[measure.TOKENS, measure.CLASSES])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measure.TOKENS, measure.CLASSES = args.sampled
    backward.DENSE_FRACTION = math.inf  # the filtered path, however much is kept
    everything = []
    for path in args.hidden_states:
        saved, rows = torch.load(path), []
        for seed, (kind, heat, eps) in enumerate(itertools.product(WEIGHTS, TEMPERATURES, FILTERS)):
            e, c, targets = subset(saved, args.tokens, args.classes, seed)
            dtype = torch.bfloat16 if device == "cuda" else torch.float32
            e, c = (e.to(device).float() / heat).to(dtype), c.to(device, dtype)
            row = compare(e, c, targets.to(device), kind, eps=eps, seed=seed)
            rows.append({"head": path.stem, "weights": kind, "temperature": heat, **row})
            print(json.dumps(rows[-1]), flush=True)
        measured = [row for row in rows if row["path"] == "filtered"]
        print(path.stem, "dE:", scatter(measured, 0))
        print(path.stem, "dC:", scatter(measured, 1), flush=True)
        everything += rows
    if args.out:
        args.out.write_text("\n".join(map(json.dumps, everything)) + "\n")


if __name__ == "__main__":
    main()
