"""``python -m benchmark``: time, memory and error of the loss on heads of real models, and on data
that are made like theirs.

Every method runs in a process of its own and they take turns. Rows can be written as JSON and CSV.
Sweeps: several values of --tokens or --classes, or --sweep. In a checkout ``python docs/make.py
FILE --plots DIR`` plots a JSON file.
"""

import argparse
import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import output
from .data import KINDS as DATA_KINDS
from .environment import environment
from .kinds import KINDS, TOKEN_KINDS, parse
from .measure import SOAK
from .methods import DEFAULT, METHODS, installed
from .pool import Clock, Process, processes
from .runs import Session, Task, measure, warm_up
from .shapes import SHAPES, SMALL, Shape
from .worker import DTYPES, Here

SWEEP_TOKENS = [2**i for i in range(10, 18)]
SWEEP_CLASSES = [32768, 65536, 98304, 131072, 196608, 262144]
CPU_SWEEP_TOKENS = [128, 256, 512, 1024]
CPU_SWEEP_CLASSES = [4096, 8192, 16384, 32768]
HEADS = Path("out/heads")
"""Folder of saved hidden states, relative to the working directory."""


def kind(name: str) -> str:
    """Check the name of a kind."""
    try:
        parse(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark", description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("--data", nargs="+", choices=[*SHAPES, "all", "file"],
        help="classifier shapes to measure; 'file' reads --file; default: the files, if there are "
        "any and a GPU, and gemma2")
    add("--file", nargs="+", type=Path,
        help="hidden states of real models that `python -m research.hidden` wrote; default: all in "
        f"{HEADS}")
    add("--tail", nargs="+", default=["broad"], choices=DATA_KINDS,
        help="data: like a trained model's (broad, structured or diffuse tail), flat, or randn")
    add("--tokens", nargs="+", type=int, help="tokens a batch (N); default 8192, on a CPU 512")
    add("--dtype", choices=DTYPES, help="of made data; default bfloat16, on a CPU float32")
    add("--classes", nargs="+", type=int, help="classes (V), instead of the shape's")
    add("--sweep", choices=("tokens", "classes"), help="loss-fw-bw over N or over V")
    add("--ignored", nargs="+", type=float, default=[0.0], metavar="FRACTION",
        help="share of the targets that are ignored")
    add("--frozen", nargs="+", default=["none"], choices=("none", "e", "c"),
        help="the input that needs no gradient")
    add("--methods", nargs="+", choices=[name for name in METHODS if name != "gemm"],
        help="default: all that run here, other packages if they are installed")
    add("--peer", nargs="+", default=[], metavar="METHOD=PATH",
        help="folder with another package, for instance apple=PATH")
    add("--kinds", nargs="+", type=kind, metavar="KIND",
        help=f"passes to measure: {', '.join(KINDS)} (the default); {', '.join(TOKEN_KINDS)}, "
        "which take +entropy, +temperature, +rank, +candidates or +reverse, +jsd, +temperature")
    add("--repetitions", type=int, default=12, help="timed runs of each, in rounds of three")
    add("--soak", type=float, default=SOAK, help="seconds of work before each turn, on a GPU")
    add("--warm-up", action="store_true",
        help="make the first calls of all methods at once: saves minutes, but no cold start is "
        "measured, and all of them have to fit the memory together")
    add("--one-process", action="store_true",
        help="all methods in this process, on the same data in its memory, but for those that need "
        "one of their own: less overhead, but no cold starts")
    add("--no-errors", action="store_true", help="skip the float32 reference")
    add("--json", type=Path, help="write everything measured to this file")
    add("--csv", type=Path, help="write the rows to this file")
    add("--commit", help="commit to name where there is no history (or COMMIT)")
    add("--time-limit", type=float, default=3600.0, help="seconds for everything")
    # fmt: on
    parsed = parser.parse_args(arguments)
    parsed.file = parsed.file or sorted(HEADS.glob("*.pt*"))
    if parsed.data is None:
        parsed.data = ["file"] * bool(parsed.file and torch.cuda.is_available()) + ["gemma2"]
    if "file" in parsed.data and not parsed.file:
        parser.error(f"--data file needs --file, or files in {HEADS}")
    try:
        parsed.peer = dict(entry.split("=", 1) for entry in parsed.peer)
    except ValueError:
        parser.error(f"--peer must be METHOD=PATH, got {parsed.peer}")
    unknown = set(parsed.peer) - {name for name, method in METHODS.items() if method.peer}
    if unknown:
        parser.error(f"--peer names no other package: {', '.join(sorted(unknown))}")
    return parsed


def tasks(arguments: argparse.Namespace, on_gpu: bool) -> list[Task]:
    """The problems that the command line asks for."""
    kinds = arguments.kinds or list(KINDS)
    tokens = arguments.tokens or [8192 if on_gpu else 512]
    classes: list[int | None] = list(arguments.classes or [None])
    if arguments.sweep:
        kinds = arguments.kinds or ["loss-fw-bw"]
    if arguments.sweep == "tokens":
        tokens = arguments.tokens or (SWEEP_TOKENS if on_gpu else CPU_SWEEP_TOKENS)
    if arguments.sweep == "classes":
        classes = list(arguments.classes or (SWEEP_CLASSES if on_gpu else CPU_SWEEP_CLASSES))
    names = list(SHAPES) if "all" in arguments.data else arguments.data
    shapes = [name for name in names if name != "file"]
    chosen = [SHAPES[name] for name in shapes]
    if not on_gpu:
        chosen = [SMALL] if shapes else []
    options: dict[str, Any] = {
        "dtype": arguments.dtype or ("bfloat16" if on_gpu else "float32"),
        "kinds": kinds,
        "errors": not arguments.no_errors and not arguments.sweep,
    }
    result = []
    for ignored, frozen in itertools.product(arguments.ignored, arguments.frozen):
        more = {**options, "ignored": ignored, "frozen": None if frozen == "none" else frozen}
        suffix = f"-ignored{ignored:g}" * (ignored > 0 or len(arguments.ignored) > 1)
        suffix += f"-frozen-{frozen}" * (frozen != "none")
        suffix += f"-{arguments.dtype}" * (arguments.dtype is not None)
        files = arguments.file if "file" in names else []
        for path in files:
            shape = Shape(path.name.split(".")[0], 0, 0)
            result.append(Task(shape.name + suffix, "file", 0, shape, file=str(path), **more))
        for shape, tail, n, v in itertools.product(chosen, arguments.tail, tokens, classes):
            name = f"{shape.name}-{tail}"
            if v is not None:
                shape = dataclasses.replace(shape, num_classes=v)
                name += f"-V{v}"
            if len(tokens) > 1:
                name += f"-N{n}"
            result.append(Task(name + suffix, tail, n, shape, **more))
    return result


