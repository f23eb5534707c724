"""One problem, all methods: what the coordinator asks for, and the rows that come of it."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .measure import KINDS, SOAK, is_roomy
from .methods import METHODS
from .pool import Clock, Process, WorkerError, processes, take_turns
from .shapes import Shape

PASSES = {"loss-fw": 1, "loss-bw": 2, "loss-fw-bw": 3}
"""Products that an exact computation cannot do without: what TFLOP/s count."""


@dataclass(frozen=True)
class Task:
    """What to measure on one problem.

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
        return {
            "kind": self.kind,
            "tokens": self.tokens,
            "shape": dataclasses.asdict(self.shape),
            "dtype": self.dtype,
            "file": self.file,
            "ignored": self.ignored,
            "frozen": self.frozen,
        }


@dataclass
class Session:
    """The processes and what was asked of them so far.

    Args:
        pool: processes by method; those that end are taken out.
        clock: when everything has to be over.
        rounds, burst: turns of each method, and timed repetitions a turn.
        first_limit: seconds that a first call may take.
        soak: seconds of work before repetitions count, on a GPU.
        progress: told of every step.
        measured: gets the rows of a kind as soon as its methods have taken their turns.
    """

    pool: dict[str, Process]
    clock: Clock
    rounds: int = 4
    burst: int = 3
    first_limit: float = 150.0
    soak: float = SOAK
    progress: Callable[[str], None] = lambda text: None
    measured: Callable[[list[dict[str, Any]]], None] = lambda rows: None
    failures: list[dict[str, str]] = field(default_factory=list)
    started: set[str] = field(default_factory=set)
    data: dict[str, dict[str, float]] = field(default_factory=dict)

    def fail(self, task: Task, method: str, what: str, reason: str) -> None:
        """Keep a failure; a process that ended takes no further part."""
        self.failures.append(
            {"test_data": task.name, "method": method, "what": what, "error": reason}
        )
        self.progress(f"{task.name}: {method} failed, {what}: {reason}")
        if method in self.pool and not self.pool[method].alive:
            self.pool.pop(method).close()


def measure(task: Task, session: Session) -> list[dict[str, Any]]:
    """Rows of one problem: one a method and kind. Failures are kept in the session."""
    loaded = _load(task, session)
    found: dict[str, dict[str, Any]] = {name: {} for name in loaded}
    _first_calls(task, session, found)
    if task.errors:
        if "gemm" in session.pool:
            answer: dict[str, Any] = {}
            _ask_for(task, session, "gemm", "describe", answer)
            session.data[task.name] = answer.get("data", {})
            _quietly(session, "gemm", "release")
        for name in [name for name in found if name in session.pool and name != "gemm"]:
            session.progress(f"{task.name}: errors of {name}")
            _ask_for(task, session, name, "errors", found[name])
            _quietly(session, name, "release")
    rows = []
    for kind in task.kinds:
        new = _rows_of_kind(task, session, kind, loaded, found)
        if new:
            session.measured(new)
        rows += new
    return rows


def _load(task: Task, session: Session) -> dict[str, dict[str, Any]]:
    session.progress(f"{task.name}: data")
    loaded: dict[str, dict[str, Any]] = {}
    names = list(session.pool)
    # Making the data takes several times their size.
    for group in [names] if is_roomy() else [[name] for name in names]:
        loaded |= _ask_group(task, session, group, "load", 180.0, dict.fromkeys(group, task.data()))
    return loaded


def _first_calls(task: Task, session: Session, found: dict[str, dict[str, Any]]) -> None:
    """One after the other: compilers use every core, and some methods tune themselves."""
    for name in list(found):
        session.progress(f"{task.name}: first call of {name}")
        kind = "gemm" if name == "gemm" else task.kinds[-1]
        limit = session.first_limit
        answers = _ask_group(task, session, [name], "first", limit, {name: {"kind": kind}})
        if name not in answers:
            found.pop(name)
            continue
        cold = name not in session.started
        found[name] = {"first_ms": answers[name]["ms"], "cold": cold}
        session.started.add(name)


