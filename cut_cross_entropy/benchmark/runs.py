"""Questions to the processes, problem by problem, and the rows of their answers."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .kinds import KINDS, parse
from .measure import SOAK, quartiles
from .pool import Clock, Process, WorkerError
from .shapes import Shape
from .worker import Here

Row = dict[str, Any]
WARM_UP = 110.0  # seconds that a call may take while others compile too


@dataclass(frozen=True)
class Task:
    """Measurements of one problem.

    Args:
        name: of the data, as the tables show it.
        kind: of the data, see ``benchmark.data``.
        file: saved hidden states instead of made ones.
        ignored: share of the targets that are ignored.
        frozen: ``"e"`` or ``"c"``: the input that needs no gradient.
        kinds: passes.
        errors: whether to compare with float32.
    """

    name: str
    kind: str
    tokens: int
    shape: Shape
    dtype: str = "bfloat16"
    file: str | None = None
    ignored: float = 0.0
    frozen: str | None = None
    kinds: Sequence[str] = KINDS
    errors: bool = True

    def data(self) -> dict[str, Any]:
        """Arguments of a worker's ``load``."""
        own = ("name", "kinds", "errors")
        return {name: x for name, x in dataclasses.asdict(self).items() if name not in own}


@dataclass
class Session:
    """The processes and what was asked of them so far.

    Args:
        pool: processes by method; those that end are taken out.
        clock: when everything has to be over.
        rounds, burst: turns of each method, and timed repetitions a turn.
        soak: seconds of work before repetitions count, on a GPU.
        progress: told of every step.
        measured: gets the rows of a kind as soon as its methods have taken their turns.
    """

    pool: dict[str, Process | Here]
    clock: Clock
    rounds: int = 4
    burst: int = 3
    soak: float = SOAK
    progress: Callable[[str], None] = lambda text: None
    measured: Callable[[list[Row]], None] = lambda rows: None
    failures: list[dict[str, str]] = field(default_factory=list)
    started: set[str] = field(default_factory=set)

    def fail(self, task: Task, method: str, what: str, reason: str) -> None:
        """Keep a failure; a process that ended takes no further part."""
        self.failures.append(
            {"test_data": task.name, "method": method, "what": what, "error": reason}
        )
        self.progress(f"{task.name}: {method} failed, {what}: {reason}")
        if method in self.pool and not self.pool[method].alive:
            self.pool.pop(method).close()

    def ask(
        self, task: Task, method: str, do: str, limit: float = 120.0, what: str = "", **options: Any
    ) -> Row | None:
        """The answer of a method's process; None, and a failure is kept, if there is none."""
        if method not in self.pool:
            return None
        try:
            return self.pool[method].ask(do, timeout=self.clock.left(limit), **options)
        except WorkerError as error:
            self.fail(task, method, what or do, str(error))
            return None


def warm_up(tasks: Sequence[Task], session: Session) -> None:
    """Make the first calls of all methods, which then compile at the same time.

    What is measured later is no cold start. Failures are kept in the session.
    """

    def first(name: str) -> None:
        for task in tasks:
            if session.ask(task, name, "load", WARM_UP, **task.data()):
                session.ask(task, name, "first", WARM_UP, kinds=list(task.kinds))

    names = list(session.pool)
    session.progress("first calls of all methods at once")
    with ThreadPoolExecutor(len(names)) as threads:
        list(threads.map(first, names))
    session.started.update(names)


def measure(task: Task, session: Session) -> list[Row]:
    """Rows of one problem: one a method and kind. Failures are kept in the session."""
    ask, found = partial(session.ask, task), dict[str, Row]()
    # One method after the other: making the data takes several times their size, compilers use
    # every core, and some methods tune themselves.
    for name in list(session.pool):
        session.progress(f"{task.name}: data and first call of {name}")
        loaded = ask(name, "load", 180.0, **task.data())
        first = loaded and ask(name, "first", 150.0, kinds=list(task.kinds))
        if not loaded or not first:
            continue
        found[name] = {**loaded, **first, "cold": name not in session.started}
        session.started.add(name)
    rows, errors = list[Row](), dict[tuple[Any, ...], Row]()
    for kind in task.kinds:
        new = _rows_of_kind(task, session, kind, found, errors)
        if new:
            session.measured(new)
        rows += new
    return rows


def _rows_of_kind(
    task: Task,
    session: Session,
    kind: str,
    found: dict[str, Row],
    errors: dict[tuple[Any, ...], Row],
) -> list[Row]:
    """Rows of one kind. ``errors`` is filled: kinds of one computation have the same errors."""
    computed = parse(kind).subject, parse(kind).additions
    memory: dict[str, Row | None] = {}
    start = time.perf_counter()
    for name in [name for name in found if name != "gemm"]:
        session.progress(f"{task.name}: memory of {name}, {kind}")
        memory[name] = session.ask(task, name, "memory", what=kind, kind=kind)
    ready = [name for name in found if name == "gemm" or memory[name]]
    # Memory took two passes of each method; a turn is one that does not count and a burst.
    seconds = (time.perf_counter() - start) / 2 * session.rounds * (session.burst + 1)
    if torch.cuda.is_available():
        seconds += session.rounds * len(ready) * session.soak
    for name in [name for name in ready if name != "gemm" and task.errors]:
        if (name, computed) not in errors:
            session.progress(f"{task.name}: errors of {name}, {kind}")
            errors[name, computed] = session.ask(task, name, "errors", kind=kind) or {}
    rounds = "1 round" if session.rounds == 1 else f"{session.rounds} rounds"
    session.progress(
        f"{task.name}: {kind}, {rounds} of {len(ready)} methods, about {seconds:.0f} s"
    )
    times = take_turns(task, session, kind, ready)
    gemm = quartiles(times["gemm"])[1] if times.get("gemm") else None
    return [
        {
            **_row(task, kind, values, gemm, found[name]),
            **(memory[name] or {}),
            **errors.get((name, computed), {}),
            "method": name,
        }
        for name, values in times.items()
        if name != "gemm" and values
    ]


def take_turns(
    task: Task, session: Session, kind: str, methods: Sequence[str]
) -> dict[str, list[float]]:
    """Times of every method over some rounds; one that fails takes no more turns.

    The order moves on by one each round, so that no method always runs on the warmest or the
    coolest GPU.
    """
    times: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(session.rounds):
        names = list(times)
        shift = number % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            options: Row = {"kind": kind, "count": session.burst, "soak": session.soak}
            answer = session.ask(task, name, "time", what=kind, **options)
            if answer is None:
                del times[name]
            else:
                times[name] += answer["times"]
    return times


def _row(task: Task, kind: str, times: list[float], gemm: float | None, found: Row) -> Row:
    first, median, third = quartiles(times)
    passes = parse(kind).products - bool(task.frozen and parse(kind).part != "fw")
    flop = 2.0 * found["tokens"] * found["classes"] * found["dim"] * passes * (1 - task.ignored)
    return {
        **found,
        "kind": kind,
        "runtime_ms": median,
        "test_data": task.name,
        "q1_ms": first,
        "q3_ms": third,
        "repetitions": len(times),
        "gemms": None if gemm is None else median / gemm,
        "gemm_ms": gemm,
        "gemm_even": True,
        "tflops": flop / median / 1e9,
        "kind_of_data": "file" if task.file else task.kind,
        "ignored": task.ignored,
        "frozen": task.frozen,
    }