def chosen_methods(arguments: argparse.Namespace, on_gpu: bool) -> list[str]:
    """The methods to start, the product that all are compared with included."""
    names = arguments.methods
    if names is None:
        subjects = {parse(name).subject for name in arguments.kinds or KINDS}
        fitting = [name for name in DEFAULT if any(map(METHODS[name].has, subjects))]
        names = [name for name in fitting if installed(name, arguments.peer)]
    return ["gemm", *(name for name in names if name != "gemm" and (on_gpu or METHODS[name].cpu))]


def reduced_sizes(arguments: argparse.Namespace) -> str:
    """Say what is measured without a GPU in place of what was asked for."""
    text = "No GPU: only implementations that run on a CPU, in float32."
    names = [name for name in arguments.data if name != "file"]
    if not names:
        return text
    classes = arguments.classes or (CPU_SWEEP_CLASSES if arguments.sweep == "classes" else None)
    tokens = arguments.tokens or (CPU_SWEEP_TOKENS if arguments.sweep == "tokens" else [512])
    counts = ", ".join(f"{n:,}" for n in classes or [SMALL.num_classes])
    return (
        f"{text} Sizes are reduced: instead of {' and '.join(names)} a small classifier, "
        f"V {counts}, D {SMALL.dim:,},\nwith N {', '.join(f'{n:,}' for n in tokens)} tokens. "
        "Nothing here says how fast anything is on a GPU or at the size of a model."
    )


def run(
    arguments: argparse.Namespace, todo: Sequence[Task], part: str, command: str
) -> dict[str, Any]:
    """Measure problems one by one with the methods and within the limits of the command line.

    Args:
        arguments: of the command line; its JSON file is written anew after every problem.
        todo: problems.
        part: name of the file's content.
        command: what it is measured by.

    Returns:
        The content of the file.
    """
    begin = time.perf_counter()

    def progress(text: str) -> None:
        print(f"[{time.perf_counter() - begin:5.0f} s] {text}", file=sys.stderr, flush=True)

    def measured(rows: list[dict[str, Any]]) -> None:
        texts = (output.sizes(rows[0]), output.table(rows), output.memory_note(rows))
        print("", *texts, sep="\n", flush=True)

    where = environment(arguments.commit)
    print("  ".join(f"{key} {value}" for key, value in where.items()))
    burst = min(3, arguments.repetitions)
    methods = chosen_methods(arguments, torch.cuda.is_available())
    if arguments.methods is None:
        absent = [name for name in DEFAULT if not installed(name, arguments.peer)]
        print(f"not installed: {', '.join(absent) or 'nothing'}")
    with contextlib.ExitStack() as stack:
        pool: dict[str, Process | Here] = {}
        own = methods
        if arguments.one_process:
            own = [name for name in methods if name == "apple"]  # its name is this package's
            sys.path += [path for name, path in arguments.peer.items() if name not in own]
            pool = {name: Here(name) for name in methods if name not in own}
        pool |= stack.enter_context(processes(own, arguments.peer))
        clock, rounds = Clock(arguments.time_limit), -(-arguments.repetitions // burst)
        session = Session(
            pool, clock, rounds, burst, soak=arguments.soak, progress=progress, measured=measured
        )
        results: dict[str, Any] = {
            "part": part,
            "command": command,
            "environment": where,
            "rows": [],
            "failures": session.failures,
        }
        session.started.update(pool if arguments.one_process else ())
        if arguments.warm_up:
            warm_up(todo, session)
        for task in todo:
            if clock.left() < 5:
                session.fail(task, "all", "time", "not measured: the time limit was reached")
                continue
            try:
                results["rows"] += measure(task, session)
            except Exception as error:  # one problem must not take the others with it
                session.fail(task, "all", "measure", f"{type(error).__name__}: {error}")
            if arguments.json:
                output.write_json(arguments.json, results)
    if arguments.json:
        output.write_json(arguments.json, results)
    for failure in session.failures:
        print("not measured: {test_data}, {method}, {what}: {error}".format(**failure))
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the files that the command line asks for."""
    parsed, on_gpu = parse_arguments(arguments), torch.cuda.is_available()
    if not on_gpu:
        print(reduced_sizes(parsed))
    elif not parsed.file:
        print(f"No hidden states of a real model in {HEADS}: `python -m research.hidden --help` "
              "in a checkout says how to get some.")  # fmt: skip
    command = output.command_line("python -m benchmark", sys.argv[1:])
    results = run(parsed, tasks(parsed, on_gpu), "benchmark", command)
    if parsed.csv:
        output.write_csv(parsed.csv, results)


if __name__ == "__main__":
    main()
