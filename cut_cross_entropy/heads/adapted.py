"""Losses of a frozen matrix with adapters, by kernels that read the two as they are.

The columns of all adapters are one narrow tensor (V, R), made by ordinary PyTorch, whose gradient
the kernels compute; the matrix is read where it is, and costs no gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from cut_cross_entropy.heads.chunks import HeadProblem
from cut_cross_entropy.heads.head import rows_of
from cut_cross_entropy.heads.rows import requires_grad
from cut_cross_entropy.problem import AdaptedProblem, Filter, KernelState, Needed, PerToken

RANK_STEP = 16  # columns that the kernels take at a time
MOST_COLUMNS = 128
"""More take the route by chunks of classes: each 16 cost a product that is not overlapped."""


def is_adapted(problem: HeadProblem) -> bool:
    """Whether a head is a frozen matrix, read as it is, and a few columns.

    It is for devices that can run the kernels; on some their compiler lacks what this needs.
    """
    from cut_cross_entropy.kernels.block_sizes import tiles_on

    base, *others = problem.products  # the frozen ones are the first
    return (
        isinstance(base.rows, Tensor)
        and base.rows.dtype == problem.compute_dtype
        and base.rows.is_contiguous()
        and base.scale is None
        and not requires_grad(base)
        and 0 < sum(x.rows.shape[1] for x in others) <= MOST_COLUMNS
        and tiles_on(problem.e.device).adds_low_rank
    )


def token_losses(problem: HeadProblem, filter_: Filter) -> PerToken:
    """Loss and log-sum-exp of every token, (N,) each, 0 for ignored tokens.

    Args:
        problem: one that :func:`is_adapted`.
        filter_: what the kernels may skip.
    """
    base, *others = problem.products
    dtype, num_classes = problem.compute_dtype, problem.rows.num_classes
    columns = []
    for x in others:
        rows = rows_of(x.rows, 0, num_classes)
        columns.append((rows if x.scale is None else rows * x.scale[:, None]).to(dtype))
    low_c = torch.cat(columns, 1)
    low_e = torch.cat([x.features.flatten(0, -2).to(dtype) for x in others], 1)
    padding = -low_c.shape[1] % RANK_STEP
    low_c, low_e = F.pad(low_c, (0, padding)), F.pad(low_e, (0, padding))
    e = base.features.flatten(0, -2)
    whole = problem.as_problem(AdaptedProblem, e=e, c=base.rows, low_e=low_e, low_c=low_c)
    inputs = (e, low_e, low_c, problem.bias)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    nll, lse = _Losses.apply(*inputs, whole, filter_, training)
    return PerToken(nll, lse)


class _Losses(Function):
    """Loss and log-sum-exp of every token by the kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        e: Tensor,
        low_e: Tensor,
        low_c: Tensor,
        bias: Tensor | None,
        problem: AdaptedProblem,
        filter_: Filter,
        training: bool,
    ) -> tuple[Tensor, Tensor]:
        from cut_cross_entropy.kernels import step, warmup
        from cut_cross_entropy.kernels.launch import current_device

        with torch.autocast(e.device.type, enabled=False), current_device(e.device):
            warmup.compile_ahead(problem, filter_, training)
            state = step.forward(problem, filter_, training)
        ctx.save_for_backward(
            e,
            low_e,
            low_c,
            bias,
            problem.c,
            problem.targets,
            problem.multiplier,
            *state,
        )
        ctx.filter = filter_
        names = ("ignore_index", "softcap", "compute_dtype", "memory_budget")
        ctx.options = {name: getattr(problem, name) for name in names}
        return state.nll, state.lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_nll: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        from cut_cross_entropy.kernels import step
        from cut_cross_entropy.kernels.launch import current_device

        e, low_e, low_c, bias, c, targets, multiplier, *state = ctx.saved_tensors
        problem = AdaptedProblem(
            e, c, targets, bias, **ctx.options, multiplier=multiplier, low_e=low_e, low_c=low_c
        )
        need_e, need_low_e, need_low_c, need_bias = ctx.needs_input_grad[:4]
        grad_low_e = torch.zeros_like(low_e) if need_low_e else None
        with torch.autocast(e.device.type, enabled=False), current_device(e.device):
            found = step.backward(
                PerToken(grad_nll, grad_lse),
                KernelState(*state),
                problem,
                ctx.filter,
                Needed(need_e, need_low_c, need_bias),
                grad_low_e=grad_low_e,
            )
        needed = (need_e, need_low_c, need_bias)
        grad_e, grad_c, grad_bias = (
            x if need else None for x, need in zip(found, needed, strict=True)
        )
        return grad_e, grad_low_e, grad_c, grad_bias, None, None, None
