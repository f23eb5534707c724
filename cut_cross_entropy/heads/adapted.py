"""Losses of a frozen weight with adapters, by kernels that keep the two apart.

The columns of all adapters are one narrow tensor (V, R), made by ordinary PyTorch, whose gradient
the kernels compute. The weight costs no gradient: a matrix is read where it is, and rows on demand
are made for a chunk of classes at a time.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from cut_cross_entropy.heads.chunks import HeadProblem
from cut_cross_entropy.heads.head import rows_of
from cut_cross_entropy.heads.rows import ClassRows, requires_grad
from cut_cross_entropy.operators.flop_formulas import counted
from cut_cross_entropy.problem import (
    AdaptedProblem,
    Filter,
    KernelState,
    MadeProblem,
    Needed,
    PerToken,
)

UNMEASURED = 0.75
"""Factor of the tolerance where nothing measures the error (docs/engineering_log.md)."""
RANK_STEP = 16  # columns that the kernels take at a time
MOST_COLUMNS = 128
"""More take the route by chunks of classes: each 16 cost a product that is not overlapped."""


def is_adapted(problem: HeadProblem) -> bool:
    """Whether a head is a frozen matrix, read as it is, and a few columns.

    It is for devices that can run the kernels; on some their compiler lacks what this needs.
    """
    base, *columns = problem.products  # the frozen ones are the first
    is_read = (
        isinstance(base.rows, Tensor)
        and base.rows.dtype == problem.compute_dtype
        and base.rows.is_contiguous()
        and base.scale is None
    )
    return is_read and len(columns) > 0 and _is_frozen_and_columns(problem)


def is_made(problem: HeadProblem, filter_: Filter) -> bool:
    """Whether a loss can be filtered whose head is rows on demand, frozen, and a few columns."""
    from cut_cross_entropy.kernels.launch import is_captured

    is_filtered = filter_.is_on and filter_.e and filter_.c and torch.is_grad_enabled()
    # The filter has no tail for a multiplied softcap, and reads its counts from the device.
    is_filtered = is_filtered and (problem.softcap is None or problem.multiplier is None)
    is_filtered = is_filtered and not is_captured(problem.e)
    return is_filtered and _is_frozen_and_columns(problem)


def _is_frozen_and_columns(problem: HeadProblem) -> bool:
    from cut_cross_entropy.kernels.block_sizes import tiles_on

    base, *columns = problem.products
    width = sum(x.rows.shape[1] for x in columns)
    can_add = width == 0 or tiles_on(problem.e.device).adds_low_rank
    return not requires_grad(base) and width <= MOST_COLUMNS and can_add


def token_losses(problem: HeadProblem, filter_: Filter) -> PerToken:
    """Loss and log-sum-exp of every token, (N,) each, 0 for ignored tokens.

    Args:
        problem: one that :func:`is_adapted` or :func:`is_made`.
        filter_: what the kernels may skip.
    """
    base, *others = problem.products
    dtype, num_classes = problem.compute_dtype, problem.rows.num_classes
    e, *hidden = (x.features.reshape(-1, x.features.shape[-1]) for x in problem.products)
    low_c, low_e = (x.new_empty((x.shape[0], 0), dtype=dtype) for x in (problem.c, e))
    if others:
        columns = []
        for x in others:
            rows = rows_of(x.rows, 0, num_classes)
            columns.append((rows if x.scale is None else rows * x.scale[:, None]).to(dtype))
        low_c = torch.cat(columns, 1)
        low_e = torch.cat([x.to(dtype) for x in hidden], 1)
        padding = -low_c.shape[1] % RANK_STEP
        low_c, low_e = F.pad(low_c, (0, padding)), F.pad(low_e, (0, padding))
    whole: AdaptedProblem
    if is_adapted(problem):
        whole = problem.as_problem(AdaptedProblem, e=e, c=base.rows, low_e=low_e, low_c=low_c)
    else:
        whole = problem.as_problem(
            MadeProblem,
            e=e,
            c=problem.c[:, : base.rows.shape[1]],
            low_e=low_e,
            low_c=low_c,
            make_rows=ClassRows([base], dtype).make,
        )
        # To estimate the error on a sample would make all rows once more.
        filter_ = replace(filter_, tolerance=filter_.tolerance * UNMEASURED, max_error=0.0)
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

        columns = e.shape[1] + low_e.shape[1]
        with (
            torch.autocast(e.device.type, enabled=False),
            current_device(e.device),
            counted(e, problem.c.shape[0], columns),
        ):
            warmup.compile_ahead(problem, filter_, training)
            state = step.forward(problem, filter_, training)
        # The rows of a made problem are made again, and its c has no values to save.
        c = None if isinstance(problem, MadeProblem) else problem.c
        ctx.save_for_backward(
            e,
            low_e,
            low_c,
            bias,
            c,
            problem.targets,
            problem.multiplier,
            *state,
        )
        ctx.filter, ctx.kind = filter_, type(problem)
        names = ["ignore_index", "softcap", "compute_dtype", "memory_budget"]
        names += ["c", "make_rows"] if c is None else []
        ctx.options = {name: getattr(problem, name) for name in names}
        return state.nll, state.lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_nll: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        from cut_cross_entropy.kernels import step
        from cut_cross_entropy.kernels.launch import current_device

        e, low_e, low_c, bias, c, targets, multiplier, *state = ctx.saved_tensors
        tensors = {"e": e, "targets": targets, "bias": bias, "multiplier": multiplier}
        tensors |= {"low_e": low_e, "low_c": low_c} | ({} if c is None else {"c": c})
        problem = ctx.kind(**tensors, **ctx.options)
        need_e, need_low_e, need_low_c, need_bias = ctx.needs_input_grad[:4]
        grad_low_e = torch.zeros_like(low_e) if need_low_e else None
        columns = (1 + need_e) * e.shape[1] + (1 + need_low_e + need_low_c) * low_e.shape[1]
        with (
            torch.autocast(e.device.type, enabled=False),
            current_device(e.device),
            counted(e, problem.c.shape[0], columns),
        ):
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
