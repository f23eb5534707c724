"""Coordinator and workers: the line protocol, failures, and turns."""

import pytest

from benchmark.pool import Clock, Process, WorkerError, take_turns

FAKE = """
import json, sys, time
name = {name!r}
for line in sys.stdin:
    command = json.loads(line)
    if command["do"] == "die":
        print("out of luck", file=sys.stderr)
        sys.exit(3)
    if command["do"] == "sleep":
        time.sleep(60)
    if command["do"] == "fail":
        print(json.dumps({{"ok": False, "error": "ValueError: no"}}), flush=True)
        continue
    value = command.get("value", 0)
    print(json.dumps({{"ok": True, "name": name, "times": [value] * command.get("count", 1)}}),
          flush=True)
"""


@pytest.fixture
def fake():
    made = []

    def make(name):
        made.append(Process(name, start=FAKE))
        return made[-1]

    yield make
    for process in made:
        process.close()


def test_a_command_gets_its_answer(fake):
    assert fake("a").ask("time", 20, count=2, value=1.5) == {"name": "a", "times": [1.5, 1.5]}


def test_an_error_of_the_worker_is_raised_and_the_worker_goes_on(fake):
    process = fake("a")
    with pytest.raises(WorkerError, match=r"^ValueError: no$"):
        process.ask("fail", 20)
    assert process.ask("time", 20)["name"] == "a"


def test_a_worker_that_ends_is_reported_with_its_last_words(fake):
    process = fake("a")
    with pytest.raises(WorkerError, match="process of a has ended: out of luck"):
        process.ask("die", 20)
    assert not process.alive
    with pytest.raises(WorkerError, match="has ended"):
        process.ask("time", 20)


def test_a_worker_that_takes_too_long_is_ended(fake):
    process = fake("a")
    process.ask("time", 20)
    with pytest.raises(WorkerError, match="no answer within 1 s"):
        process.ask("sleep", 0.6)
    assert not process.alive


class Recorder:
    """Stands in for a process and keeps the order of turns."""

    def __init__(self, name, turns, fails_at=None):
        self.name, self.turns, self.fails_at = name, turns, fails_at

    def ask(self, do, timeout, **arguments):
        self.turns.append(self.name)
        if self.turns.count(self.name) == self.fails_at:
            raise WorkerError("broken")
        return {"times": [1.0] * arguments["count"]}


def test_turns_rotate_and_a_failure_takes_no_more_turns():
    turns, failed = [], []
    pool = {
        "a": Recorder("a", turns),
        "b": Recorder("b", turns, fails_at=2),
        "c": Recorder("c", turns),
    }
    times = take_turns(
        pool,
        lambda name: {"do": "time", "count": 2},
        3,
        Clock(60),
        lambda name, reason: failed.append((name, reason)),
    )
    assert turns == ["a", "b", "c", "b", "c", "a", "a", "c"]
    assert times == {"a": [1.0] * 6, "c": [1.0] * 6}
    assert failed == [("b", "broken")]


def test_a_clock_counts_down():
    clock = Clock(10)
    assert 9 < clock.left() <= 10
    assert clock.left(3) == 3
