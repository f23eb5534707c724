"""Worker processes, one a method, and the rounds in which they take turns.

Every process starts with an empty compilation cache of its own, so that its first call is a cold
start. Methods take turns within a round, and the order moves on by one each round, so that no
method always runs on the warmest or the coolest GPU.
"""

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

START = """
import sys
sys.path[:1] = {paths!r}
from benchmark.worker import main
main({name!r})
"""


class WorkerError(RuntimeError):
    """A worker could not do what it was told, or did not answer in time."""


class Process:
    """One worker process.

    Args:
        name: the method.
        path: folder that goes first on its ``sys.path``.
        start: program of the process; tests use their own.
    """

    def __init__(self, name: str, path: str | None = None, start: str = START) -> None:
        self.name = name
        self.scratch = tempfile.mkdtemp(prefix=f"benchmark-{name}-")
        paths = ([str(Path(path).resolve())] if path else []) + [str(ROOT)]
        environment = dict(os.environ)
        environment["TRITON_CACHE_DIR"] = f"{self.scratch}/triton"
        environment["TORCHINDUCTOR_CACHE_DIR"] = f"{self.scratch}/inductor"
        self.log = open(f"{self.scratch}/log", "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", start.format(paths=paths, name=name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            text=True,
        )
        self.words: str | None = None  # the last ones, once it has ended
        self.answers: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(None)

    def send(self, do: str, **arguments: Any) -> None:
        """Give a command; its answer comes from :meth:`receive`."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise WorkerError(f"the process of {self.name} has ended: {self._last_words()}") from (
                error
            )

    def receive(self, timeout: float) -> dict[str, Any]:
        """The answer to the last command.

        Raises:
            WorkerError: it failed, ended, or took too long (the process is then ended).
        """
        try:
            line = self.answers.get(timeout=max(0.0, timeout))
        except queue.Empty:
            self.close()
            late = f"no answer within {timeout:.0f} s" if timeout > 0.5 else "no time was left"
            raise WorkerError(late) from None
        if line is None:
            words = self._last_words()
            self.close()
            raise WorkerError(f"the process of {self.name} has ended: {words}")
        answer: dict[str, Any] = json.loads(line)
        if not answer.pop("ok"):
            raise WorkerError(answer["error"])
        return answer

    def ask(self, do: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Command and answer."""
        self.send(do, **arguments)
        return self.receive(timeout)

    @property
    def alive(self) -> bool:
        """Whether it can take commands."""
        return self.process.poll() is None

    def _last_words(self) -> str:
        if self.words is None:
            self.process.poll()
            lines = Path(self.log.name).read_text(errors="replace").strip().splitlines()
            self.words = (lines or [f"exit code {self.process.returncode}"])[-1][:300]
        return self.words

    def close(self) -> None:
        """End the process and remove its caches."""
        with contextlib.suppress(Exception):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            self.process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.reader.join(timeout=5)  # the pipe has ended with the process
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()
        if Path(self.scratch).exists():
            self._last_words()
        shutil.rmtree(self.scratch, ignore_errors=True)


@contextlib.contextmanager
def processes(names: Sequence[str], peers: dict[str, str]) -> Iterator[dict[str, Process]]:
    """Processes by method; they start at once and are ended at the end."""
    pool = {name: Process(name, peers.get(name)) for name in names}
    try:
        yield pool
    finally:
        for process in pool.values():
            process.close()


class Clock:
    """Seconds that are left of a time limit."""

    def __init__(self, limit: float) -> None:
        self.end = time.monotonic() + limit

    def left(self, most: float = float("inf")) -> float:
        """What is left, at most ``most``."""
        return min(most, self.end - time.monotonic())


def take_turns(
    pool: dict[str, Process],
    commands: Callable[[str], dict[str, Any]],
    rounds: int,
    clock: Clock,
    failed: Callable[[str, str], None],
    limit: float = 120.0,
    answered: Callable[[str, dict[str, Any]], None] = lambda name, answer: None,
) -> dict[str, list[float]]:
    """Times of every process over some rounds; one that fails takes no more turns.

    Args:
        commands: the command for a process.
        failed: told of the process and the reason.
        answered: told of the process and its whole answer.
        limit: seconds of one turn.
    """
    times: dict[str, list[float]] = {name: [] for name in pool}
    names = list(pool)
    for round_number in range(rounds):
        shift = round_number % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            try:
                answer = pool[name].ask(timeout=clock.left(limit), **commands(name))
                times[name] += answer["times"]
                answered(name, answer)
            except WorkerError as error:
                failed(name, str(error))
                names = [other for other in names if other != name]
    return {name: values for name, values in times.items() if name in names}
