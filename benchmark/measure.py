"""Time, memory and error of one implementation on one problem."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark.data import Problem
from cut_cross_entropy import linear_cross_entropy

KINDS = ("loss-fw", "loss-bw", "loss-fw-bw")


def loss_of(method: str, problem: Problem) -> Tensor:
    """Mean loss; ``"baseline"`` is eager full logits, other methods are names of ``impl``."""
    e, c, targets, softcap = problem.e, problem.c, problem.targets, problem.softcap
    if method != "baseline":
        loss = linear_cross_entropy(e, c, targets, softcap=softcap, impl=method)
        assert isinstance(loss, Tensor)
        return loss
    logits = F.linear(e, c).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets)


@dataclass(frozen=True)
class Measurement:
    """One row of the table.

    Args:
        runtime_ms: median over the repetitions.
        spread_ms: largest less smallest.
        op_mem_mb: peak memory beyond what was allocated before, MiB, gradients included.
        first_ms: the first call, compilation included.
    """

    method: str
    kind: str
    runtime_ms: float
    spread_ms: float
    op_mem_mb: float
    first_ms: float


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device, repetitions: int) -> list[float]:
    """Milliseconds of each repetition; on a GPU by events, without waiting in between."""
    if device.type != "cuda":
        times = []
        for _ in range(repetitions):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    run()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    return [first.elapsed_time(last) for first, last in itertools.pairwise(events)]


def measure(method: str, kind: str, problem: Problem, repetitions: int) -> Measurement:
    """Measure one kind of pass; the problem's e and c must require gradients."""
    device = problem.e.device
    inputs = (problem.e, problem.c)
    loss = None

    def forward() -> None:
        with torch.no_grad():
            loss_of(method, problem)

    def both() -> None:
        torch.autograd.grad(loss_of(method, problem), inputs)

    def backward() -> None:
        assert loss is not None
        torch.autograd.grad(loss, inputs, retain_graph=True)

    run = {"loss-fw": forward, "loss-bw": backward, "loss-fw-bw": both}[kind]
    start = time.perf_counter()
    if kind == "loss-bw":
        loss = loss_of(method, problem)
    run()
    synchronize(device)
    first = (time.perf_counter() - start) * 1e3
    memory = 0.0
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        memory = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    times = timed(run, device, repetitions)
    return Measurement(
        method, kind, statistics.median(times), max(times) - min(times), memory, first
    )


def time_of_one_gemm(problem: Problem, repetitions: int) -> float:
    """Median milliseconds of the library's ``e @ c.T``, by parts that fit the memory."""
    e, c = problem.e.detach(), problem.c.detach()
    part = min(c.shape[0], 65536)
    out = torch.empty((e.shape[0], part), dtype=e.dtype, device=e.device)

    def run() -> None:
        for start in range(0, c.shape[0], part):
            rows = c[start : start + part]
            torch.mm(e, rows.T, out=out[:, : rows.shape[0]])

    run()
    return statistics.median(timed(run, e.device, repetitions))


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
    """Frobenius norm of the difference beside that of ``exact``."""
    return float((value.float() - exact).norm() / exact.norm())


def exact_gradients(problem: Problem, tokens: int = 512) -> Exact:
    """Reference by blocks of tokens; needs a few float32 copies of c."""
    e, c, targets = problem.e.detach(), problem.c.detach().float(), problem.targets
    grad_e = torch.zeros(e.shape, device=e.device)
    grad_c = torch.zeros_like(c)
    total = 0.0
    for start in range(0, e.shape[0], tokens):
        here = slice(start, start + tokens)
        block = e[here].float()
        logits = block @ c.T
        slope = None
        if problem.softcap is not None:
            tanh = torch.tanh(logits / problem.softcap)
            slope, logits = 1 - tanh.square(), tanh * problem.softcap
        lse = torch.logsumexp(logits, 1)
        rows = torch.arange(block.shape[0], device=e.device)
        total += float((lse - logits[rows, targets[here]]).double().sum())
        grad = logits.sub_(lse[:, None]).exp_()
        grad[rows, targets[here]] -= 1
        if slope is not None:
            grad *= slope
        grad /= e.shape[0]
        grad_e[here] = grad @ c
        grad_c.addmm_(grad.T, block)
    dtype = problem.e.dtype
    return Exact(
        total / e.shape[0],
        grad_e,
        grad_c,
        relative_error(grad_e.to(dtype), grad_e),
        relative_error(grad_c.to(dtype), grad_c),
    )
