"""Logits of a tensor-parallel head before its hooks have made an ordinary tensor of them.

A tensor-parallel head (``parallelize_module``, or the ``tp_plan`` of transformers) multiplies
DTensors, each process its classes, and then redistributes the logits. What stands for the product
answers the few questions that such code asks of a DTensor. Whole logits on every process are lazy
again; then the loss is vocabulary-parallel and no process has more than its classes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cut_cross_entropy.distributed.options import is_dtensor
from cut_cross_entropy.lazy.recipe import Recipe, classifier, product
from cut_cross_entropy.lazy.value import LazyValue, StandIn


def why_not_vocab_parallel(x: Any, weight: Any) -> str | None:
    """Return why ``F.linear`` of these DTensors is not a vocabulary-parallel product, or None."""
    if not is_dtensor(weight):
        return "its head got a DTensor for an ordinary weight"
    if weight.device_mesh.ndim != 1 or not weight.placements[0].is_shard(0):
        return f"its head is a DTensor that is not divided by classes ({weight.placements})"
    if not is_dtensor(x) or x.device_mesh != weight.device_mesh:
        return "its head is a DTensor and its features are not, on the same mesh"
    if not x.placements[0].is_replicate():
        return f"its head is tensor-parallel and its features are divided ({x.placements})"
    return None


class LazyShards(StandIn):
    """Logits (..., V) as a DTensor that is not computed.

    Args:
        lazy: the whole logits, from features that every process has and the DTensor's rows.
        placements: how the logits are said to be distributed.
        tensor: makes whole logits of ``lazy`` for the model.
    """

    def __init__(
        self, lazy: LazyValue, placements: tuple[Any, ...], tensor: Callable[[LazyValue], Any]
    ) -> None:
        self.lazy = lazy
        self.placements = placements
        self.tensor = tensor
        self.dtype, self.device = lazy.dtype, lazy.device

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # transformers asks whether it has a DTensor
        from torch.distributed.tensor import DTensor

        return DTensor

    @property
    def device_mesh(self) -> Any:
        """The processes that the classes are divided over."""
        weight: Any = self.lazy.recipe.terms[0][1]
        return weight.device_mesh

    def redistribute(
        self, device_mesh: Any = None, placements: Any = None, *, async_op: bool = False
    ) -> Any:
        """As of a DTensor; nothing is sent."""
        known = device_mesh is None or device_mesh == self.device_mesh
        if known and tuple(placements) == self.placements:
            return self
        if known and all(placement.is_replicate() for placement in placements):
            return LazyShards(self.lazy, tuple(placements), self.tensor)
        logits: Any = self.materialise("redistribute")
        return logits.redistribute(device_mesh, placements)

    def to_local(self, *, grad_placements: Any = None) -> Any:
        """The whole logits, lazy, if every process was to have them; else the real part."""
        if all(placement.is_replicate() for placement in self.placements):
            return self.tensor(self.lazy)
        logits: Any = self.materialise("to_local")
        return logits.to_local(grad_placements=grad_placements)

    def materialise(self, operation: str) -> Tensor:
        """Return the DTensor that the head would have given."""
        call = self.lazy.call

        def compute(recipe: Recipe) -> Tensor:
            (e, c, constant), *_ = recipe.terms
            logits: Any = product(e, classifier(c, constant), recipe.bias)
            return logits.redistribute(placements=self.placements)  # type: ignore[no-any-return]

        with torch.set_grad_enabled(self.lazy.requires_grad):
            logits = call.compute(self.lazy.recipe, compute)
        call.record.note_read(call.uses, operation, True)
        return logits

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "lazy":
            raise AttributeError(name)
        return getattr(self.materialise(name), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def real(shards: LazyShards) -> Tensor:
            return shards.materialise(func.__name__)

        # By what is inside: the class that these objects claim to have is that of DTensors.
        args, kwargs = pytree.tree_map(
            lambda value: real(value) if type(value) is LazyShards else value, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def lazy_shards(lazy: LazyValue, tensor: Callable[[LazyValue], Any]) -> LazyShards:
    """Return what a tensor-parallel head gives, each process its classes of ``lazy``."""
    from torch.distributed.tensor import Shard

    return LazyShards(lazy, (Shard(lazy.ndim - 1),), tensor)
