"""``python -m research.ranks``: probabilities by rank, of a real model and of made data.

The likeliest class of a token has rank 1. The curve falls so fast that most of the vocabulary lies
below what the gradient's number format resolves; that is what every filter here lives on.
"""

import math
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.benchmark.data import Problem, make, read
from cut_cross_entropy.benchmark.environment import environment
from cut_cross_entropy.benchmark.output import write_json
from cut_cross_entropy.benchmark.shapes import SHAPES, SMALL
from research.command import parse_arguments

CUTOFF = 2.0**-12  # Apple's threshold for bfloat16
POINTS = 120


def curve(problem: Problem, block: int = 256) -> dict[str, Any]:
    """Probabilities at ranks that are even on a logarithmic scale, over all tokens.

    ``mean`` is over tokens; ``low`` and ``high`` hold four tokens of five.
    """
    num_classes = problem.c.shape[0]
    wanted = torch.logspace(0, math.log10(num_classes), POINTS).round().long().unique()
    c = problem.c.float()
    found: list[Tensor] = []
    above = mass = 0.0
    for start in range(0, problem.e.shape[0], block):
        logits = problem.e[start : start + block].float() @ c.T
        if problem.softcap is not None:
            logits = problem.softcap * torch.tanh(logits / problem.softcap)
        p = logits.softmax(1)
        above += float((p >= CUTOFF).sum())
        mass += float(torch.where(p >= CUTOFF, p, 0).sum())
        found.append(p.sort(dim=1, descending=True).values[:, wanted - 1].cpu())
    at = torch.cat(found)
    tokens = at.shape[0]
    low, high = at.quantile(torch.tensor([0.1, 0.9]), dim=0)
    return {
        "tokens": tokens,
        "classes": num_classes,
        "ranks": wanted.tolist(),
        "mean": [float(f"{x:.4g}") for x in at.mean(0).tolist()],
        "low": [float(f"{x:.4g}") for x in low.tolist()],
        "high": [float(f"{x:.4g}") for x in high.tolist()],
        "cutoff": CUTOFF,
        "above_cutoff": above / tokens,
        "mass_above_cutoff": mass / tokens,
    }


def main() -> None:
    """Write the curves."""
    arguments = parse_arguments("ranks", choices=[*SHAPES, SMALL.name], default=[])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {
        "part": "ranks",
        "environment": environment(arguments.commit),
        "curves": {},
    }
    problems = {}
    if arguments.file:
        problems[arguments.file.name.split(".")[0]] = read(arguments.file, device)
    for name in arguments.data:
        shape = {**SHAPES, SMALL.name: SMALL}[name]
        problems[f"{name}-structured"] = make("structured", arguments.tokens, shape, device=device)
    for name, problem in problems.items():
        n = arguments.tokens
        problem = Problem(problem.e[:n], problem.c, problem.targets[:n], problem.softcap)
        with torch.no_grad():
            results["curves"][name] = curve(problem)
        found = results["curves"][name]
        print(
            f"{name}: {found['above_cutoff']:.0f} of {found['classes']} classes of a token are "
            f"above the cut-off; they hold {found['mass_above_cutoff']:.1%} of the probability"
        )
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
