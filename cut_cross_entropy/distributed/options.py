"""Options for a classifier that is spread over processes: by classes, or as data parallelism does.

DTensors are recognised here without importing what defines them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cut_cross_entropy.distributed.collectives import group_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shard(NamedTuple):
    """The classes of this process as the implementations need to know them.

    Args:
        start: the first one.
        group: name of the process group.
        world_size: processes of the group.
    """

    start: int
    group: str
    world_size: int


def partition_n_into_range(n: int, rank: int, world_size: int) -> tuple[int, int]:
    """Range ``[start, stop)`` of ``rank`` when ``n`` items are spread evenly, the rest in front.

    Examples:
        >>> [partition_n_into_range(10, rank, 3) for rank in range(3)]
        [(0, 4), (4, 7), (7, 10)]

    Args:
        n: number of items.
        rank: of this process.
        world_size: number of processes.

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
    """The classes ``[start, stop)`` whose rows of the classifier (and bias) this process holds.

    All processes of the group make the same call with their own rows, and get the same loss. They
    have to compute the same from it, so that each can make its part of the gradients alone.

    Args:
        start: first class of this process.
        stop: one past its last class; ``start`` if it holds none.
        group: the processes that hold the vocabulary together; None is the default group.
        reduce_e_grad: sum the gradient of ``e`` over the group, or leave each process its part.
        gather_e: every process has tokens of its own (sequence parallelism), as many as the others
            (pad with ``ignore_index``): ``e`` is gathered and its gradient reduce-scattered.
            ``"mean"`` and ``"sum"`` are over the tokens of all; losses and log-sum-exps by token
            are those of this process, and what the processes add to their loss from these adds up
            over the group.

    Raises:
        ValueError: not 0 <= start <= stop, or ``gather_e`` without ``reduce_e_grad``.
    """

    start: int
    stop: int
    group: "ProcessGroup | None" = None
    reduce_e_grad: bool = True
    gather_e: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(
                f"start and stop must satisfy 0 <= start <= stop, got {self.start} and {self.stop}"
            )
        if self.gather_e and not self.reduce_e_grad:
            raise ValueError(
                "reduce_e_grad must be True with gather_e: tokens of other processes have no "
                "gradient here that could be left unsummed"
            )

    @classmethod
    def from_vocab(
        cls,
        vocab_size: int,
        group: "ProcessGroup | None" = None,
        reduce_e_grad: bool = True,
        gather_e: bool = False,
    ) -> "VocabParallelOptions":
        """The options of this process when ``vocab_size`` classes are spread evenly.

        Args:
            vocab_size: number of classes over all processes.
            group: the processes that hold the vocabulary together; None is the default group.
            reduce_e_grad: whether to sum the gradient of ``e`` over the group.
            gather_e: whether every process has tokens of its own.

        Returns:
            Options with the range of this process, as :func:`partition_n_into_range` divides it.

        Raises:
            RuntimeError: torch.distributed is not initialised.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise RuntimeError(
                "VocabParallelOptions.from_vocab needs torch.distributed.init_process_group first"
            )
        rank = torch.distributed.get_rank(group)
        size = torch.distributed.get_world_size(group)
        start, stop = partition_n_into_range(vocab_size, rank, size)
        return cls(start, stop, group, reduce_e_grad, gather_e)

    @classmethod
    def from_dtensor(
        cls, c: Tensor, reduce_e_grad: bool = True, gather_e: bool = False
    ) -> "VocabParallelOptions":
        """The options of this process when ``c`` is a DTensor sharded by rows.

        Args:
            c: classifier (V, D) or bias (V,), with the placement ``Shard(0)``.
            reduce_e_grad: whether to sum the gradient of ``e`` over the processes of its mesh.
            gather_e: whether every process has tokens of its own.

        Returns:
            Options with the rows of this process and the group of its mesh.

        Raises:
            TypeError: ``c`` is not a DTensor.
            NotImplementedError: a mesh or placements that do not divide the classes.
        """
        start, stop, group = classes_of(c)
        return cls(start, stop, group, reduce_e_grad, gather_e)

    def shard(self) -> Shard:
        """Return the properties that implementations need."""
        size = torch.distributed.get_world_size(self.group)
        return Shard(self.start, group_name(self.group), size)


@dataclass
class DataParallelOptions:
    """Handling of a classifier (and bias) that ``fully_shard`` has spread over processes.

    They are gathered before the loss, freed after it, gathered again for the gradients, and the
    gradients reduce-scattered. The names are those of FSDP2's ``MixedPrecisionPolicy``.

    Args:
        param_dtype: dtype to gather them in; None is the dtype of autocast, or of ``e`` if that is
            narrower than theirs.
        reduce_dtype: dtype to reduce-scatter their gradients in; None is the gradients' own.
        average: whether the gradient is the mean over the processes, as FSDP has it, or the sum.

    Raises:
        TypeError: a value that is not a floating point dtype.
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    average: bool = True

    def __post_init__(self) -> None:
        for name in ("param_dtype", "reduce_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and not (
                isinstance(dtype, torch.dtype) and dtype.is_floating_point
            ):
                raise TypeError(f"{name} must be None or a floating point dtype, got {dtype!r}")


def is_dtensor(x: object) -> bool:
    """Whether ``x`` is a DTensor, without importing what defines them."""
    # A parameter that is a DTensor is of no class of its own. Dynamo cannot walk the bases of one.
    return isinstance(x, Tensor) and type(x).__name__ == "DTensor"


def classes_of(c: Any) -> tuple[int, int, "ProcessGroup"]:
    """First and one past the last row of this process, and the group that holds all rows.

    Raises:
        TypeError: ``c`` is not a DTensor.
        NotImplementedError: not sharded by rows over a mesh of one dimension.
    """
    if not is_dtensor(c):
        raise TypeError(f"c must be a DTensor, got {type(c).__name__}")
    mesh = c.device_mesh
    if mesh.ndim != 1 or not c.placements[0].is_shard(0):
        raise NotImplementedError(
            f"c must be sharded by rows, Shard(0), over a mesh of one dimension, got a DTensor "
            f"({describe(c)})"
        )
    # As torch.chunk divides: all but the last have as many rows.
    rows = -(-c.shape[0] // mesh.size())
    start = min(mesh.get_local_rank() * rows, c.shape[0])
    return start, min(start + rows, c.shape[0]), mesh.get_group()


def describe(x: Any) -> str:
    """Placements and mesh of a DTensor, for error messages."""
    return f"placements {tuple(x.placements)}, mesh dimensions {x.device_mesh.mesh_dim_names}"
