"""The forward of a patched model: the model's own, with its head and its loss intercepted."""

import copy
import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from cut_cross_entropy.lazy import intercept
from cut_cross_entropy.lazy.notices import call_count, warn_once
from cut_cross_entropy.lazy.record import ForwardRecord, active_record
from cut_cross_entropy.lazy.sharded_heads import (
    gathers,
    is_sharded,
    num_rows,
    why_not_intercept,
)
from cut_cross_entropy.lazy.value import Unevaluated
from cut_cross_entropy.transformers import causal_loss
from cut_cross_entropy.transformers.heads import find_heads
from cut_cross_entropy.transformers.replaced_loss import calling_the_replacement, is_replaced
from cut_cross_entropy.transformers.utils import PatchOptions, divisor

Forward = Callable[..., Any]
Run = Callable[[], Any]  # a forward with its model and its arguments


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
        if labels is None:
            labels = _labels_in_a_dictionary(args, kwargs)
        if not options.use_lce(labels, self.training) or not is_installed(self):
            if (
                options.lazy_logits
                and labels is None
                and not kwargs.get("use_cache")
                and (self.training or not options.train_only)
                and not torch.compiler.is_compiling()
                and is_installed(self)
            ):
                return _lazy(self, partial(original, self, *args, **kwargs), options)
            output = original(self, *args, **kwargs)
            if labels is None and not torch.compiler.is_compiling() and is_installed(self):
                _warn_about_a_loss(self, output)
            return output
        if options.reduction != "mean":
            kwargs.pop("num_items_in_batch", None)  # it asks for a mean
        elif kwargs.get("num_items_in_batch") is not None:
            kwargs["num_items_in_batch"] = divisor(kwargs["num_items_in_batch"])
        run = partial(original, self, *args, **kwargs)
        if torch.compiler.is_compiling():
            if not is_replaced():
                return _traced(self, run, options, labels)
            warn_once(
                type(self).__name__,
                "apply_lce compiled",
                "apply_lce was replaced, and only eager code calls the replacement, so the forward "
                "of a batch with labels is not compiled",
            )
            return _not_traced(self, original, options, labels, args=args, kwargs=kwargs)
        if is_replaced():
            with calling_the_replacement(self, options):
                return _intercepted(self, run, options, labels)
        return _intercepted(self, run, options, labels)

    forward.__name__ = "forward"
    forward.__qualname__ = getattr(original, "__qualname__", "forward")
    forward.__module__ = getattr(original, "__module__", __name__)
    forward.__doc__ = original.__doc__
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.cce_original = original  # type: ignore[attr-defined]
    forward.cce_self = forward  # type: ignore[attr-defined]
    return forward


