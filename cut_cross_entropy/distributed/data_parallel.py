"""A data-parallel classifier: gathered while it is needed, its gradient reduce-scattered.

Outside of the forward of its module, ``fully_shard`` keeps a parameter as a DTensor, (Shard(0),) or
for HSDP (Replicate(), Shard(0)). The whole exists during the forward and, gathered once more,
during the backward of the loss; between them only the shard does. At the peak, in the backward, a
process holds the whole classifier and the whole of its gradient, (V, D) each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from cut_cross_entropy.distributed.collectives import refuse_create_graph
from cut_cross_entropy.distributed.options import DataParallelOptions


class _Whole(torch.autograd.Function):
    """The whole of a DTensor; the gradient comes back as a DTensor sharded like it."""

    @staticmethod
    def forward(ctx: Any, sharded: Any, like: "Like", options: DataParallelOptions) -> Tensor:
        ctx.sharding = (sharded.device_mesh, sharded.placements)
        ctx.like, ctx.options = Like(sharded.device, sharded.dtype), options
        return _whole(sharded, like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, None, None]:  # type: ignore[override]
        from torch.distributed.tensor import DTensor, Partial

        refuse_create_graph()
        mesh, placements = ctx.sharding
        if ctx.options.reduce_dtype is not None:
            grad = grad.to(ctx.options.reduce_dtype)
        if ctx.options.average:
            # Before the sum, which could leave the range of float16; in place, because it is as
            # large as the whole and nobody else has it.
            grad = grad.div_(mesh.size())
        parts = DTensor.from_local(grad, mesh, [Partial()] * mesh.ndim, run_check=False)
        return parts.redistribute(placements=placements).to(**ctx.like._asdict()), None, None


class Like(NamedTuple):
    """Device and dtype of a tensor."""

    device: torch.device
    dtype: torch.dtype


def _whole(sharded: Any, like: Like) -> Tensor:
    with torch.no_grad():  # cast first: fewer bytes travel
        return sharded.detach().to(**like._asdict()).full_tensor()  # type: ignore[no-any-return]


def gather(sharded: Any, name: str, like: Like, options: DataParallelOptions) -> Tensor:
    """The whole of a DTensor, of a dtype and on a device (which offloaded shards are not on).

    Differentiable; the gradient goes back to where the shard is.

    Raises:
        NotImplementedError: within ``torch.compile``, or sharded otherwise than by rows.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{name} is a DTensor that has to be gathered, which torch.compile cannot trace: call "
            "linear_cross_entropy outside of the compiled region, or within the forward of the "
            "module that fully_shard manages"
        )
    for placement in sharded.placements:
        if not (placement.is_shard(0) or placement.is_replicate()):
            raise NotImplementedError(
                f"{name} must be sharded by rows to be gathered, got placements "
                f"{tuple(sharded.placements)}"
            )
    return _Whole.apply(sharded, like, options)  # type: ignore[no-any-return]


@contextmanager
def gathered_again(pairs: list[tuple[Any, Tensor]]) -> Iterator[None]:
    """Keep the gathered tensors of ``pairs`` out of what autograd saves within this context.

    Each is a DTensor and its whole. In the backward it is gathered once more, by all processes in
    the same order, and shared while anything of the backward holds it.
    """
    storages = {whole.untyped_storage().data_ptr(): i for i, (_, whole) in enumerate(pairs)}
    recipes = [
        (sharded, Like(whole.device, whole.dtype), _version(sharded)) for sharded, whole in pairs
    ]
    again: dict[int, Any] = {}
    del pairs

    def pack(saved: Tensor) -> Any:
        i = storages.get(saved.untyped_storage().data_ptr()) if saved.numel() else None
        if i is None:
            return saved
        return i, saved.shape, saved.stride(), saved.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        i, shape, stride, offset = packed
        whole = again[i]() if i in again else None
        if whole is None:
            sharded, like, version = recipes[i]
            if _version(sharded) != version:
                raise RuntimeError(
                    "a sharded classifier or bias was modified by an inplace operation between "
                    "the loss and its backward"
                )
            whole = _whole(sharded, like)
            again[i] = ref(whole)
        return whole.as_strided(shape, stride, offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _version(sharded: Any) -> int:
    return int(sharded._version + sharded._local_tensor._version)
