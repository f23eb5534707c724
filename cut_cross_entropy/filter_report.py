"""Records of the gradient filter, one for every backward pass.

>>> with record_filter() as records:  # doctest: +SKIP
...     loss.backward()
>>> records[0].path, records[0].strips_kept  # doctest: +SKIP
('filtered', 0.019)
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FilterRecord:
    """One backward pass of the kernels.

    The errors are estimates from a sample: rows that are drawn by their share in the gradient and
    in what was dropped, and computed exactly. They are those of the gradients as returned, their
    rounding included, and None for a gradient that the filter did not compute. Of a vocabulary that
    is sharded over processes they are about the classes of this process.

    Args:
        path: ``"filtered"``, ``"dense"`` (the data was too flat to skip anything, or too much would
            have been left to the tail) or ``"exact"`` (no filter was asked for, or ``"auto"``
            found the problem too small to gain from one).
        strips_kept: fraction of the strips (a class for 128 tokens) that were computed.
        dropped_mass: mean probability of a token that the tail stands for.
        flat_tokens: tokens treated without the filter because their distribution is flat.
        tokens: tokens that are not ignored.
        error_e: relative error (Frobenius norm) of the gradient of the embeddings, in multiples of
            0.166 %, the error of rounding it to bfloat16. None for heads of rows on demand.
        error_c: the same of the gradient of the classifier.
        cosines_c: cosines between rows of the classifier's gradient and the exact rows, percentiles
            1, 10 and 50 over 256 classes spaced evenly.
    """

    path: str
    strips_kept: float
    dropped_mass: float
    flat_tokens: int
    tokens: int
    # Factories leave no value in the class, which would hide a missing one from __getattr__.
    error_e: float | None = field(default_factory=lambda: None)
    error_c: float | None = field(default_factory=lambda: None)
    cosines_c: tuple[float, float, float] | None = field(default_factory=lambda: None)

    @classmethod
    def pending(
        cls,
        read: Callable[[], dict[str, Any]],
        path: str,
        strips_kept: float,
        flat_tokens: int,
        tokens: int,
    ) -> "FilterRecord":
        """Return a record whose other values are read when one of them is first asked for."""
        record = cls(path, strips_kept, 0.0, flat_tokens, tokens)
        for name in ("dropped_mass", "error_e", "error_c", "cosines_c"):
            record.__dict__.pop(name)
        record.__dict__["_read"] = read
        return record

    def __getattr__(self, name: str) -> Any:  # only where the attribute is missing
        read = self.__dict__.pop("_read", None)
        if read is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self.__dict__.update(read())
        return getattr(self, name)


_collectors: list[list[FilterRecord]] = []
_silent: contextvars.ContextVar[bool] = contextvars.ContextVar("silent", default=False)


@contextlib.contextmanager
def record_filter() -> Iterator[list[FilterRecord]]:
    """Collect a :class:`FilterRecord` for every backward pass of the kernels inside the block.

    Recording computes a few rows of the gradients exactly, to measure their errors; the gradients
    stay the same. It does not wait for the device: that happens when a value of a record is read.
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
