"""The tensor operations that lazy logits record instead of computing anything.

Each function takes the lazy logits first and then the arguments of the tensor method. It returns
new lazy logits, or ``NotImplemented`` for arguments that it cannot record: then the logits are
computed.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.transformers.recorded import (
    BIAS,
    CAST,
    CLASSES,
    DEVICE,
    DIVIDE,
    SCALE,
    TANH,
    Recipe,
    Unevaluated,
    add,
    scale_classes,
)


def _cast(lazy: Any, dtype: torch.dtype) -> Any:
    if dtype == lazy.dtype:
        return lazy
    return lazy.derived(lazy.recipe.then(CAST, dtype), dtype=dtype)


def _to(lazy: Any, *args: Any, **kwargs: Any) -> Any:
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    for arg in args:
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, (Tensor, Unevaluated)):
            dtype, device = arg.dtype, arg.device
        elif isinstance(arg, (str, int, torch.device)) and not isinstance(arg, bool):
            device = arg
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    result = lazy if dtype is None else _cast(lazy, dtype)
    if device is not None and torch.device(device) != lazy.device:
        device = torch.device(device)
        result = result.derived(result.recipe.then(DEVICE, device), device=device)
    return result


def _type(lazy: Any, dtype: Any = None, **kwargs: Any) -> Any:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return NotImplemented
    return _cast(lazy, dtype)


def _cast_to(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda lazy, **kwargs: _cast(lazy, dtype)


def _same(lazy: Any, *args: Any, **kwargs: Any) -> Any:
    return lazy.alias(lazy.recipe)


def _clone(lazy: Any, **kwargs: Any) -> Any:
    return lazy.derived(lazy.recipe)


def _detach(lazy: Any) -> Any:
    result = lazy.alias(lazy.recipe)
    result.origin = lazy.origin.without_grad()
    return result


def _view(lazy: Any, *shape: Any, **kwargs: Any) -> Any:
    if "shape" in kwargs:
        shape = tuple(kwargs["shape"])
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    if not shape or not isinstance(shape[-1], (int, torch.SymInt)):
        return NotImplemented  # view(dtype)
    leading: Any = shape[:-1]
    last: Any = shape[-1]
    if last == -1:
        known = math.prod(leading)
        last = lazy.numel() // known if known > 0 else None
    if last != lazy.num_classes:
        return NotImplemented
    # The logits would be contiguous where the features need not be: no view, but reshape.
    recipe = lazy.recipe
    terms = tuple([(e.reshape(*leading, e.shape[-1]), c) for e, c in recipe.terms])
    return lazy.alias(Recipe(terms, recipe.bias, recipe.steps))


def _flatten(lazy: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    end_dim = end_dim % lazy.ndim
    if end_dim == lazy.ndim - 1:
        return NotImplemented if start_dim % lazy.ndim != end_dim else _same(lazy)
    return lazy.alias(lazy.recipe.on_features(lambda e: e.flatten(start_dim, end_dim)))


def _unsqueeze(lazy: Any, dim: int) -> Any:
    dim = dim % (lazy.ndim + 1)
    if dim == lazy.ndim:
        return NotImplemented
    return lazy.alias(lazy.recipe.on_features(lambda e: e.unsqueeze(dim)))


def _squeeze(lazy: Any, *dims: int) -> Any:
    if len(dims) != 1 or not isinstance(dims[0], int) or dims[0] % lazy.ndim == lazy.ndim - 1:
        return NotImplemented
    dim = dims[0] % lazy.ndim  # counted from the front: features and logits agree there
    return lazy.alias(lazy.recipe.on_features(lambda e: e.squeeze(dim)))


def _narrow(lazy: Any, dim: int, start: int, length: int) -> Any:
    index = [slice(None)] * lazy.ndim
    index[dim] = slice(start, start + length)
    return _getitem(lazy, tuple(index))


def _getitem(lazy: Any, index: Any) -> Any:
    index = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, Unevaluated) for item in index):
        return NotImplemented
    used = sum([_dims_used(item) for item in index])
    for position, item in enumerate(index):
        if item is Ellipsis:
            index[position : position + 1] = [slice(None)] * (lazy.ndim - used)
            used = lazy.ndim
            break
    classes = None
    if used == lazy.ndim:
        classes = index.pop()
        if not isinstance(classes, slice):
            return NotImplemented
    recipe = lazy.recipe
    if index:
        leading = (*index, Ellipsis)  # the features' own dimension stays whole
        recipe = recipe.on_features(lambda e: e[leading])
    if classes is None or classes == slice(None):
        return lazy.alias(recipe)
    start, stop, step = classes.indices(lazy.num_classes)
    if step != 1 or stop <= start or recipe.is_divided:
        return NotImplemented
    return lazy.alias(recipe.then(CLASSES, slice(start, stop)), num_classes=stop - start)


def _dims_used(item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.ndim
    return 1


def _mul(lazy: Any, other: Any) -> Any:
    if _is_number(other):
        return lazy.derived(lazy.recipe.then(SCALE, other))
    if not isinstance(other, Tensor) or not other.is_floating_point() or lazy.recipe.has_tanh:
        return NotImplemented
    dtype = _promoted(lazy, other)
    if _is_per_class(lazy, other):
        if not lazy.recipe.is_linear or lazy.origin.reenters or lazy.recipe.is_divided:
            return NotImplemented
        return lazy.derived(scale_classes(lazy.recipe, other.reshape(-1)), dtype=dtype)
    recipe = lazy.recipe
    if not recipe.is_linear or not _is_per_token(lazy, other):
        return NotImplemented
    if recipe.bias is not None:
        if other.numel() != 1:
            return NotImplemented
        recipe = replace(recipe, bias=recipe.bias * other.reshape(()))
    elif lazy.origin.reenters:  # whose bias is not known here
        return NotImplemented
    return lazy.derived(recipe.on_features(lambda e: e * other.to(e.dtype)), dtype=dtype)


def _div(lazy: Any, other: Any, *, rounding_mode: Any = None) -> Any:
    if rounding_mode is not None:
        return NotImplemented
    if _is_number(other):
        return NotImplemented if other == 0 else lazy.derived(lazy.recipe.then(DIVIDE, other))
    if not isinstance(other, Tensor):
        return NotImplemented
    return _mul(lazy, other.reciprocal())


def _add(lazy: Any, other: Any, *, alpha: Any = 1) -> Any:
    if alpha != 1 or lazy.recipe.has_tanh or lazy.recipe.is_divided:
        return NotImplemented
    if isinstance(other, Unevaluated):
        if (
            not (lazy.recipe.is_linear and other.recipe.is_linear)
            or other.pinned
            or other.recipe.is_divided
            or lazy.shape != other.shape
            or lazy.origin.reenters
            or other.origin.reenters
        ):
            return NotImplemented
        dtype = torch.promote_types(lazy.dtype, other.dtype)
        result = lazy.derived(add(lazy.recipe, other.recipe), dtype=dtype)
        result.origin = lazy.origin.merged(other.origin)
        return result
    if isinstance(other, Tensor) and other.is_floating_point() and _is_per_class(lazy, other):
        return lazy.derived(lazy.recipe.then(BIAS, other.reshape(-1)), dtype=_promoted(lazy, other))
    return NotImplemented


def _tanh(lazy: Any) -> Any:
    if lazy.recipe.has_tanh:
        return NotImplemented
    return lazy.derived(lazy.recipe.then(TANH))


def _in_place(operation: Callable[..., Any]) -> Callable[..., Any]:
    def changed(lazy: Any, *args: Any, **kwargs: Any) -> Any:
        if lazy.aliased:
            return NotImplemented
        result = operation(lazy, *args, **kwargs)
        if result is NotImplemented or result.dtype != lazy.dtype:
            return NotImplemented
        lazy.recipe, lazy.origin, lazy.value = result.recipe, result.origin, None
        return lazy

    return changed


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_per_class(lazy: Any, other: Tensor) -> bool:
    """Whether ``other`` holds one number for each class and is the same for all tokens."""
    return bool(
        lazy.num_classes > 1
        and 0 < other.ndim <= lazy.ndim
        and other.shape[-1] == lazy.num_classes
        and other.numel() == lazy.num_classes
    )


def _is_per_token(lazy: Any, other: Tensor) -> bool:
    """Whether ``other`` is a single number, or has one for each token."""
    if other.ndim == 0:
        return True
    return other.ndim <= lazy.ndim and other.shape[-1] == 1


def _promoted(lazy: Any, other: Tensor) -> torch.dtype:
    return lazy.dtype if other.ndim == 0 else torch.promote_types(lazy.dtype, other.dtype)


COMMUTING = frozenset({"mul", "multiply", "add"})
"""Operations that may have the lazy logits as their second argument."""

RECORDED: dict[str, Callable[..., Any]] = {
    "float": _cast_to(torch.float32),
    "double": _cast_to(torch.float64),
    "half": _cast_to(torch.float16),
    "bfloat16": _cast_to(torch.bfloat16),
    "to": _to,
    "type": _type,
    "contiguous": _same,
    "clone": _clone,
    "detach": _detach,
    "view": _view,
    "reshape": _view,
    "flatten": _flatten,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "narrow": _narrow,
    "__getitem__": _getitem,
    "mul": _mul,
    "multiply": _mul,
    "div": _div,
    "divide": _div,
    "true_divide": _div,
    "add": _add,
    "tanh": _tanh,
    "mul_": _in_place(_mul),
    "div_": _in_place(_div),
    "add_": _in_place(_add),
    "tanh_": _in_place(_tanh),
}
