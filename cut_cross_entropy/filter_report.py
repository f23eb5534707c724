"""Records of the gradient filter, one for every backward pass.

>>> with record_filter() as records:  # doctest: +SKIP
...     loss.backward()
>>> records[0].path, records[0].strips_kept  # doctest: +SKIP
('filtered', 0.019)
"""

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class FilterRecord:
    """One backward pass of the kernels.

    Args:
        path: ``"filtered"``, ``"dense"`` (the data was too flat to skip anything) or ``"exact"``
            (no filter was asked for).
        strips_kept: fraction of the strips (a class for 128 tokens) that were computed.
        dropped_mass: mean probability of a token that the tail stands for.
        flat_tokens: tokens treated without the filter because their distribution is flat.
        tokens: tokens that are not ignored.
    """

    path: str
    strips_kept: float
    dropped_mass: float
    flat_tokens: int
    tokens: int


_collectors: list[list[FilterRecord]] = []
_silent: contextvars.ContextVar[bool] = contextvars.ContextVar("silent", default=False)


@contextlib.contextmanager
def record_filter() -> Iterator[list[FilterRecord]]:
    """Collect a :class:`FilterRecord` for every backward pass of the kernels inside the block.

    Recording reads values from the device and so waits for it, more than a backward does anyway.
    Passes that are captured in a CUDA graph are left out.
    """
    records: list[FilterRecord] = []
    _collectors.append(records)
    try:
        yield records
    finally:
        # By identity: two empty lists are equal.
        _collectors[:] = [other for other in _collectors if other is not records]


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Suppress recording inside the block, in this thread."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def recording() -> bool:
    """Whether a :func:`record_filter` block is active and not suppressed in this thread."""
    return bool(_collectors) and not _silent.get()


def report(record: FilterRecord) -> None:
    """Add a record to the list of every active :func:`record_filter` block."""
    for records in _collectors:
        records.append(record)
