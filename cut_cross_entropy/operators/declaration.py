"""Operators declared by the classes of their arguments and results.

An implementation with a backward of its own is a pair of ``torch.library`` operators. To the
compiler they are opaque, so ``torch.compile(fullgraph=True)``, activation checkpointing and fake
tensors treat them like any built-in operator. They take and return tensors and plain values only:
the text of a schema is made of the fields of dataclasses and named tuples, and bodies and fakes get
the objects, rebuilt from the values. Autocast is off in every body. Where nobody sees the
difference, a call takes the body instead of the operator: PyTorch's way from one to the other takes
the host a tenth of a small step.
"""

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd import Function

from cut_cross_entropy.call_context import is_observed
from cut_cross_entropy.operators.transforms import transformable

_TYPES = {Tensor: "Tensor", torch.dtype: "ScalarType"}


def schema(kind: type, prefix: str = "") -> list[str]:
    """Return the part of a schema for each field of a dataclass or named tuple, in their order."""
    names: tuple[str, ...] = getattr(kind, "_fields", ()) or kind.__match_args__  # type: ignore
    hints = get_type_hints(kind)
    parts = []
    for name in names:
        options = get_args(hints[name]) or (hints[name],)
        of_value = next(option for option in options if option is not NoneType)
        text = _TYPES.get(of_value, of_value.__name__)
        parts.append(f"{text}{'?' if NoneType in options else ''} {prefix}{name}")
    return parts


class Arguments:
    """The arguments of an operator.

    Args:
        *parts: each a class whose fields are arguments, a pair of a prefix for the names of its
            fields and the class, or the schema of one value.
    """

    def __init__(self, *parts: type | tuple[str, type] | str) -> None:
        self._places: list[tuple[Callable[..., Any] | None, int, int]] = []
        texts: list[str] = []
        for part in parts:
            start = len(texts)
            if isinstance(part, str):
                texts.append(part)
                self._places.append((None, start, len(texts)))
                continue
            prefix, kind = part if isinstance(part, tuple) else ("", part)
            texts += schema(kind, prefix)
            self._places.append((kind, start, len(texts)))
        self.schema = ", ".join(texts)
        self._tensors = [i for i, text in enumerate(texts) if text.startswith("Tensor")]

    def unpack(self, flat: Sequence[Any]) -> list[Any]:
        """Return the objects and values of the parts, from all values of the schema."""
        return [
            flat[start] if kind is None else kind(*flat[start:stop])
            for kind, start, stop in self._places
        ]

    def save(self, ctx: Any, inputs: Sequence[Any], results: Sequence[Tensor]) -> tuple[Any, ...]:
        """Save a call and its results for the backward; return the tensors that were saved."""
        tensors = (*(inputs[place] for place in self._tensors), *results)
        ctx.inputs = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*tensors)
        # Gradients of zeros for all that is saved would cost launches, tangents a product.
        ctx.set_materialize_grads(False)
        return tensors

    def saved(self, ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
        """Return the inputs and the results that were saved."""
        saved = ctx.saved_tensors  # once: a checkpoint computes them again each time
        flat = list(ctx.inputs)
        for place, tensor in zip(self._tensors, saved, strict=False):
            flat[place] = tensor
        return flat, saved[len(self._tensors) :]


def needed_gradients(ctx: Any) -> tuple[bool, bool, bool]:
    """Whether e, c and bias, of which the first inputs are, need a gradient."""
    need_e, need_c, _, need_bias = ctx.needs_input_grad[:4]
    return need_e, need_c, need_bias


def by_inputs(ctx: Any, found: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return gradients by all inputs, the first of which are those of a problem.

    Args:
        ctx: of the call.
        found: gradients by e, c and bias; anything where not needed.
    """
    needed = needed_gradients(ctx)
    e, c, bias = (grad if need else None for grad, need in zip(found, needed, strict=True))
    return e, c, None, bias, *(None for _ in ctx.needs_input_grad[4:])


def operator(
    name: str,
    arguments: Arguments,
    returns: type | tuple[str, type] | str,
    fake: Callable[..., Any],
) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that makes an operator of a function of the parts of its arguments.

    Args:
        name: within the namespace of the package.
        arguments: what it takes.
        returns: named tuple of its tensors, maybe with a prefix for their names; or a schema.
        fake: function of the same parts that returns results without values.
    """
    if not isinstance(returns, str):
        prefix, kind = returns if isinstance(returns, tuple) else ("", returns)
        returns = f"({', '.join(schema(kind, prefix))})"

    def declare(function: Callable[..., Any]) -> Any:
        def body(*flat: Any) -> Any:
            device = next(x for x in flat if isinstance(x, Tensor)).device
            with torch.autocast(device.type, enabled=False):
                return function(*arguments.unpack(flat))

        made = torch.library.custom_op(
            f"cut_cross_entropy::{name}",
            body,
            mutates_args=(),
            schema=f"({arguments.schema}) -> {returns}",
        )
        made.__doc__ = function.__doc__
        body.__name__ = name
        made.body = body  # type: ignore[attr-defined]
        made.register_fake(lambda *flat: fake(*arguments.unpack(flat)))
        return made

    return declare


def differentiable(
    operator: Any,
    *,
    save: Callable[..., None],
    backward: Callable[..., Any],
    jvp: Callable[..., Any],
) -> Callable[..., tuple[Tensor, ...]]:
    """Give an operator its derivatives, and return it as a function to call."""
    operator.register_autograd(backward, setup_context=save)
    body = operator.body

    def forward(ctx: Any, *flat: Any) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = body(*flat)
        save(ctx, flat, results)
        return results

    # PyTorch's own node takes the host ten times as long: it looks for arguments that were left
    # out, in a time that grows with the square of their number.
    rules = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    node: Any = type(body.__name__, (Function,), rules)

    def direct(*flat: Any) -> tuple[Tensor, ...]:
        if is_observed(flat):
            return operator(*flat)  # type: ignore[no-any-return]
        return (node.apply if torch.is_grad_enabled() else body)(*flat)  # type: ignore[no-any-return]

    return transformable(operator, direct, setup_context=save, backward=backward, jvp=jvp)


def constant(operator: Any, refuse: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """Give an operator that computes derivatives none of its own, and return it to call."""
    operator.register_autograd(refuse)

    def direct(*flat: Any) -> tuple[Tensor, ...]:
        dispatched = torch.is_grad_enabled() or is_observed(flat)
        return (operator if dispatched else operator.body)(*flat)  # type: ignore[no-any-return]

    return transformable(operator, direct, backward=refuse, jvp=refuse)
