"""``python -m benchmark.suite --out DIR``: every measurement that the documentation shows.

Parts run one after the other, each in a process of its own with a time limit of its own; what a
part has measured is on the disk as soon as it is measured, and a part that fails or runs out of
time leaves the others alone. One JSON file a part; ``python docs/make.py`` makes the tables
and plots of the documentation from them once they lie in ``docs/measurements``.
"""

import argparse
import contextlib
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmark import output
from benchmark.environment import environment
from benchmark.measure import LONG_SOAK, SOAK
from benchmark.methods import METHODS, installed
from benchmark.pool import ROOT
from benchmark.runs import Session, Task, measure_all
from benchmark.shapes import SHAPES, SMALL

OURS = ("cce", "cce_exact")
ALL = (
    "cce", "cce_exact", "torch_compile", "chunked", "baseline", "apple", "liger", "quack", "trl",
    "torch",
)  # fmt: skip
LARGEST = ("cce", "baseline", "apple", "liger", "cce_exact", "torch_compile", "trl", "chunked")
BOTH = ("loss-fw-bw",)
WHEELS = {
    "cut_cross_entropy": "apple",
    "liger_kernel": "liger",
    "trl": "trl",
    "datasets": "trl",  # which TRL imports, and what that needs
    "dill": "trl",
    "multiprocess": "trl",
}
"""Beginnings of the names of wheels, and the methods that they are for."""


@dataclass(frozen=True)
class Part:
    """One file of measurements.

    Args:
        seconds: limit, of which a part should need two thirds.
        methods: what runs; other packages only if they are there.
        repetitions: timed runs of each.
        soak: seconds of work before them.
        command: a module with a command line of its own instead of tasks.
    """

    seconds: float
    methods: Sequence[str] = ()
    repetitions: int = 9
    soak: float = SOAK
    command: Sequence[str] = ()


PARTS = {
    "table": Part(300, ALL),
    "shapes": Part(150, OURS, 6),
    "largest": Part(130, command=("benchmark.largest",)),
    "simulate": Part(50, command=("benchmark.simulate", "--tokens", "4096")),
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


def run_part(name: str, arguments: argparse.Namespace, peers: dict[str, str]) -> None:
    """Measure a part made of tasks, in this process."""
    part = PARTS[name]
    on_gpu = torch.cuda.is_available()
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
        print(output.table(rows) if rows else "nothing measured", flush=True)

    methods = ["gemm"]
    for method in part.methods:
        if arguments.methods and method not in arguments.methods:
            continue
        if not installed(method, peers) or (METHODS[method].peer and method not in peers):
            continue
        if on_gpu or METHODS[method].cpu:
            methods.append(method)
    start = time.perf_counter()
    session = measure_all(
        tasks_of(name, arguments.hidden, on_gpu),
        methods,
        peers,
        seconds=part.seconds - 15,
        repetitions=part.repetitions,
        soak=part.soak,
        progress=lambda text: print(f"[{time.perf_counter() - start:5.0f} s] {text}", flush=True),
        done=keep,
    )
    results["failures"] = session.failures
    output.write_json(file, results)


def unpack(wheels: Path, into: Path) -> dict[str, str]:
    """Folders with the other packages, by method, from wheels of theirs."""
    found = {}
    for wheel in sorted(wheels.glob("*.whl")):
        for package, method in WHEELS.items():
            if wheel.name.startswith(package + "-"):
                folder = into / method
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(folder)
                found[method] = str(folder)
    return found


def run_apart(
    name: str, arguments: argparse.Namespace, peers: dict[str, str], seconds: float
) -> str:
    """One part in a process of its own; what became of it."""
    part = PARTS[name]
    peer = [f"{method}={path}" for method, path in peers.items()]
    commit = ["--commit", arguments.commit] if arguments.commit else []
    file = str(arguments.out / f"{name}.json")
    if part.command:
        command = [*part.command, "--json", file, *commit]
        if name == "largest":
            wanted = [m for m in LARGEST if not arguments.methods or m in arguments.methods]
            known = [m for m in wanted if not METHODS[m].peer or m in peers]
            command += ["--methods", *known, "--time-limit", str(seconds - 10)]
            command += ["--peer", *peer] if peer else []
        elif arguments.hidden is not None:
            command += ["--file", str(arguments.hidden)]
    else:
        command = ["benchmark.suite", "--inside", name, "--out", str(arguments.out), *commit]
        command += ["--peer", *peer] if peer else []
        command += ["--methods", *arguments.methods] if arguments.methods else []
        if arguments.hidden is not None:
            command += ["--hidden", str(arguments.hidden)]
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, start_new_session=True, env=dict(os.environ)
    )
    try:
        status = f"exit code {process.wait(timeout=seconds)}"
    except subprocess.TimeoutExpired:
        status = "ended at its time limit"
    # Workers belong to the part's process group; none outlives it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return f"{status}, {time.monotonic() - start:.0f} s"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.suite", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the JSON files")
    add("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="default: all")
    add("--methods", nargs="+", choices=list(METHODS), help="these of a part alone; default: all")
    add("--hidden", type=Path, help="hidden states that `python -m benchmark.hidden` wrote")
    add("--wheels", type=Path, help="folder with wheels of other packages, unpacked for the run")
    add("--peer", nargs="+", default=[], metavar="METHOD=PATH", help="unpacked packages")
    add("--commit", help="commit to name where there is no history (or COMMIT)")
    add("--time-limit", type=float, default=900.0, help="seconds for everything")
    add("--inside", choices=list(PARTS), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts."""
    parsed = parse_arguments(arguments)
    parsed.out = parsed.out.resolve()
    parsed.out.mkdir(parents=True, exist_ok=True)
    if parsed.hidden is not None:
        parsed.hidden = parsed.hidden.resolve()
    peers = dict(entry.split("=", 1) for entry in parsed.peer)
    if parsed.inside:
        run_part(parsed.inside, parsed, peers)
        return
    end = time.monotonic() + parsed.time_limit
    status = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-peers-") as folder:
        if parsed.wheels is not None:
            peers |= unpack(parsed.wheels, Path(folder))
        if parsed.hidden is not None and parsed.hidden.suffix == ".xz":
            # Once, and not by every worker.
            plain = Path(folder) / parsed.hidden.stem
            with lzma.open(parsed.hidden) as source, plain.open("wb") as target:
                shutil.copyfileobj(source, target)
            parsed.hidden = plain
        for name in parsed.parts:
            seconds = min(PARTS[name].seconds, end - time.monotonic())
            if PARTS[name].command[:1] == ("benchmark.largest",) and not torch.cuda.is_available():
                status[name] = "needs a GPU"
            elif seconds < 20:
                status[name] = "not run: no time left"
            else:
                print(f"== {name}", flush=True)
                status[name] = run_apart(name, parsed, peers, seconds)
            print(f"== {name}: {status[name]}", flush=True)
    print(json.dumps(status, indent=1))


if __name__ == "__main__":
    main()
