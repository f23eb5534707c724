"""What a patched model returns in the place of lazy logits."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from cut_cross_entropy.transformers.recorded import Unevaluated

_MAY_HOLD_LAZY = (Unevaluated, ModelOutput, tuple, list, dict)


def replace_lazy(output: Any, replacement: Callable[[Any], Any]) -> Any:
    """``output`` with ``replacement(lazy)`` for each of its lazy logits.

    Args:
        output: what a forward returned: an output class, dictionary, tuple, or list, nested.
        replacement: called with lazy logits; None leaves a field of an output class out of its
            keys, and stays in its place in a tuple.
    """
    if isinstance(output, Unevaluated):
        return replacement(output)
    if isinstance(output, ModelOutput):
        return _replace_fields(output, replacement)
    if type(output) in (tuple, list):
        return type(output)([replace_lazy(item, replacement) for item in output])
    if type(output) in (dict, OrderedDict):
        return type(output)((k, replace_lazy(v, replacement)) for k, v in output.items())
    return output


def _replace_fields(output: ModelOutput, replacement: Callable[[Any], Any]) -> ModelOutput:
    if torch.compiler.is_compiling():
        fields = {
            field.name: replace_lazy(getattr(output, field.name), replacement)
            for field in dataclasses.fields(output)  # type: ignore[arg-type]
        }
        return type(output)(**fields)
    for name, value in tuple(output.items()):
        if type(value) is Tensor or not isinstance(value, _MAY_HOLD_LAZY):
            continue
        is_lazy = isinstance(value, Unevaluated)
        replaced = replacement(value) if is_lazy else replace_lazy(value, replacement)
        if replaced is None:
            # An output class allows no deletion; its None fields are no keys.
            OrderedDict.__delitem__(output, name)
            output.__dict__[name] = None
        elif replaced is not value:
            OrderedDict.__setitem__(output, name, replaced)
            output.__dict__[name] = replaced
    return output
