"""Worker processes, one for each method.

Every process starts with an empty compilation cache of its own, so that its first call is a cold
start.
"""

import contextlib
import importlib
import multiprocessing
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
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
package.__path__ = folders
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
        module: with functions ``start`` and ``call``.
        folder: of the module, which imports the others of this folder by relative names.
    """

    def __init__(
        self, name: str, path: str | None = None, module: str = "worker", folder: Path = FOLDER
    ) -> None:
        self.name = name
        self.scratch = tempfile.mkdtemp(prefix=f"benchmark-{name}-")
        full_name = f"{ALIAS}.{module}"
        # A function is sent to a worker by its name, so this process needs the same names.
        alias = sys.modules[ALIAS] = types.ModuleType(ALIAS)
        alias.__path__ = folders = [str(folder), str(FOLDER)]
        self.call = importlib.import_module(full_name).call
        given = {
            "alias": ALIAS,
            "folders": folders,
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
        self.executor.submit(dict)  # starts the process
        (self.process,) = set(multiprocessing.active_children()) - before

    def ask(self, do: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Give a command and return its answer; a process that takes too long is ended.

        Raises:
            WorkerError: the command failed or took too long, or the process has ended.
        """
        try:
            future = self.executor.submit(self.call, do, arguments)
            answer: dict[str, Any] = future.result(timeout=max(0.0, timeout))
        except FutureTimeoutError:
            self.close()
            late = f"no answer within {timeout:.0f} s" if timeout > 0.5 else "no time was left"
            raise WorkerError(late) from None
        except RuntimeError as error:  # a broken pool, or one that was closed
            ended = self._ended()
            self.close()
            raise WorkerError(ended) from error
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

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
def processes(
    names: Sequence[str], peers: dict[str, str], **worker: Any
) -> Iterator[dict[str, Process]]:
    """Processes by method; they start at once and are ended at the end."""
    pool = {name: Process(name, peers.get(name), **worker) for name in names}
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
        """Return what is left, at most ``most``."""
        return min(most, self.end - time.monotonic())
