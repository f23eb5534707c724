"""The tensor operations that lazy logits record instead of computing anything.

Each function takes the lazy logits first and then the arguments of the tensor method. It returns
new lazy logits, the same where PyTorch returns its argument, or ``NotImplemented`` for arguments
that it cannot record: then the logits are computed.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.lazy.recipe import (
    BIAS,
    CAST,
    CLASSES,
    DEVICE,
    DIVIDE,
    SCALE,
    TANH,
    Recipe,
    add,
    scale_classes,
)
from cut_cross_entropy.lazy.value import LazyValue


def record(name: str, lazy: LazyValue, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record the method ``name`` of a tensor.

    Returns:
        Lazy logits, ``lazy`` itself where it is returned or was changed in place, or
        ``NotImplemented``.
    """
    if (
        lazy.call.record.stays_open
        and name not in _OF_PROBABILITIES
        and any(isinstance(v, LazyValue) and v.recipe.is_normalised for v in (lazy, *args))
    ):
        return NotImplemented
    if torch.is_grad_enabled():
        return _RECORDED[name](lazy, *args, **kwargs)
    if name.endswith("_") and not name.endswith("__") and lazy.requires_grad:
        return NotImplemented  # changes the value, and not the graph
    source = without_grad(lazy)
    result = _RECORDED[name](source, *[without_grad(arg) for arg in args], **kwargs)
    return lazy if result is source else result


def without_grad(value: Any) -> Any:
    """Return an argument of an operation that runs where no gradient is recorded."""
    if isinstance(value, LazyValue):
        return _detach(value, shared=value.storage.shared) if value.requires_grad else value
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def _cast(lazy: LazyValue, dtype: torch.dtype) -> LazyValue:
    if dtype == lazy.dtype:
        return lazy
    return lazy.derived(lazy.recipe.then(CAST, dtype), dtype=dtype)


def _to(lazy: LazyValue, *args: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    flags = [arg for arg in args if isinstance(arg, bool)]
    kwargs.pop("non_blocking", None)
    if any(kwargs.values()) or any(flags[1:]):  # a copy, or another memory format
        return NotImplemented
    for arg in args:
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, (Tensor, LazyValue)):
            dtype, device = arg.dtype, arg.device
        elif isinstance(arg, (str, int, torch.device)) and not isinstance(arg, bool):
            device = arg
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    result = lazy if dtype is None else _cast(lazy, dtype)
    if device is not None and not _is_same_device(torch.device(device), lazy.device):
        device = torch.device(device)
        result = result.derived(result.recipe.then(DEVICE, device), device=device)
    return result


def _is_same_device(device: torch.device, own: torch.device) -> bool:
    if device.index is None and device.type == own.type:
        return own.type == "cpu" or own.index == torch.get_device_module(own).current_device()
    return device == own


