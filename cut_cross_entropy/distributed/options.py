"""Which classes a process holds when the vocabulary is spread over a process group."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def partition_n_into_range(n: int, rank: int, world_size: int) -> tuple[int, int]:
    """Range ``[start, stop)`` of ``rank`` when ``n`` items are spread evenly, the rest in front.

    >>> [partition_n_into_range(10, rank, 3) for rank in range(3)]
    [(0, 4), (4, 7), (7, 10)]

    Raises:
        ValueError: ``n`` negative, or ``rank`` not in [0, world_size).
    """
    if n < 0:
        raise ValueError(f"n must be >= 0, got {n}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size) = [0, {world_size}), got {rank}")
    base, extra = divmod(n, world_size)
    start = rank * base + min(rank, extra)
    return start, start + base + (rank < extra)


@dataclass
class VocabParallelOptions:
    """The classes ``[start, stop)`` whose rows of the classifier this process holds.

    Args:
        start: first class of this process.
        stop: one past its last class.
        group: the processes that hold the vocabulary together; None is the default group.
        reduce_e_grad: sum the gradient of ``e`` over the group, or leave each process its part.

    Raises:
        ValueError: not 0 <= start <= stop.
    """

    start: int
    stop: int
    group: "ProcessGroup | None" = None
    reduce_e_grad: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(
                f"start and stop must satisfy 0 <= start <= stop, got {self.start} and {self.stop}"
            )

    @classmethod
    def from_vocab(
        cls, vocab_size: int, group: "ProcessGroup | None" = None, reduce_e_grad: bool = True
    ) -> "VocabParallelOptions":
        """The options of this process when ``vocab_size`` classes are spread evenly.

        Raises:
            RuntimeError: torch.distributed is not initialised.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise RuntimeError(
                "VocabParallelOptions.from_vocab needs torch.distributed.init_process_group first"
            )
        rank = torch.distributed.get_rank(group)
        world_size = torch.distributed.get_world_size(group)
        start, stop = partition_n_into_range(vocab_size, rank, world_size)
        return cls(start, stop, group, reduce_e_grad)
