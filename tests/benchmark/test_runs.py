"""Requests of the coordinator to the processes, and their order."""

import json

import pytest

from cut_cross_entropy.benchmark import __main__ as command
from cut_cross_entropy.benchmark.pool import Clock, WorkerError
from cut_cross_entropy.benchmark.runs import Session, Task, measure, take_turns, warm_up
from cut_cross_entropy.benchmark.shapes import Shape

TASK = Task("made", "structured", 1024, Shape("made", 4096, 64))
LOADED = {"version": "1", "tokens": 1024, "classes": 4096, "dim": 64, "dtype": "bfloat16"}
ANSWERS = {
    "load": LOADED,
    "first": {"first_ms": 500.0},
    "errors": {"error_e": 0.1, "error_c": 0.2, "rounding_e": 0.1, "rounding_c": 0.1},
    "memory": {"op_mem_mb": 7.0},
    "time": {"times": [2.0, 1.0, 3.0]},
}


class Fake:
    """A process that answers at once and keeps what it was asked, when it begins and ends."""

    def __init__(self, name, log, fails=()):
        self.name, self.log, self.fails, self.alive = name, log, fails, True

    def ask(self, do, timeout, **arguments):
        self.log.append((f"begin {do}", self.name))
        self.log.append((f"end {do}", self.name))
        if do in self.fails:
            raise WorkerError("ValueError: no")
        return dict(ANSWERS[do])


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


def test_a_failure_of_one_method_leaves_the_others_alone():
    fails = {"cce": ("errors",), "baseline": ("memory",), "chunked": ("load",), "trl": ("first",)}
    session = session_of(["gemm", "cce", "baseline", "chunked", "trl", "liger"], [], fails)
    rows = measure(TASK, session)
    assert {row["method"] for row in rows} == {"cce", "liger"}
    assert "error_e" not in next(row for row in rows if row["method"] == "cce")
    failed = {(failure["method"], failure["what"]) for failure in session.failures}
    expected = {(name, what) for name, (what,) in fails.items() if what != "memory"}
    assert failed == expected | {("baseline", kind) for kind in TASK.kinds}


@pytest.mark.parametrize("command", ["load", "first"])
def test_making_data_and_first_calls_do_not_overlap(command):
    log = []
    measure(TASK, session_of(["gemm", "cce", "apple"], log))
    found = [entry for entry in log if entry[0].endswith(command)]
    names = ("gemm", "cce", "apple")
    assert found == [(f"{do} {command}", name) for name in names for do in ("begin", "end")]


def test_warm_methods_make_no_cold_start():
    log = []
    session = session_of(["gemm", "cce", "apple"], log, {"apple": ("load",)})
    warm_up([TASK], session)
    assert {entry for entry in log if entry[0] == "begin first"} == {
        ("begin first", "gemm"), ("begin first", "cce"),
    }  # fmt: skip
    assert [failure["method"] for failure in session.failures] == ["apple"]
    assert [row["cold"] for row in measure(TASK, session)] == [False] * 3


def test_turns_rotate_and_a_failure_takes_no_more_turns():
    log = []
    session = session_of(["a", "b", "c"], log)
    session.rounds = 3
    asked = session.pool["b"].ask

    def fails_at_the_second_turn(do, timeout, **arguments):
        if log.count(("end time", "b")) == 1:
            session.pool["b"].fails = ("time",)
        return asked(do, timeout, **arguments)

    session.pool["b"].ask = fails_at_the_second_turn
    times = take_turns(TASK, session, "loss-fw", ["a", "b", "c"])
    turns = [name for what, name in log if what == "begin time"]
    assert turns == ["a", "b", "c", "b", "c", "a", "a", "c"]
    assert times == {"a": [2.0, 1.0, 3.0] * 3, "c": [2.0, 1.0, 3.0] * 3}
    failed = [(x["method"], x["what"], x["error"]) for x in session.failures]
    assert failed == [("b", "loss-fw", "ValueError: no")]


def test_an_error_of_the_coordinator_costs_one_problem(monkeypatch, tmp_path):
    calls = []

    def broken(task, session):
        calls.append(task)
        if len(calls) == 1:
            raise KeyError("trl")
        return [{"row": 1}]

    monkeypatch.setattr(command, "measure", broken)
    path = tmp_path / "rows.json"
    arguments = command.parse_arguments(["--methods", "chunked", "--json", str(path)])
    arguments.methods = []
    results = command.run(arguments, [TASK, TASK], "x", "y")
    assert results["rows"] == [{"row": 1}]
    assert results["failures"][0]["error"] == "KeyError: 'trl'"
    assert json.loads(path.read_text()) == results
