"""Time, memory and error of one loss on one problem, in the process that it runs in."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .data import IGNORE_INDEX, Problem

KINDS = ("loss-fw", "loss-bw", "loss-fw-bw")

SOAK = 0.15  # seconds of work before a GPU is timed: one that has rested is faster than it can stay
LONG_SOAK = 1.5  # the same, until its power limit shows as well
ROOMY_GIB = 120  # of GPU memory: from here on what all methods keep fits at once
MANY_LOGITS = 2**32  # full logits of this many take a GPU to themselves


def is_roomy() -> bool:
    """Whether several methods can hold their memory on this GPU at the same time."""
    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_properties(0).total_memory >= ROOMY_GIB * 2**30
    )


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_mhz(device: torch.device) -> float | None:
    """Clock of a GPU's multiprocessors now; None where the driver's library does not tell."""
    try:
        return float(torch.cuda.clock_rate(device))
    except Exception:  # of that library, which need not be there: a note must not cost the times
        return None


def timed(run: Callable[[], object], device: torch.device, repetitions: int) -> list[float]:
    """Milliseconds of each repetition after one that does not count."""
    return timed_after(lambda: None, lambda _: run(), device, repetitions)


def timed_after(
    prepare: Callable[[], Any],
    run: Callable[[Any], object],
    device: torch.device,
    repetitions: int,
    soak: float = 0.0,
    watch: Callable[[], None] = lambda: None,
) -> list[float]:
    """The same, where each repetition gets what ``prepare`` gives, which is not timed.

    On a GPU by events, without waiting in between, as in training, and after ``soak`` seconds of
    repetitions that do not count (not for steps of several processes, which have to be as many).
    ``watch`` is called while the last repetition runs.
    """
    start = time.perf_counter()
    while device.type == "cuda" and time.perf_counter() - start < soak:
        run(prepare())
        synchronize(device)
    run(prepare())
    if device.type != "cuda":
        times = []
        for _ in range(repetitions):
            prepared = prepare()
            start = time.perf_counter()
            run(prepared)
            times.append((time.perf_counter() - start) * 1e3)
        return times
    events = []
    for _ in range(repetitions):
        prepared = prepare()
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        run(prepared)
        pair[1].record()
        events.append(pair)
    watch()
    torch.cuda.synchronize(device)
    return [first.elapsed_time(last) for first, last in events]


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
    return float((value.float() - exact).norm() / exact.norm())


def exact_gradients(problem: Problem, tokens: int = 512) -> Exact:
    """Reference by blocks of tokens; needs a few float32 copies of c."""
    e, c, targets = problem.e.detach(), problem.c.detach().float(), problem.targets
    counted = targets != IGNORE_INDEX
    count = int(counted.sum())
    grad_e = torch.zeros(e.shape, device=e.device)
    grad_c = torch.zeros_like(c)
    total = 0.0
    for start in range(0, e.shape[0], tokens):
        here = slice(start, start + tokens)
        block, inside = e[here].float(), counted[here]
        wanted = targets[here].clamp_min(0)
        logits = block @ c.T
        slope = None
        if problem.softcap is not None:
            tanh = torch.tanh(logits / problem.softcap)
            slope, logits = 1 - tanh.square(), tanh * problem.softcap
        lse = torch.logsumexp(logits, 1)
        rows = torch.arange(block.shape[0], device=e.device)
        total += float((lse - logits[rows, wanted])[inside].double().sum())
        grad = logits.sub_(lse[:, None]).exp_()
        grad[rows, wanted] -= 1
        if slope is not None:
            grad *= slope
        grad *= inside[:, None] / count
        grad_e[here] = grad @ c
        grad_c.addmm_(grad.T, block)
    dtype = problem.e.dtype
    return Exact(
        total / count,
        grad_e,
        grad_c,
        relative_error(grad_e.to(dtype), grad_e),
        relative_error(grad_c.to(dtype), grad_c),
    )
