"""The operators of ``linear_divergence``, for each token and for a sum of them.

The gradient is that of the student alone.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.call_context import is_computed_again
from cut_cross_entropy.divergence_results import DivergenceGrads, DivergenceState, DivergenceSum
from cut_cross_entropy.implementations import chunked_divergence
from cut_cross_entropy.operators.declaration import (
    Arguments,
    by_inputs,
    constant,
    differentiable,
    needed_gradients,
    operator,
)
from cut_cross_entropy.operators.flop_formulas import register_flop_formulas
from cut_cross_entropy.operators.losses import GRADIENTS, NEEDED, fake_gradients
from cut_cross_entropy.operators.sums import multiplied_sums, saved_sums
from cut_cross_entropy.problem import Flat, Gradients, Needed, Problem
from cut_cross_entropy.refusals import refusal_of_both

_NUM_STATE, _NUM_GRADS = len(DivergenceState._fields), len(DivergenceGrads._fields)
_refuse = refusal_of_both("linear_divergence")


@dataclass(frozen=True)
class DivergenceOptions(Flat):
    """Options of a divergence.

    Args:
        beta: from 0 to 1.
        has_targets: whether to compute the log-probabilities of the targets.
        by_kernels: whether kernels do what lies between the products, or PyTorch.
    """

    beta: float
    has_targets: bool
    by_kernels: bool


_INPUTS = (Problem, ("teacher_", Problem), DivergenceOptions)
_ARGUMENTS = Arguments(*_INPUTS)


@contextlib.contextmanager
def implementation(by_kernels: bool, device: torch.device) -> Iterator[ModuleType]:
    """Return the module that computes, under what its computations need."""
    with torch.autocast(device.type, enabled=False):
        if by_kernels:
            from cut_cross_entropy.kernels import divergence as kernels
            from cut_cross_entropy.kernels.launch import current_device

            with current_device(device):
                yield kernels
        else:
            yield chunked_divergence


def _fake_state(student: Problem, teacher: Problem, options: DivergenceOptions) -> DivergenceState:
    num_tokens = student.targets.shape[0]

    def empty(wanted: bool = True) -> Tensor:
        return student.e.new_empty(num_tokens if wanted else 0, dtype=student.wide)

    return DivergenceState(empty(), empty(), empty(options.has_targets), empty(), empty(), empty())


@operator("divergence", _ARGUMENTS, DivergenceState, _fake_state)
def divergence(student: Problem, teacher: Problem, options: DivergenceOptions) -> DivergenceState:
    """Divergence of a student from a teacher; see ``chunked_divergence.forward``."""
    with implementation(options.by_kernels, student.e.device) as chosen:
        found: DivergenceState = chosen.forward(student, teacher, options.beta, options.has_targets)
    return found


@operator(
    "divergence_backward",
    Arguments(("grad_", DivergenceGrads), DivergenceState, *_INPUTS, NEEDED),
    GRADIENTS,
    lambda grads, state, student, teacher, options, needed: fake_gradients(student, needed),
)
def divergence_backward(
    grads: DivergenceGrads,
    state: DivergenceState,
    student: Problem,
    teacher: Problem,
    options: DivergenceOptions,
    needed: Needed,
) -> Gradients:
    """Gradients of the student's inputs of :func:`divergence`; empty where not needed."""
    with implementation(options.by_kernels, student.e.device) as chosen:
        found: Gradients = chosen.backward(grads, state, student, teacher, options.beta, needed)
    return found


_SUM = Arguments(*_INPUTS, "Tensor? weights", "float tolerance", NEEDED, "bool loss_only")


def _fake_sum(
    student: Problem, teacher: Problem, options: DivergenceOptions, *further: Any
) -> DivergenceSum:
    *_, needed, loss_only = further
    make = lambda shape: student.e.new_empty(shape, dtype=student.wide)
    inputs = zip((student.e, student.c, student.bias), needed.flat(), strict=True)
    return DivergenceSum(
        make(()),
        *_fake_state(student, teacher, options),
        *(make(x.shape) if x is not None and need and not loss_only else make(0)
          for x, need in inputs),
    )  # fmt: skip


