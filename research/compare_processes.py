"""Train the same model in one process and in several, and compare the losses of every step.

    python -m research.compare_processes --json docs/measurements/DEVICE/training_processes.json

Runs ``training/train.py`` on one GPU, and under FSDP2 and DeepSpeed ZeRO-3 on several; then both on
one GPU, and one GPU with its batch in parts, which show what rounding and another order of the same
sums do. All runs have the same start, data, seed and tokens in a step. The record is written after
every run; ``--again`` keeps what is there and replaces the runs that are named.
"""

import argparse
import csv
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from training.arguments import Parser, add_settings, config_from
from training.config import UsageError, flag

ROOT = Path(__file__).resolve().parents[1]
PART = "training-processes"
PACKAGES = ("transformers", "accelerate", "deepspeed")
ZERO3 = ("--deepspeed", "training/zero3.json")
SHARED = (
    "model", "data", "loss", "dtype", "device", "seed", "steps", "sequence_length", "learning_rate",
    "warmup_steps",
)  # fmt: skip
"""Settings that train.py gets as they are."""


@dataclass(frozen=True)
class Setup:
    """One of the runs to compare.

    Args:
        name: name in the record and the table.
        several: whether it has all processes; else one.
        parts: whether one process makes a step of as many batches as there are processes.
        options: further flags of train.py.
        torchrun: whether it needs a process group even with one process.
        against: the runs to compare it with.
    """

    name: str
    several: bool = False
    parts: bool = False
    options: tuple[str, ...] = ()
    torchrun: bool = False
    against: tuple[str, ...] = ("one GPU",)


SETUPS = {
    "one": Setup("one GPU", against=()),
    # FSDP2 gathers weights in bfloat16, and ZeRO-3 with several processes too, unlike autocast on
    # one GPU: the comparison with the same on one GPU shows what the processes change.
    "fsdp2": Setup(
        "FSDP2", several=True, options=("--fsdp",), against=("one GPU", "FSDP2 on one GPU")
    ),
    "zero3": Setup("ZeRO-3", several=True, options=ZERO3, against=("one GPU", "ZeRO-3 on one GPU")),
    "fsdp2-one": Setup("FSDP2 on one GPU", options=("--fsdp",), torchrun=True),
    "zero3-one": Setup("ZeRO-3 on one GPU", options=ZERO3, torchrun=True),
    "parts": Setup("one GPU, the batch in parts", parts=True),
    "ddp": Setup("DDP", several=True),
}
"""Runs by the name on the command line, the most important first."""


def command(setup: Setup, arguments: argparse.Namespace, output: Path) -> list[str]:
    """Return the command line that starts the run."""
    processes = arguments.processes if setup.several else 1
    launch = [sys.executable]
    if processes > 1 or setup.torchrun:
        launch += ["-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc-per-node", str(processes)]
    parts = arguments.processes if setup.parts else processes
    settings = {
        **{name: getattr(arguments, name) for name in SHARED},
        "batch_size": arguments.batch_size // parts,
        "gradient_accumulation": parts if setup.parts else 1,
        "log_interval": 1,
        "checkpoint_interval": arguments.steps,
        "output": output,
    }
    flags = [text for name, value in settings.items() for text in (flag(name), str(value))]
    return [*launch, "training/train.py", *flags, "--no-tensorboard", "--no-export", *setup.options]


