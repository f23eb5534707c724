"""Checks of the arguments of ``linear_cross_entropy``.

Every message names the argument, the value it got and the values it takes; common mistakes get a
hint. Only :func:`check_target_range` reads values of a tensor, so nothing else stalls a GPU.
"""

import functools
import inspect
import math
import operator
import os
from collections.abc import Callable, Collection, Sequence
from typing import ParamSpec, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from cut_cross_entropy.call_context import is_traced, is_transformed
from cut_cross_entropy.constants import DEFAULT_MEMORY_BUDGET, IGNORE_INDEX
from cut_cross_entropy.options import (
    FilterEps,
    Reduction,
    check_chunk_size,
    check_filter_eps,
    check_filter_mass,
    check_flag,
    did_you_mean,
)

P = ParamSpec("P")
T = TypeVar("T")

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TARGET_DTYPES = (torch.int64, torch.int32)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
LOGPROB_ROUNDING = 0.1  # of a logit of some 20 less its log-sum-exp, in bfloat16


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
        check_dense(name, tensor)
        if tensor.device != e.device:
            raise ValueError(f"{name} must be on the device of e, {e.device}, got {tensor.device}")

    for name in ("e", "c", "bias"):
        if name in named:
            check_float_dtype(name, named[name])
    if targets.dtype not in TARGET_DTYPES:
        hint = ": probabilities as targets are not supported" if targets.is_floating_point() else ""
        raise TypeError(
            f"the dtype of targets must be one of {_names(TARGET_DTYPES)}, "
            f"got {targets.dtype}{hint}"
        )
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
        hint = (
            ". Is c transposed? It is (V, D), as the weight of nn.Linear"
            if (e.shape[-1] == c.shape[0])
            else ""
        )
        raise ValueError(
            f"e and c must agree in their last dimension, got {tuple(e.shape)} and "
            f"{tuple(c.shape)}{hint}"
        )
    if bias is not None and tuple(bias.shape) != (c.shape[0],):
        raise ValueError(f"bias must have shape (V,) = ({c.shape[0]},), got {tuple(bias.shape)}")
    _check_target_shape(e, c, targets, shift)


def check_dense(name: str, tensor: Tensor) -> None:
    """Check that an argument is a dense tensor.

    Raises:
        TypeError: not a tensor, or of another layout.
    """
    if not isinstance(tensor, Tensor):
        hint = ": pass its .weight" if isinstance(tensor, nn.Module) else ""
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}{hint}")
    compiling = torch.compiler.is_compiling()  # nested tensors have no strided layout there
    if tensor.layout is not torch.strided or (not compiling and tensor.is_nested):
        raise TypeError(f"{name} must be a dense tensor, got {_layout(tensor)}")


def check_float_dtype(name: str, tensor: Tensor) -> None:
    """Check that a tensor has one of ``FLOAT_DTYPES``.

    Raises:
        TypeError: it has another.
    """
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"the dtype of {name} must be one of {_names(FLOAT_DTYPES)}, got {tensor.dtype}"
        )


def _check_target_shape(e: Tensor, c: Tensor, targets: Tensor, shift: int) -> None:
    leading, got = tuple(e.shape[:-1]), tuple(targets.shape)
    if leading == got:
        if shift and not got:
            raise ValueError(f"shift must be 0 when targets is a single element, got {shift}")
        return
    count = math.prod(got)
    hint = ""
    if count != math.prod(leading) and count == c.shape[0]:
        hint = ". Are e and c swapped? The embeddings come first, then the classifier"
    if shift:
        raise ValueError(
            f"targets must have the leading shape of e, {leading}, when shift={shift}, "
            f"got {got}{hint}"
        )
    if count != math.prod(leading):
        raise ValueError(
            f"targets must have the leading shape of e, {leading}, or as many elements, "
            f"got {got}{hint}"
        )