@operator("divergence_sum", _SUM, DivergenceSum, _fake_sum)
def divergence_sum(
    student: Problem, teacher: Problem, options: DivergenceOptions, *further: Any
) -> DivergenceSum:
    """Sum of divergences; see ``chunked_divergence.divergence_and_gradients``.

    Without gradients, as :func:`divergence` computes it, if ``loss_only``: this forward will run
    again before a backward pass.
    """
    weights, tolerance, needed, loss_only = further
    models = (student, teacher, options.beta, options.has_targets)
    with implementation(options.by_kernels, student.e.device) as chosen:
        if loss_only:
            state = chosen.forward(*models)
            values = state.divergence if weights is None else state.divergence * weights
            return DivergenceSum(values.sum(), *state, *(values.new_empty(0) for _ in range(3)))
        if options.by_kernels:
            from cut_cross_entropy.kernels import divergence_sum as kernels

            return kernels.divergence_and_gradients(*models, weights, needed, tolerance)
        return chunked_divergence.divergence_and_gradients(*models, weights, needed)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[_NUM_GRADS:])
    _ARGUMENTS.save(ctx, inputs, output)


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    total, state, sums = output[0], output[1 : 1 + _NUM_STATE], output[1 + _NUM_STATE :]
    ctx.mark_non_differentiable(state[0], *state[_NUM_GRADS:], *sums)
    student, teacher, options, _, _, needed, loss_only = _SUM.unpack(inputs)
    of_student = (student.e, student.c, student.bias)
    sums = saved_sums(ctx, of_student, sums, needed if loss_only else None, total)
    ctx.ignore_index = student.ignore_index
    of_both = (*student.flat(), *teacher.flat(), *options.flat())
    _ARGUMENTS.save(ctx, of_both, (*state, *sums))


def _walk_again(
    ctx: Any,
    upstream: tuple[Tensor | None, ...],
    inputs: tuple[Problem, Problem, DivergenceOptions],
    state: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Gradients of the student's e, c and bias by a walk of the backward.

    Args:
        ctx: of the call.
        upstream: gradients of divergence, entropy and log-probabilities.
        inputs: both models, and the options.
        state: the results.
    """
    student, teacher, options = inputs
    of_divergence, of_entropy, of_logprobs = upstream
    if not options.has_targets:
        of_logprobs = None
    flat = (*student.flat(), *teacher.flat(), *options.flat(), *needed_gradients(ctx))
    return _call_backward(of_divergence, of_entropy, of_logprobs, *state, *flat)


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    inputs, state = _ARGUMENTS.saved(ctx)
    models = tuple(_ARGUMENTS.unpack(inputs))
    return by_inputs(ctx, _walk_again(ctx, grads[:_NUM_GRADS], models, state))


def _autograd_of_sum(ctx: Any, grad_total: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
    inputs, saved = _ARGUMENTS.saved(ctx)
    student, teacher, options = _ARGUMENTS.unpack(inputs)
    state, sums = saved[:_NUM_STATE], saved[_NUM_STATE:]
    found: list[Tensor | None] = [None, None, None]
    if grad_total is not None:
        of_student = (student.e, student.c, student.bias)
        found = multiplied_sums(ctx, grad_total, sums, student.targets, of_student)
    of_entropy, of_logprobs = grads[1], grads[2] if options.has_targets else None
    if of_entropy is not None or of_logprobs is not None:
        upstream = (None, of_entropy, of_logprobs)
        further = _walk_again(ctx, upstream, (student, teacher, options), state)
        found = [x if first is None else first + x for first, x in zip(found, further, strict=True)]
    return by_inputs(ctx, found)


divergence_sum.register_autograd(_autograd_of_sum, setup_context=_save_sum)
_call_backward = constant(divergence_backward, _refuse)
_call = differentiable(divergence, save=_save, backward=_autograd, jvp=_refuse)


def run_divergence(
    student: Problem, teacher: Problem, beta: float, has_targets: bool, by_kernels: bool
) -> DivergenceState:
    """Divergence in bounded memory, differentiable in the student.

    Args:
        student, teacher: the inputs, with the same classes in this process.
        beta: from 0 to 1.
        has_targets: whether to compute the log-probabilities of the targets.
        by_kernels: whether kernels do what lies between the products, or PyTorch.
    """
    register_flop_formulas()
    flat = (*student.flat(), *teacher.flat(), beta, has_targets, by_kernels)
    return DivergenceState(*_call(*flat))


def run_divergence_sum(
    student: Problem,
    teacher: Problem,
    beta: float,
    has_targets: bool,
    weights: Tensor | None,
    needed: Needed,
    by_kernels: bool,
    tolerance: float = 0.0,
) -> DivergenceSum:
    """Sum of divergences, with the results of each token.

    Differentiable in the student: the sum, whose gradients this forward computes, the entropies and
    the log-probabilities.

    Args:
        student, teacher, beta, has_targets, by_kernels: as in :func:`run_divergence`; the budget
            holds the logits of enough tokens.
        weights: (N,), factors of the divergences, 0 for ignored tokens; None for 1. They have no
            gradient.
        needed: the gradients to compute.
        tolerance: of the filter that the kernels have, see ``kernels.divergence_columns``; 0 turns
            it off.
    """
    register_flop_formulas()
    flat = (*student.flat(), *teacher.flat(), beta, has_targets, by_kernels)
    found = divergence_sum(*flat, weights, tolerance, *needed.flat(), is_computed_again())
    return DivergenceSum(*found)