def _ask_group(
    task: Task,
    session: Session,
    names: Sequence[str],
    do: str,
    limit: float,
    arguments: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """The same command to several processes at once; answers of those that could."""
    sent, answers = [], {}
    for name in names:
        try:
            session.pool[name].send(do, **arguments[name])
            sent.append(name)
        except WorkerError as error:
            session.fail(task, name, do, str(error))
    clock = Clock(session.clock.left(limit))
    for name in sent:
        try:
            answers[name] = session.pool[name].receive(clock.left())
        except WorkerError as error:
            session.fail(task, name, do, str(error))
    return answers


def _ask_for(
    task: Task, session: Session, name: str, do: str, result: dict[str, Any], **arguments: Any
) -> None:
    try:
        answer = session.pool[name].ask(do, timeout=session.clock.left(120.0), **arguments)
    except WorkerError as error:
        session.fail(task, name, do, str(error))
        return
    result.update(answer)


def _quietly(session: Session, name: str, do: str) -> None:
    """A command whose failure shows in what follows."""
    try:
        session.pool[name].ask(do, timeout=session.clock.left(60.0))
    except (KeyError, WorkerError):
        return


def _rows_of_kind(
    task: Task,
    session: Session,
    kind: str,
    loaded: dict[str, dict[str, Any]],
    found: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    memory: dict[str, dict[str, Any]] = {}
    start = time.perf_counter()
    for name in [name for name in found if name in session.pool and name != "gemm"]:
        session.progress(f"{task.name}: memory of {name}, {kind}")
        memory[name] = {}
        _ask_for(task, session, name, "memory", memory[name], kind=kind)
        _quietly(session, name, "release")
    ready = [name for name in found if name == "gemm" or "mib" in memory.get(name, {})]
    # Memory took two passes of each method; a turn is one that does not count and a burst.
    seconds = (time.perf_counter() - start) / 2 * session.rounds * (session.burst + 1)
    if torch.cuda.is_available():
        seconds += session.rounds * len(ready) * session.soak
    rounds = "1 round" if session.rounds == 1 else f"{session.rounds} rounds"
    session.progress(
        f"{task.name}: {kind}, {rounds} of {len(ready)} methods, about {seconds:.0f} s"
    )
    clocks: dict[str, list[float]] = {name: [] for name in ready}

    def note_clock(name: str, answer: dict[str, Any]) -> None:
        if answer.get("clock_mhz") is not None:
            clocks[name].append(answer["clock_mhz"])

    times = take_turns(
        {name: session.pool[name] for name in ready if name in session.pool},
        lambda name: {
            "do": "time",
            "kind": "gemm" if name == "gemm" else kind,
            "count": session.burst,
            "soak": session.soak,
        },
        session.rounds,
        session.clock,
        lambda name, reason: session.fail(task, name, kind, reason),
        answered=note_clock,
    )
    for name, values in clocks.items():
        found[name]["clock_mhz"] = statistics.median(values) if values else None
    for name in times:
        _quietly(session, name, "release")
    gemm = statistics.median(times["gemm"]) if times.get("gemm") else None
    return [
        _row(task, kind, name, values, gemm, memory[name]["mib"], loaded[name], found[name])
        for name, values in times.items()
        if name != "gemm" and values
    ]


def _row(
    task: Task,
    kind: str,
    name: str,
    times: list[float],
    gemm: float | None,
    mib: float,
    loaded: dict[str, Any],
    found: dict[str, Any],
) -> dict[str, Any]:
    median = statistics.median(times)
    tokens, classes, dim = loaded["tokens"], loaded["classes"], loaded["dim"]
    passes = PASSES[kind]
    if task.frozen and kind != "loss-fw":
        passes -= 1
    flop = 2.0 * tokens * classes * dim * passes * (1 - task.ignored)
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [median] * 3
    row: dict[str, Any] = {
        "method": name,
        "kind": kind,
        "runtime_ms": median,
        "op_mem_mb": mib,
        "test_data": task.name,
        "spread_ms": max(times) - min(times),
        "q1_ms": quartiles[0],
        "q3_ms": quartiles[2],
        "repetitions": len(times),
        "gemms": None if gemm is None else median / gemm,
        "gemm_ms": gemm,
        "gemm_even": True,
        "tflops": flop / median / 1e9,
        "tokens": tokens,
        "classes": classes,
        "dim": dim,
        "dtype": loaded["dtype"],
        "kind_of_data": "file" if task.file else task.kind,
        "ignored": task.ignored,
        "frozen": task.frozen,
        "version": loaded["version"],
        "peer": METHODS[name].peer,
    }
    row.update({key: value for key, value in found.items() if key not in row})
    return row


def measure_all(
    todo: Sequence[Task],
    methods: Sequence[str],
    peers: dict[str, str],
    *,
    seconds: float,
    repetitions: int,
    soak: float = SOAK,
    progress: Callable[[str], None] = lambda text: None,
    measured: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    done: Callable[[list[dict[str, Any]], Session], None] = lambda rows, session: None,
) -> Session:
    """Measure the problems one by one.

    Args:
        todo: problems.
        methods: what takes turns.
        peers: folders of other packages by method.
        seconds: limit for everything.
        repetitions: timed runs of each.
        soak: seconds of work before repetitions count, on a GPU.
        progress: told of every step.
        measured: gets the rows of each kind of pass.
        done: gets all rows of a problem.
    """
    burst = min(3, repetitions)
    with processes(methods, peers) as pool:
        rounds = -(-repetitions // burst)
        session = Session(
            pool, Clock(seconds), rounds, burst, soak=soak, progress=progress, measured=measured
        )
        for task in todo:
            if session.clock.left() < 5:
                session.fail(task, "all", "time", "not measured: the time limit was reached")
                continue
            try:
                rows = measure(task, session)
            except Exception as error:  # one problem must not take the others with it
                session.fail(task, "all", "measure", f"{type(error).__name__}: {error}")
                rows = []
            done(rows, session)
    return session