def check_options(
    *,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    filter_eps: FilterEps = None,
    filter_mass: float | None = None,
    c_grad_chunk_size: int = 0,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    **flags: bool,
) -> None:
    """Check options that are plain values, those that are not given being in order.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, or an unknown reduction.
    """
    if isinstance(ignore_index, bool) or not _is_integer(ignore_index):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if softcap is not None:
        if isinstance(softcap, bool) or not isinstance(softcap, (int, float, torch.SymFloat)):
            raise TypeError(f"softcap must be None or a float, got {type(softcap).__name__}")
        if not softcap > 0 or softcap == math.inf:
            raise ValueError(f"softcap must be None or a finite float > 0, got {softcap!r}")
    check_reduction(reduction)
    check_shift(shift)
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, (int, torch.SymInt)):
        raise TypeError(f"memory_budget must be an int (bytes), got {type(memory_budget).__name__}")
    if memory_budget < 1:
        raise ValueError(f"memory_budget must be at least 1 byte, got {memory_budget}")
    check_filter_eps(filter_eps)
    check_filter_mass(filter_mass)
    check_chunk_size(c_grad_chunk_size)
    check_logit_scale(logit_scale)
    check_label_smoothing(label_smoothing)
    for name, flag in flags.items():
        check_flag(name, flag)


def check_logit_scale(logit_scale: float) -> None:
    """Accept a finite number other than 0.

    Raises:
        TypeError, ValueError: anything else.
    """
    if isinstance(logit_scale, bool) or not isinstance(logit_scale, (int, float, torch.SymFloat)):
        raise TypeError(f"logit_scale must be a float, got {type(logit_scale).__name__}")
    if not 0 < abs(logit_scale) < math.inf:
        raise ValueError(f"logit_scale must be a finite float other than 0, got {logit_scale!r}")


def check_label_smoothing(label_smoothing: float) -> None:
    """Accept a number from 0 to 1.

    Raises:
        TypeError, ValueError: anything else.
    """
    if isinstance(label_smoothing, bool) or not isinstance(
        label_smoothing, (int, float, torch.SymFloat)
    ):
        raise TypeError(f"label_smoothing must be a float, got {type(label_smoothing).__name__}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be a float from 0 to 1, got {label_smoothing!r}")


def check_class_weights(class_weights: Tensor, c: Tensor, first_class: int, exactly: bool) -> None:
    """Accept a vector with a weight for each class; of a shard, for all classes and not its own.

    Args:
        class_weights: (V,).
        c: the classifier or one shard of it.
        first_class: class id of the first row of ``c``.
        exactly: whether ``c`` has all classes.

    Raises:
        TypeError, ValueError: anything else.
    """
    if not isinstance(class_weights, Tensor):
        raise TypeError(f"class_weights must be a torch.Tensor, got {type(class_weights).__name__}")
    if not class_weights.is_floating_point():
        raise TypeError(
            f"the dtype of class_weights must be a floating point one, got {class_weights.dtype}"
        )
    if class_weights.device != c.device:
        raise ValueError(
            f"class_weights must be on the device of c, {c.device}, got {class_weights.device}"
        )
    if class_weights.requires_grad:
        raise ValueError("class_weights have no gradient here: pass class_weights.detach()")
    stop, got = first_class + c.shape[0], tuple(class_weights.shape)
    if len(got) != 1 or (got[0] != stop if exactly else got[0] < stop):
        wanted = f"(V,) = ({stop},)" if exactly else f"(V,) with V >= {stop}, all classes"
        raise ValueError(f"class_weights must have shape {wanted}, got {got}")


def check_num_items(num_items_in_batch: int | Tensor | None, reduction: str) -> None:
    """Accept None, a number above 0, or a tensor of one element, for a mean.

    Raises:
        TypeError, ValueError: anything else.
    """
    if num_items_in_batch is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items_in_batch is the divisor of reduction='mean', got {reduction=}")
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(
                "num_items_in_batch must have one element, got shape "
                f"{tuple(num_items_in_batch.shape)}"
            )
        return
    if isinstance(num_items_in_batch, bool) or not isinstance(
        num_items_in_batch, (int, float, torch.SymInt, torch.SymFloat)
    ):
        raise TypeError(
            "num_items_in_batch must be None, an int or a tensor, got "
            f"{type(num_items_in_batch).__name__}"
        )
    if not num_items_in_batch > 0:
        raise ValueError(f"num_items_in_batch must be > 0, got {num_items_in_batch!r}")


