"""Checks of the arguments of ``linear_cross_entropy``.

Every message names the argument, what it got and what is allowed. Nothing here reads a value of a
tensor, so nothing stalls a GPU; the range of the targets is checked where they are read.
"""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TARGET_DTYPES = (torch.int64, torch.int32)
REDUCTIONS = ("mean", "sum", "none")


def check_tensors(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    shift: int,
    num_classes: int | None = None,
) -> None:
    """Check types, dtypes, devices and shapes; ``num_classes`` are those of a shard.

    Raises:
        TypeError: not a tensor, or a dtype that is not supported.
        ValueError: shapes or devices that do not fit together, or ``ignore_index`` and targets.
    """
    named = {"e": e, "c": c, "targets": targets}
    if bias is not None:
        named["bias"] = bias
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != e.device:
            raise ValueError(f"{name} must be on the device of e, {e.device}, got {tensor.device}")

    for name in ("e", "c", "bias"):
        if name in named and named[name].dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name} must be one of {_names(FLOAT_DTYPES)}, got {named[name].dtype}"
            )
    if targets.dtype not in TARGET_DTYPES:
        raise TypeError(f"targets must be one of {_names(TARGET_DTYPES)}, got {targets.dtype}")
    limits = torch.iinfo(targets.dtype)
    if not limits.min <= ignore_index <= limits.max:
        raise ValueError(
            f"ignore_index must fit the dtype of targets, {targets.dtype}, got {ignore_index}"
        )

    if e.ndim < 1:
        raise ValueError(f"e must have shape (..., D), got {tuple(e.shape)}")
    if c.ndim != 2:
        raise ValueError(f"c must have shape (V, D), got {tuple(c.shape)}")
    if num_classes is not None and c.shape[0] != num_classes:
        raise ValueError(
            f"c must have the {num_classes} rows that vocab_parallel_options name, "
            f"got {tuple(c.shape)}"
        )
    if (c.shape[0] < 1 and num_classes is None) or c.shape[1] < 1:
        raise ValueError(f"c must have at least one row and one column, got {tuple(c.shape)}")
    if e.shape[-1] != c.shape[1]:
        raise ValueError(
            f"e and c must agree in their last dimension, got {tuple(e.shape)} and {tuple(c.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (c.shape[0],):
        raise ValueError(f"bias must have shape (V,) = ({c.shape[0]},), got {tuple(bias.shape)}")
    _check_target_shape(e, targets, shift)


def _check_target_shape(e: Tensor, targets: Tensor, shift: int) -> None:
    leading, got = tuple(e.shape[:-1]), tuple(targets.shape)
    if shift == 0:
        if leading != got and math.prod(leading) != math.prod(got):
            raise ValueError(
                f"targets must have the leading shape of e, {leading}, or as many elements, "
                f"got {got}"
            )
        return
    if leading != got:
        raise ValueError(
            f"targets must have the leading shape of e, {leading}, when shift={shift}, got {got}"
        )
    if not got:
        raise ValueError(f"shift must be 0 when targets is a single element, got {shift}")
    if shift >= got[-1]:
        raise ValueError(
            f"shift must be in [0, T) with T = {got[-1]}, the last dimension of targets, "
            f"got {shift}"
        )


def check_options(
    ignore_index: int, softcap: float | None, reduction: str, shift: bool | int, memory_budget: int
) -> None:
    """Check the options that are plain values.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, or an unknown reduction.
    """
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if softcap is not None:
        if isinstance(softcap, bool) or not isinstance(softcap, (int, float, torch.SymFloat)):
            raise TypeError(f"softcap must be None or a float, got {type(softcap).__name__}")
        if not softcap > 0 or softcap == math.inf:
            raise ValueError(f"softcap must be None or a finite float > 0, got {softcap!r}")
    if not isinstance(reduction, str):
        raise TypeError(f"reduction must be a string, got {type(reduction).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not isinstance(shift, (bool, int, torch.SymInt)):
        raise TypeError(f"shift must be a bool or an int, got {type(shift).__name__}")
    if shift < 0:
        raise ValueError(f"shift must be >= 0, got {shift}")
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, (int, torch.SymInt)):
        raise TypeError(f"memory_budget must be an int (bytes), got {type(memory_budget).__name__}")
    if memory_budget < 1:
        raise ValueError(f"memory_budget must be at least 1 byte, got {memory_budget}")


def check_compute_dtypes(e: Tensor, c: Tensor, bias: Tensor | None, autocast: bool) -> None:
    """Without autocast the tensors have to agree; a float32 bias goes with every ``c``.

    Raises:
        TypeError: they do not.
    """
    if autocast:
        return
    if e.dtype != c.dtype:
        raise TypeError(
            f"e and c must have the same dtype outside autocast, got {e.dtype} and {c.dtype}"
        )
    if bias is not None and bias.dtype not in (c.dtype, torch.float32):
        raise TypeError(
            f"bias must have the dtype of c, {c.dtype}, or torch.float32, got {bias.dtype}"
        )


def check_target_range(targets: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse targets outside [0, V), where looking does not stall anything.

    On a GPU the look would wait for the device, so it happens under ``CCE_DEBUG=1`` only; without
    it the loss of such a token is NaN.

    Raises:
        ValueError: a target that is neither in [0, V) nor ``ignore_index``.
    """
    if isinstance(targets, FakeTensor) or targets.is_meta:  # a shape and no values
        return
    if targets.device.type != "cpu" and os.environ.get("CCE_DEBUG", "0") != "1":
        return
    wrong = ((targets < 0) | (targets >= num_classes)) & (targets != ignore_index)
    if bool(wrong.any()):
        value = int(targets[wrong][0])
        raise ValueError(
            f"targets must lie in [0, V) with V = {num_classes}, or be "
            f"ignore_index = {ignore_index}, got {value} ({int(wrong.sum())} out of range)"
        )


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
