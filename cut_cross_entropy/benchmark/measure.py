"""Time, memory and error of one loss on one problem, in the process that it runs in."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import IGNORE_INDEX, Problem

SOAK = 0.15  # seconds of work before a GPU is timed: one that has rested is faster than it can stay
LONG_SOAK = 0.7  # the same, until its power limit shows as well


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    run: Callable[..., object],
    device: torch.device,
    repetitions: int,
    prepare: Callable[[], Any] = lambda: None,
    soak: float = 0.0,
) -> list[float]:
    """Milliseconds of each repetition after one that does not count.

    On a GPU by events, without waiting in between, as in training.

    Args:
        run: what is timed; gets what ``prepare`` returns.
        device: that it runs on.
        repetitions: how many times.
        prepare: what each repetition needs and is not timed.
        soak: seconds of repetitions before, on a GPU (0 for steps of several processes, of which
            all have to run as many).
    """

    def mark() -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    start = time.perf_counter()
    while device.type == "cuda" and time.perf_counter() - start < soak:
        run(prepare())
        synchronize(device)
    run(prepare())
    marks = []
    for _ in range(repetitions):
        prepared = prepare()
        begin = mark()
        run(prepared)
        marks.append((begin, mark()))
    synchronize(device)
    if device.type == "cuda":
        return [begin.elapsed_time(end) for begin, end in marks]
    return [(end - begin) * 1e3 for begin, end in marks]


def quartiles(times: Sequence[float]) -> list[float]:
    """First quartile, median and third quartile."""
    return statistics.quantiles(times, n=4) if len(times) > 1 else [*times] * 3


def peak_mib(
    run: Callable[[Any], object],
    device: torch.device,
    prepare: Callable[[], Any] = lambda: None,
) -> float:
    """Peak memory of ``run`` beyond what was allocated before, MiB, results included."""
    prepared = prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = run(prepared)
        torch.cuda.synchronize(device)
        del kept
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = run(prepared)
    del kept
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    running = itertools.accumulate(change for _, change in sorted(events))
    return max(running, default=0) / 2**20


@dataclass(frozen=True)
class Exact:
    """Mean loss and gradients of full logits in float32, and what rounding them to the dtype costs.

    Errors are relative Frobenius norms.
    """

    loss: float
    grad_e: Tensor
    grad_c: Tensor
    rounding_e: float
    rounding_c: float


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Return the Frobenius norm of the difference, relative to that of ``exact``."""
    return float((value.to(exact.dtype) - exact).norm() / exact.norm())


def exact_gradients(problem: Problem, tokens: int = 512) -> Exact:
    """Reference by blocks of tokens; needs a few float32 copies of c."""
    c = problem.c.detach().float().requires_grad_()
    count = int((problem.targets != IGNORE_INDEX).sum())
    c.grad = torch.zeros_like(c)
    total, parts = 0.0, []
    for block, targets in zip(
        problem.e.detach().split(tokens), problem.targets.split(tokens), strict=True
    ):
        e = block.float().requires_grad_()
        losses = F.cross_entropy(problem.logits(e, c), targets, reduction="none")
        (losses.sum() / count).backward()
        total += losses.detach().double().sum().item()
        parts.append(e)
    grad_e, grad_c = torch.cat([part.grad for part in parts if part.grad is not None]), c.grad
    rounding = lambda grad: relative_error(grad.to(problem.e.dtype), grad)
    return Exact(total / count, grad_e, grad_c, rounding(grad_e), rounding(grad_c))
