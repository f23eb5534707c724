"""``python -m benchmark.suite --out DIR``: every measurement that the documentation shows.

Parts run one after the other, each with a time limit of its own; what a part has measured is on the
disk as soon as it is measured, and a part that fails or runs out of time leaves the others alone.
One JSON file for each part; ``python docs/make.py`` makes the tables and plots of the
documentation from them once they lie in ``docs/measurements``.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import __main__ as command
from .measure import LONG_SOAK, SOAK
from .methods import METHODS, installed
from .runs import Task, measure_all

OURS = ("cce", "cce_exact")
ALL = (
    "cce", "cce_exact", "torch_compile", "chunked", "baseline", "apple", "liger", "quack", "trl",
    "torch",
)  # fmt: skip
BOTH = "--kinds loss-fw-bw"
FILE = "--data file"


@dataclass(frozen=True)
class Part:
    """One file of measurements.

    Args:
        seconds: limit, of which a part should need two thirds.
        methods: what runs; other packages only if they are there.
        problems: arguments of ``python -m benchmark``, most wanted first.
        repetitions: timed runs of each.
        soak: seconds of work before them.
    """

    seconds: float
    methods: Sequence[str]
    problems: Sequence[str]
    repetitions: int = 9
    soak: float = SOAK


# Sizes of a sweep are compared with each other: all of them at the clock of a long run. The largest
# batches come last: they take the longest.
PARTS = {
    "table": Part(300, ALL, ("--data gemma2", FILE, f"--data llama3-8b {BOTH}")),
    "shapes": Part(150, OURS, (
        "--data qwen3-0.6b phi3.5 mistral-nemo qwen3-8b gpt-oss llama3.2-1b",
        "--data llama3-8b gpt2 gemma2-9b llama3-70b gemma2-27b",
    ), 6),
    "sweeps": Part(420, (*OURS, "chunked", "baseline", "liger"), (
        "--data llama3.2-1b --sweep classes",
        "--data llama3.2-1b --sweep tokens",
    ), 6, LONG_SOAK),
    "options": Part(60, (*OURS, "baseline"), (
        f"--data llama3.2-1b --no-errors --ignored 0 0.5 0.75 0.9 {BOTH}",
        f"--data llama3.2-1b --no-errors --frozen e c {BOTH}",
    ), 6),
    "tails": Part(75, (*OURS, "baseline", "apple", "liger"), (
        f"--data gemma2 --tail diffuse randn flat {BOTH}",
    ), 6),
}  # fmt: skip


def tasks_of(part: str, hidden: Path | None, on_gpu: bool) -> list[Task]:
    """The problems of a part, most wanted first; those of saved hidden states if there are any."""
    result = []
    for line in PARTS[part].problems:
        if line != FILE or hidden is not None:
            arguments = command.parse_arguments([*line.split(), "--file", str(hidden)])
            result += command.tasks(arguments, on_gpu)
    return result


def run_part(
    name: str, arguments: argparse.Namespace, peers: dict[str, str], seconds: float
) -> dict[str, Any]:
    """Measure a part and return the content of its file."""
    part, on_gpu = PARTS[name], torch.cuda.is_available()
    methods = [
        method
        for method in part.methods
        if (not arguments.methods or method in arguments.methods)
        and (method in peers if METHODS[method].peer else installed(method, peers))
        and (on_gpu or METHODS[method].cpu)
    ]
    return measure_all(
        tasks_of(name, arguments.hidden, on_gpu),
        ["gemm", *methods],
        peers,
        part=name,
        command=f"python -m benchmark.suite --parts {name}",
        seconds=seconds,
        repetitions=part.repetitions,
        soak=part.soak,
        commit=arguments.commit,
        path=arguments.out / f"{name}.json",
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.suite", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the JSON files")
    add("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="default: all")
    add("--methods", nargs="+", choices=list(METHODS), help="these of a part alone; default: all")
    add("--hidden", type=Path, help="hidden states that `python -m research.hidden` wrote")
    add("--peers", type=Path, help="folder of `make peers`: other packages, a folder for each")
    add("--commit", help="commit to name where there is no history (or COMMIT)")
    add("--time-limit", type=float, default=900.0, help="seconds for everything")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts."""
    parsed = parse_arguments(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    peers = {}
    if parsed.peers is not None:
        peers = {p.name: str(p) for p in sorted(parsed.peers.iterdir()) if p.name in METHODS}
    end = time.monotonic() + parsed.time_limit
    for name in parsed.parts:
        seconds = min(PARTS[name].seconds, end - time.monotonic()) - 15
        if seconds < 5:
            print(f"== {name}: not run, no time left", flush=True)
            continue
        print(f"== {name}", flush=True)
        start = time.monotonic()
        results = run_part(name, parsed, peers, seconds)
        print(
            f"== {name}: {len(results['rows'])} rows, {len(results['failures'])} failures, "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