def _cpu(lazy: LazyValue, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else _to(lazy, "cpu")


def _type(lazy: LazyValue, dtype: Any = None, **kwargs: Any) -> Any:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return NotImplemented
    return _cast(lazy, dtype)


def _cast_to(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda lazy, **kwargs: NotImplemented if kwargs else _cast(lazy, dtype)


def _contiguous(lazy: LazyValue, **kwargs: Any) -> Any:
    if kwargs:
        return NotImplemented
    if lazy.geometry is None or lazy.geometry.is_contiguous():
        return lazy
    return lazy.derived(lazy.recipe, geometry=lazy.geometry.contiguous())


def _clone(lazy: LazyValue, **kwargs: Any) -> Any:
    if kwargs or (lazy.recipe.steps and lazy.recipe.steps[-1][0] == TANH):
        return NotImplemented  # the backward of tanh needs its result, so the copy has to be one
    return lazy.derived(lazy.recipe)


def _detach(lazy: LazyValue, shared: bool = True) -> LazyValue:
    result = lazy.view(lazy.recipe.detached(), Tensor.detach, lazy.geometry)
    result.requires_grad = False
    lazy.storage.shared = shared
    return result


def _lead(
    lazy: LazyValue,
    function: Callable[[Tensor], Tensor],
    of_logits: Callable[[Tensor], Tensor] | None = None,
) -> LazyValue:
    """Apply to features and logits an operation that leaves their last dimension alone."""
    of_logits = of_logits or function
    if lazy.geometry is None:
        return lazy.view(lazy.recipe.on_features(function), of_logits, None)
    geometry = of_logits(lazy.geometry)  # raises what it would raise for the logits
    recipe = lazy.recipe.on_features(function)
    if torch._C._is_alias_of(geometry, lazy.geometry):  # type: ignore[attr-defined]
        return lazy.view(recipe, of_logits, geometry)
    return lazy.derived(recipe, geometry=geometry)


def _view(lazy: LazyValue, *shape: Any, **kwargs: Any) -> Any:
    return _shaped(lazy, shape, kwargs, "view")


def _reshape(lazy: LazyValue, *shape: Any, **kwargs: Any) -> Any:
    return _shaped(lazy, shape, kwargs, "reshape")


def _shaped(lazy: LazyValue, shape: Any, kwargs: dict[str, Any], name: str) -> Any:
    if not shape and len(kwargs) == 1:
        shape = (next(iter(kwargs.values())),)
    elif kwargs:
        return NotImplemented
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    if not shape or not all(isinstance(size, (int, torch.SymInt)) for size in shape):
        return NotImplemented  # view(dtype)
    leading: Any = shape[:-1]
    last: Any = shape[-1]
    if last == -1:
        known = math.prod(leading)
        last = lazy.numel() // known if known > 0 else None
    if last != lazy.num_classes:
        return NotImplemented
    # The logits may be contiguous where the features are not: those need reshape.
    return _lead(
        lazy,
        lambda e: e.reshape(*leading, e.shape[-1]),
        lambda logits: getattr(logits, name)(*leading, logits.shape[-1]),
    )


def _flatten(lazy: LazyValue, start_dim: int = 0, end_dim: int = -1, **kwargs: Any) -> Any:
    ndim = lazy.ndim
    if kwargs or not (-ndim <= start_dim < ndim and -ndim <= end_dim < ndim):
        return NotImplemented
    start_dim, end_dim = start_dim % ndim, end_dim % ndim
    if end_dim == ndim - 1:
        return lazy if start_dim == end_dim else NotImplemented
    return _lead(lazy, lambda tensor: tensor.flatten(start_dim, end_dim))


def _unsqueeze(lazy: LazyValue, dim: int, **kwargs: Any) -> Any:
    if kwargs or not -lazy.ndim <= dim + 1 <= lazy.ndim + 1:
        return NotImplemented
    dim = dim % (lazy.ndim + 1)
    if dim == lazy.ndim:
        return NotImplemented
    return _lead(lazy, lambda tensor: tensor.unsqueeze(dim))


def _squeeze(lazy: LazyValue, *dims: Any, **kwargs: Any) -> Any:
    if kwargs or len(dims) != 1 or not isinstance(dims[0], int):
        return NotImplemented
    if not -lazy.ndim <= dims[0] < lazy.ndim or dims[0] % lazy.ndim == lazy.ndim - 1:
        return NotImplemented
    dim = dims[0] % lazy.ndim  # counted from the front: features and logits agree there
    return _lead(lazy, lambda tensor: tensor.squeeze(dim))


def _transpose(lazy: LazyValue, *dims: Any, **kwargs: Any) -> Any:
    if kwargs or len(dims) != 2 or not all(isinstance(dim, int) for dim in dims):
        return NotImplemented
    if not all(-lazy.ndim <= dim < lazy.ndim for dim in dims):
        return NotImplemented
    first, second = dims[0] % lazy.ndim, dims[1] % lazy.ndim
    if lazy.ndim - 1 in (first, second):
        return NotImplemented
    return _lead(lazy, lambda tensor: tensor.transpose(first, second))


def _permute(lazy: LazyValue, *dims: Any, **kwargs: Any) -> Any:
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = tuple(dims[0])
    if kwargs or len(dims) != lazy.ndim or not all(isinstance(dim, int) for dim in dims):
        return NotImplemented
    if dims[-1] not in (-1, lazy.ndim - 1):
        return NotImplemented
    return _lead(lazy, lambda tensor: tensor.permute(dims))


def _narrow(lazy: LazyValue, dim: Any, start: Any, length: Any, **kwargs: Any) -> Any:
    if kwargs or not all(isinstance(value, int) for value in (dim, start, length)):
        return NotImplemented
    if not -lazy.ndim <= dim < lazy.ndim:
        return NotImplemented
    size = lazy.shape[dim]
    start = start + size if start < 0 else start
    if not (start >= 0 and length >= 0 and start + length <= size):
        return NotImplemented
    index = [slice(None)] * lazy.ndim
    index[dim] = slice(start, start + length)
    return _getitem(lazy, tuple(index))


def _getitem(lazy: LazyValue, index: Any) -> Any:
    if isinstance(index, (list, range)) and not all(isinstance(item, int) for item in index):
        return NotImplemented  # PyTorch takes a list of lists for a tuple
    index = list(index) if isinstance(index, tuple) else [index]
    advanced = False
    for position, item in enumerate(index):
        if item is None or item is Ellipsis or isinstance(item, slice):
            continue
        if isinstance(item, (int, torch.SymInt)) and not isinstance(item, bool):
            continue
        item = _as_index(item, lazy.recipe.terms[0][0].device)
        if item is None:
            return NotImplemented
        index[position], advanced = item, True
    used = sum([_dims_used(item) for item in index])
    for position, item in enumerate(index):
        if item is Ellipsis:
            index[position : position + 1] = [slice(None)] * (lazy.ndim - used)
            used = lazy.ndim
            break
    classes = None
    if used > lazy.ndim:
        return NotImplemented
    if used == lazy.ndim:
        classes = index.pop()
        if not isinstance(classes, slice):
            return NotImplemented
    if classes is not None and classes != slice(None):
        start, stop, step = classes.indices(lazy.num_classes)
        if step != 1 or stop <= start or lazy.recipe.is_divided:
            return NotImplemented
    result = lazy
    if index:
        leading = (*index, Ellipsis)  # the features' own dimension stays whole
        result = _gather(lazy, leading) if advanced else _lead(lazy, lambda t: t[leading])
    if classes is None or classes == slice(None):
        return result if index else _lead(lazy, lambda tensor: tensor[...])
    start, stop, _ = classes.indices(lazy.num_classes)
    part = slice(start, stop)
    geometry = None if result.geometry is None else result.geometry[..., part]
    recipe = result.recipe.then(CLASSES, part)
    return result.view(recipe, lambda logits: logits[..., part], geometry, num_classes=stop - start)


def _as_index(item: Any, device: torch.device) -> Any:
    """Return an index array as a tensor, or None for what is not one."""
    if not isinstance(item, Tensor):
        if isinstance(item, LazyValue) or not hasattr(item, "__len__"):
            return None
        try:
            item = torch.as_tensor(item)
        except (TypeError, ValueError, RuntimeError):
            return None
        item = item if item.numel() else item.long()
    if item.dtype not in (torch.bool, torch.uint8, torch.int64, torch.int32) or not item.ndim:
        return None
    return item if item.device.type == "cpu" or item.device == device else item.to(device)


def _gather(lazy: LazyValue, index: tuple[Any, ...]) -> LazyValue:
    """Index leading dimensions with arrays, which copies."""
    recipe = lazy.recipe.on_features(lambda e: e[index])
    if lazy.geometry is None:
        return lazy.view(recipe, lambda logits: logits[index], None)
    shape = (*recipe.terms[0][0].shape[:-1], lazy.num_classes)
    return lazy.derived(recipe, geometry=torch.empty(shape, device="meta"))


def _dims_used(item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.ndim
    return 1


def _mul(lazy: LazyValue, other: Any, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else _scaled(lazy, other, SCALE)


def _div(lazy: LazyValue, other: Any, *, rounding_mode: Any = None, **kwargs: Any) -> Any:
    if kwargs or rounding_mode is not None or (_is_number(other) and other == 0):
        return NotImplemented
    return _scaled(lazy, other, DIVIDE)


def _scaled(lazy: LazyValue, other: Any, how: str) -> Any:
    recipe = lazy.recipe
    if _is_number(other):
        return lazy.derived(recipe.then(how, other))
    if not isinstance(other, Tensor) or not other.is_floating_point() or recipe.has_tanh:
        return NotImplemented
    if other.ndim and other.device != lazy.device:
        return NotImplemented
    dtype = _promoted(lazy, other)
    if _is_per_class(lazy, other):
        if not recipe.is_linear or lazy.call.reenter is not None or recipe.is_divided:
            return NotImplemented
        factors = other.reshape(-1)
        if how == DIVIDE:
            factors = factors.reciprocal()
        return lazy.derived(scale_classes(recipe, factors).then(CAST, dtype), dtype=dtype)
    if not _is_per_token(lazy, other):
        return NotImplemented
    # Everything that is added scales with the product; per token, a bias would become a matrix.
    added = [value for name, value in recipe.steps if name == BIAS]
    if (recipe.bias is not None or added) and other.numel() != 1:
        return NotImplemented
    if lazy.call.reenter is not None:  # whose bias is not known here
        return NotImplemented

    def scale(tensor: Tensor, factor: Tensor) -> Tensor:
        if factor.dtype != tensor.dtype:  # rounded once, not the factor and the result
            high = torch.promote_types(tensor.dtype, factor.dtype)
            scaled = scale(tensor.to(high), factor.to(high))
            return scaled.to(tensor.dtype)
        return tensor / factor if how == DIVIDE else tensor * factor

    number = other.reshape(()) if other.numel() == 1 else other
    scaled = Recipe(
        tuple([(scale(e, other), c, constant) for e, c, constant in recipe.terms]),
        None if recipe.bias is None else scale(recipe.bias, number),
        tuple([(n, scale(v, number) if n == BIAS else v) for n, v in recipe.steps]),
    )
    return lazy.derived(scaled if dtype == lazy.dtype else scaled.then(CAST, dtype), dtype=dtype)


def _add(lazy: LazyValue, other: Any, *, alpha: Any = 1, **kwargs: Any) -> Any:
    recipe = lazy.recipe
    if kwargs or alpha != 1 or recipe.has_tanh or recipe.is_divided:
        return NotImplemented
    if isinstance(other, LazyValue):
        if (
            not (recipe.is_linear and other.recipe.is_linear)
            or other.recipe.is_divided
            or lazy.shape != other.shape
            or lazy.device != other.device
            or lazy.call.reenter is not None
            or other.call.reenter is not None
        ):
            return NotImplemented
        dtype = torch.promote_types(lazy.dtype, other.dtype)
        result = lazy.derived(add(recipe, other.recipe).then(CAST, dtype), dtype=dtype)
        result.call = result.storage.call = lazy.call.merged(other.call)
        other.note_use()
        return result
    if (
        isinstance(other, Tensor)
        and other.is_floating_point()
        and other.device == lazy.device
        and _is_per_class(lazy, other)
    ):
        added = other.reshape(-1).clone()  # the model may change it afterwards
        return lazy.derived(recipe.then(BIAS, added), dtype=_promoted(lazy, other))
    return NotImplemented


def _tanh(lazy: LazyValue, **kwargs: Any) -> Any:
    if kwargs or lazy.recipe.has_tanh:
        return NotImplemented
    return lazy.derived(lazy.recipe.then(TANH))


def _in_place(operation: Callable[..., Any]) -> Callable[..., Any]:
    def changed(lazy: LazyValue, *args: Any, **kwargs: Any) -> Any:
        if lazy.storage.shared or lazy.views:
            return NotImplemented
        used = lazy.used
        result = operation(lazy, *args, **kwargs)
        if result is NotImplemented or result.dtype != lazy.dtype:
            lazy.used = used
            return NotImplemented
        lazy.replace(result)
        return lazy

    return changed


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_per_class(lazy: LazyValue, other: Tensor) -> bool:
    """Return whether ``other`` holds one number for each class and is the same for all tokens."""
    return bool(
        lazy.num_classes > 1
        and 0 < other.ndim <= lazy.ndim
        and other.shape[-1] == lazy.num_classes
        and other.numel() == lazy.num_classes
    )


def _is_per_token(lazy: LazyValue, other: Tensor) -> bool:
    """Return whether ``other`` is a single number, or has one for each token."""
    if other.ndim == 0:
        return True
    if other.ndim > lazy.ndim or other.shape[-1] != 1:
        return False
    leading = lazy.shape[lazy.ndim - other.ndim : -1]
    return all(size in (1, own) for size, own in zip(other.shape[:-1], leading, strict=True))


def _promoted(lazy: LazyValue, other: Tensor) -> torch.dtype:
    return lazy.dtype if other.ndim == 0 else torch.promote_types(lazy.dtype, other.dtype)


_OF_PROBABILITIES = frozenset(
    {"float", "double", "to", "contiguous", "detach", "view", "reshape", "flatten", "unsqueeze"}
    | {"squeeze", "transpose", "permute", "narrow", "__getitem__"}
)

COMMUTING = frozenset({"mul", "multiply", "add"})
"""Operations that may have the lazy logits as their second argument."""

_RECORDED: dict[str, Callable[..., Any]] = {
    "float": _cast_to(torch.float32),
    "double": _cast_to(torch.float64),
    "half": _cast_to(torch.float16),
    "bfloat16": _cast_to(torch.bfloat16),
    "to": _to,
    "cpu": _cpu,
    "type": _type,
    "contiguous": _contiguous,
    "clone": _clone,
    "detach": lambda lazy, **kwargs: NotImplemented if kwargs else _detach(lazy),
    "view": _view,
    "reshape": _reshape,
    "flatten": _flatten,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "permute": _permute,
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
RECORDED = frozenset(_RECORDED)
"""Names of the methods that :func:`record` takes."""

OPERATORS = {
    "__mul__": "mul",
    "__rmul__": "mul",
    "__truediv__": "div",
    "__add__": "add",
    "__radd__": "add",
    "__imul__": "mul_",
    "__itruediv__": "div_",
    "__iadd__": "add_",
}
"""The method that each operator stands for."""

KEPT_AFTERWARDS = frozenset(
    {"float", "double", "half", "bfloat16", "to", "type", "detach", "clone", "contiguous", "cpu"}
)
"""Operations that hand logits on and stay unevaluated after the forward; a part is a use."""
