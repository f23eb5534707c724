"""Lazy logits in code that ``torch.compile`` traces.

Dynamo does not trace the construction of tensor subclasses, so a plain object with
``__torch_function__`` stands for the logits there. It is traced away; C++ never sees it.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.lazy.cross_entropy import cross_entropy
from cut_cross_entropy.lazy.operations import COMMUTING, OPERATORS, RECORDED, record
from cut_cross_entropy.lazy.value import LazyValue, StandIn

_SPECIAL = (
    *("__sub__", "__isub__", "__rsub__", "__neg__", "__pow__", "__rpow__", "__matmul__"),
    *("__rmatmul__", "__rtruediv__", "__floordiv__", "__mod__", "__abs__", "__eq__", "__ne__"),
    *("__lt__", "__le__", "__gt__", "__ge__", "__bool__", "__float__", "__int__", "__iter__"),
    *("__contains__", "__reversed__", "__setitem__"),
)
_ATTRIBUTES = frozenset(name for name in dir(Tensor) if not name.startswith("__"))
_PROPERTIES = frozenset(name for name in _ATTRIBUTES if not callable(getattr(Tensor, name)))
_PINNING = frozenset({"retain_grad", "register_hook", "requires_grad_", "__setitem__"})


class TracedLogits(StandIn):
    """Stands for logits (..., V) in traced code.

    Args:
        lazy: the logits.
    """

    def __init__(self, lazy: LazyValue) -> None:
        self.lazy = lazy

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return self.lazy.dtype

    @property
    def device(self) -> torch.device:
        """Of the logits."""
        return self.lazy.device

    @property
    def requires_grad(self) -> bool:
        """Whether they are part of the graph."""
        return self.lazy.requires_grad

    @property
    def is_cuda(self) -> bool:
        """Whether they are on a GPU."""
        return self.lazy.device.type == "cuda"

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Return the number of elements."""
        return self.lazy.numel()

    def is_floating_point(self) -> bool:
        """Return True."""
        return True

    def get_device(self) -> int:
        """Return the index of the device, -1 without one."""
        return -1 if self.device.index is None else int(self.device.index)

    def __len__(self) -> int:
        return int(self.shape[0])

    __hash__ = object.__hash__

    def materialise(self, operation: str) -> Tensor:
        """Return the logits, because of ``operation``."""
        return self.lazy.materialise(operation)

    def apply(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the method ``name`` of a tensor, recorded or of the logits themselves."""
        method = OPERATORS.get(name, name)
        if method in RECORDED:
            result = _record(method, (self, *args), kwargs)
            if result is not NotImplemented:
                return result
        lazy = self.lazy
        if name in _PINNING or (name.endswith("_") and not name.endswith("__")):
            if lazy.storage.shared:
                raise RuntimeError(
                    f"{lazy.call.model_name} changes its logits in place ({name}) after taking a "
                    "view of them, which its patched forward cannot follow where it is compiled: "
                    "use cce_unpatch"
                )
            if name in ("register_hook", "retain_grad"):
                lazy.check_unused(name)
            value = self.materialise(name)
            lazy.storage.given_out = True
            result = getattr(value, name)(*_concrete(args, name), **_concrete(kwargs, name))
            return self if result is value else result
        value = self.materialise(name)
        return getattr(value, name)(*_concrete(args, name), **_concrete(kwargs, name))

    def __getattr__(self, name: str) -> Any:
        if name not in _ATTRIBUTES:
            raise AttributeError(f"'TracedLogits' object has no attribute {name!r}")
        if name in _PROPERTIES:
            return getattr(self.materialise(name), name)
        return functools.partial(self.apply, name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "cross_entropy":
            logits = args[0] if args else kwargs.get("input")
            if isinstance(logits, TracedLogits):
                rest = {key: value for key, value in kwargs.items() if key != "input"}
                return cross_entropy(logits.lazy, *args[1:], **rest)
        else:
            method = OPERATORS.get(name, name)
            if method in RECORDED and args:
                result = _record(method, args, kwargs)
                if result is not NotImplemented:
                    return result
        return func(*_concrete(args, name), **_concrete(kwargs, name))


def _record(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record a method; the result is ``NotImplemented`` where the logits have to be computed."""
    if not isinstance(args[0], TracedLogits):
        if name not in COMMUTING or kwargs or len(args) != 2:
            return NotImplemented
        args = (args[1], args[0])
    logits = args[0]
    if not isinstance(logits, TracedLogits):
        return NotImplemented
    values = tuple([arg.lazy if isinstance(arg, TracedLogits) else arg for arg in args])
    for value in values:
        if isinstance(value, LazyValue) and value.is_changed:
            return NotImplemented
    result = record(name, values[0], values[1:], kwargs)
    if result is NotImplemented:
        return NotImplemented
    return logits if result is logits.lazy else TracedLogits(result)


def _concrete(value: Any, operation: str) -> Any:
    """Return ``value`` with logits in the place of lazy ones, in tuples, lists and dictionaries."""
    if isinstance(value, TracedLogits):
        return value.materialise(operation)
    if isinstance(value, (tuple, list)):
        return type(value)([_concrete(item, operation) for item in value])
    if isinstance(value, dict):
        return {key: _concrete(item, operation) for key, item in value.items()}
    return value


def _operator(name: str) -> Any:
    def method(self: TracedLogits, *args: Any, **kwargs: Any) -> Any:
        return self.apply(name, *args, **kwargs)

    return method


for _name in (*OPERATORS, *_SPECIAL, *RECORDED):
    setattr(TracedLogits, _name, _operator(_name))
