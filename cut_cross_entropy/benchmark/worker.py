"""The process of one method, a command at a time: each public method of :class:`Worker` is one.

Whatever a library prints goes to the log of the process.
"""

import contextlib
import dataclasses
import gc
import importlib
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from .data import Problem, ignore, make, read
from .kinds import Kind, parse
from .measure import SOAK, Exact, exact_gradients, peak_mib, relative_error, synchronize, timed
from .methods import METHODS, version_of
from .pool import WorkerError
from .questions import ask, errors
from .shapes import Shape

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


class Worker:
    """State of the process: one method on one problem.

    Commands answer with what they found, named as in the rows of the benchmark.
    """

    problem: Problem
    loss: Callable[[], Tensor]

    def __init__(self, name: str) -> None:
        self.name = name
        self.method = METHODS[name]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

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
        """Make the data, every worker the same from the same seed, or read them."""
        self.problem = self.loss = None  # type: ignore[assignment]  # no two problems at a time
        problem = self.data(
            kind, tokens, Shape(**shape), dtype, file=file, ignored=ignored, seed=seed
        )
        if problem.softcap is not None and not self.method.softcap:
            raise ValueError(f"{self.name} has no softcap")
        problem.e.requires_grad_(frozen != "e")
        problem.c.requires_grad_(frozen != "c")
        self.problem, self.loss = problem, self.method.build(problem)
        return {
            "version": version_of(self.name),
            "tokens": problem.e.shape[0],
            "classes": problem.c.shape[0],
            "dim": problem.e.shape[1],
            "dtype": str(problem.e.dtype).removeprefix("torch."),
        }

    def data(
        self,
        kind: str,
        tokens: int,
        shape: Shape,
        dtype: str,
        *,
        file: str | None,
        ignored: float,
        seed: int,
    ) -> Problem:
        """The problem that is asked for."""
        self.release()
        if file is None:
            problem = make(kind, tokens, shape, DTYPES[dtype], device=self.device, seed=seed)
        else:
            problem = read(Path(file), self.device)
            if self.device.type == "cpu":
                problem = dataclasses.replace(problem, e=problem.e.float(), c=problem.c.float())
        return ignore(problem, ignored, seed)

    def reference(self) -> Exact:
        """Full logits of the problem in float32."""
        return exact_gradients(self.problem)

    def _inputs(self) -> dict[str, Tensor]:
        both = {"e": self.problem.e, "c": self.problem.c}
        return {name: tensor for name, tensor in both.items() if tensor.requires_grad}

    def _pass(self, kind: str) -> tuple[Callable[[Any], object], Callable[[], Any]]:
        """Return what one repetition runs, and what it needs unmeasured: a backward's graph.

        Every backward gets a graph of its own: compiled ones cannot run twice, and some methods
        change what they have saved.
        """
        loss, inputs = self.loss, list(self._inputs().values())
        nothing, asked = lambda: None, parse(kind)
        if self.name == "gemm":
            return lambda _: loss(), nothing
        if asked.subject != "loss":
            return self._token_pass(asked), nothing
        if kind == "loss-bw":
            return lambda graph: torch.autograd.grad(graph, inputs), loss
        if kind == "loss-fw":
            # As in an evaluation, whose embeddings come out of a model without gradients.
            plain = dataclasses.replace(self.problem, e=self.problem.e.detach())
            forward = torch.no_grad()(self.method.build(plain))
            return lambda _: forward(), nothing
        return lambda _: torch.autograd.grad(loss(), inputs), nothing

    def _token_pass(self, kind: Kind) -> Callable[[Any], object]:
        """Return what one repetition of a kind with results for each token runs."""
        build = getattr(self.method, kind.subject)
        if build is None:
            raise NotImplementedError(f"{self.name} does not have {kind.subject}")
        inputs, question = list(self._inputs().values()), ask(self.problem, kind)
        if kind.part == "fw":
            plain = dataclasses.replace(self.problem, e=self.problem.e.detach())
            forward = torch.no_grad()(build(dataclasses.replace(question, problem=plain)))
            return lambda _: forward()
        run = build(question)
        return lambda _: question.gradients(run(), inputs)

    def first(self, kinds: list[str]) -> dict[str, Any]:
        """Time the first call with all that it compiles: a cold start if the process is fresh.

        Of the kinds it is the last that the method has.
        """
        start = time.perf_counter()
        for kind in reversed(kinds):
            try:
                run, prepare = self._pass(kind)
                run(prepare())
            except NotImplementedError:
                if kind == kinds[0]:
                    raise
            else:
                break
        synchronize(self.device)
        return {"first_ms": (time.perf_counter() - start) * 1e3}

    def time(self, kind: str, count: int, soak: float = SOAK) -> dict[str, Any]:
        """Time repetitions, after ``soak`` seconds of some that do not count."""
        run, prepare = self._pass(kind)
        return {"times": timed(run, self.device, count, prepare, soak)}

    def memory(self, kind: str) -> dict[str, Any]:
        """Measure the peak of one repetition; a backward's without its forward's."""
        run, prepare = self._pass(kind)
        run(prepare())
        return {"op_mem_mb": peak_mib(run, self.device, prepare)}

    def errors(self, kind: str) -> dict[str, Any]:
        """Compare with full logits, and tell what the filter did.

        Loss and gradients are compared with float32, results for each token with float64.
        """
        asked, inputs = parse(kind), self._inputs()
        recorder: Any = contextlib.nullcontext([])
        if self.name.startswith("cce"):
            recorder = importlib.import_module("cut_cross_entropy").record_filter()
        if asked.subject != "loss":
            question = ask(self.problem, asked)
            with recorder as records:
                scores = getattr(self.method, asked.subject)(question)()
                found = question.gradients(scores, list(inputs.values()))
            gradients = dict(zip(inputs, found, strict=True))
            exact_method = getattr(METHODS["baseline"], asked.subject)
            return {
                "filter": [dataclasses.asdict(record) for record in records],
                **errors(question, scores, gradients, exact_method),
            }
        exact = self.reference()
        with recorder as records:
            loss = self.loss()
            grads = torch.autograd.grad(loss, list(inputs.values()))
        result: dict[str, Any] = {
            "loss_error": abs(loss.item() - exact.loss),
            "filter": [dataclasses.asdict(record) for record in records],
        }
        for name, grad in zip(inputs, grads, strict=True):
            result[f"error_{name}"] = relative_error(grad, getattr(exact, f"grad_{name}"))
            result[f"rounding_{name}"] = getattr(exact, f"rounding_{name}")
        return result

    def release(self) -> None:
        """Give back what the caching allocator keeps: the other processes need it."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def answer(self, do: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run a command; ``error`` in the answer says why it failed."""
        try:
            found: dict[str, Any] = getattr(self, do)(**arguments)
            return found
        except Exception as error:
            traceback.print_exc()
            text = (str(error).strip().splitlines() or [""])[0]
            error.__traceback__ = None  # it holds what the call had allocated
            return {"error": f"{type(error).__name__}: {text}"[:300]}


