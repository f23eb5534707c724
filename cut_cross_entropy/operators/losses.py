"""The operators of a loss per token, by PyTorch and by the kernels.

Results are per token (``nll`` and ``lse``), which leaves the reductions to ordinary PyTorch and
gives the gradient of the logits its general form ``a * p - b * onehot``.
"""

from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.call_context import is_transformed
from cut_cross_entropy.constants import BLOCK_TOKENS
from cut_cross_entropy.implementations import chunked
from cut_cross_entropy.operators.declaration import (
    Arguments,
    by_inputs,
    constant,
    differentiable,
    needed_gradients,
    operator,
)
from cut_cross_entropy.operators.flop_formulas import register_flop_formulas
from cut_cross_entropy.problem import (
    Directions,
    Filter,
    Gradients,
    KernelState,
    Needed,
    PerToken,
    Problem,
)
from cut_cross_entropy.refusals import refuse_second_derivative

NEEDED = ("need_", Needed)
FILTER = ("filter_", Filter)
GRADIENTS = ("grad_", Gradients)
_CHUNKED = Arguments(Problem)
_KERNELS = Arguments(Problem, FILTER, "bool training")
_UPSTREAM = ("grad_", PerToken)


def _fake_per_token(problem: Problem) -> Tensor:
    shape = problem.targets.shape
    return torch.empty(shape, dtype=problem.wide, device=problem.e.device)


def _fake_losses(problem: Problem) -> PerToken:
    return PerToken(*(_fake_per_token(problem) for _ in range(2)))


def fake_gradients(problem: Problem, needed: Needed) -> Gradients:
    """Results of a backward operator without values; an empty tensor for each not needed."""
    e, c, bias = problem.e, problem.c, problem.bias
    pairs = ((e, needed.e), (c, needed.c), (bias, needed.bias))
    return Gradients(
        *(
            torch.empty(x.shape, dtype=x.dtype, device=x.device)
            if x is not None and need
            else e.new_empty(0)
            for x, need in pairs
        )
    )


@operator("chunked", _CHUNKED, PerToken, _fake_losses)
def chunked_losses(problem: Problem) -> PerToken:
    """Loss and log-sum-exp by the memory-bounded PyTorch implementation."""
    return chunked.forward(problem)


@operator(
    "chunked_backward",
    Arguments(_UPSTREAM, PerToken, Problem, NEEDED),
    GRADIENTS,
    lambda upstream, results, problem, needed: fake_gradients(problem, needed),
)
def chunked_gradients(
    upstream: PerToken, results: PerToken, problem: Problem, needed: Needed
) -> Gradients:
    """Gradients of the inputs of :func:`chunked_losses`; empty where not needed."""
    return chunked.backward(upstream, results, problem, needed)


@operator(
    "tangents",
    Arguments(("tangent_", Directions), PerToken, Problem),
    ("tangent_", PerToken),
    lambda directions, results, problem: _fake_losses(problem),
)
def tangents(directions: Directions, results: PerToken, problem: Problem) -> PerToken:
    """Derivatives of loss and log-sum-exp along a direction in the inputs of either forward."""
    return chunked.tangents(directions, results, problem)


