"""``F.cross_entropy`` of lazy logits: by the operator, or from full logits where it cannot."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cut_cross_entropy.device_support import current_autocast
from cut_cross_entropy.distributed.options import VocabParallelOptions
from cut_cross_entropy.lazy.recipe import Recipe, fold, is_foldable
from cut_cross_entropy.lazy.value import LazyValue
from cut_cross_entropy.linear_cross_entropy import linear_cross_entropy

NOTHING: dict[str, Any] = {}


def cross_entropy(
    input: LazyValue,  # (N, V)
    target: Any,  # (N,)
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Compute ``F.cross_entropy`` from lazy logits; the arguments are those of PyTorch.

    What the operator lacks is computed from full logits, with a warning that names it. The gradient
    mode is that of this call.
    """
    call, asked = input.call, reduction
    record = call.record
    if record.options.reduction != "mean":
        reduction = record.options.reduction

    is_usual = (
        weight is None
        and size_average is None
        and reduce is None
        and not label_smoothing
        and not input.is_changed
        and type(target) is Tensor
        and target.dtype == torch.int64
        and input.ndim == 2
        and target.ndim == 1
        and not input.recipe.has_tanh
        and not (record.stays_open and input.recipe.is_normalised)
    )
    missing = None if is_usual else _what_is_missing(input, target, weight, size_average, reduce)
    if missing is not None:
        logits = input.materialise(missing)
        loss = F.cross_entropy(
            logits, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    else:
        further: dict[str, Any] = {}
        if weight is not None:
            further["class_weights"] = weight
        if label_smoothing:
            further["label_smoothing"] = label_smoothing
        loss = fused_cross_entropy(
            input, target, ignore_index, reduction, input.dtype, further=further
        )

    if reduction == "none" and asked != "none":
        loss = _per_token(loss, target, record)
    return loss


def fused_cross_entropy(
    logits: LazyValue,  # (..., V)
    target: Tensor,  # as many elements as there are rows of logits
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype,
    shift: bool = False,
    further: dict[str, Any] = NOTHING,
) -> Tensor:
    """Compute the loss of logits that :func:`is_foldable` accepts by the operator.

    Args:
        logits: of which nothing has changed in place.
        target: class ids.
        ignore_index: target value of tokens without a loss.
        reduction: see ``linear_cross_entropy``.
        dtype: of the logits in the model's code.
        shift: position t predicts target t + 1; ``target`` has the leading shape of ``logits``.
        further: more options of ``linear_cross_entropy``.
    """
    call = logits.call
    options = call.record.options.to_kwargs()
    options["reduction"] = reduction

    def compute(recipe: Recipe) -> Tensor:
        folded = fold(recipe)
        e, c = folded.e, folded.c
        shards = None
        if isinstance(c, Tensor):
            if e.dtype != c.dtype and current_autocast(e.device.type) is None:
                e = e.to(c.dtype)
            if recipe.is_divided:
                shards = VocabParallelOptions.from_dtensor(c)
        result = linear_cross_entropy(
            e,
            c,
            target if target.device == e.device else target.to(e.device),
            bias=folded.bias,
            softcap=folded.softcap,
            ignore_index=ignore_index,
            shift=shift,
            vocab_parallel_options=shards,
            **options,
            **further,
        )
        assert isinstance(result, Tensor)
        return result

    loss = call.compute(logits.recipe, compute)
    call.record.note_loss(call.uses)
    if torch.is_grad_enabled():
        logits.note_use()
    # PyTorch's own is of the logits' dtype, and at least float32 under autocast.
    if dtype != torch.float32 and current_autocast(target.device.type) is not None:
        dtype = torch.promote_types(dtype, torch.float32)
    if loss.dtype != dtype:
        loss = loss.to(dtype)
    return loss if loss.device == target.device else loss.to(target.device)


def _what_is_missing(
    logits: Any, target: Any, weight: Any, size_average: Any, reduce: Any
) -> str | None:
    """Why the operator cannot compute this loss, or None if it can."""
    name = "F.cross_entropy"
    if logits.is_changed:
        return f"{name} of logits that may have been changed in place"
    if weight is not None and (type(weight) is not Tensor or weight.requires_grad):
        return f"{name} with class weights that have a gradient or are not a plain tensor"
    if size_average is not None or reduce is not None:
        return f"{name} with size_average or reduce"
    if not isinstance(target, Tensor):
        return f"{name} of logits with logits"
    if target.is_floating_point():
        return f"{name} with soft targets"
    if target.ndim != logits.ndim - 1 or logits.ndim > 2:
        return f"{name} with classes in another dimension than the last"
    if not is_foldable(logits.recipe):
        return f"{name} of a softcap below 0, or of a softmax"
    return None


def _per_token(loss: Tensor, target: Tensor, record: Any) -> Tensor:
    """Return losses of flattened tokens in the shape of the labels, less columns of padding.

    A causal model shifts its labels by one and drops a column, or pads the labels by a column to
    ignore, which is dropped here: the caller gets (B, T - 1). Where a model does not shift, (B, T).
    Which of them follows from what the model did, never from the values of the labels.
    """
    labels = record.labels
    if labels is None or labels.ndim < 2 or loss.ndim != 1:
        return loss
    *batch, time = labels.shape
    if loss.numel() == labels.numel():
        per_token = loss.reshape(labels.shape)
        return per_token[..., :-1] if record.labels_padded else per_token
    if loss.numel() == labels[..., 1:].numel():
        return loss.reshape(*batch, time - 1)
    return loss
