"""``python -m benchmark.suite --out DIR``: every measurement that the documentation shows.

Parts run one after the other, each with a time limit of its own; what a part has measured is on the
disk as soon as it is measured, and a part that fails or runs out of time leaves the others alone.
One JSON file for each part; ``python docs/make.py`` makes the tables and plots of the
documentation from them once they lie in ``docs/measurements``.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import __main__ as command
from .measure import LONG_SOAK
from .methods import DEFAULT, METHODS, installed
from .runs import Task

OURS = "--methods cce cce_exact"
BOTH = "--kinds loss-fw-bw --repetitions 6"
STRUCTURED = "--tail structured"
HEAD = f"--data llama3.2-1b {BOTH} {OURS} baseline"
VARIANTS = "cce_exact_1gib cce_exact_c cce_exact_e"
OTHERS = "torch_compile baseline apple liger trl quack"
COMPARED = f"{BOTH} {OURS} {VARIANTS} {OTHERS} --time-limit 300 --data"
PLAIN = f"{BOTH} --methods chunked chunked_1gib baseline --time-limit 60 --no-errors"

# Sizes of a sweep are compared with each other: all of them at the clock of a long run. The largest
# batches come last: they take the longest.
SWEEP = f"{HEAD} chunked liger --soak {LONG_SOAK} --time-limit 420 --sweep"
TABLE = f"{STRUCTURED} --repetitions 9 --time-limit 300 --data"
MORE = ("", "+temperature", "+rank", "+candidates", "+entropy", "+entropy+temperature")
PASSES = ("logprobs-fw", "logprobs-fw-bw")
PARTS = {
    "comparison": (
        f"{COMPARED} file",
        f"{COMPARED} gemma2 llama3-8b qwen3-0.6b mistral-nemo phi3.5",
    ),
    "table": (f"{TABLE} file", f"{TABLE} gemma2", f"{TABLE} llama3-8b --kinds loss-fw-bw"),
    "shapes": (
        f"{OURS} {STRUCTURED} --repetitions 6 --time-limit 150 --data qwen3-0.6b phi3.5 "
        "mistral-nemo qwen3-8b gpt-oss llama3.2-1b llama3-8b gpt2 gemma2-9b llama3-70b gemma2-27b",
    ),
    "sweeps": (f"{SWEEP} classes", f"{SWEEP} tokens"),
    "options": (
        f"{HEAD} --time-limit 60 --no-errors --ignored 0 0.5 0.75 0.9",
        f"{HEAD} --time-limit 60 --no-errors --frozen e c",
    ),
    "tails": (
        f"{BOTH} {OURS} cce_exact_1gib baseline apple liger --time-limit 120 "
        "--data gemma2 llama3-8b qwen3-0.6b --tail diffuse randn flat",
    ),
    "chunked": (
        f"{PLAIN} --data gemma2 phi3.5 llama3.2-1b gpt2",
        f"{PLAIN} --dtype float32 --data llama3.2-1b gpt2",
        f"{PLAIN} --dtype float64 --data gpt2",
    ),
    "logprobs": (
        f"--data ministral-8b qwen3-8b {STRUCTURED} "
        "--kinds logprobs-fw+entropy logprobs-fw-bw+entropy "
        "--methods cce trl liger verl --repetitions 6 --time-limit 240",
    ),
    "additions": (
        f"--data ministral-8b {STRUCTURED} --methods cce --no-errors --repetitions 6 "
        "--time-limit 150 --kinds " + " ".join(base + more for base in PASSES for more in MORE),
    ),
    "divergences": (
        f"--data qwen3-8b {STRUCTURED} --kinds divergence-fw-bw divergence-fw-bw+jsd "
        "--methods cce trl liger --repetitions 3 --time-limit 200",
    ),
}
"""Arguments of ``python -m benchmark`` for the problems of each part, most wanted first.

A part has the methods, the repetitions and the limit of its first line; it should need two thirds
of the limit.
"""


def lines_of(part: str, hidden: Sequence[Path]) -> list[argparse.Namespace]:
    """The command lines of a part; that of saved hidden states only if there are any."""
    return [
        command.parse_arguments([*line.split(), *(("--file", *map(str, hidden)) if hidden else ())])
        for line in PARTS[part]
        if hidden or not line.endswith("--data file")
    ]


def tasks_of(part: str, hidden: Sequence[Path], on_gpu: bool) -> list[Task]:
    """The problems of a part."""
    return [task for line in lines_of(part, hidden) for task in command.tasks(line, on_gpu)]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.suite", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the JSON files")
    add("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="default: all")
    add("--methods", nargs="+", choices=list(METHODS), help="these of a part alone; default: all")
    add("--data", nargs="+", help="these problems of a part alone; default: all")
    add(
        "--hidden",
        nargs="+",
        type=Path,
        default=[],
        help="hidden states of real models that `python -m research.hidden` wrote",
    )
    add("--peers", type=Path, help="folder of `make peers`: other packages, a folder for each")
    add("--commit", help="commit to name where there is no history (or COMMIT)")
    add("--time-limit", type=float, default=900.0, help="seconds for everything")
    add("--warm-up", action="store_true", help="as of `python -m benchmark`")
    add("--one-process", action="store_true", help="as of `python -m benchmark`")
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
        line = lines_of(name, parsed.hidden)[0]
        line.time_limit = min(line.time_limit, end - time.monotonic()) - 15
        if line.time_limit < 5:
            print(f"== {name}: not run, no time left", flush=True)
            continue
        print(f"== {name}", flush=True)
        start = time.monotonic()
        line.methods = [
            method
            for method in line.methods or DEFAULT
            if (not parsed.methods or method in parsed.methods) and installed(method, peers)
        ]
        line.warm_up, line.one_process = parsed.warm_up, parsed.one_process
        line.peer, line.commit, line.json = peers, parsed.commit, parsed.out / f"{name}.json"
        todo = tasks_of(name, parsed.hidden, torch.cuda.is_available())
        todo = [task for task in todo if task.name in (parsed.data or [task.name])]
        results = command.run(line, todo, name, f"python -m benchmark.suite --parts {name}")
        print(
            f"== {name}: {len(results['rows'])} rows, {len(results['failures'])} failures, "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
