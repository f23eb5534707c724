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
from cut_cross_entropy.divergence_problem import (
    DivergenceGrads,
    DivergenceProblem,
    DivergenceState,
    DivergenceSum,
    Summation,
)
from cut_cross_entropy.implementations import chunked_divergence
from cut_cross_entropy.operators.declaration import (
    Arguments,
    by_inputs,
    constant,
    differentiable,
    needed_gradients,
    operator,
    schema,
)
from cut_cross_entropy.operators.flop_formulas import register_flop_formulas
from cut_cross_entropy.operators.losses import GRADIENTS, NEEDED, fake_gradients
from cut_cross_entropy.operators.sums import multiplied_sums, saved_sums
from cut_cross_entropy.problem import Flat, Gradients, Needed, Problem
from cut_cross_entropy.refusals import refusal

_NUM_STATE, _NUM_GRADS = len(DivergenceState._fields), len(DivergenceGrads._fields)
_refuse = refusal(
    "linear_divergence has no second and no forward-mode derivative in this implementation; "
    "impl='reference' has both"
)


@dataclass(frozen=True)
class _Options(Flat):
    """Options of a divergence, of which ``by_kernels`` names the implementation."""

    beta: float
    has_targets: bool
    by_kernels: bool

    def of(self, student: Problem, teacher: Problem) -> DivergenceProblem:
        return DivergenceProblem(student, teacher, self.beta, self.has_targets)


_INPUTS = (Problem, ("teacher_", Problem), _Options)
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


def sum_by(problem: DivergenceProblem, summation: Summation, by_kernels: bool) -> DivergenceSum:
    """Compute a sum and its gradients by an implementation; see :func:`run_divergence_sum`."""
    weights, needed, tolerance = summation
    if by_kernels:
        from cut_cross_entropy.kernels import divergence_sum as kernels

        return kernels.divergence_and_gradients(problem, weights, needed, tolerance)
    return chunked_divergence.divergence_and_gradients(problem, weights, needed)


def _fake_state(student: Problem, teacher: Problem, options: _Options) -> DivergenceState:
    num_tokens = student.targets.shape[0]

    def empty(wanted: bool = True) -> Tensor:
        return student.e.new_empty(num_tokens if wanted else 0, dtype=student.wide)

    return DivergenceState(
        empty(), empty(), empty(options.has_targets), empty(), teacher_lse=empty(), relative=empty()
    )


@operator("divergence", _ARGUMENTS, DivergenceState, _fake_state)
def divergence(student: Problem, teacher: Problem, options: _Options) -> DivergenceState:
    """Divergence of a student from a teacher; see ``chunked_divergence.forward``."""
    with implementation(options.by_kernels, student.e.device) as chosen:
        found: DivergenceState = chosen.forward(options.of(student, teacher))
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
    options: _Options,
    needed: Needed,
) -> Gradients:
    """Gradients of the student's inputs of :func:`divergence`; empty where not needed."""
    with implementation(options.by_kernels, student.e.device) as chosen:
        found: Gradients = chosen.backward(grads, state, options.of(student, teacher), needed)
    return found


_RESULTS = (
    "Tensor total",
    *schema(DivergenceState),
    *schema(Gradients, "grad_"),
)
_SUM = Arguments(*_INPUTS, "Tensor? weights", "float tolerance", NEEDED, "bool loss_only")


def _fake_sum(
    student: Problem, teacher: Problem, options: _Options, *further: Any
) -> tuple[Tensor, ...]:
    *_, needed, loss_only = further
    make = lambda shape: student.e.new_empty(shape, dtype=student.wide)
    inputs = zip((student.e, student.c, student.bias), needed.flat(), strict=True)
    return (
        make(()),
        *_fake_state(student, teacher, options),
        *(make(x.shape) if x is not None and need and not loss_only else make(0)
          for x, need in inputs),
    )  # fmt: skip


@operator("divergence_sum", _SUM, f"({', '.join(_RESULTS)})", _fake_sum)
def divergence_sum(
    student: Problem, teacher: Problem, options: _Options, *further: Any
) -> tuple[Tensor, ...]:
    """Sum of divergences; see ``chunked_divergence.divergence_and_gradients``.

    Without gradients, as :func:`divergence` computes it, if ``loss_only``: this forward will run
    again before a backward pass.
    """
    weights, tolerance, needed, loss_only = further
    problem = options.of(student, teacher)
    with implementation(options.by_kernels, student.e.device) as chosen:
        if loss_only:
            state = chosen.forward(problem)
            values = state.divergence if weights is None else state.divergence * weights
            return (values.sum(), *state, *(values.new_empty(0) for _ in range(3)))
        found = sum_by(problem, Summation(weights, needed, tolerance), options.by_kernels)
    return (found.total, *found.state, *found.gradients)


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
    inputs: tuple[Problem, Problem, _Options],
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


_call_sum = differentiable(divergence_sum, save=_save_sum, backward=_autograd_of_sum, jvp=_refuse)
_call_backward = constant(divergence_backward, _refuse)
_call = differentiable(divergence, save=_save, backward=_autograd, jvp=_refuse)


def run_divergence(problem: DivergenceProblem, by_kernels: bool) -> DivergenceState:
    """Divergence in bounded memory, differentiable in the student.

    Args:
        problem: of two models with the same classes in this process.
        by_kernels: whether kernels do what lies between the products, or PyTorch.
    """
    register_flop_formulas()
    return DivergenceState(*_call(*_flat(problem), by_kernels))


def _flat(problem: DivergenceProblem) -> tuple[Any, ...]:
    student, teacher, beta, has_targets = problem
    return (*student.flat(), *teacher.flat(), beta, has_targets)


def run_divergence_sum(
    problem: DivergenceProblem, summation: Summation, by_kernels: bool
) -> tuple[Tensor, DivergenceState]:
    """Sum of divergences, and the results of each token.

    Differentiable in the student: the sum, whose gradients this forward computes, the entropies and
    the log-probabilities.

    Args:
        problem, by_kernels: as in :func:`run_divergence`; the budget holds the logits of enough
            tokens.
        summation: the weights of the sum, and the gradients to compute.
    """
    weights, needed, tolerance = summation
    register_flop_formulas()
    options = (weights, tolerance, *needed.flat(), is_computed_again())
    total, *found = _call_sum(*_flat(problem), by_kernels, *options)
    return total, DivergenceState(*found[:_NUM_STATE])
