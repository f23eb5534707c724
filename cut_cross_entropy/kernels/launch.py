"""Launches kernels, or notes what would be launched so that it can be compiled beforehand.

Triton compiles a kernel when it is first launched. A step launches twenty kernels one after the
other, and compiling them in that order takes three times as long as compiling them side by side.

Arguments that change from call to call (numbers of tokens, rows of tables, ends of ranges) are
declared ``do_not_specialize`` where a kernel is defined, or a training run would stop to compile
whenever one happens to be a multiple of 16. Two kernels still know it of the number of tokens,
since one of them spills otherwise: they have two variants.
"""

import contextlib
import contextvars
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def is_captured(tensor: Tensor) -> bool:
    """Whether what is done with ``tensor`` goes into a CUDA graph: nobody can wait for it."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments (tensors on the meta device) and options."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def variant(self) -> tuple[Any, ...]:
        """What tells this launch from those that the same machine code serves."""
        # Interpreted kernels do not know what is specialised.
        plain = set(getattr(self.kernel, "do_not_specialize", ()))
        names = self.kernel.arg_names
        kinds = tuple(
            kind_of(argument, name not in plain)
            for name, argument in zip(names, self.arguments, strict=False)
        )
        return (self.kernel.__name__, kinds, tuple(sorted(self.options.items())))


@dataclass
class Plan:
    """Launches that were noted instead of made, for tensors that stand for those of a device."""

    device: torch.device
    launches: list[Launch] = field(default_factory=list)


_plan: contextvars.ContextVar[Plan | None] = contextvars.ContextVar("plan", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel over a grid of programs; inside :func:`planning` only note it."""
    plan = _plan.get()
    if plan is None:
        kernel[grid](*arguments, **options)
    else:
        plan.launches.append(Launch(kernel, arguments, options))


@contextlib.contextmanager
def planning(device: torch.device) -> Iterator[Plan]:
    """Note launches instead of making them; tensors on the meta device stand for ``device``'s."""
    plan = Plan(device)
    token = _plan.set(plan)
    try:
        yield plan
    finally:
        _plan.reset(token)


def planned_device(device: torch.device) -> torch.device:
    """The device that tensors on ``device`` stand for."""
    plan = _plan.get()
    return device if plan is None else plan.device


def compile_side_by_side(plan: Plan) -> None:
    """Compile and load every variant of a plan, each in a thread of its own.

    Most of a compilation is spent in LLVM and in the assembler, which need no interpreter lock.
    """
    variants = list({launch.variant(): launch for launch in plan.launches}.values())
    if not variants:
        return
    for one in variants:
        one.kernel.cache_key  # noqa: B018 (computed once and kept, and not by two threads)
    threads = min(len(variants), os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, "compile-kernels") as pool:
        list(pool.map(lambda one: _compile(one, plan.device), variants))


def _compile(one: Launch, device: torch.device) -> None:
    # What cannot be compiled fails where it is launched, if it is launched at all.
    with contextlib.suppress(Exception), torch.cuda.device(device):
        compiled = one.kernel.warmup(*one.arguments, grid=(1,), **one.options)
        compiled[(1, 1, 1)]  # loads the machine code and makes what launches it


def kind_of(argument: Any, specialised: bool) -> Any:
    """What Triton distinguishes in an argument."""
    if isinstance(argument, Tensor):
        return str(argument.dtype)
    if hasattr(argument, "block_shape"):  # a tensor descriptor
        return (str(argument.base.dtype), tuple(argument.block_shape))
    if isinstance(argument, int) and specialised:
        return (argument == 1, argument % 16 == 0)
    return type(argument).__name__