def fake_state(problem: Problem, filter_: Filter, training: bool) -> KernelState:
    """Results of a forward by the kernels without values."""
    nll, lse, support = (_fake_per_token(problem) for _ in range(3))
    if not (training and filter_.is_on):
        support, shard_mass = (lse.new_empty(0) for _ in range(2))
        strips, origin = (lse.new_empty(0, dtype=kind) for kind in (torch.int16, torch.int64))
        return KernelState(nll, lse, strips, origin, support=support, shard_mass=shard_mass)
    num_tokens, num_classes = nll.shape[0], problem.c.shape[0]
    num_blocks = (num_tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    strips = lse.new_empty((num_blocks, num_classes), dtype=torch.int16)
    origin = lse.new_empty(num_tokens, dtype=torch.int64)
    shard_mass = lse.new_empty(0 if problem.group is None else num_tokens)
    return KernelState(nll, lse, strips, origin, support=support, shard_mass=shard_mass)


@operator("cce", _KERNELS, KernelState, fake_state)
def cce_losses(problem: Problem, filter_: Filter, training: bool) -> KernelState:
    """Loss and log-sum-exp by the kernels, and what their backward needs of the forward."""
    from cut_cross_entropy.kernels import step, warmup
    from cut_cross_entropy.kernels.launch import current_device

    with current_device(problem.e.device):
        warmup.compile_ahead(problem, filter_, training)
        return step.forward(problem, filter_, training)


@operator(
    "cce_backward",
    Arguments(_UPSTREAM, KernelState, Problem, FILTER, "bool training", NEEDED),
    GRADIENTS,
    lambda upstream, state, problem, filter_, training, needed: fake_gradients(problem, needed),
)
def cce_gradients(
    upstream: PerToken,
    state: KernelState,
    problem: Problem,
    filter_: Filter,
    training: bool,
    needed: Needed,
) -> Gradients:
    """Gradients of the inputs of :func:`cce_losses`; empty where not needed."""
    from cut_cross_entropy.kernels import step
    from cut_cross_entropy.kernels.launch import current_device

    with current_device(problem.e.device):
        return step.backward(upstream, state, problem, filter_, needed)


_call_tangents = constant(tangents, refuse_second_derivative)


def _differentiable(losses: Any, gradients: Any, arguments: Arguments) -> Any:
    """Give a forward operator its derivatives, and return it as a function to call."""
    call_gradients = constant(gradients, refuse_second_derivative)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[2:])
        saved = arguments.save(ctx, inputs, output)
        if is_transformed():
            ctx.save_for_forward(*saved)

    def backward(
        ctx: Any, grad_nll: Tensor | None, grad_lse: Tensor | None, *nothing: Any
    ) -> tuple[Any, ...]:
        inputs, state = arguments.saved(ctx)
        grad_nll, grad_lse = (
            torch.zeros_like(result) if grad is None else grad
            for result, grad in zip(state[:2], (grad_nll, grad_lse), strict=True)
        )
        needed = needed_gradients(ctx)
        return by_inputs(ctx, call_gradients(grad_nll, grad_lse, *state, *inputs, *needed))

    def jvp(
        ctx: Any, e: Tensor | None, c: Tensor | None, targets: None, bias: Tensor | None, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        inputs, (nll, lse, *others) = arguments.saved(ctx)
        problem, *_ = arguments.unpack(inputs)
        of_nll, of_lse = _call_tangents(e, c, bias, nll, lse, *problem.flat())
        return of_nll, of_lse, *(None for _ in others)

    return differentiable(losses, save=save, backward=backward, jvp=jvp)


_call_chunked = _differentiable(chunked_losses, chunked_gradients, _CHUNKED)
_call_cce = _differentiable(cce_losses, cce_gradients, _KERNELS)


def run_chunked(problem: Problem) -> PerToken:
    """Loss and log-sum-exp by the memory-bounded PyTorch implementation, differentiable."""
    register_flop_formulas()
    nll, lse = _call_chunked(*problem.flat())
    return PerToken(nll, lse)


def is_training(problem: Problem) -> bool:
    """Whether autograd may ask for a gradient of the problem, or of another shard of it.

    Processes that hold the classes together exchange bounds in training, whether or not their own
    classes are trained.
    """
    return torch.is_grad_enabled() and (
        problem.group is not None
        or any(x is not None and x.requires_grad for x in (problem.e, problem.c, problem.bias))
    )


def run_kernels(problem: Problem, filter_: Filter) -> PerToken:
    """Loss and log-sum-exp by the kernels, differentiable."""
    register_flop_formulas()
    nll, lse, *_ = _call_cce(*problem.flat(), *filter_.flat(), is_training(problem))
    return PerToken(nll, lse)