def run(setup: Setup, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Train once, for ``seconds`` at most; return the losses, and the output if it failed."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="compare_processes_") as folder:
        process = subprocess.Popen(
            command(setup, arguments, Path(folder)),
            cwd=ROOT,
            env={"OMP_NUM_THREADS": "4", **os.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        code: int | None = None
        try:
            output, _ = process.communicate(timeout=seconds)
            code = process.returncode
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun hands it on, and train.py ends after the step
            kill = threading.Timer(30, os.killpg, (process.pid, signal.SIGKILL))
            kill.start()
            output, _ = process.communicate()
            kill.cancel()
        losses = read_losses(Path(folder, "losses.csv"))
    return {
        "name": setup.name,
        "against": list(setup.against),
        "processes": arguments.processes if setup.several else 1,
        "losses": losses,
        "seconds": round(time.monotonic() - begin, 1),
        "exit_code": code,
        **({} if code == 0 else {"output": output[-4000:]}),
    }


def read_losses(path: Path) -> list[float]:
    """Return the losses of all steps in the table that train.py wrote, none without a table."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [round(float(row["loss"]), 6) for row in csv.DictReader(file) if row["loss"]]


def differences(
    row: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, list[float]]]:
    """Yield each run to compare ``row`` with, and the differences by step, in nats."""
    losses = {one["name"]: one["losses"] for one in rows}
    for name in row["against"]:
        if losses.get(name) and row["losses"]:
            yield name, [abs(a - b) for a, b in zip(row["losses"], losses[name], strict=False)]


def table(record: dict[str, Any]) -> str:
    """Format a record as Markdown, with the machine it was measured on."""
    from cut_cross_entropy.benchmark.environment import in_words

    where, settings = record["environment"], record["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"{in_words(where)}, {versions}, commit {where['commit']}. {settings['steps']} "
        f"steps of {settings['batch_size']} x {settings['sequence_length']} tokens in all "
        f"processes together, `--dtype {settings['dtype']}`, `--loss {settings['loss']}`, learning "
        f"rate {settings['learning_rate']:g}.",
        "",
        "| run | processes | first loss | last loss | compared with | largest difference, nats "
        "| mean | mean of the last ten steps |",
        "|:---|---:|---:|---:|:---|---:|---:|---:|",
    ]
    order = [setup.name for setup in SETUPS.values()]
    rows = sorted(record["rows"], key=lambda row: order.index(row["name"]))
    notes: list[str] = []
    others: dict[str, list[str]] = {}
    for row in rows:
        losses = row["losses"]
        ends = [f"{losses[0]:.4f}", f"{losses[-1]:.4f}"] if losses else ["", ""]
        cells = [row["name"], str(row["processes"]), *ends]
        for name, found in list(differences(row, rows)) or [("", [])]:
            figures = (max(found), mean(found), mean(found[-10:])) if found else ()
            cells += [name, *(f"{x:.1e}" for x in figures)]
            lines.append(f"| {' | '.join([*cells, '', '', ''][:8])} |")
            cells = [""] * 4
        if len(losses) < settings["steps"] or row["exit_code"] != 0:
            done = f"{len(losses)} of {settings['steps']} steps, exit code {row['exit_code']}"
            notes.append(f"{row['name']}: {done}.")
        if its := row.get("environment"):
            others.setdefault(f"{in_words(its)}, commit {its['commit']}", []).append(row["name"])
    notes += [f"Run on {place}: {', '.join(names)}." for place, names in others.items()]
    if missing := [name for name in order if name not in {row["name"] for row in rows}]:
        notes.append(f"Not run: {', '.join(missing)}.")
    return "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; settings of train.py have the same names."""
    parser = Parser(
        prog="python -m research.compare_processes", description=(__doc__ or "").splitlines()[0]
    )
    defaults = {"dtype": "autocast", "steps": 50, "sequence_length": 256, "warmup_steps": 5}
    add_settings(parser, SHARED, **defaults)
    add = parser.add_argument
    add("--batch-size", type=int, default=8, help="sequences per step, in all processes together")
    add("--processes", type=int, default=2, help="processes of the runs with several")
    add("--ways", nargs="+", default=list(SETUPS), choices=list(SETUPS), help="runs, in order")
    add("--time-limit", type=float, default=600.0, help="seconds, of all runs together")
    add("--commit", default=None, help="commit of the code, where the history is missing")
    add("--json", type=Path, required=True, help="the record to write")
    add(
        "--again",
        action="store_true",
        help="replace --ways in that record and keep its other runs, of the same settings",
    )
    parsed = parser.parse_args(arguments)
    if parsed.processes < 1 or parsed.batch_size < 1 or parsed.batch_size % parsed.processes:
        parser.error(f"--batch-size must be a multiple of --processes, got {parsed.batch_size}")
    try:
        config_from(parsed)
    except UsageError as error:
        parser.error(str(error))
    return parsed


def continued(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """Return the record in ``path``, to replace runs of ``now``.

    Raises:
        UsageError: not a record, or one of other settings or other versions of the packages.
    """
    try:
        before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--again needs a record in --json, got {path}: {error}") from error
    for what in ("settings", "versions"):
        if before.get(what) != now[what]:
            raise UsageError(
                f"--again needs the {what} of the record, {before.get(what)}, got {now[what]}"
            )
    return before


def main(argv: Sequence[str] | None = None) -> int:
    """Run and compare; exit code 0 done, 1 a run failed, 2 wrong input."""
    from cut_cross_entropy.benchmark.environment import environment
    from cut_cross_entropy.benchmark.output import write_json

    begin = time.monotonic()
    arguments = parse_arguments(argv)
    where = environment(arguments.commit)
    installed = {one.name: one.version for one in importlib.metadata.distributions()}
    names = [name for name in SHARED if name not in ("model", "device")]
    settings = {name: getattr(arguments, name) for name in (*names, "batch_size", "processes")}
    record: dict[str, Any] = {
        "part": PART,
        "environment": where,
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
        "settings": {"model": Path(arguments.model).name, **settings},
        "rows": [],
    }
    if arguments.again:
        try:
            record = continued(arguments.json, record)
        except UsageError as error:
            print(f"compare_processes.py: error: {error}", file=sys.stderr)
            return 2
    failed = False
    for name in arguments.ways:
        left = arguments.time_limit - (time.monotonic() - begin)
        if left <= 0:
            print(f"no time is left for {name}", flush=True)
            continue
        row = run(SETUPS[name], arguments, left)
        if where != record["environment"]:
            row["environment"] = where
        record["rows"] = [*(old for old in record["rows"] if old["name"] != row["name"]), row]
        print(
            f"[{time.monotonic() - begin:5.1f} s] {row['name']}: {len(row['losses'])} steps, "
            f"exit code {row['exit_code']}",
            flush=True,
        )
        if row["exit_code"] != 0:
            failed = True
            print(row["output"], flush=True)
        write_json(arguments.json, record)
    print(table(record))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
