"""``python -m research.tails``: how broad the tail of an output layer is, and what a filter keeps.

Curves of real and of made data: probability outside the likeliest classes of a token, and energy of
dropped strips against the share that is kept, with tokens in the order of the text and in order of
content. Energies and masses are exact here; the kernels' bytes overstate energies, so they keep
more strips at the same tolerance.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cut_cross_entropy.benchmark.data import Problem, make, read
from cut_cross_entropy.benchmark.environment import environment
from cut_cross_entropy.benchmark.output import write_json
from cut_cross_entropy.benchmark.shapes import Shape
from cut_cross_entropy.dispatch import FILTER_TOLERANCE
from research.content_order.simulate import staged

BLOCK = 128
RANKS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000]
KEPT = [0.01, 0.02, 0.04, 0.08, 0.16]
QUANTILES = [0.1, 0.25, 0.5, 0.75, 0.9]
MAPPED = 4096  # classes in a map of strips


def orders(e: Tensor) -> dict[str, Tensor]:
    """Return the tokens in the order of the text and in order of content, (N,) each."""
    random = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (e.shape[1], 64), generator=random).to(e) * 2 - 1
    blocks = e.shape[0] // BLOCK
    levels = (blocks - 1).bit_length()
    stages = tuple(count for count in (min(3, levels), levels - 3) if count > 0)
    features = F.normalize(e, dim=1) @ signs
    return {
        "text": torch.arange(e.shape[0], device=e.device),
        "content": staged(features, stages),
    }


def probabilities(problem: Problem, tokens: Tensor) -> Tensor:
    """Return the probabilities of some tokens, (len(tokens), V) float32."""
    return problem.logits(problem.e[tokens], problem.c).softmax(1)


def rounded(values: Tensor, digits: int = 3) -> list[float]:
    """Round to significant digits."""
    return [float(f"{value:.{digits}g}") for value in values.tolist()]


def distribution(problem: Problem) -> dict[str, Any]:
    """Return how the probability of a token spreads over its classes.

    ``outside[i]`` is the mean probability outside the ``ranks[i]`` likeliest classes; ``top1`` and
    ``entropy`` are the quantiles QUANTILES over tokens.
    """
    ranks = [rank for rank in RANKS if rank < problem.c.shape[0]]
    outside, top, entropy = [], [], []
    for tokens in torch.arange(len(problem.e), device=problem.e.device).split(BLOCK):
        p = probabilities(problem, tokens)
        ordered = p.sort(dim=1, descending=True).values
        # From the far end, where the small ones are.
        beyond = ordered.flip(1).cumsum(1).flip(1)
        outside.append(beyond[:, ranks])
        top.append(ordered[:, 0])
        entropy.append(-(p * p.clamp_min(1e-30).log()).sum(1))
    q = torch.tensor(QUANTILES, device=problem.e.device)
    return {
        "ranks": ranks,
        "outside": rounded(torch.cat(outside).mean(0)),
        "top1": rounded(torch.cat(top).quantile(q)),
        "entropy": rounded(torch.cat(entropy).quantile(q)),
    }


def selection(problem: Problem, order: Tensor, tolerance: float) -> tuple[Tensor, dict[str, Any]]:
    """Return the strips that the filter keeps, (blocks, V) bool, and what it leaves out.

    ``dropped[i]`` is the root of the energy of the dropped strips, relative to the root of the
    energy of the gradient at the targets, when the share ``KEPT[i]`` of all strips is kept.
    """
    energies, missed = [], []
    for tokens in order.view(-1, BLOCK):
        p = probabilities(problem, tokens)
        energies.append(p.square().sum(0))
        missed.append(1 - p.gather(1, problem.targets[tokens, None])[:, 0])
    energy = torch.stack(energies)
    row = torch.arange(len(order), device=order.device) // BLOCK
    forced = torch.zeros_like(energy, dtype=torch.bool)
    forced[row, problem.targets[order]] = True
    at_targets = torch.cat(missed).square().sum()
    light, place = energy.masked_fill(forced, 0).flatten().sort()
    dropped = (light.double().cumsum(0) / at_targets).sqrt()
    count = int((dropped <= tolerance).sum())
    kept = torch.ones(energy.numel(), dtype=torch.bool, device=order.device)
    kept[place[:count]] = False
    kept = kept.view_as(energy) | forced
    shares = [int((1 - share) * energy.numel()) - 1 for share in KEPT]
    return kept, {"kept": round(float(kept.float().mean()), 4), "dropped": rounded(dropped[shares])}


def errors(problem: Problem, order: Tensor, kept: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """Return exact dE and dC, and the errors when a tail for each block replaces what is dropped.

    The gradients are those of the sum of the losses. ``error_e`` and ``error_c`` are relative
    Frobenius norms, ``cosines`` those of the rows of dC with the exact ones at the 1st, 10th and
    50th percentile of all classes, ``norms`` the share of rows whose norms are within a tenth.
    """
    e, c = problem.e, problem.c
    grad_e, wrong_e = torch.empty_like(e), torch.empty_like(e)
    grad_c, wrong_c = torch.zeros_like(c), torch.zeros_like(c)
    for tokens, keeps in zip(order.view(-1, BLOCK), kept, strict=True):
        p = probabilities(problem, tokens)
        dropped = p.masked_fill(keeps, 0)
        p[torch.arange(BLOCK, device=p.device), problem.targets[tokens]] -= 1
        grad_e[tokens] = p @ c
        grad_c.addmm_(p.T, e[tokens])
        del p
        weights = dropped.sum(0)
        tail = weights / weights.sum().clamp_min(1e-30)
        dropped.addr_(dropped.sum(1), tail, alpha=-1)
        wrong_e[tokens] = dropped @ c
        wrong_c.addmm_(dropped.T, e[tokens])
    got, exact = grad_c - wrong_c, grad_c
    sizes = [rows.norm(dim=1).double() for rows in (got, exact)]
    parts = zip(got.split(4096), exact.split(4096), strict=True)
    products = torch.cat([(a.double() * b).sum(1) for a, b in parts])
    cosine = (products / (sizes[0] * sizes[1]).clamp_min(1e-300)).sort().values
    ratio = sizes[0] / sizes[1].clamp_min(1e-300)
    return [grad_e, grad_c], {
        "error_e": float(f"{wrong_e.norm() / grad_e.norm():.3g}"),
        "error_c": float(f"{wrong_c.norm() / grad_c.norm():.3g}"),
        "cosines": rounded(cosine[[len(cosine) * percent // 100 for percent in (1, 10, 50)]]),
        "norms": round(float(((ratio > 0.9) & (ratio < 1.1)).float().mean()), 3),
    }


def masks(kept: Tensor) -> list[str]:
    """Return the blocks that keep a class, of evenly spaced classes: bits as hexadecimal numbers.

    Classes that no block keeps are left out, and the first block is the highest bit.
    """
    every = max(1, kept.shape[1] // MAPPED)
    columns = kept[:, ::every].T.tolist()
    numbers = sorted((int("".join("01"[bit] for bit in bits), 2) for bits in columns), reverse=True)
    return [f"{number:x}" for number in numbers if number]


def study(problem: Problem, with_map: bool) -> dict[str, Any]:
    """Return everything about one problem; tokens beyond the last whole block are left out.

    Raises:
        ValueError: a softcap, whose slope the gradients here do not have.
    """
    if problem.softcap is not None:
        raise ValueError(f"softcap must be None, got {problem.softcap}")
    count = len(problem.e) // BLOCK * BLOCK
    problem = Problem(
        problem.e[:count].float(), problem.c.float(), problem.targets[:count], problem.softcap
    )
    found: dict[str, Any] = {
        "tokens": count,
        "classes": problem.c.shape[0],
        "dim": problem.c.shape[1],
        **distribution(problem),
        "shares": KEPT,
    }
    tail = torch.ones(problem.c.shape[0], dtype=torch.bool, device=problem.c.device)
    tail[problem.targets] = False
    for name, order in orders(problem.e).items():
        kept, found[name] = selection(problem, order, FILTER_TOLERANCE)
        gradients, more = errors(problem, order, kept)
        found[name] |= more
        if with_map:
            found[name]["masks"] = masks(kept)
        norms = gradients[1].norm(dim=1)
        typical = norms.square().mean().sqrt()
        q = torch.tensor(QUANTILES, device=norms.device)
        found["row_norms"] = rounded((norms[tail] / typical).quantile(q))
    return found


def main() -> None:
    """Measure files and made data, and write the curves."""
    parser = argparse.ArgumentParser(prog="python -m research.tails", description=__doc__)
    add = parser.add_argument
    add("--file", nargs="*", type=Path, default=[], help="hidden states with tensors e, c and t")
    add("--made", nargs="*", default=[], metavar="KIND:V:D", help="data of the benchmark")
    add("--tokens", type=int, default=8192, help="at most that many")
    add("--map", nargs="*", default=[], help="problems whose kept strips are written as well")
    add("--commit", help="commit to name where there is no history (or COMMIT)")
    add("--json", type=Path, required=True, help="file to write; what it has of others stays")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {"part": "tail-curves", "problems": {}}
    if arguments.json.exists():
        results = json.loads(arguments.json.read_text(encoding="utf-8"))
    results["environment"] = environment(arguments.commit)
    for name in [*arguments.file, *arguments.made]:
        if isinstance(name, Path):
            label = name.name.split(".")[0]
            problem = read(name, device).part(slice(arguments.tokens))
        else:
            kind, classes, dim = name.split(":")
            shape = Shape(kind, int(classes), int(dim))
            label, problem = name, make(kind, arguments.tokens, shape, device=device)
        with torch.no_grad():
            found = study(problem, label in arguments.map)
        results["problems"][label] = found
        print(f"{label}: {found['tokens']} tokens, entropies {found['entropy']}", flush=True)
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
