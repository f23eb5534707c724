"""``python -m research.measured_error HIDDEN... --json FILE``: estimated errors, and the true ones.

Compares the errors that ``record_filter`` estimates with those of the whole gradients. The input is
what ``python -m research.hidden`` writes. Each file gives 36 problems: six kinds of upstream
gradients, three temperatures, the default filter and one of a fixed wide tolerance. With fewer
tokens or classes than the file has, each problem takes others. Without a GPU, set
``TRITON_INTERPRET=1`` and take ``--tokens 256 --classes 2048 --sampled 32 128``: the same kernels
on the CPU, in float32. ``docs/make.py`` makes a table and a plot of docs/numerics.md from the file.
"""

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy import dispatch, linear_cross_entropy, record_filter
from cut_cross_entropy.benchmark.environment import environment
from cut_cross_entropy.benchmark.output import write_json
from cut_cross_entropy.kernels.filtered import backward, measure

PART = "measured-error"
WEIGHTS = ("equal", "normal", "sure", "unsure", "probability", "sparse")
TEMPERATURES = (0.7, 1.0, 1.5)
FILTERS = ("auto", 2.0**-8)
SURE = 0.3  # loss of a token that counts as sure


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
    """Return the gradients of the losses, (N,).

    "sure" tokens alone; "unsure" ones at 0.01; the "probability" of the target; "sparse": a tenth.
    """
    random = torch.Generator().manual_seed(seed)
    if kind == "normal":
        return torch.randn(loss.shape, generator=random).to(loss)
    if kind == "sure":
        return (loss < SURE).to(loss)
    if kind == "unsure":
        return torch.where(loss < SURE, 1.0, 0.01).to(loss)
    if kind == "probability":
        return torch.exp(-loss)
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


def compare(
    e: Tensor, c: Tensor, targets: Tensor, kind: str, eps: object, seed: int
) -> dict[str, Any]:
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


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(prog="python -m research.measured_error", description=__doc__)
    add = parser.add_argument
    add("hidden_states", type=Path, nargs="+")
    add("--tokens", type=int, default=8192)
    add("--classes", type=int, default=2**30)
    add("--sampled", type=int, nargs=2, default=[measure.TOKENS, measure.CLASSES])
    add("--commit", help="commit to name where there is no history (or COMMIT)")
    add("--json", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    measure.TOKENS, measure.CLASSES = args.sampled
    # The filtered path, however much is kept or dropped.
    backward.DENSE_FRACTION, dispatch.MOST_DROPPED = math.inf, 1.0
    where, rows = environment(args.commit), []
    for path in args.hidden_states:
        saved = torch.load(path, weights_only=True)
        for seed, (kind, heat, eps) in enumerate(itertools.product(WEIGHTS, TEMPERATURES, FILTERS)):
            e, c, targets = subset(saved, args.tokens, args.classes, seed)
            e, c = (e.to(device).float() / heat).to(dtype), c.to(device, dtype)
            row = compare(e, c, targets.to(device), kind, eps=eps, seed=seed)
            problem = {"test_data": path.stem, "weights": kind, "temperature": heat, "filter": eps}
            rows.append({**problem, **row})
            print(rows[-1], flush=True)
            write_json(args.json, {"part": PART, "environment": where, "rows": rows})


if __name__ == "__main__":
    main()