def _labels_in_a_dictionary(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the labels where a forward of the model's own takes all inputs in one dictionary."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Mapping) and value.get("labels") is not None:
            return value["labels"]
    return None


def _warn_about_a_loss(model: nn.Module, output: Any) -> None:
    """Say so if a call in which no labels were found has returned a loss from full logits."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is not None and not call_count(model):
        warn_once(
            type(model).__name__,
            "no labels",
            "its forward returned a loss, and no labels were found among its arguments: the patch "
            "did nothing. Pass labels=, or a dictionary with labels",
        )


def is_patched_forward(function: Any) -> bool:
    """Whether :func:`patched_forward` made this function, and not a wrapper copied its attributes.

    ``functools.wraps`` does copy them.
    """
    return function is not None and getattr(function, "cce_self", None) is function


def _intercepted(model: nn.Module, run: Run, options: PatchOptions, labels: Any) -> Any:
    """Run a call with labels, its head intercepted."""
    heads = find_heads(model)
    if _is_part(heads):
        return run()
    is_outermost = active_record() is None
    record = ForwardRecord(model, options, labels)
    with intercept.intercepted(record, heads):
        try:
            if options.reduction == "mean":
                causal_loss.install(model)
            if options.reduction == "none":
                # Whether the model pads its labels decides which columns of the loss are kept.
                with intercept.HeadMode(record, ()):
                    output = run()
            else:
                output = run()
            if is_outermost:
                output = replace_lazy(output, _replacement(model, record))
        finally:
            causal_loss.remove(model)
    record.check_at_return()
    return output


def _lazy(model: nn.Module, run: Run, options: PatchOptions) -> Any:
    """Return the output of a call without labels, its logits lazy and open to the caller."""
    heads = find_heads(model)
    if _is_part(heads) or is_sharded(model) or any(map(gathers, heads)):
        return run()  # weights that are sharded may be gone afterwards
    record = ForwardRecord(model, options, None)
    record.stays_open = True
    record.way_out = "Use cce_patch without lazy_logits for this model"
    with intercept.intercepted(record, heads):
        output = run()
        if any(stand_in.is_spread for stand_in in record.heads):  # only all processes can read it
            output = replace_lazy(output, lambda lazy: _real(lazy, record))
    return output


def _is_part(heads: list[nn.Module]) -> bool:
    """Return whether a forward is that of a part of a patched model, which has its heads."""
    return bool(heads) and active_record() is not None and all(map(intercept.is_intercepted, heads))


def _replacement(model: nn.Module, record: ForwardRecord) -> Callable[[Any], Any]:
    if model.training:
        return lambda lazy: None
    if is_sharded(model) or any(stand_in.is_spread for stand_in in record.heads):
        # The weights may be gone after the forward, and only all processes together get them back.
        return lambda lazy: _real(lazy, record)
    return lambda lazy: lazy


def _real(lazy: Any, record: ForwardRecord) -> Tensor:
    record.finished = True  # no warning: the caller asked for an evaluation
    logits: Tensor = lazy.materialise("outputs.logits")
    return logits


def _traced(model: nn.Module, run: Run, options: PatchOptions, labels: Any) -> Any:
    """The same in code that ``torch.compile`` traces, where modules cannot change for a while.

    A mode covers the whole forward instead of the head. It exists while tracing only.
    """
    record = ForwardRecord(model, options, labels)
    record.labels_padded = _pads_labels(model)
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
    with intercept.HeadMode(record, tuple(sizes), weights=weights):
        record.heads_called += 1
        output = run()
    if model.training:
        output = replace_lazy(output, lambda lazy: None)
    else:
        output = replace_lazy(output, lambda lazy: _real(lazy, record))
    record.check_at_return()
    return output


@torch.compiler.disable
def _not_traced(
    model: nn.Module,
    original: Forward,
    options: PatchOptions,
    labels: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a replaced ``apply_lce`` from compiled code, which goes on with the output."""
    with calling_the_replacement(model, options):
        output = _intercepted(model, partial(original, model, *args, **kwargs), options, labels)
    return replace_lazy(output, lambda logits: _real(logits, logits.lazy.call.record))


def _pads_labels(model: nn.Module) -> bool:
    """Return whether the loss of ``model`` pads its labels, where no mode sees it do so."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    loss_function = getattr(model, "loss_function", None)
    return getattr(loss_function, "__name__", "") == "ForCausalLMLoss"


def replace_lazy(output: Any, replacement: Callable[[Any], Any]) -> Any:
    """Replace the lazy logits of an output.

    Args:
        output: what a forward returned: an output class, dataclass, or container of any kind that
            ``torch.utils._pytree`` knows, nested.
        replacement: called with lazy logits; None leaves a field of an output class out of its
            keys, and stays in its place elsewhere.

    Returns:
        ``output``, changed in place if it can be; a copy if its class is immutable.
    """
    if isinstance(output, Unevaluated):
        return replacement(output)
    if output is None or isinstance(output, (Tensor, str, int, float, Cache)):
        return output
    if isinstance(output, ModelOutput):
        return _replace_fields(output, replacement)
    if type(output) in (tuple, list):
        return type(output)([replace_lazy(item, replacement) for item in output])
    if type(output) in (dict, OrderedDict):
        return type(output)((k, replace_lazy(v, replacement)) for k, v in output.items())
    if torch.compiler.is_compiling():
        return output
    return _replace_parts(output, replacement)


def _replace_parts(output: Any, replacement: Callable[[Any], Any]) -> Any:
    """Do the same for a container of another kind."""
    replace = lambda part: replace_lazy(part, replacement)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        changed = {
            field.name: new
            for field in dataclasses.fields(output)
            if (new := replace(old := getattr(output, field.name, None))) is not old
        }
        frozen = type(output).__dataclass_params__.frozen  # type: ignore[attr-defined]
        output = copy.copy(output) if frozen and changed else output
        for name, new in changed.items():
            object.__setattr__(output, name, new)
        return output
    if isinstance(output, MutableMapping):  # before pytrees: subclasses keep what else they hold
        for key, old in list(output.items()):
            if (new := replace(old)) is not old:
                output[key] = new
        return output
    parts, structure = pytree.tree_flatten(output, is_leaf=lambda part: part is not output)
    if not structure.is_leaf():
        new_parts = [replace(part) for part in parts]
        if all(new is old for new, old in zip(new_parts, parts, strict=True)):
            return output
        return pytree.tree_unflatten(new_parts, structure)
    if isinstance(output, (tuple, list)):  # a subclass that pytrees do not know
        new_parts = [replace(part) for part in output]
        if all(new is old for new, old in zip(new_parts, output, strict=True)):
            return output
        if isinstance(output, list):
            output[:] = new_parts
            return output
        return type(output)(new_parts)
    for name, old in list(getattr(output, "__dict__", {}).items()):  # of any other object
        if isinstance(old, Unevaluated):
            object.__setattr__(output, name, replacement(old))
    return output


def _replace_fields(output: ModelOutput, replacement: Callable[[Any], Any]) -> ModelOutput:
    if torch.compiler.is_compiling():
        fields = {
            field.name: replace_lazy(getattr(output, field.name), replacement)
            for field in dataclasses.fields(output)  # type: ignore[arg-type]
        }
        return type(output)(**fields)
    for name, value in tuple(output.items()):
        if type(value) is Tensor:
            continue
        replaced = replace_lazy(value, replacement)
        if replaced is None:
            # An output class allows no deletion; its None fields are not keys.
            OrderedDict.__delitem__(output, name)
            output.__dict__[name] = None
        elif replaced is not value:
            OrderedDict.__setitem__(output, name, replaced)
            output.__dict__[name] = replaced
    return output
