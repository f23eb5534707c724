"""The operators of a sum of losses whose gradients are computed in the forward.

A per-token loss has to wait for the gradient of each token, and its backward computes the logits
again. The gradient of a sum is one number, so the forward can leave gradients that only have to be
multiplied by it: three products instead of four. They are kept in float32 (float64 for float64
inputs) until then, so they are rounded once.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cut_cross_entropy.call_context import is_computed_again, is_transformed
from cut_cross_entropy.device_support import kernels_unavailable
from cut_cross_entropy.implementations import chunked, chunked_sum
from cut_cross_entropy.operators.declaration import (
    Arguments,
    by_inputs,
    constant,
    needed_gradients,
    operator,
)
from cut_cross_entropy.operators.flop_formulas import register_flop_formulas
from cut_cross_entropy.operators.losses import FILTER, GRADIENTS, NEEDED
from cut_cross_entropy.problem import (
    NO_FILTER,
    Filter,
    Gradients,
    Needed,
    PerToken,
    Problem,
    SumGradients,
)
from cut_cross_entropy.refusals import refusal

SCALED_BYTES = 16 * 2**20  # of a copy in float32 that PyTorch makes on a CPU to change the dtype

_ARGUMENTS = Arguments(
    Problem,
    "Tensor? weights",  # (N,) of dtype Problem.wide, 0 for ignored tokens
    FILTER,
    NEEDED,
    # Whether to save the inputs as well. Nothing reads them, but PyTorch then notices that they
    # were modified, and what they depend on when it differentiates twice.
    "bool keep_inputs",
    "bool loss_only",  # no gradient, because this forward will run again before a backward pass
)


def _fake_sums(
    problem: Problem,
    weights: Tensor | None,
    filter_: Filter,
    needed: Needed,
    keep_inputs: bool,
    loss_only: bool,
) -> SumGradients:
    def make(*shape: Any) -> Tensor:
        return torch.empty(shape, dtype=problem.wide, device=problem.e.device)

    inputs = zip((problem.e, problem.c, problem.bias), needed.flat(), strict=True)
    return SumGradients(
        make(),
        *(
            make(*x.shape) if x is not None and need and not loss_only else make(0)
            for x, need in inputs
        ),
    )


@operator("chunked_sum", _ARGUMENTS, ("sum_", SumGradients), _fake_sums)
def chunked_sums(
    problem: Problem, weights: Tensor | None, filter_: Filter, needed: Needed, *options: bool
) -> SumGradients:
    """Sum of the losses with its gradients by the memory-bounded PyTorch implementation."""
    _, loss_only = options
    if loss_only:
        return _without_gradients(chunked.forward(problem), weights)
    return chunked_sum.loss_and_gradients(problem, needed, weights)


@operator("cce_sum", _ARGUMENTS, ("sum_", SumGradients), _fake_sums)
def cce_sums(
    problem: Problem, weights: Tensor | None, filter_: Filter, needed: Needed, *options: bool
) -> SumGradients:
    """Sum of the losses with its gradients, at least one of them exact, by the kernels."""
    from cut_cross_entropy.kernels import exact_sum, step, warmup
    from cut_cross_entropy.kernels.launch import current_device

    _, loss_only = options
    with current_device(problem.e.device):
        if loss_only:
            warmup.compile_ahead(problem, NO_FILTER, training=False)
            state = step.forward(problem, NO_FILTER, training=True)
            return _without_gradients(PerToken(state.nll, state.lse), weights)
        arguments = (problem, needed, weights, filter_)
        warmup.compile_sum_ahead(*arguments)
        return exact_sum.loss_and_gradients(*arguments)


def _without_gradients(results: PerToken, weights: Tensor | None) -> SumGradients:
    losses = results.nll if weights is None else results.nll * weights
    return SumGradients(losses.sum(), *(losses.new_empty(0) for _ in range(3)))


class _Sums(NamedTuple):
    e: Tensor | None
    c: Tensor | None
    bias: Tensor | None


class _Dtypes(NamedTuple):
    dtype_e: torch.dtype | None
    dtype_c: torch.dtype | None
    dtype_bias: torch.dtype | None


def _fake_scaled(factor: Tensor, sums: _Sums, inputs: _Sums, dtypes: _Dtypes) -> Gradients:
    return Gradients(
        *(
            factor.new_empty(0) if total is None else torch.empty_like(total, dtype=dtype)
            for total, dtype in zip(sums, dtypes, strict=True)
        )
    )


@operator(
    "scaled",
    Arguments("Tensor factor", ("sum_", _Sums), _Sums, _Dtypes),
    GRADIENTS,
    _fake_scaled,
)
def scaled_gradients(factor: Tensor, sums: _Sums, inputs: _Sums, dtypes: _Dtypes) -> Gradients:
    """Gradients of a sum times that of the sum itself, in their own dtypes.

    The inputs are not read; a second derivative has to be refused because of them.
    """
    return Gradients(
        *(
            factor.new_empty(0) if total is None else _scaled(total, factor, dtype)
            for total, dtype in zip(sums, dtypes, strict=True)
        )
    )


def _scaled(total: Tensor, factor: Tensor, dtype: torch.dtype | None) -> Tensor:
    result = torch.empty(total.shape, dtype=dtype, device=total.device)
    rows = len(total)
    if total.numel() == 0:
        return result
    if total.is_cuda and total.dtype == torch.float32 and not kernels_unavailable(total.device):
        from cut_cross_entropy.kernels import scale
        from cut_cross_entropy.kernels.launch import current_device

        with current_device(total.device):
            scale.scale(total, factor.float(), result)
        return result
    if dtype != total.dtype and not total.is_cuda:
        rows = max(1, SCALED_BYTES * rows // total.nbytes)
    for start in range(0, len(total), rows):
        part = slice(start, start + rows)
        torch.mul(total[part], factor, out=result[part])
    return result


_call_scaled = constant(
    scaled_gradients,
    refusal(
        "a mean or sum whose gradients the forward computes has no second derivative in this "
        "implementation; impl='reference' has one"
    ),
)


def saved_sums(
    ctx: Any,
    inputs: tuple[Tensor | None, ...],
    sums: tuple[Tensor, ...],
    needed: Needed | None,
    total: Tensor,
) -> tuple[Tensor, ...]:
    """Return the gradients of a sum to save for the backward, and note their dtypes.

    Args:
        ctx: of the call.
        inputs: e, c and bias.
        sums: their gradients.
        needed: the gradients that were left out, because this forward will run again; else None.
        total: the sum.
    """
    ctx.dtypes = [None if x is None else x.dtype for x in inputs]
    if needed is None:
        return sums
    # The checkpoint compares what the second forward saves with the first, by shape.
    return tuple(
        total.detach().expand(x.shape) if x is not None and need else empty
        for x, need, empty in zip(inputs, needed.flat(), sums, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    problem, _, _, needed, keep_inputs, loss_only = _ARGUMENTS.unpack(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros as large as the sums
    tensors = (problem.e, problem.c, problem.bias)
    sums = saved_sums(ctx, tensors, output[1:], needed if loss_only else None, output[0])
    ctx.ignore_index = problem.ignore_index
    ctx.save_for_backward(*sums, problem.targets, *(tensors if keep_inputs else (None,) * 3))


def _backward(ctx: Any, grad_loss: Tensor, *nothing: Any) -> tuple[Any, ...]:
    # Read once: a checkpoint computes them again each time.
    *saved, targets, e, c, bias = ctx.saved_tensors
    return by_inputs(ctx, multiplied_sums(ctx, grad_loss, saved, targets, (e, c, bias)))


def multiplied_sums(
    ctx: Any,
    factor: Tensor,
    saved: Sequence[Tensor],
    targets: Tensor,
    inputs: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """Gradients of e, c and bias: their sums times the gradient of the loss; None if not needed.

    Args:
        ctx: of the call, with ``dtypes`` of the results and ``ignore_index``.
        factor: gradient of the loss, ().
        saved: the sums, in float32 or wider. May be overwritten.
        targets: (N,).
        inputs: e, c and bias, because of which a second derivative has to be refused, or None.
    """
    # Of a batch without labels a model may ask for 0 / 0, whose gradients are 0 in PyTorch.
    factor = torch.where((targets == ctx.ignore_index).all(), 0.0, factor)
    sums = [x if need else None for x, need in zip(saved, needed_gradients(ctx), strict=True)]
    grads: list[Tensor | None] = [None, None, None]
    for i, (total, dtype) in enumerate(zip(sums, ctx.dtypes, strict=True)):
        if total is not None and _may_overwrite(total, factor, dtype):
            grads[i], sums[i] = total.mul_(factor), None
    if any(total is not None for total in sums):
        found = _call_scaled(factor, *sums, *inputs, *ctx.dtypes)
        grads = [
            grad if total is None else new
            for grad, total, new in zip(grads, sums, found, strict=True)
        ]
    return grads


def _may_overwrite(total: Tensor, factor: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether this backward is the last to read a sum, which then becomes the gradient."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return (
        keeps_graph is not None  # since PyTorch 2.5
        and type(total) is Tensor  # not within the compiler
        and total.dtype == dtype
        and not torch.is_grad_enabled()
        and not is_transformed()
        and not torch._C._functorch.is_legacy_batchedtensor(factor)  # is_grads_batched=True
        and not keeps_graph()
    )


for _operator in (chunked_sums, cce_sums):
    _operator.register_autograd(_backward, setup_context=_save)


def run_sum(
    problem: Problem,
    needed: Needed,
    weights: Tensor | None,
    filter_: Filter | None,
    *,
    keep_inputs: bool,
) -> Tensor:
    """Sum of all losses, (), differentiable, by the kernels or in PyTorch.

    Args:
        problem: one for which :func:`chunked_sum.tokens_per_chunk`, or for the kernels
            :func:`powers_per_chunk`, is not 0.
        needed: the gradients to compute.
        weights: (N,) of dtype :attr:`Problem.wide`, factors of the losses, 0 for ignored tokens;
            None for 1. They have no gradient.
        filter_: which of the gradients the kernels filter, not all that are needed; None for the
            memory-bounded PyTorch implementation.
        keep_inputs: whether to save the inputs; see above.
    """
    register_flop_formulas()
    run, filter_ = (chunked_sums, NO_FILTER) if filter_ is None else (cce_sums, filter_)
    options = (*filter_.flat(), *needed.flat(), keep_inputs, is_computed_again())
    sums: tuple[Tensor, ...] = run(*problem.flat(), weights, *options)
    return sums[0]