def check_temperature(temperature: float | Tensor, targets: Tensor | None) -> None:
    """Accept a number above 0, or a tensor of them that broadcasts against ``targets``, if known.

    The values of a tensor are looked at where that does not stall anything, as those of targets.

    Raises:
        TypeError, ValueError: anything else.
    """
    if not isinstance(temperature, Tensor):
        if isinstance(temperature, bool) or not isinstance(
            temperature, (int, float, torch.SymFloat)
        ):
            raise TypeError(
                f"temperature must be a float or a tensor, got {type(temperature).__name__}"
            )
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a finite float > 0, got {temperature!r}")
        return
    if targets is not None:
        check_per_token("temperature", temperature, targets)
    if temperature.requires_grad:
        raise ValueError("temperature has no gradient here: pass temperature.detach()")
    if _looks_at_argument(temperature) and not bool(
        (temperature > 0).all() & (temperature < math.inf).all()
    ):
        raise ValueError(
            f"temperature must have finite values > 0, got {float(temperature.min())} to "
            f"{float(temperature.max())}"
        )


def check_per_token(name: str, values: Tensor, targets: Tensor) -> None:
    """Accept a tensor of floats that broadcasts against ``targets``, on its device.

    Raises:
        TypeError, ValueError: anything else.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(values).__name__}")
    if not values.is_floating_point():
        raise TypeError(f"the dtype of {name} must be a floating point one, got {values.dtype}")
    if values.device != targets.device:
        raise ValueError(
            f"{name} must be on the device of targets, {targets.device}, got {values.device}"
        )
    got, wanted = tuple(values.shape), tuple(targets.shape)
    padded = (1,) * (len(wanted) - len(got)) + got
    if len(padded) != len(wanted) or any(
        a not in (1, b) for a, b in zip(padded, wanted, strict=True)
    ):
        raise ValueError(f"{name} must broadcast against targets, {wanted}, got shape {got}")


def check_logprobs(name: str, values: Tensor, mask: Tensor | None) -> None:
    """Refuse what is no logarithm of a probability, such as a logit, where looking stalls nothing.

    Args:
        name: of the argument.
        values: (..., K).
        mask: (..., K), False where the value does not count; None: all count.

    Raises:
        ValueError: a value above 0, by more than rounding in half precision.
    """
    if not _looks_at_argument(values):
        return
    wrong = values > LOGPROB_ROUNDING
    wrong = wrong if mask is None else wrong & mask
    if bool(wrong.any()):
        raise ValueError(
            f"{name} must be log-probabilities, at most 0, got {float(values[wrong].max()):.3g}: "
            "pass log_softmax of all classes at the candidates"
        )


def check_class_ids(name: str, ids: Tensor, targets: Tensor) -> None:
    """Accept class ids (..., K) of each target, as far as shape, dtype and device go.

    Raises:
        TypeError, ValueError: anything else.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype not in TARGET_DTYPES:
        raise TypeError(
            f"the dtype of {name} must be one of {_names(TARGET_DTYPES)}, got {ids.dtype}"
        )
    if ids.device != targets.device:
        raise ValueError(
            f"{name} must be on the device of targets, {targets.device}, got {ids.device}"
        )
    if tuple(ids.shape[:-1]) != tuple(targets.shape) or ids.ndim != targets.ndim + 1:
        raise ValueError(
            f"{name} must have the shape of targets, {tuple(targets.shape)}, with a last dimension "
            f"of K class ids, -1 for none, got {tuple(ids.shape)}"
        )


def check_class_id_range(name: str, ids: Tensor, num_classes: int) -> None:
    """Refuse class ids outside [-1, V), where looking does not stall anything.

    Raises:
        ValueError: an id that is neither -1 nor that of a class.
    """
    if not _looks_at_argument(ids):
        return
    wrong = (ids < -1) | (ids >= num_classes)
    if bool(wrong.any()):
        raise ValueError(
            f"{name} must be class ids in [0, V) with V = {num_classes}, or -1 for none, "
            f"got {int(ids[wrong][0])} ({int(wrong.sum())} out of range)"
        )


