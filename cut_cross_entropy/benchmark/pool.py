"""Worker processes, one for each method, and the rounds in which they take turns.

Every process starts with an empty compilation cache of its own, so that its first call is a cold
start. Methods take turns within a round, and the order moves on by one each round, so that no
method always runs on the warmest or the coolest GPU.
"""

import contextlib
import importlib
import multiprocessing
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ALIAS = "cce_benchmark"
"""Name of this package in a worker, where ``cut_cross_entropy`` may be somebody else's."""

START = """
import multiprocessing, os, sys, threading, types

def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)

threading.Thread(target=end_with_parent, daemon=True).start()
log = os.open(log_file, os.O_WRONLY | os.O_CREAT)
os.dup2(log, 1)
os.dup2(log, 2)
os.environ.update(variables)
for known in [known for known in sys.modules if known.split(".")[0] == "cut_cross_entropy"]:
    del sys.modules[known]  # of a command that starts by importing this package
sys.path[:0] = paths
package = sys.modules[alias] = types.ModuleType(alias)
package.__path__ = [folder]
__import__(module, fromlist=["start"]).start(method)
"""
"""Initializer of a worker. It is source text because nothing of this package may be imported."""


class WorkerError(RuntimeError):
    """A worker failed, ended, or did not answer in time."""


class Process:
    """One worker process.

    Args:
        name: the method.
        path: folder that goes first on its ``sys.path``.
        module: in this folder, with functions ``start`` and ``call``; tests use their own.
        folder: of the module.
    """

    def __init__(
        self, name: str, path: str | None = None, module: str = "worker", folder: Path = FOLDER
    ) -> None:
        self.name = name
        self.scratch = tempfile.mkdtemp(prefix=f"benchmark-{name}-")
        full_name = f"{ALIAS}.{module}"
        # A function is sent to a worker by its name, so this process needs the same names.
        alias = sys.modules[ALIAS] = types.ModuleType(ALIAS)
        alias.__path__ = [str(folder)]
        self.call = importlib.import_module(full_name).call
        given = {
            "alias": ALIAS,
            "folder": str(folder),
            "log_file": f"{self.scratch}/log",
            "method": name,
            "module": full_name,
            "paths": [*([str(Path(path).resolve())] if path else []), str(FOLDER.parents[1])],
            "variables": {
                "TRITON_CACHE_DIR": f"{self.scratch}/triton",
                "TORCHINDUCTOR_CACHE_DIR": f"{self.scratch}/inductor",
            },
        }
        self.executor = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=exec, initargs=(START, given)
        )
        before = set(multiprocessing.active_children())
        self.answer: Future[dict[str, Any]] = self.executor.submit(dict)
        (self.process,) = set(multiprocessing.active_children()) - before

    def send(self, do: str, **arguments: Any) -> None:
        """Give a command; its answer comes from :meth:`receive`.

        Raises:
            WorkerError: the process has ended.
        """
        try:
            self.answer = self.executor.submit(self.call, do, arguments)
        except RuntimeError as error:  # a broken pool, or one that was closed
            raise WorkerError(self._ended()) from error

    def receive(self, timeout: float) -> dict[str, Any]:
        """Return the answer to the last command.

        Raises:
            WorkerError: it failed, ended, or took too long (the process is then ended).
        """
        try:
            answer = self.answer.result(timeout=max(0.0, timeout))
        except FutureTimeoutError:
            self.close()
            late = f"no answer within {timeout:.0f} s" if timeout > 0.5 else "no time was left"
            raise WorkerError(late) from None
        except BrokenProcessPool:
            ended = self._ended()
            self.close()
            raise WorkerError(ended) from None
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def ask(self, do: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Give a command and return its answer."""
        self.send(do, **arguments)
        return self.receive(timeout)

    @property
    def alive(self) -> bool:
        """Whether the process can take commands."""
        return bool(self.process.is_alive())

    def _ended(self) -> str:
        log = Path(self.scratch) / "log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        words = lines[-1] if lines else f"exit code {self.process.exitcode}"
        return f"the process of {self.name} has ended: {words[:300]}"

    def close(self) -> None:
        """End the process and remove its caches."""
        self.executor.shutdown(wait=False, cancel_futures=True)
        self.process.join(timeout=2.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
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
