"""``python -m benchmark.suite --out DIR``: every measurement that the documentation shows.

Parts run one after the other, each with a time limit of its own; what a part has measured is on the
disk as soon as it is measured, and a part that fails or runs out of time leaves the others alone.
One JSON file for each part; ``python docs/make.py`` makes the tables and plots of the
documentation from them once they lie in ``docs/measurements``.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import output
from .environment import environment
from .measure import LONG_SOAK, SOAK
from .methods import METHODS, installed
from .runs import Session, Task, measure_all
from .shapes import SHAPES, SMALL

OURS = ("cce", "cce_exact")
ALL = (
    "cce", "cce_exact", "torch_compile", "chunked", "baseline", "apple", "liger", "quack", "trl",
    "torch",
)  # fmt: skip
BOTH = ("loss-fw-bw",)


@dataclass(frozen=True)
class Part:
    """One file of measurements.

    Args:
        seconds: limit, of which a part should need two thirds.
        methods: what runs; other packages only if they are there.
        repetitions: timed runs of each.
        soak: seconds of work before them.
    """

    seconds: float
    methods: Sequence[str]
    repetitions: int = 9
    soak: float = SOAK


PARTS = {
    "table": Part(300, ALL),
    "shapes": Part(150, OURS, 6),
    # Sizes that are compared with each other: all of them at the clock of a long run.
    "sweeps": Part(420, ("cce", "cce_exact", "chunked", "baseline", "liger"), 6, LONG_SOAK),
    "options": Part(60, ("cce", "cce_exact", "baseline"), 6),
    "tails": Part(75, ("cce", "cce_exact", "baseline", "apple", "liger"), 6),
}


def tasks_of(part: str, hidden: Path | None, on_gpu: bool) -> list[Task]:
    """The problems of a part, most wanted first."""

    def made(model: str, kind: str = "structured", tokens: int = 8192, **changes: Any) -> Task:
        shape = SHAPES[model] if on_gpu else SMALL
        if not on_gpu:
            tokens //= 64
        dtype = "bfloat16" if on_gpu else "float32"
        return replace(Task(f"{shape.name}-{kind}", kind, tokens, shape, dtype), **changes)

    if part == "table":
        result = [made("gemma2")]
        if hidden is not None:
            name = hidden.name.split(".")[0]
            result.append(made("gemma2", name=name, file=str(hidden)))
        return [*result, made("llama3-8b", kinds=BOTH)]
    if part == "shapes":
        first = ("qwen3-0.6b", "phi3.5", "mistral-nemo", "qwen3-8b", "gpt-oss", "llama3.2-1b")
        rest = ("llama3-8b", "gpt2", "gemma2-9b", "llama3-70b", "gemma2-27b")
        return [made(name) for name in first + rest]
    if part == "tails":
        return [made("gemma2", kind, kinds=BOTH) for kind in ("diffuse", "randn", "flat")]
    plain = made("llama3.2-1b", kinds=BOTH, errors=False)
    if part == "sweeps":
        counts = [2**i for i in range(10, 18)]
        sizes = [65536, 98304, 131072, 196608, 262144]
        scale = 1 if on_gpu else 64
        result = []
        for v in sizes:
            shape = replace(plain.shape, num_classes=v // scale)
            result.append(replace(plain, name=f"V{v}", shape=shape))
        # The largest batches last: they take the longest.
        return result + [replace(plain, name=f"N{n}", tokens=n // scale) for n in counts]
    if part == "options":
        shares = [
            replace(plain, name=f"ignored-{share}", ignored=share) for share in (0, 0.5, 0.75, 0.9)
        ]
        return [*shares, *(replace(plain, name=f"frozen-{x}", frozen=x) for x in "ec")]
    raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")


def run_part(
    name: str, arguments: argparse.Namespace, peers: dict[str, str], seconds: float
) -> dict[str, Any]:
    """Measure a part and return the content of its file."""
    part, on_gpu = PARTS[name], torch.cuda.is_available()
    results: dict[str, Any] = {
        "part": name,
        "command": f"python -m benchmark.suite --parts {name}",
        "environment": environment(arguments.commit),
        "rows": [],
        "failures": [],
        "data": {},
    }
    file = arguments.out / f"{name}.json"

    def keep(rows: list[dict[str, Any]], session: Session) -> None:
        results["rows"] += rows
        results["failures"], results["data"] = session.failures, session.data
        output.write_json(file, results)

    methods = ["gemm"]
    for method in part.methods:
        wanted = not arguments.methods or method in arguments.methods
        there = method in peers if METHODS[method].peer else installed(method, peers)
        if wanted and there and (on_gpu or METHODS[method].cpu):
            methods.append(method)
    progress = output.Progress(1)
    session = measure_all(
        tasks_of(name, arguments.hidden, on_gpu),
        methods,
        peers,
        seconds=seconds,
        repetitions=part.repetitions,
        soak=part.soak,
        progress=progress.say,
        measured=lambda rows: print(output.table(rows), flush=True),
        done=keep,
    )
    results["failures"] = session.failures
    output.write_json(file, results)
    return results


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
