"""Losses of a head by kernels, chunk by chunk of its classes.

Of a frozen head the sum of the losses has its gradient in the forward, and the rows of a chunk are
made once; otherwise they are made again in the backward. See
``cut_cross_entropy.kernels.made_rows``.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cut_cross_entropy.heads.chunks import HeadProblem
from cut_cross_entropy.operators.flop_formulas import counted
from cut_cross_entropy.operators.sums import scaled_gradients
from cut_cross_entropy.problem import Needed, PerToken, Problem

_NOTHING = torch.empty(0)


def takes_one_pass(problem: HeadProblem, weights: Tensor | None) -> bool:
    """Whether the sum of the losses has a gradient by the features, and no other."""
    others = (problem.anchor, problem.bias, weights)
    return (
        torch.is_grad_enabled()
        and any(x.features.requires_grad for x in problem.products)
        and not any(x is not None and x.requires_grad for x in others)
    )


def sum_of_losses(problem: HeadProblem, weights: Tensor | None) -> Tensor:
    """Return the sum of all losses, ().

    Args:
        problem: one that takes one pass.
        weights: (N,), factors of the losses, 0 for ignored tokens; None for 1.
    """
    return _Sum.apply(problem.features(), problem, weights)  # type: ignore[no-any-return]


class _Sum(Function):
    """The sum of the losses, whose gradient by the features is there but for one factor."""

    @staticmethod
    def forward(ctx: Any, e: Tensor, problem: HeadProblem, weights: Tensor | None) -> Tensor:
        from cut_cross_entropy.kernels import made_rows, warmup
        from cut_cross_entropy.kernels.launch import current_device

        with (
            torch.autocast(e.device.type, enabled=False),
            current_device(e.device),
            counted(e, problem.c.shape[0], 2 * e.shape[1]),
        ):
            whole: Problem = problem.as_problem(e=e)
            warmup.compile_made_rows_ahead(whole, weights, None)
            found = made_rows.loss_and_gradient(whole, problem.rows.make, weights)
        ctx.dtype, ctx.ignore_index = e.dtype, problem.ignore_index
        ctx.save_for_backward(found.grad_e, problem.targets)
        return found.loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_e, targets = ctx.saved_tensors
        # Of a batch without labels a model may ask for 0 / 0, whose gradients are 0 in PyTorch.
        grad = torch.where((targets == ctx.ignore_index).all(), 0.0, grad)
        absent = (None,) * 5
        found = scaled_gradients(grad, grad_e, *absent, ctx.dtype, None, None)
        return found[0], None, None


def token_losses(problem: HeadProblem) -> PerToken:
    """Loss and log-sum-exp of every token, (N,) each, 0 for ignored tokens."""
    return PerToken(*_Losses.apply(problem.features(), problem.bias, problem.anchor, problem))


class _Losses(Function):
    """Loss and log-sum-exp of every token. The gradient of the rows goes to their parts."""

    @staticmethod
    def forward(
        ctx: Any, e: Tensor, bias: Tensor | None, anchor: Tensor | None, problem: HeadProblem
    ) -> tuple[Tensor, Tensor]:
        from cut_cross_entropy.kernels import made_rows, warmup
        from cut_cross_entropy.kernels.launch import current_device

        frozen = problem.rows.frozen_columns
        whole: Problem = problem.as_problem(e=e, bias=bias, frozen_columns=frozen)
        need_e, need_bias, need_rows, _ = ctx.needs_input_grad
        with (
            torch.autocast(e.device.type, enabled=False),
            current_device(e.device),
            counted(e, problem.c.shape[0], e.shape[1]),
        ):
            warmup.compile_made_rows_ahead(whole, None, Needed(need_e, need_rows, need_bias))
            found = made_rows.token_losses(whole, problem.rows.make)
        ctx.save_for_backward(e, bias, anchor, whole.targets, whole.multiplier, *found)
        ctx.rows = problem.rows
        ctx.problem = replace(
            whole, e=_NOTHING, targets=_NOTHING, bias=None, multiplier=None
        )  # the saved tensors take their places
        return found.nll, found.lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_nll: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        from cut_cross_entropy.kernels import made_rows
        from cut_cross_entropy.kernels.launch import current_device

        e, bias, anchor, targets, multiplier, *saved = ctx.saved_tensors
        need_e, need_bias, need_rows, _ = ctx.needs_input_grad
        ctx.rows.forget_gradients()
        problem = replace(
            ctx.problem,
            e=e,
            targets=targets,
            bias=bias,
            multiplier=multiplier,
        )
        trained = e.shape[1] - problem.frozen_columns
        columns = (1 + need_e) * e.shape[1] + need_rows * trained
        with (
            torch.autocast(e.device.type, enabled=False),
            current_device(e.device),
            counted(e, problem.c.shape[0], columns),
        ):
            found = made_rows.gradients(
                PerToken(grad_nll, grad_lse),
                PerToken(*saved),
                problem,
                ctx.rows.make,
                Needed(need_e, need_rows, need_bias),
                take_rows=ctx.rows.add_gradient_of_all,
            )
        return (
            found.e if need_e else None,
            found.bias if need_bias else None,
            torch.zeros_like(anchor) if need_rows else None,
            None,
        )
