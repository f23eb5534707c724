"""The process of one method of ``research.largest``; a module of the benchmark's workers."""

import time
from typing import Any

import torch

from .data import Problem
from .worker import Worker, call
from .worker import start as start_worker

__all__ = ["call", "start"]


class LargestWorker(Worker):
    """A worker that tries batches of any size."""

    def largest(self, tokens: int) -> dict[str, Any]:
        """Peak of a step with this many tokens, everything included; None if it did not fit."""
        c = self.problem.c
        self.release()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            e = self.problem.e.detach()
            e = e.repeat(-(-tokens // e.shape[0]), 1)[:tokens].requires_grad_()
            targets = self.problem.targets.repeat(-(-tokens // self.problem.targets.shape[0]))
            problem = Problem(e, c, targets[:tokens].contiguous(), self.problem.softcap)
            grads = torch.autograd.grad(self.method.build(problem)(), (e, c))
            torch.cuda.synchronize()
            del grads
        except RuntimeError as error:  # PyTorch's own error of this kind, or a launch's
            if "out of memory" not in str(error):
                raise
            return {"gib": None}
        gib = torch.cuda.max_memory_allocated() / 2**30
        return {"gib": gib, "seconds": time.perf_counter() - start}


def start(name: str) -> None:
    """Prepare this process for a method."""
    start_worker(name, LargestWorker)
