"""The operators that PyTorch sees: schemas, fakes and autograd around the implementations.

An implementation with a backward of its own is a pair of ``torch.library`` operators. To the
compiler they are opaque, so ``torch.compile(fullgraph=True)``, activation checkpointing and fake
tensors treat them like any built-in operator. Results are per token (``nll`` and ``lse``), which
leaves the reductions to ordinary PyTorch and gives the gradient of the logits its general form
``a * p - b * onehot``.

The schemas are those of the classes in ``cut_cross_entropy.problem``: the body of an operator
rebuilds a :class:`Problem` from its first values. The kernels are imported when one is first
called, so importing this module needs no Triton.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.constants import BLOCK_TOKENS
from cut_cross_entropy.flop_formulas import register_flop_formulas
from cut_cross_entropy.implementations import chunked
from cut_cross_entropy.problem import (
    GRADIENTS_SCHEMA,
    MULTIPLIER,
    NUM_FIELDS,
    Directions,
    Filter,
    Gradients,
    KernelState,
    Needed,
    PerToken,
    Problem,
)
from cut_cross_entropy.transforms import is_transformed, refuse_second_derivative, transformable

_NUM_FILTER = len(fields(Filter))
_NUM_STATE = len(KernelState._fields)


def _tensors(fields: tuple[str, ...], prefix: str = "") -> str:
    return ", ".join(f"Tensor {prefix}{name}" for name in fields)


_RESULTS, _STATE = _tensors(PerToken._fields), _tensors(KernelState._fields)
_UPSTREAM = _tensors(PerToken._fields, "grad_")
_TANGENTS = _tensors(PerToken._fields, "tangent_")


@torch.library.custom_op(
    "cut_cross_entropy::chunked",
    mutates_args=(),
    schema=f"({Problem.SCHEMA}) -> ({_RESULTS})",
)
def chunked_losses(*flat: Any) -> PerToken:
    """Loss and log-sum-exp by the memory-bounded PyTorch implementation."""
    problem = Problem(*flat)
    with torch.autocast(problem.e.device.type, enabled=False):
        return chunked.forward(problem)


@chunked_losses.register_fake
def _(*flat: Any) -> PerToken:
    problem = Problem(*flat)
    return PerToken(*(_fake_per_token(problem) for _ in range(2)))


@torch.library.custom_op(
    "cut_cross_entropy::chunked_backward",
    mutates_args=(),
    schema=(
        f"({_UPSTREAM}, {_RESULTS}, {Problem.SCHEMA}, {Needed.SCHEMA}) -> ({GRADIENTS_SCHEMA})"
    ),
)
def chunked_gradients(
    grad_nll: Tensor, grad_lse: Tensor, nll: Tensor, lse: Tensor, *flat: Any
) -> Gradients:
    """Gradients of the inputs of :func:`chunked_losses`; empty where not needed."""
    problem, needed = Problem(*flat[:NUM_FIELDS]), Needed(*flat[NUM_FIELDS:])
    with torch.autocast(problem.e.device.type, enabled=False):
        return chunked.backward(PerToken(grad_nll, grad_lse), PerToken(nll, lse), problem, needed)


@chunked_gradients.register_fake
def _(grad_nll: Tensor, grad_lse: Tensor, nll: Tensor, lse: Tensor, *flat: Any) -> Gradients:
    return fake_gradients(Problem(*flat[:NUM_FIELDS]), Needed(*flat[NUM_FIELDS:]))


@torch.library.custom_op(
    "cut_cross_entropy::tangents",
    mutates_args=(),
    schema=(
        "(Tensor? tangent_e, Tensor? tangent_c, Tensor? tangent_bias, "
        f"{_RESULTS}, {Problem.SCHEMA}) -> ({_TANGENTS})"
    ),
)
def tangents(
    e: Tensor | None, c: Tensor | None, bias: Tensor | None, nll: Tensor, lse: Tensor, *flat: Any
) -> PerToken:
    """Derivatives of loss and log-sum-exp along a direction in the inputs of either forward."""
    problem = Problem(*flat)
    with torch.autocast(problem.e.device.type, enabled=False):
        return chunked.tangents(Directions(e, c, bias), PerToken(nll, lse), problem)


@tangents.register_fake
def _(*flat: Any) -> PerToken:
    return PerToken(*(_fake_per_token(Problem(*flat[5:])) for _ in range(2)))


@torch.library.custom_op(
    "cut_cross_entropy::cce",
    mutates_args=(),
    schema=f"({Problem.SCHEMA}, {Filter.SCHEMA}, bool training) -> ({_STATE})",
)
def cce_losses(*flat: Any) -> KernelState:
    """Loss and log-sum-exp by the kernels, and what their backward needs of the forward."""
    from cut_cross_entropy.kernels import step, warmup
    from cut_cross_entropy.kernels.launch import current_device

    problem, filter_, training = _kernel_options(flat)
    with torch.autocast(problem.e.device.type, enabled=False), current_device(problem.e.device):
        warmup.compile_ahead(problem, filter_, training)
        return step.forward(problem, filter_, training)


def _kernel_options(flat: tuple[Any, ...]) -> tuple[Problem, Filter, bool]:
    stop = NUM_FIELDS + _NUM_FILTER
    return Problem(*flat[:NUM_FIELDS]), Filter(*flat[NUM_FIELDS:stop]), flat[stop]


@cce_losses.register_fake
def _(*flat: Any) -> KernelState:
    return fake_state(*_kernel_options(flat))


def fake_state(problem: Problem, filter_: Filter, training: bool) -> KernelState:
    """Results of a forward by the kernels without values."""
    nll, lse, support = (_fake_per_token(problem) for _ in range(3))
    if not (training and filter_.is_on):
        support, shard_mass = (lse.new_empty(0) for _ in range(2))
        strips, origin = (lse.new_empty(0, dtype=kind) for kind in (torch.int16, torch.int64))
        return KernelState(nll, lse, strips, origin, support, shard_mass)
    num_tokens, num_classes = nll.shape[0], problem.c.shape[0]
    num_blocks = (num_tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    strips = lse.new_empty((num_blocks, num_classes), dtype=torch.int16)
    origin = lse.new_empty(num_tokens, dtype=torch.int64)
    shard_mass = lse.new_empty(0 if problem.group is None else num_tokens)
    return KernelState(nll, lse, strips, origin, support, shard_mass)


@torch.library.custom_op(
    "cut_cross_entropy::cce_backward",
    mutates_args=(),
    schema=(
        f"({_UPSTREAM}, {_STATE}, {Problem.SCHEMA}, {Filter.SCHEMA}, bool training, "
        f"{Needed.SCHEMA}) -> ({GRADIENTS_SCHEMA})"
    ),
)
def cce_gradients(grad_nll: Tensor, grad_lse: Tensor, *flat: Any) -> Gradients:
    """Gradients of the inputs of :func:`cce_losses`; empty where not needed."""
    from cut_cross_entropy.kernels import step
    from cut_cross_entropy.kernels.launch import current_device

    state, (problem, filter_, _), needed = (
        KernelState(*flat[:_NUM_STATE]),
        _kernel_options(flat[_NUM_STATE:]),
        Needed(*flat[-3:]),
    )
    upstream = PerToken(grad_nll, grad_lse)
    with torch.autocast(problem.e.device.type, enabled=False), current_device(problem.e.device):
        return step.backward(upstream, state, problem, filter_, needed)


@cce_gradients.register_fake
def _(grad_nll: Tensor, grad_lse: Tensor, *flat: Any) -> Gradients:
    return fake_gradients(_kernel_options(flat[_NUM_STATE:])[0], Needed(*flat[-3:]))


def _fake_per_token(problem: Problem) -> Tensor:
    shape = problem.targets.shape
    return torch.empty(shape, dtype=problem.wide, device=problem.e.device)


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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = (*inputs[:4], inputs[MULTIPLIER], *output)
    ctx.options = (*inputs[4:MULTIPLIER], *inputs[NUM_FIELDS:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors)
    # Gradients of zeros for all that is saved would cost launches, tangents a product.
    ctx.set_materialize_grads(False)
    if is_transformed():
        ctx.save_for_forward(*tensors)


def _saved(ctx: Any) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """Inputs of a forward operator in the order of its schema, and its results."""
    saved = ctx.saved_tensors  # once: a checkpoint computes them again each time
    values, rest = ctx.options[: MULTIPLIER - 4], ctx.options[MULTIPLIER - 4 :]
    return (*saved[:4], *values, saved[4], *rest), saved[5:]


def _backward_by(gradients: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Any, ...]]:
    """The autograd formula of a forward operator, by the function of its backward operator."""

    def backward(
        ctx: Any, grad_nll: Tensor | None, grad_lse: Tensor | None, *nothing: Any
    ) -> tuple[Any, ...]:
        inputs, state = _saved(ctx)
        grad_nll, grad_lse = (
            torch.zeros_like(result) if grad is None else grad
            for result, grad in zip(state[:2], (grad_nll, grad_lse), strict=True)
        )
        need_e, need_c, _, need_bias = ctx.needs_input_grad[:4]
        grad_e, grad_c, grad_bias = gradients(
            grad_nll, grad_lse, *state, *inputs, need_e, need_c, need_bias
        )
        return (
            grad_e if need_e else None,
            grad_c if need_c else None,
            None,
            grad_bias if need_bias else None,
            *(None for _ in inputs[4:]),
        )

    return backward


def _jvp(
    ctx: Any, e: Tensor | None, c: Tensor | None, targets: None, bias: Tensor | None, *nothing: Any
) -> tuple[Tensor | None, ...]:
    """The tangents of loss and log-sum-exp, from those of the inputs."""
    inputs, (nll, lse, *others) = _saved(ctx)
    of_nll, of_lse = _call_tangents(e, c, bias, nll, lse, *inputs[:NUM_FIELDS])
    return of_nll, of_lse, *(None for _ in others)


def _differentiable(losses: Any, gradients: Any) -> Callable[..., tuple[Tensor, ...]]:
    """Give a forward operator its derivatives, and return it as a function to call."""
    backward = _backward_by(transformable(gradients))
    losses.register_autograd(backward, setup_context=_save)
    gradients.register_autograd(refuse_second_derivative)
    return transformable(losses, setup_context=_save, backward=backward, jvp=_jvp)


_call_tangents = transformable(tangents)
tangents.register_autograd(refuse_second_derivative)
_call_chunked = _differentiable(chunked_losses, chunked_gradients)
_call_cce = _differentiable(cce_losses, cce_gradients)


def run_chunked(problem: Problem) -> PerToken:
    """Loss and log-sum-exp by the memory-bounded PyTorch implementation, differentiable."""
    if not torch.compiler.is_compiling():
        register_flop_formulas()
    nll, lse = _call_chunked(*problem.flat())
    return PerToken(nll, lse)


def run_kernels(problem: Problem, filter_: Filter) -> PerToken:
    """Loss and log-sum-exp by the kernels, differentiable."""
    training = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (problem.e, problem.c, problem.bias)
    )
    if not torch.compiler.is_compiling():
        register_flop_formulas()
    nll, lse, *_ = _call_cce(*problem.flat(), *filter_.flat(), training)
    return PerToken(nll, lse)
