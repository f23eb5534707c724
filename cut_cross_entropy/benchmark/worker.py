"""What the process of one method does, a command at a time.

Whatever a library prints goes to the log of the process.

- ``load``: make or read the problem and build the loss; answers with the versions.
- ``first``: one call, its time with all that it compiles.
- ``time``: milliseconds of each of ``count`` repetitions.
- ``memory``: peak beyond what is allocated before.
- ``errors``: relative errors of the gradients against float32, and what the filter did.
- ``describe``: what the data are like.
- ``release``: give back memory that nothing uses.
- ``largest``: the peak of one step with a given number of tokens.
"""

import dataclasses
import gc
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import Problem, describe, ignore, make, read
from .measure import (
    MANY_LOGITS,
    SOAK,
    clock_mhz,
    exact_gradients,
    is_roomy,
    peak_mib,
    relative_error,
    synchronize,
    timed_after,
)
from .methods import METHODS, version_of
from .shapes import Shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Worker:
    """State of the process: one method on one problem."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.method = METHODS[name]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.problem: Problem | None = None
        self.loss: Callable[[], Tensor] | None = None
        self.frozen: str | None = None

    def load(
        self,
        kind: str,
        tokens: int,
        shape: dict[str, Any],
        dtype: str,
        file: str | None = None,
        ignored: float = 0.0,
        frozen: str | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Every worker makes the same data from the same seed."""
        self.problem = self.loss = None
        self.release()
        if file is not None:
            problem = read(Path(file), self.device)
            if self.device.type == "cpu":
                problem = dataclasses.replace(problem, e=problem.e.float(), c=problem.c.float())
        else:
            problem = make(kind, tokens, Shape(**shape), DTYPES[dtype], self.device, seed)
        problem = ignore(problem, ignored, seed)
        if problem.softcap is not None and not self.method.softcap:
            raise ValueError(f"{self.name} has no softcap")
        problem.e.requires_grad_(frozen != "e")
        problem.c.requires_grad_(frozen != "c")
        self.frozen = frozen
        self.problem, self.loss = problem, self.method.build(problem)
        self.release()
        return {
            "version": version_of(self.name),
            "tokens": problem.e.shape[0],
            "classes": problem.c.shape[0],
            "dim": problem.e.shape[1],
            "dtype": str(problem.e.dtype).removeprefix("torch."),
        }

    def crowded(self) -> bool:
        """Whether memory is short: a process that waits for its turn then keeps none for later."""
        assert self.problem is not None
        logits = self.problem.e.shape[0] * self.problem.c.shape[0]
        return self.device.type == "cuda" and (logits > MANY_LOGITS or not is_roomy())

    def inputs(self) -> list[Tensor]:
        """What needs a gradient."""
        assert self.problem is not None
        return [x for x in (self.problem.e, self.problem.c) if x.requires_grad]

    def pass_of(self, kind: str) -> tuple[Callable[[Any], object], Callable[[], Any]]:
        """What one repetition runs, and what it needs that is not measured: a backward's graph.

        Every backward gets a graph of its own: compiled ones cannot run twice, and some methods
        change what they have saved.
        """
        loss = self.loss
        assert loss is not None
        if kind == "gemm":
            return lambda _: loss(), lambda: None
        inputs = self.inputs()
        if kind == "loss-bw":
            return lambda graph: torch.autograd.grad(graph, inputs), loss
        if kind == "loss-fw":
            # As in an evaluation, whose embeddings come out of a model without gradients.
            assert self.problem is not None
            plain = dataclasses.replace(self.problem, e=self.problem.e.detach())
            forward = torch.no_grad()(self.method.build(plain))
            return lambda _: forward(), lambda: None
        return lambda _: torch.autograd.grad(loss(), inputs), lambda: None

    def first(self, kind: str) -> dict[str, Any]:
        """The first call, from an empty cache if the process is fresh."""
        start = time.perf_counter()
        run, prepare = self.pass_of(kind)
        run(prepare())
        synchronize(self.device)
        ms = (time.perf_counter() - start) * 1e3
        del run, prepare
        self.release()
        return {"ms": ms}

    def time(self, kind: str, count: int, soak: float = SOAK) -> dict[str, Any]:
        """Repetitions after ``soak`` seconds of some that do not count, and the clock."""
        run, prepare = self.pass_of(kind)
        clocks: list[float | None] = []
        times = timed_after(
            prepare, run, self.device, count, soak, lambda: clocks.append(clock_mhz(self.device))
        )
        if self.crowded():
            self.release()
        return {"times": times, "clock_mhz": clocks[0] if clocks else None}

    def memory(self, kind: str) -> dict[str, Any]:
        """Peak of one repetition; a backward's without its forward's."""
        run, prepare = self.pass_of(kind)
        run(prepare())
        return {"mib": peak_mib(run, self.device, prepare)}

    def errors(self) -> dict[str, Any]:
        """Against full logits in float32 on the same data."""
        assert self.problem is not None
        assert self.loss is not None
        exact = exact_gradients(self.problem)
        records: list[Any] = []
        if self.name.startswith("cce"):
            from cut_cross_entropy import record_filter

            with record_filter() as records:
                loss = self.loss()
                grads = torch.autograd.grad(loss, self.inputs())
        else:
            loss = self.loss()
            grads = torch.autograd.grad(loss, self.inputs())
        result: dict[str, Any] = {
            "loss_error": abs(loss.item() - exact.loss),
            "filter": [dataclasses.asdict(record) for record in records],
        }
        needed = [name for name in "ec" if name != self.frozen]
        for name, grad in zip(needed, grads, strict=True):
            expected = exact.grad_e if name == "e" else exact.grad_c
            result[f"error_{name}"] = relative_error(grad, expected)
            result[f"rounding_{name}"] = getattr(exact, f"rounding_{name}")
        return result

    def describe(self) -> dict[str, Any]:
        """What the distribution of the tokens looks like."""
        assert self.problem is not None
        with torch.no_grad():
            return {"data": describe(self.problem)}

    def release(self) -> dict[str, Any]:
        """Give back what the caching allocator keeps."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    def largest(self, tokens: int) -> dict[str, Any]:
        """Peak of a step with this many tokens, everything included; None if it did not fit."""
        assert self.problem is not None
        c = self.problem.c
        self.release()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            e = self.problem.e.detach()
            e = e.repeat(-(-tokens // e.shape[0]), 1)[:tokens].requires_grad_()
            targets = self.problem.targets.repeat(-(-tokens // self.problem.targets.shape[0]))
            problem = Problem(e, c, targets[:tokens].contiguous(), self.problem.softcap)
            grads = torch.autograd.grad(self.method.build(problem)(), (e, c))
            torch.cuda.synchronize()
            del grads
        except RuntimeError as error:  # PyTorch's own error of this kind, or a launch's
            if "out of memory" not in str(error):
                raise
            return {"gib": None}
        gib = torch.cuda.max_memory_allocated() / 2**30
        return {"gib": gib, "seconds": time.perf_counter() - start}


_workers: list[Worker] = []
"""The one of this process."""


def start(name: str) -> None:
    """Prepare this process for a method."""
    _workers.append(Worker(name))


def call(do: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run a command; ``error`` in the answer says why it failed."""
    (worker,) = _workers
    try:
        answer: dict[str, Any] = getattr(worker, do)(**arguments)
        return answer
    except Exception as error:
        traceback.print_exc()
        text = (str(error).strip().splitlines() or [""])[0]
        error.__traceback__ = None  # it holds what the call had allocated
        worker.release()
        return {"error": f"{type(error).__name__}: {text}"[:300]}
