"""The forward of a patched model: the model's own, with its head and its loss intercepted."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cut_cross_entropy.transformers import interception
from cut_cross_entropy.transformers.deferred_logits import DeferredLogits
from cut_cross_entropy.transformers.forward_record import (
    ForwardRecord,
    active_record,
    enter,
    leave,
)
from cut_cross_entropy.transformers.gathering import gathers, is_sharded
from cut_cross_entropy.transformers.heads import find_heads, num_rows, why_not_intercept
from cut_cross_entropy.transformers.outputs import replace_lazy
from cut_cross_entropy.transformers.utils import PatchOptions

Forward = Callable[..., Any]


def patched_forward(
    original: Forward, options: PatchOptions, is_installed: Callable[[nn.Module], bool]
) -> Forward:
    """``original`` with the loss of ``options``.

    Args:
        original: a forward as a function of ``self``; its signature names ``labels``.
        options: how to compute the loss.
        is_installed: whether the model is patched still. Others keep references to its forward.

    Returns:
        A function of ``self`` with the signature of ``original``. It has no ``__wrapped__``:
        accelerate would take it for a decorator to strip.
    """
    signature = inspect.signature(original)
    position = list(signature.parameters).index("labels") - 1  # without self

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is None and 0 <= position < len(args):
            labels = args[position]
        if not options.use_lce(labels, self.training) or not is_installed(self):
            return original(self, *args, **kwargs)
        if options.reduction != "mean":
            kwargs.pop("num_items_in_batch", None)  # it asks for a mean that nobody wants
        if torch.compiler.is_compiling():
            return _traced(self, original, options, labels, args, kwargs)
        return _intercepted(self, original, options, labels, args, kwargs)

    forward.__name__ = "forward"
    forward.__qualname__ = getattr(original, "__qualname__", "forward")
    forward.__module__ = getattr(original, "__module__", __name__)
    forward.__doc__ = original.__doc__
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.cce_original = original  # type: ignore[attr-defined]
    forward.cce_self = forward  # type: ignore[attr-defined]
    return forward


def is_patched_forward(function: Any) -> bool:
    """Whether :func:`patched_forward` made this function, and not a wrapper copied its attributes.

    ``functools.wraps`` does copy them.
    """
    return function is not None and getattr(function, "cce_self", None) is function


def _intercepted(
    model: nn.Module,
    original: Forward,
    options: PatchOptions,
    labels: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    heads = find_heads(model)
    outer = active_record()
    if outer is not None and heads and all(map(interception.is_intercepted, heads)):
        return original(model, *args, **kwargs)  # a part of a patched model: the whole has them

    record = ForwardRecord(model, options, labels)
    installed: list[interception.HeadForward] = []
    enter(record)
    try:
        for head in heads:
            its_own = gathers(head)
            reason = why_not_intercept(head, its_own)
            if reason is None:
                installed.append(interception.install(head, its_own))
            else:
                record.not_captured = reason
        output = original(model, *args, **kwargs)
        if outer is None:
            output = replace_lazy(output, _replacement(model, installed, record))
    finally:
        leave(record)
        for stand_in in installed:
            interception.remove(stand_in)
    record.check_at_return(torch.is_grad_enabled())
    return output


def _replacement(
    model: nn.Module, installed: list[interception.HeadForward], record: ForwardRecord
) -> Callable[[Any], Any]:
    if model.training:
        return lambda lazy: None
    if is_sharded(model) or any(stand_in.is_spread for stand_in in installed):
        # The weights may be gone after the forward, and only all processes together get them back.
        return lambda lazy: _real(lazy, record)
    return DeferredLogits


def _real(lazy: Any, record: ForwardRecord) -> Tensor:
    record.finished = True  # computing what was asked for is no surprise
    logits: Tensor = lazy.materialise("outputs.logits")
    return logits


def _traced(
    model: nn.Module,
    original: Forward,
    options: PatchOptions,
    labels: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The same in code that ``torch.compile`` traces, where modules cannot change for a while.

    A mode covers the whole forward instead of the head. It exists while tracing only.
    """
    record = ForwardRecord(model, options, labels)
    weights: list[Tensor] = []
    sizes: list[int] = []
    for head in find_heads(model):
        its_own = gathers(head)
        reason = why_not_intercept(head, its_own)
        if reason is None and its_own:
            reason = "its head is sharded by itself and traced by torch.compile"
        rows = num_rows(head)
        if reason is not None:
            record.not_captured = reason
        elif rows is not None:
            sizes.append(rows)
            weights.extend(head.parameters())
    with interception.HeadMode(record, tuple(sizes), weights=weights):
        record.heads_called += 1
        output = original(model, *args, **kwargs)
    if model.training:
        output = replace_lazy(output, lambda lazy: None)
    else:
        output = replace_lazy(output, lambda lazy: _real(lazy, record))
    record.check_at_return(torch.is_grad_enabled())
    return output
