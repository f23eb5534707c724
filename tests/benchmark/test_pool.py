"""Coordinator and workers: commands and answers, failures, and turns."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cut_cross_entropy.benchmark.pool import Clock, Process, WorkerError


@pytest.fixture
def fake():
    made = []

    def make(name, path=None):
        folder = Path(__file__).parent
        made.append(Process(name, path, module="fake_worker", folder=folder))
        return made[-1]

    yield make
    for process in made:
        process.close()


def test_a_command_gets_its_answer(fake):
    assert fake("a").ask("time", 20, count=2, value=1.5) == {"name": "a", "times": [1.5, 1.5]}


def test_a_worker_has_its_own_caches_and_its_own_packages(fake, tmp_path):
    """Another package of this one's name can be imported there."""
    one, other = (fake(name, str(tmp_path)).ask("look", 20) for name in "ab")
    assert len({*one["caches"], *other["caches"]}) == 4
    assert one["path"] == str(tmp_path)
    assert one["ours"] == []


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


def test_a_clock_counts_down():
    clock = Clock(10)
    assert 9 < clock.left() <= 10
    assert clock.left(3) == 3


def test_another_package_of_the_same_name_is_measured_and_not_this_one(tmp_path):
    package = tmp_path / "cut_cross_entropy"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch.nn.functional as F\n"
        "__version__ = '99.9'\n"
        "def linear_cross_entropy(e, c, targets, softcap=None, impl='cce'):\n"
        "    return F.cross_entropy(e @ c.T, targets)\n"
    )
    shape = {"name": "tiny", "num_classes": 64, "dim": 8}
    task = {"kind": "flat", "tokens": 16, "shape": shape, "dtype": "float32"}
    process = Process("apple", str(tmp_path))
    try:
        assert process.ask("load", 60, **task)["version"] == "99.9"
        assert process.ask("first", 60, kinds=["loss-fw-bw"])["first_ms"] > 0
        assert process.ask("errors", 60, kind="loss-fw-bw")["error_e"] < 1e-5
        assert len(process.ask("time", 60, kind="loss-fw-bw", count=2)["times"]) == 2
        with pytest.raises(WorkerError, match="has no attribute 'nothing'"):
            process.ask("nothing", 60)
    finally:
        process.close()
    assert not process.alive
    assert not Path(process.scratch).exists()


def test_no_worker_outlives_a_command_that_is_killed():
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from cut_cross_entropy.benchmark.pool import Process\n"
        "process = Process('a', module='fake_worker', folder=Path(sys.argv[1]))\n"
        "process.ask('time', 60)\n"
        "print(process.process.pid, process.scratch, flush=True)\n"
        "process.ask('sleep', 60)\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pid, scratch = parent.stdout.readline().split()
        parent.kill()
    shutil.rmtree(scratch)
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the worker is still there after ten seconds")
