"""Logits that are not computed: what a patched head returns while the model computes its loss.

Deliberately no subclass of ``torch.Tensor``: nothing in C++ can read a value that is not there, and
``torch.compile`` traces through it. What can be recorded (``recording``) gives new lazy logits;
``F.cross_entropy`` becomes the operator (``lazy_loss``); everything else computes the logits, with
the operations that were recorded, and says so.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.transformers.lazy_loss import cross_entropy
from cut_cross_entropy.transformers.origin import Origin
from cut_cross_entropy.transformers.recorded import Recipe, Unevaluated, replay
from cut_cross_entropy.transformers.recording import COMMUTING, RECORDED

# An operator stands for a method. In-place forms without a method of their own end in "_".
_OPERATORS = {
    "__mul__": "mul",
    "__rmul__": "mul",
    "__truediv__": "div",
    "__add__": "add",
    "__radd__": "add",
    "__imul__": "mul_",
    "__itruediv__": "div_",
    "__iadd__": "add_",
    "__isub__": "sub_",
    "__getitem__": "__getitem__",
    "__setitem__": "__setitem__",
}
_COMPUTING_OPERATORS = (
    *("__sub__", "__rsub__", "__neg__", "__pow__", "__rpow__", "__matmul__", "__rmatmul__"),
    *("__rtruediv__", "__floordiv__", "__mod__", "__abs__", "__eq__", "__ne__", "__lt__", "__le__"),
    *("__gt__", "__ge__", "__bool__", "__float__", "__int__", "__iter__", "__contains__"),
    *("__array__", "__reversed__", "__deepcopy__", "__reduce_ex__"),
)
_ATTRIBUTES = frozenset(name for name in dir(Tensor) if not name.startswith("__"))
_PROPERTIES = frozenset(name for name in _ATTRIBUTES if not callable(getattr(Tensor, name)))
# After these the tensor itself is what later operations have to use.
_PINNING = frozenset({"retain_grad", "register_hook", "requires_grad_", "__setitem__"})


class LazyLogits(Unevaluated):
    """The logits (..., V) of one call of a head.

    Args:
        recipe: how to compute them.
        dtype: of the logits, as the operations so far make it.
        num_classes: size of their last dimension.
        device: where the model's code expects them.
        origin: when and where they were asked for; shared by all that derive from them.
    """

    aliased = False  # whether another object stands for the same memory
    pinned = False  # whether ``value`` was given away for changes
    value: Tensor | None = None

    def __init__(
        self, recipe: Recipe, dtype: torch.dtype, num_classes: int, device: Any, origin: Origin
    ) -> None:
        self.recipe = recipe
        self.dtype = dtype
        self.num_classes = num_classes
        self.device = device
        self.origin = origin

    # What the model may ask without computing anything.

    @property
    def shape(self) -> torch.Size:
        """Of the logits."""
        return torch.Size((*self.recipe.terms[0][0].shape[:-1], self.num_classes))

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.recipe.terms[0][0].ndim

    @property
    def requires_grad(self) -> bool:
        """Whether they are part of the graph."""
        return bool(self.origin.requires_grad)

    @property
    def is_cuda(self) -> bool:
        """Whether they would be on a GPU."""
        return bool(self.device.type == "cuda")

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Number of dimensions."""
        return self.ndim

    def numel(self) -> int:
        """Number of elements that they would have."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Always."""
        return True

    def get_device(self) -> int:
        """Index of the device, -1 without one."""
        return -1 if self.device.index is None else int(self.device.index)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __repr__(self) -> str:
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    __hash__ = object.__hash__

    # Everything else.

    def derived(
        self,
        recipe: Recipe,
        dtype: torch.dtype | None = None,
        num_classes: int | None = None,
        device: Any = None,
    ) -> "LazyLogits":
        """Lazy logits that come from these by one more operation."""
        return LazyLogits(
            recipe,
            self.dtype if dtype is None else dtype,
            self.num_classes if num_classes is None else num_classes,
            self.device if device is None else device,
            self.origin,
        )

    def alias(self, recipe: Recipe, num_classes: int | None = None) -> "LazyLogits":
        """Like :meth:`derived`, for an operation whose result is a view of its argument."""
        view = self.derived(recipe, num_classes=num_classes)
        self.aliased = view.aliased = True
        return view

    def materialise(self, operation: str) -> Tensor:
        """The logits in full, because of ``operation``."""
        if self.value is None:
            self.value = self.origin.compute(self.recipe, replay)
        self.origin.note_read(operation)
        return self.value

    def apply(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The method ``name`` of a tensor, which cannot be recorded."""
        if self.pinned:
            assert self.value is not None
            return getattr(self.value, name)(*concrete(args, name), **concrete(kwargs, name))
        if name in _PINNING or (name.endswith("_") and not name.endswith("__")):
            return self._change(name, args, kwargs)
        value = self.materialise(name)
        return getattr(value, name)(*concrete(args, name), **concrete(kwargs, name))

    def _change(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation that changes the logits in place, or hangs something on them."""
        if self.aliased:
            raise RuntimeError(
                f"{self.origin.model_name} changes its logits in place ({name}) after taking a "
                "view of them, which its patched forward cannot follow: use cce_unpatch"
            )
        value = self.materialise(name)
        self.pinned = True
        result = getattr(value, name)(*concrete(args, name), **concrete(kwargs, name))
        return self if result is value else result

    def __getattr__(self, name: str) -> Any:
        if name not in _ATTRIBUTES:
            raise AttributeError(f"'LazyLogits' object has no attribute {name!r}")
        if name in _PROPERTIES:
            return getattr(self.materialise(name), name)
        return functools.partial(self.apply, name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        name = _OPERATORS.get(name, name)
        if name == "cross_entropy":
            result = cross_entropy(*args, **kwargs)
            if result is not NotImplemented:
                return result
        elif args:
            if name in COMMUTING and not isinstance(args[0], LazyLogits):
                args = (args[1], args[0], *args[2:])
            lazy = args[0]
            if isinstance(lazy, LazyLogits) and not lazy.pinned and name in RECORDED:
                result = RECORDED[name](lazy, *args[1:], **kwargs)
                if result is not NotImplemented:
                    return result
        return func(*concrete(args, name), **concrete(kwargs, name))


def concrete(value: Any, operation: str) -> Any:
    """``value`` with real logits in the place of lazy ones, in tuples, lists and dictionaries."""
    if isinstance(value, Unevaluated):
        return value.materialise(operation)
    if isinstance(value, (tuple, list)):
        return type(value)([concrete(item, operation) for item in value])
    if isinstance(value, dict):
        return {key: concrete(item, operation) for key, item in value.items()}
    return value


def _operator(name: str) -> Any:
    record = RECORDED.get(name)

    def method(self: LazyLogits, *args: Any, **kwargs: Any) -> Any:
        if record is not None and not self.pinned:
            result = record(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return self.apply(name, *args, **kwargs)

    return method


# What is recorded has methods of its own only because they are faster than ``__getattr__``.
for _special, _name in (
    *_OPERATORS.items(),
    *((name, name) for name in (*_COMPUTING_OPERATORS, *RECORDED)),
):
    setattr(LazyLogits, _special, _operator(_name))
