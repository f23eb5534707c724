"""The operators under ``torch.func`` and in forward-mode differentiation.

A ``torch.library`` operator has no rule for ``vmap`` and no tangent: PyTorch refuses the first with
an internal error and takes the second for zero. While a transform or a dual level is active, an
autograd Function with both rules stands in for the operator; its forward runs the operator.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cut_cross_entropy.call_context import is_transformed
from cut_cross_entropy.refusals import refuse_second_derivative


def transformable(
    operator: Callable[..., tuple[Tensor, ...]],
    direct: Callable[..., tuple[Tensor, ...]] | None = None,
    *,
    setup_context: Callable[..., None] = lambda ctx, inputs, output: None,
    backward: Callable[..., Any] = refuse_second_derivative,
    jvp: Callable[..., Any] = refuse_second_derivative,
) -> Callable[..., tuple[Tensor, ...]]:
    """``operator`` as a function that transforms and forward-mode differentiation understand.

    Args:
        operator: takes tensors and plain values, by position.
        direct: what to call where nothing transforms; by default ``operator``.
        setup_context, backward, jvp: as in :class:`torch.autograd.Function`. By default both
            derivatives are refused.
    """

    class Transformable(Function):
        @staticmethod
        def forward(*flat: Any) -> tuple[Tensor, ...]:
            return tuple(operator(*flat))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
            # Examples may differ in the classifier, and per-example gradients of it have a copy
            # each, so one call for all of them would not be cheaper in general.
            results = []
            for i in range(info.batch_size):
                pairs = zip(flat, in_dims, strict=True)
                example = [x if dim is None else x.select(dim, i) for x, dim in pairs]
                results.append(Transformable.apply(*example))
            stacked = tuple(torch.stack(x) for x in zip(*results, strict=True))
            return stacked, (0,) * len(stacked)

    for name, rule in (("setup_context", setup_context), ("backward", backward), ("jvp", jvp)):
        setattr(Transformable, name, staticmethod(rule))

    direct = direct or operator

    def call(*flat: Any) -> tuple[Tensor, ...]:
        if not is_transformed():
            return direct(*flat)  # less to do for the host, and one node for the compiler
        apply = Transformable.apply
        if "torch._dynamo" in sys.modules:
            # Where the compiler gives up on a transform, it would try the functions within again.
            apply = torch.compiler.disable(apply)
        return apply(*flat)  # type: ignore[no-any-return]

    return call
