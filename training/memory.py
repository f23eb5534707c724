"""Peak memory of a piece of work, measured and not computed."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import torch

HOW = {
    "cuda": "torch.cuda.max_memory_allocated during the work, less what was allocated before",
    "cpu": "PyTorch's allocator as torch.profiler records it, every allocation and release",
}
"""How the peak is measured, by device type."""


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most memory that ``work`` held at one time beyond what was there before it.

    ``work`` runs twice: the first time warms up workspaces that stay.

    Raises:
        NotImplementedError: no way to measure on that device.
    """
    if device.type not in HOW:
        raise NotImplementedError(f"peak memory is measured on {', '.join(HOW)}, got {device}")
    work()
    return _cuda_peak(work, device) if device.type == "cuda" else _cpu_peak(work)


def _cuda_peak(work: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(work: Callable[[], object]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _silent_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        work()
    # The sums that the profiler's table shows are per operator; a peak needs the single events.
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = ((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = peak = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        held += change
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep the profiler's C++ log off the terminal; Python's own stderr goes there as well."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