def check_outputs(outputs: Collection[str], known: Sequence[str]) -> None:
    """Accept a collection of the names in ``known``.

    Raises:
        TypeError, ValueError: anything else.
    """
    if isinstance(outputs, str) or not isinstance(outputs, Collection):
        got = repr(outputs) if isinstance(outputs, str) else type(outputs).__name__
        raise TypeError(f"outputs must be a collection of names, such as a tuple, got {got}")
    for name in outputs:
        if name not in known:
            hint = did_you_mean(name, known) if isinstance(name, str) else ""
            raise ValueError(f"outputs must be among {', '.join(known)}, got {name!r}{hint}")


def check_top_k(top_k: int, num_classes: int | None) -> None:
    """Accept an int from 0 to V; ``num_classes`` is None if V is not known.

    Raises:
        TypeError, ValueError: anything else.
    """
    if isinstance(top_k, bool) or not isinstance(top_k, (int, torch.SymInt)):
        raise TypeError(f"top_k must be an int, got {type(top_k).__name__}")
    if top_k < 0:
        raise ValueError(f"top_k must be >= 0, got {top_k}")
    if num_classes is not None and top_k > num_classes:
        raise ValueError(f"top_k must be at most V = {num_classes}, got {top_k}")


def check_reduction(reduction: str) -> None:
    """Accept the names in ``REDUCTIONS``.

    Raises:
        TypeError, ValueError: anything else.
    """
    if not isinstance(reduction, str):
        raise TypeError(f"reduction must be a string, got {type(reduction).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {', '.join(REDUCTIONS)}, "
            f"got {reduction!r}{did_you_mean(reduction, REDUCTIONS)}"
        )


def check_shift(shift: bool | int) -> None:
    """Accept a bool or an int >= 0.

    Raises:
        TypeError, ValueError: anything else.
    """
    if not _is_integer(shift):
        raise TypeError(f"shift must be a bool or an int, got {type(shift).__name__}")
    if shift < 0:
        raise ValueError(f"shift must be >= 0, got {shift}")


def _is_integer(value: object) -> bool:
    """Return whether ``value`` is an integer of Python, of NumPy, or symbolic; no tensor."""
    if isinstance(value, (int, torch.SymInt)):
        return True
    if isinstance(value, Tensor):  # a look at it may wait for a GPU
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


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


def _looks_at(tensor: Tensor) -> bool:
    """Whether checks read the values of ``tensor``: on the CPU, elsewhere under ``CCE_DEBUG=1``."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta:  # a shape and no values
        return False
    return tensor.device.type == "cpu" or os.environ.get("CCE_DEBUG", "0") == "1"


def _looks_at_argument(tensor: Tensor) -> bool:
    """The same outside of operators, where a compiler or a transform may have no values."""
    transformed = torch.compiler.is_compiling() or is_traced() or is_transformed()
    return not transformed and _looks_at(tensor)


def check_target_range(targets: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse targets outside [0, V), where looking does not stall anything.

    On a GPU the look would wait for the device, so it happens under ``CCE_DEBUG=1`` only; without
    it the loss of such a token is NaN.

    Raises:
        ValueError: a target that is neither in [0, V) nor ``ignore_index``.
    """
    if not _looks_at(targets):
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


def _layout(tensor: Tensor) -> str:
    """The layout of a tensor that is not dense, and the way out."""
    if tensor.is_nested:
        return "a nested tensor: pass its values() and the targets of the same tokens"
    return f"layout {tensor.layout}: call to_dense() first"


_ELSEWHERE = {
    "target": "the argument is named targets",
    "labels": "the argument is named targets",
    "input": "the embeddings are named e",
    "weight": "class weights are named class_weights, and the classifier c",
    "ce_weight": "class weights are named class_weights",
    "num_items": "the argument is named num_items_in_batch",
    "lse_square_scale": "use return_lse=True and compute_z_loss",
    "size_average": "use reduction",
    "reduce": "use reduction",
}
"""Arguments of similar functions, and what stands for them here."""


def explains_unknown_keywords(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, which refuses unknown keyword arguments with a hint where there is one."""
    known = frozenset(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in known:
                hint = _ELSEWHERE.get(name)
                hint = f": {hint}" if hint else did_you_mean(name, known)
                raise TypeError(
                    f"{function.__name__}() got an unexpected keyword argument {name!r}{hint}"
                )
        return function(*args, **kwargs)

    return checked
