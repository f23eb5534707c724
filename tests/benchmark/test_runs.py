"""What the coordinator asks of the processes, and in which order."""

import pytest

from benchmark import runs
from benchmark.pool import Clock, WorkerError
from benchmark.runs import Session, Task, measure
from benchmark.shapes import Shape

TASK = Task("made", "structured", 1024, Shape("made", 4096, 64))
LOADED = {"version": "1", "tokens": 1024, "classes": 4096, "dim": 64, "dtype": "bfloat16"}
ANSWERS = {
    "load": LOADED,
    "first": {"ms": 500.0},
    "describe": {"data": {"top1": 0.5}},
    "errors": {"error_e": 0.1, "error_c": 0.2, "rounding_e": 0.1, "rounding_c": 0.1},
    "memory": {"mib": 7.0},
    "time": {"times": [2.0, 1.0, 3.0]},
    "release": {},
}


class Fake:
    """A process that answers at once and keeps what it was asked."""

    def __init__(self, name, log, fails=()):
        self.name, self.log, self.fails, self.alive = name, log, fails, True

    def send(self, do, **arguments):
        self.log.append((f"send {do}", self.name))
        self.pending = do

    def receive(self, timeout):
        self.log.append((f"receive {self.pending}", self.name))
        if self.pending in self.fails:
            raise WorkerError("ValueError: no")
        return dict(ANSWERS[self.pending])

    def ask(self, do, timeout, **arguments):
        self.send(do, **arguments)
        return self.receive(timeout)


def session_of(names, log, fails=None):
    pool = {name: Fake(name, log, (fails or {}).get(name, ())) for name in names}
    return Session(pool, Clock(60), rounds=2, burst=3)


def test_rows_of_all_methods_and_kinds():
    session = session_of(["gemm", "cce", "baseline"], [])
    rows = measure(TASK, session)
    assert [(row["method"], row["kind"]) for row in rows] == [
        (method, kind) for kind in TASK.kinds for method in ("cce", "baseline")
    ]
    row = rows[-1]
    assert row["runtime_ms"] == 2.0
    assert row["repetitions"] == 6
    assert row["gemms"] == 1.0
    assert row["op_mem_mb"] == 7.0
    assert row["tflops"] == pytest.approx(2 * 1024 * 4096 * 64 * 3 / 2.0 / 1e9)
    assert session.data == {"made": {"top1": 0.5}}


def test_a_failure_of_one_method_leaves_the_others_alone():
    fails = {"cce": ("errors",), "baseline": ("memory",), "chunked": ("load",)}
    session = session_of(["gemm", "cce", "baseline", "chunked", "liger"], [], fails)
    rows = measure(TASK, session)
    assert {row["method"] for row in rows} == {"cce", "liger"}
    assert "error_e" not in next(row for row in rows if row["method"] == "cce")
    failed = {(failure["method"], failure["what"]) for failure in session.failures}
    assert failed == {("cce", "errors"), ("baseline", "memory"), ("chunked", "load")}


def first_groups(monkeypatch, task, roomy):
    monkeypatch.setattr(runs, "is_roomy", lambda: roomy)
    monkeypatch.setattr(runs.os, "cpu_count", lambda: 64)
    log = []
    measure(task, session_of(["gemm", "cce", "baseline", "apple"], log))
    groups, sending = [], False
    for what, name in log:
        if what == "send first":
            if not sending:
                groups.append([])
            groups[-1].append(name)
        if what.endswith("first"):
            sending = what.startswith("send")
    return groups


def test_what_tunes_itself_runs_alone(monkeypatch):
    assert first_groups(monkeypatch, TASK, True) == [["gemm", "cce", "baseline"], ["apple"]]


def test_on_a_small_gpu_everything_runs_alone(monkeypatch):
    groups = first_groups(monkeypatch, TASK, False)
    assert groups == [["gemm"], ["cce"], ["baseline"], ["apple"]]


def test_very_large_full_logits_run_alone(monkeypatch):
    task = Task("large", "structured", 2**17, Shape("large", 2**17, 64))
    groups = first_groups(monkeypatch, task, True)
    assert groups == [["gemm", "cce"], ["baseline"], ["apple"]]
