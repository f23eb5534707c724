"""Logits of an evaluation: a tensor that computes itself when it is first used."""

from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.transformers.recorded import Unevaluated
from cut_cross_entropy.transformers.recording import RECORDED

# What stays unevaluated. (Views would too, but whoever takes a part is about to use it.)
_KEPT_LAZY = frozenset(
    {"float", "double", "half", "bfloat16", "to", "type", "detach", "clone", "contiguous", "cpu"}
)
_METADATA = frozenset(
    {"size", "dim", "numel", "nelement", "is_floating_point", "is_complex", "get_device", "stride"}
    | {"__len__", "element_size", "is_contiguous", "ndimension", "is_inference"}
)
_PROPERTIES = frozenset(
    {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_sparse", "is_meta"}
    | {"is_quantized", "is_mps", "is_xpu", "itemsize"}
)


class DeferredLogits(Tensor):
    """Logits (..., V) that are computed on first use and kept from then on.

    Casts, moves and ``detach`` stay deferred, so that handing them through an evaluation loop
    computes nothing. Grad mode and autocast are those of the forward.
    """

    _lazy: Any
    _value: Tensor | None

    @staticmethod
    def __new__(cls, lazy: Any) -> "DeferredLogits":
        """A tensor of the shape, dtype and device of ``lazy``."""
        # Whether a gradient is wanted is answered in Python: a wrapper that required one would
        # swallow the gradient that an autograd.Function sends it.
        logits: DeferredLogits = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, lazy.shape, dtype=lazy.dtype, device=lazy.device, requires_grad=False
        )
        logits._lazy = lazy
        logits._value = None
        return logits

    def compute(self) -> Tensor:
        """The logits as an ordinary tensor."""
        if self._value is None:
            self._value = self._lazy.materialise("outputs.logits")
            self._lazy = None  # the features are not needed any more
        return self._value

    @property
    def is_computed(self) -> bool:
        """Whether the logits were used."""
        return self._value is not None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if isinstance(first, DeferredLogits) and not first.is_computed:
            lazy = first._lazy
            if name == "__get__" or name in _METADATA:
                answer = _metadata(func, name, first, lazy, args, kwargs)
                if answer is not NotImplemented:
                    return answer
            if name == "cpu":
                name, args = "to", (first, "cpu")
            if name in _KEPT_LAZY:
                result = RECORDED[name](lazy, *args[1:], **kwargs)
                if isinstance(result, Unevaluated):
                    return first if result is lazy else DeferredLogits(result)
        return func(*_computed(args), **_computed(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*_computed(args), **_computed(kwargs or {}))


def _metadata(
    func: Any, name: str, logits: DeferredLogits, lazy: Any, args: Any, kwargs: Any
) -> Any:
    """What is known without computing, or ``NotImplemented``."""
    if name == "__get__":
        owner = getattr(func, "__self__", None)
        name = getattr(owner, "__name__", "")
        if name == "requires_grad":
            return lazy.requires_grad
        if name not in _PROPERTIES:
            return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _computed(value: Any) -> Any:
    if isinstance(value, DeferredLogits):
        return value.compute()
    if isinstance(value, (tuple, list)):
        items = [_computed(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: _computed(item) for key, item in value.items()}
    return value