class Here(Worker):
    """A method in the process that asks. All of them have the same data, once in memory."""

    alive = True
    shared: ClassVar[dict[Any, Any]] = {}
    """The last problem by what was asked for, and its reference."""

    def data(self, *sizes: Any, **more: Any) -> Problem:
        """The problem that is asked for, which may be the last one."""
        asked = (*sizes, *more.items())
        if asked not in self.shared:
            self.shared.clear()
            self.shared[asked] = super().data(*sizes, **more)
        problem: Problem = self.shared[asked]
        # Leaves of their own, whose need of gradients is their own.
        return dataclasses.replace(problem, e=problem.e.detach(), c=problem.c.detach())

    def reference(self) -> Exact:
        """Full logits of the problem in float32, computed once."""
        if "exact" not in self.shared:
            self.shared["exact"] = super().reference()
        return cast(Exact, self.shared["exact"])

    def ask(self, do: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Give a command and return its answer, however long it takes.

        Raises:
            WorkerError: the command failed, or there was no time to begin.
        """
        answer = self.answer(do, arguments) if timeout > 0.5 else {"error": "no time was left"}
        if "error" in answer:
            self.release()
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """End nothing."""


_workers: list[Worker] = []
"""The one of this process."""


def start(name: str, kind: type[Worker] = Worker) -> None:
    """Prepare this process for a method."""
    _workers.append(kind(name))


def call(do: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run a command; ``error`` in the answer says why it failed."""
    (worker,) = _workers
    try:
        return worker.answer(do, arguments)
    finally:
        worker.release()
