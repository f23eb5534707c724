"""Embeddings and their gradients between the processes of a vocabulary-parallel call.

Every process sees its own classes, so its gradient of e is a part; the sum of the parts is the
gradient. Legend: R processes of the group, N tokens of each, D features.
"""

from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.distributed.collectives import (
    check_shards,
    gather_shards,
    group_name,
    group_of,
    refuse_create_graph,
    sum_over_group,
    sum_own_part,
    world_size,
)
from cut_cross_entropy.distributed.options import VocabParallelOptions


class _SumGradient(torch.autograd.Function):
    """The identity, whose gradient is summed over the group."""

    @staticmethod
    def forward(ctx: Any, e: Tensor, group: str) -> Tensor:
        ctx.group = group
        return e.view_as(e)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        refuse_create_graph()
        # In place: the gradient comes from an operator of ours and nobody else has it.
        grad = grad.contiguous()
        sum_over_group(grad, ctx.group)
        return grad, None


def sum_gradient(e: Tensor, group: str) -> Tensor:
    """``e`` (N, D), whose gradient will be the sum of those of all processes: one all-reduce."""
    return _SumGradient.apply(e, group)  # type: ignore[no-any-return]


@torch.library.custom_op(
    "cut_cross_entropy::gather_tokens",
    mutates_args=(),
    schema="(Tensor tokens, str group) -> Tensor",
)
def gather_tokens(tokens: Tensor, group: str) -> Tensor:
    """(N, ...) of every process in a row: (R N, ...).

    One all-gather; the backward pass sums gradients and leaves each process its own tokens', one
    reduce-scatter.
    """
    return gather_shards(tokens, group).flatten(0, 1)


@gather_tokens.register_fake
def _(tokens: Tensor, group: str) -> Tensor:
    return tokens.new_empty((world_size(group) * tokens.shape[0], *tokens.shape[1:]))


@torch.library.custom_op(
    "cut_cross_entropy::scatter_gradient",
    mutates_args=(),
    schema="(Tensor grad, str group) -> Tensor",
)
def scatter_gradient(grad: Tensor, group: str) -> Tensor:
    """The backward pass of :func:`gather_tokens`: (R N, ...) to (N, ...)."""
    size = world_size(group)
    return sum_own_part(grad.reshape(size, grad.shape[0] // size, *grad.shape[1:]), group)


@scatter_gradient.register_fake
def _(grad: Tensor, group: str) -> Tensor:
    return grad.new_empty((grad.shape[0] // world_size(group), *grad.shape[1:]))


@torch.library.custom_op(
    "cut_cross_entropy::own_tokens",
    mutates_args=(),
    schema="(Tensor tokens, str group) -> Tensor",
)
def own_tokens(tokens: Tensor, group: str) -> Tensor:
    """Values of this process's own tokens: (R N,) to (N,), and in the backward pass back.

    The gradient of each process covers its own tokens; all processes get all of it, N floats each.
    """
    size, rank = tokens.shape[0] // world_size(group), group_of(group).rank()
    return tokens[rank * size : (rank + 1) * size].clone()


@own_tokens.register_fake
def _(tokens: Tensor, group: str) -> Tensor:
    return tokens.new_empty(tokens.shape[0] // world_size(group))


def _save_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


def _gather_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    refuse_create_graph()
    return scatter_gradient(grad, ctx.group), None


def _own_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    refuse_create_graph()
    return gather_tokens(grad, ctx.group), None


gather_tokens.register_autograd(_gather_autograd, setup_context=_save_group)
own_tokens.register_autograd(_own_autograd, setup_context=_save_group)


def share_tokens(
    e: Tensor,  # (N, D)
    targets: Tensor,  # (N,)
    ignore_index: int,
    compute_dtype: torch.dtype,
    options: VocabParallelOptions,
) -> tuple[Tensor, Tensor]:
    """The tokens that all processes compute the loss of, and who sums the gradient of ``e``.

    Raises:
        ValueError: the calls of the processes do not fit together.
    """
    group = group_name(options.group)
    shape = (options.start, options.stop, e.shape[1])
    targets = check_shards(targets, ignore_index, *shape, compute_dtype, group, options.gather_e)
    if options.gather_e:
        e = gather_tokens(e.to(compute_dtype), group)  # cast first: fewer bytes travel
    elif options.reduce_e_grad:
        e = sum_gradient(e, group)
    return e, targets
