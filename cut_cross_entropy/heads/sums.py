"""The sum of all losses of a frozen head, with its gradient in the forward, by kernels.

Rows that are made on demand are made once: for the logits of a chunk of classes, and for what they
add to the gradient of the features. See ``cut_cross_entropy.kernels.made_rows``.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cut_cross_entropy.heads.chunks import HeadProblem
from cut_cross_entropy.sum_operators import scaled_gradients


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
        from cut_cross_entropy.kernels import made_rows
        from cut_cross_entropy.kernels.launch import current_device

        with torch.autocast(e.device.type, enabled=False), current_device(e.device):
            whole = replace(problem, e=e)
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
