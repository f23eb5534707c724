"""Times loss and gradients of the ways to spread them over GPUs.

    torchrun --nproc-per-node 2 -m benchmark.distributed --json docs/measurements/DEVICE
    torchrun --nproc-per-node 2 -m benchmark.distributed --device cpu --data small --tokens 64 \
        --impl chunked --compare

One process measures what one GPU does alone. ``--tokens`` are those of a process: where all have
the same tokens (vocabulary- and tensor-parallel) that is as many in all, where each has its own
(sequence-parallel, FSDP2, DDP) as many on each. The file is written after every row, what matters
most comes first, and no row begins after ``--time-limit``. docs/distributed.md defines what a row
has.
"""

import argparse
import datetime
import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cut_cross_entropy.options import ImplName

from .data import Problem, make
from .distributed_traffic import (
    Replay,
    back_to_back,
    collectives,
    measure_links,
    slowest,
    timed_together,
)
from .environment import environment
from .leave import leave
from .measure import peak_mib
from .output import write_json
from .setups import ALONE, LOGITS, OWN_CLASSES, OWN_TOKENS, SETUPS
from .shapes import SHAPES, SMALL

WANTED = (
    "vocabulary-parallel",
    "vocabulary-parallel, own tokens",
    "FSDP2",
    "DDP",
    "tensor-parallel DTensor",
    "tensor-parallel full logits",
)
"""Set-ups by default, what matters most first."""

COMPARED = ("vocabulary-parallel", "FSDP2", "one GPU")
"""Set-ups that further implementations are measured in, at the smallest batch."""

FIGURES = ("ms", "q1_ms", "q3_ms", "peak_mib", "sent_mib", "alone_ms", "exchange_ms")
"""Of a row; None where there is none. The quartiles are those of the first process."""

NO_MEMORY = "out of memory"


@dataclass(frozen=True)
class Job:
    """Settings of one row; names as on the command line."""

    data: str
    tokens: int
    setup: str
    impl: ImplName


def jobs_of(arguments: argparse.Namespace, processes: int) -> list[Job]:
    """The rows in their order: small batches first, further implementations last."""
    setups = arguments.setups or (ALONE if processes == 1 else WANTED)
    setups = [name for name in setups if not name.startswith("HSDP") or processes % 2 == 0]
    least = min(arguments.tokens)
    impls: dict[bool, list[ImplName]] = {True: ["reference"], False: arguments.impl}
    result = [
        Job(data, tokens, setup, impl)
        for tokens in sorted(arguments.tokens)
        for data in arguments.data
        for setup in setups
        for impl in impls[setup in LOGITS]
    ]
    result += [
        Job(data, least, setup, impl)
        for impl in arguments.compare
        for data in arguments.data
        for setup in setups
        if setup in COMPARED
    ]
    # Full logits of a large batch are the one thing that may not fit, and come last.
    return sorted(result, key=lambda job: job.setup in LOGITS and job.tokens > least)


def measure(job: Job, problem: Problem, repetitions: int, row: dict[str, Any]) -> None:
    """Fill one row: milliseconds of the slowest process, MiB of the one that needs most.

    Args:
        job: what to measure.
        problem: its tokens: of all processes if each has its own.
        repetitions: of everything that is timed.
        row: gets every figure as soon as it is there.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    device, processes = problem.e.device, dist.get_world_size()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    step = (SETUPS | ALONE)[job.setup](problem, job.impl)
    step.run()  # compiles, and what the first call of a group does only
    if device.type == "cuda":
        held = (torch.cuda.memory_allocated(device) - before) / 2**20
        row["peak_mib"] = slowest(held + peak_mib(lambda _: step.run(), device))  # noqa: F821
    row["q1_ms"], row["ms"], row["q3_ms"] = timed_together(step.run, device, repetitions)
    classes, dim = problem.c.shape
    found = collectives(
        job.setup,
        job.tokens,
        classes,
        dim,
        impl=job.impl,
        dtype=problem.e.dtype,
        processes=processes,
    )
    if not found:  # one process, or a set-up whose collectives are not known
        return
    row["sent_mib"] = sum(one.sent(processes) for one in found) / 2**20
    alone = without_communication(job, problem, step.run)
    del step  # what it holds is not needed by work that needs no processes
    row["alone_ms"] = timed_together(alone, device, repetitions)[1]
    del alone
    row["exchange_ms"] = timed_together(back_to_back(found, device), device, repetitions)[1]


def without_communication(
    job: Job, problem: Problem, run: Callable[[], Tensor]
) -> Callable[[], object]:
    """The work of this process in a step, without the others.

    Where all classes and own tokens meet in one place that is what one GPU does. Where each process
    has its classes, the step itself runs with the results of its collectives kept from another run;
    with full logits, whose work does not depend on the numbers, a product of the same size.

    Raises:
        RuntimeError: the step without communication has another loss.
    """
    processes, rank = dist.get_world_size(), dist.get_rank()
    if job.setup not in OWN_CLASSES:
        own = slice(rank * job.tokens, (rank + 1) * job.tokens)
        return ALONE["one GPU"](problem.part(own), job.impl).run
    if job.setup in LOGITS:
        rows = -(-problem.c.shape[0] // processes)
        part = replace(problem, c=problem.c[:rows], targets=problem.targets % rows)
        return ALONE["one GPU, full logits"](part, job.impl).run
    replay = Replay(run)
    if slowest(float(not torch.equal(replay.run(), replay.first))):  # so that all raise
        raise RuntimeError(f"{job.setup} has another loss without its communication")
    return replay.run


def measure_or_note(job: Job, problem: Problem, repetitions: int) -> dict[str, Any]:
    """A row, with the reason if something of it is missing; the memory that it took is free."""
    times = dist.get_world_size() if job.setup in OWN_TOKENS else 1
    row: dict[str, Any] = {"repetitions": repetitions, **dict.fromkeys(FIGURES)}
    try:
        measure(job, problem.part(slice(job.tokens * times)), repetitions, row)
    except torch.OutOfMemoryError:
        row["why"] = NO_MEMORY
    except Exception as error:  # of whatever a set-up is made of: the other rows are still wanted
        row["why"] = f"{type(error).__name__}: {error}".splitlines()[0]
    # Outside of the handler, whose exception holds what the step had allocated. All processes do
    # the same, so all run out of memory in the same place.
    gc.collect()
    if problem.e.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def make_problems(jobs: list[Job], kind: str, device: torch.device) -> dict[str, Problem]:
    """Data of each head for the largest batch of all processes, the same on all of them."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = max(job.tokens for job in jobs) * dist.get_world_size()
    result = {}
    for name in dict.fromkeys(job.data for job in jobs):
        shape = SMALL if name == "small" else SHAPES[name]
        result[name] = make(kind, tokens, shape, dtype, device)
        for tensor in (result[name].e, result[name].c, result[name].targets):
            dist.broadcast(tensor, 0)
    return result


