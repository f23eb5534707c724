"""``python -m research.aims --json FILE``: the aims of the filter, and what is reached.

Loss and both gradients of 8,192 tokens with the default options, in turns with one product
``e @ c.T`` and with ``cce_exact``; errors against full logits in float32. ``docs/make.py`` makes
the table of docs/benchmarks.md from the file, which is written anew after each head.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy import linear_cross_entropy, record_filter
from cut_cross_entropy.benchmark.data import KINDS, SHAPES, Problem, make, read
from cut_cross_entropy.benchmark.environment import environment
from cut_cross_entropy.benchmark.measure import (
    SOAK,
    exact_gradients,
    peak_mib,
    relative_error,
    timed,
)
from cut_cross_entropy.benchmark.output import write_json
from docs.aims import AIMS, PART
from research.measured_error import cosines

TURNS, REPETITIONS = 3, 8


def problem_of(name: str, hidden: dict[str, Path], device: str, tokens: int) -> Problem | None:
    """Return the data of an aim; None for a real head whose file is not there."""
    shape, _, kind = name.rpartition("-")
    if kind in KINDS:
        return make(kind, tokens, SHAPES[shape], device=device)
    return read(hidden[name], device).part(slice(0, tokens)) if name in hidden else None


def losses(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed: a product, the loss, and loss and gradients with each method."""
    e, c = problem.e.detach().requires_grad_(), problem.c.detach().requires_grad_()

    def loss(impl: str) -> Tensor:
        return linear_cross_entropy(e, c, problem.targets, impl=impl, softcap=problem.softcap)

    def with_gradients(impl: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(impl), (e, c))

    def forward() -> Tensor:
        with torch.no_grad():
            return loss("cce")

    product = e.detach() @ c.detach().T  # its memory is used again
    return {
        "gemm": lambda: torch.mm(e.detach(), c.detach().T, out=product),
        "forward": forward,
        "time": lambda: with_gradients("cce"),
        "exact": lambda: with_gradients("cce_exact"),
    }


def times(problem: Problem, device: torch.device) -> dict[str, Any]:
    """Return times relative to a product, and the quartiles of the product's in milliseconds."""
    runs = losses(problem)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, run in runs.items():
            found[name] += timed(lambda _, run=run: run(), device, REPETITIONS, soak=SOAK)
    gemm = statistics.median(found["gemm"])
    ratios = {n: round(statistics.median(v) / gemm, 3) for n, v in found.items() if n != "gemm"}
    first, _, third = statistics.quantiles(found["gemm"], n=4)
    return {**ratios, "gemm_ms": [round(first, 3), round(third, 3)]}


def errors(problem: Problem) -> dict[str, Any]:
    """Return what the filter did, and the errors of the gradients in roundings to bfloat16."""
    run = losses(problem)["time"]
    with record_filter() as records:
        grad_e, grad_c = run()
    (record,) = records
    exact = exact_gradients(problem)
    norms = grad_c.float().norm(dim=1) / exact.grad_c.norm(dim=1)
    return {
        "path": record.path,
        "strips_kept": round(record.strips_kept, 4),
        "dropped_mass": record.dropped_mass,
        "flat_tokens": record.flat_tokens,
        "error_e": round(relative_error(grad_e, exact.grad_e) / exact.rounding_e, 2),
        "error_c": round(relative_error(grad_c, exact.grad_c) / exact.rounding_c, 2),
        "estimates": [record.error_e, record.error_c],
        "rows": [round(value, 3) for value in cosines(grad_c, exact.grad_c)],
        "norms": round(float(((norms - 1).abs() <= 0.1).float().mean()), 3),
    }


def study(problem: Problem, name: str) -> dict[str, Any]:
    """Return the row of one head."""
    device = problem.e.device
    sizes = dict(zip(("classes", "dim"), problem.c.shape, strict=True))
    found = {"test_data": name, "tokens": problem.e.shape[0], **sizes, **times(problem, device)}
    run = losses(problem)["time"]
    return {**found, **errors(problem), "peak_mib": round(peak_mib(lambda _: run(), device))}


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(prog="python -m research.aims", description=__doc__)
    add = parser.add_argument
    add("--hidden", type=Path, nargs="*", default=[], help="files of `python -m research.hidden`")
    add("--data", nargs="+", choices=list(AIMS), default=list(AIMS))
    add("--tokens", type=int, default=8192)
    add("--commit", help="commit to name where there is no history (or COMMIT)")
    add("--json", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = {path.stem: path for path in args.hidden}
    where = environment(args.commit)
    rows: list[dict[str, Any]] = []
    for name in args.data:
        problem = problem_of(name, hidden, device, args.tokens)
        if problem is None:
            print(f"{name}: no file", flush=True)
            continue
        rows.append(study(problem, name))
        print(rows[-1], flush=True)
        write_json(args.json, {"part": PART, "environment": where, "rows": rows})
        del problem


if __name__ == "__main__":
    main()
