"""Shapes and dtypes of results on the meta device, found without PyTorch's decompositions.

PyTorch decomposes most functions of meta tensors in Python, for which it imports its compiler and a
symbolic algebra: several seconds of a first call. The few functions that a plan of launches calls
need neither.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _in_place(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _like(x: Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return _empty(x.shape, dtype or x.dtype)


def _test(x: Tensor, other: Any) -> Tensor | None:
    return _empty(x.shape, torch.bool) if _broadcasts(x, other) else None


def _arithmetic(x: Tensor, other: Any) -> Tensor | None:
    return _empty(x.shape, torch.result_type(x, other)) if _broadcasts(x, other) else None


def _where(condition: Tensor, x: Any, other: Any) -> Tensor | None:
    of_values = [value for value in (x, other) if isinstance(value, Tensor)]
    if not of_values or not all(_broadcasts(condition, value) for value in of_values):
        return None
    return _empty(condition.shape, of_values[0].dtype)


def _broadcasts(x: Tensor, other: Any) -> bool:
    """Whether results of both have the shape of ``x``, as they do in plans."""
    return not isinstance(other, Tensor) or other.shape in (x.shape, ())


def _getitem(x: Tensor, key: Any) -> Tensor | None:
    if not isinstance(key, Tensor) or key.dtype == torch.bool:
        return None
    return _empty((*key.shape, *x.shape[1:]), x.dtype)


def _sum(
    x: Tensor, dim: Any = None, dtype: torch.dtype | None = None, **options: Any
) -> Tensor | None:
    if options or not isinstance(dim, int) or not x.is_floating_point():
        return None
    shape = list(x.shape)
    del shape[dim]
    return _empty(shape, dtype or x.dtype)


def _sort(x: Tensor, **_: Any) -> Any:
    return torch.return_types.sort((_empty(x.shape, x.dtype), _empty(x.shape, torch.int64)))


def _mm(x: Tensor, other: Tensor) -> Tensor:
    return _empty((x.shape[0], other.shape[1]), x.dtype)


def _both(names: str) -> list[str]:
    """Return names of functions, and of the operators that are called like them."""
    return [form for name in names.split() for form in (name, f"__{name}__")]


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("add_", "addmm_", "copy_", "div_", "exp2_", "mul_", "zero_"), _in_place),
    **dict.fromkeys(("__iadd__", "__imul__", "__setitem__"), _in_place),
    **dict.fromkeys(("empty_like", "full_like", "ones_like", "zeros_like"), _like),
    **dict.fromkeys(("abs", "bitwise_not", "__invert__", "masked_fill"), _like),
    **dict.fromkeys(_both("eq ge gt le lt ne"), _test),
    **dict.fromkeys(_both("add and mul or rshift sub"), _arithmetic),
    "__getitem__": _getitem,
    "mm": _mm,
    "sort": _sort,
    "sum": _sum,
    "where": _where,
}


class ShapesAlone(TorchFunctionMode):
    """In this mode these functions make results of meta tensors from shapes and dtypes."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        make = _FUNCTIONS.get(getattr(func, "__name__", ""))
        if make is not None and isinstance(args[0], Tensor) and args[0].is_meta:
            out = kwargs.get("out")
            result = make(*args, **kwargs) if out is None else out
            if result is not None:
                return result
        return func(*args, **kwargs)