def compile_ahead(jobs: list[Job], problems: dict[str, Problem]) -> None:
    """Compile the kernels of different problems on different processes, which share a cache."""
    few = slice(min(job.tokens for job in jobs))
    needed = dict.fromkeys((job.impl, job.data) for job in jobs if job.setup not in LOGITS)
    for impl, data in list(needed)[dist.get_rank() :: dist.get_world_size()]:
        ALONE["one GPU"](problems[data].part(few), impl).run()
    dist.barrier()


def start(device: str) -> torch.device:
    """Join the other processes; this one's device."""
    timeout = datetime.timedelta(seconds=120)
    if device == "cpu":
        dist.init_process_group("gloo", timeout=timeout)
        return torch.device("cpu")
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(own)
    dist.init_process_group("nccl", timeout=timeout, device_id=own)
    return own


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="torchrun -m benchmark.distributed", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--data", nargs="+", default=["llama3-8b", "gemma2"], choices=["small", *SHAPES])
    add("--tokens", nargs="+", type=int, default=[8192, 32768], help="of a process")
    add("--impl", nargs="+", default=["cce"], help="implementations of all rows")
    add(
        "--compare",
        nargs="*",
        default=["cce_exact"],
        metavar="IMPL",
        help=f"measured at the smallest batch too, in {', '.join(COMPARED)}",
    )
    add("--setups", nargs="+", choices=[*SETUPS, *ALONE], help="default: depends on the processes")
    add("--kind", default="structured", help="of data, see cut_cross_entropy/benchmark/data.py")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--repetitions", type=int, default=7)
    add("--time-limit", type=float, default=600.0, help="seconds; no row begins after it")
    add("--commit", help="of the code, where the history is missing")
    add("--json", type=Path, help="a file, or a folder for distributed_PROCESSES.json")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print; ``--json`` writes the rows as well."""
    begin = time.monotonic()
    arguments = parse_arguments()
    device = start(arguments.device)
    world, first = dist.get_world_size(), dist.get_rank() == 0
    jobs = jobs_of(arguments, world)
    record: dict[str, Any] = {
        "part": "distributed",
        "processes": world,
        "backend": dist.get_backend(),
        "environment": environment(arguments.commit),
        "links": measure_links(device) if world > 1 else {},
        "rows": [],
        "skipped": [],
    }
    path = arguments.json
    if path is not None and path.suffix != ".json":
        path = path / f"distributed_{world}.json"

    def note(what: str) -> None:
        if first:
            print(f"[{time.monotonic() - begin:5.1f} s] {what}", flush=True)

    note(f"{world} processes, {record['environment']['device']}: links {record['links']}")
    problems = make_problems(jobs, arguments.kind, device)
    note("data made")
    compile_ahead(jobs, problems)
    note("kernels compiled")
    for job in jobs:
        if slowest(time.monotonic() - begin) > arguments.time_limit:
            record["skipped"].append(vars(job))
        else:
            row = {
                **vars(job),
                "processes": world,
                **measure_or_note(job, problems[job.data], arguments.repetitions),
            }
            record["rows"].append(row)
            note(json.dumps(row))
        if first and path is not None:
            write_json(path, record)
    note(f"done, {len(record['skipped'])} rows had no time")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave()
