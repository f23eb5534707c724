"""The operators of ``linear_divergence``: schemas, fakes and autograd around the implementation.

As in ``cut_cross_entropy.operators`` for the divergence of each token, and as in
``cut_cross_entropy.sum_operators`` for a sum of them. The gradient is that of the student alone.
"""

import contextlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.divergence_results import DivergenceGrads, DivergenceState, DivergenceSum
from cut_cross_entropy.flop_formulas import register_flop_formulas
from cut_cross_entropy.implementations import chunked_divergence
from cut_cross_entropy.operators import fake_gradients
from cut_cross_entropy.problem import (
    GRADIENTS_SCHEMA,
    MULTIPLIER,
    NUM_FIELDS,
    Gradients,
    Needed,
    Problem,
)
from cut_cross_entropy.sum_operators import multiplied_sums
from cut_cross_entropy.transforms import is_computed_again, refusal_of_both, transformable

_NUM_TENSORS = 5  # of a problem
_NUM_STATE, _NUM_GRADS = len(DivergenceState._fields), len(DivergenceGrads._fields)
_STATE = ", ".join(f"Tensor {name}" for name in DivergenceState._fields)
_UPSTREAM = ", ".join(f"Tensor? grad_{name}" for name in DivergenceGrads._fields)
_TEACHER = ", ".join(
    " ".join((kind, f"teacher_{name}"))
    for kind, name in (part.split(" ") for part in Problem.SCHEMA.split(", "))
)
_INPUTS = f"{Problem.SCHEMA}, {_TEACHER}, float beta, bool has_targets, bool by_kernels"
_NUM_INPUTS = 2 * NUM_FIELDS + 3
_OF_SUM = f"Tensor? weights, float tolerance, {Needed.SCHEMA}, bool loss_only"
_NUM_OF_SUM = 6
_SUM = ", ".join(f"Tensor {name}" for name in DivergenceSum._fields)
_refuse = refusal_of_both("linear_divergence")


def _parts(flat: tuple[Any, ...]) -> tuple[Problem, Problem, float, bool, bool]:
    student, teacher = Problem(*flat[:NUM_FIELDS]), Problem(*flat[NUM_FIELDS : 2 * NUM_FIELDS])
    return student, teacher, *flat[-3:]


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


@torch.library.custom_op(
    "cut_cross_entropy::divergence", mutates_args=(), schema=f"({_INPUTS}) -> ({_STATE})"
)
def divergence(*flat: Any) -> DivergenceState:
    """Divergence of a student from a teacher; see ``chunked_divergence.forward``."""
    student, teacher, beta, has_targets, by_kernels = _parts(flat)
    with implementation(by_kernels, student.e.device) as chosen:
        found: DivergenceState = chosen.forward(student, teacher, beta, has_targets)
    return found


@divergence.register_fake
def _fake_state(*flat: Any) -> DivergenceState:
    student, _, _, has_targets, _ = _parts(flat)
    num_tokens = student.targets.shape[0]

    def empty(wanted: bool = True) -> Tensor:
        return student.e.new_empty(num_tokens if wanted else 0, dtype=student.wide)

    return DivergenceState(empty(), empty(), empty(has_targets), empty(), empty(), empty())


@torch.library.custom_op(
    "cut_cross_entropy::divergence_backward",
    mutates_args=(),
    schema=f"({_UPSTREAM}, {_STATE}, {_INPUTS}, {Needed.SCHEMA}) -> ({GRADIENTS_SCHEMA})",
)
def divergence_backward(*flat: Any) -> Gradients:
    """Gradients of the student's inputs of :func:`divergence`; empty where not needed."""
    stop = _NUM_GRADS + _NUM_STATE
    grads, state = DivergenceGrads(*flat[:_NUM_GRADS]), DivergenceState(*flat[_NUM_GRADS:stop])
    student, teacher, beta, _, by_kernels = _parts(flat[stop:-3])
    with implementation(by_kernels, student.e.device) as chosen:
        found: Gradients = chosen.backward(grads, state, student, teacher, beta, Needed(*flat[-3:]))
    return found


@divergence_backward.register_fake
def _(*flat: Any) -> Gradients:
    student, *_ = _parts(flat[_NUM_GRADS + _NUM_STATE : -3])
    return fake_gradients(student, Needed(*flat[-3:]))


@torch.library.custom_op(
    "cut_cross_entropy::divergence_sum",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OF_SUM}) -> ({_SUM})",
)
def divergence_sum(*flat: Any) -> DivergenceSum:
    """Sum of divergences; see ``chunked_divergence.divergence_and_gradients``.

    Without gradients, as :func:`divergence` computes it, if ``loss_only``: this forward will run
    again before a backward pass.
    """
    student, teacher, beta, has_targets, by_kernels = _parts(flat[:_NUM_INPUTS])
    weights, tolerance, *needed, loss_only = flat[_NUM_INPUTS:]
    with implementation(by_kernels, student.e.device) as chosen:
        if loss_only:
            state = chosen.forward(student, teacher, beta, has_targets)
            values = state.divergence if weights is None else state.divergence * weights
            return DivergenceSum(values.sum(), *state, *(values.new_empty(0) for _ in range(3)))
        arguments = (student, teacher, beta, has_targets, weights, Needed(*needed))
        if by_kernels:
            from cut_cross_entropy.kernels import divergence_sum as kernels

            return kernels.divergence_and_gradients(*arguments, tolerance)
        return chunked_divergence.divergence_and_gradients(*arguments)


@divergence_sum.register_fake
def _(*flat: Any) -> DivergenceSum:
    student, *_ = _parts(flat[:_NUM_INPUTS])
    _, _, *needed, loss_only = flat[_NUM_INPUTS:]
    state = _fake_state(*flat[:_NUM_INPUTS])
    make = lambda shape: student.e.new_empty(shape, dtype=student.wide)
    inputs = zip((student.e, student.c, student.bias), needed, strict=True)
    return DivergenceSum(
        make(()),
        *state,
        *(make(x.shape) if x is not None and need and not loss_only else make(0)
          for x, need in inputs),
    )  # fmt: skip


def _save_inputs(ctx: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Keep the options of a call; return its tensors."""
    ctx.set_materialize_grads(False)
    student, teacher = inputs[:NUM_FIELDS], inputs[NUM_FIELDS : 2 * NUM_FIELDS]
    ctx.options = [side[4:MULTIPLIER] for side in (student, teacher)]
    ctx.beta, ctx.has_targets, ctx.by_kernels = inputs[2 * NUM_FIELDS : _NUM_INPUTS]
    return [x for side in (student, teacher) for x in (*side[:4], side[MULTIPLIER])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[_NUM_GRADS:])
    ctx.save_for_backward(*_save_inputs(ctx, inputs), *output)


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    total, state, sums = output[0], output[1 : 1 + _NUM_STATE], output[1 + _NUM_STATE :]
    ctx.mark_non_differentiable(state[0], *state[_NUM_GRADS:], *sums)
    of_student = (inputs[0], inputs[1], inputs[3])
    ctx.dtypes = [None if x is None else x.dtype for x in of_student]
    _, _, *needed, loss_only = inputs[_NUM_INPUTS:]
    if loss_only:
        # The checkpoint compares what the second forward saves with the first, by shape.
        sums = tuple(
            total.detach().expand(x.shape) if x is not None and need else empty
            for x, need, empty in zip(of_student, needed, sums, strict=True)
        )
    ctx.save_for_backward(*_save_inputs(ctx, inputs), *state, *sums)


def _walk_again(
    ctx: Any, upstream: tuple[Tensor | None, ...], saved: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """Gradients of the student's e, c and bias by a walk of the backward.

    Args:
        ctx: of the call.
        upstream: gradients of divergence, entropy and log-probabilities.
        saved: the tensors of :func:`_save_inputs`, and the state.
    """
    flat: list[Any] = []
    for place, options in enumerate(ctx.options):
        start = place * _NUM_TENSORS
        flat += [*saved[start : start + 4], *options, saved[start + 4]]
    state = saved[2 * _NUM_TENSORS : 2 * _NUM_TENSORS + _NUM_STATE]
    of_divergence, of_entropy, of_logprobs = upstream
    need_e, need_c, _, need_bias = ctx.needs_input_grad[:4]
    return _call_backward(
        of_divergence, of_entropy, of_logprobs if ctx.has_targets else None,
        *state, *flat, ctx.beta, ctx.has_targets, ctx.by_kernels, need_e, need_c, need_bias,
    )  # fmt: skip


def _by_inputs(
    ctx: Any, found: Sequence[Tensor | None], num_inputs: int
) -> tuple[Tensor | None, ...]:
    """Gradients by all inputs from those of the student's e, c and bias."""
    e, c, bias = found
    needed = ctx.needs_input_grad[:4]
    return (
        *(grad if need else None for grad, need in zip((e, c, None, bias), needed, strict=True)),
        *(None for _ in range(num_inputs - 4)),
    )


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: a checkpoint computes them again each time
    return _by_inputs(ctx, _walk_again(ctx, grads[:_NUM_GRADS], saved), _NUM_INPUTS)


def _autograd_of_sum(ctx: Any, grad_total: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    e, c, targets, bias = saved[:4]
    need_e, need_c, _, need_bias = ctx.needs_input_grad[:4]
    found: list[Tensor | None] = [None, None, None]
    if grad_total is not None:
        # Of a batch without tokens a trainer may ask for 0 / 0, whose gradients are 0 in PyTorch.
        ignored = targets == ctx.options[0][0]
        grad_total = torch.where(ignored.all(), 0.0, grad_total)
        needed = (need_e, need_c, need_bias)
        sums = [x if need else None for x, need in zip(saved[-3:], needed, strict=True)]
        found = multiplied_sums(grad_total, sums, (e, c, bias), ctx.dtypes)
    of_entropy, of_logprobs = grads[1], grads[2] if ctx.has_targets else None
    if of_entropy is not None or of_logprobs is not None:
        further = _walk_again(ctx, (None, of_entropy, of_logprobs), saved)
        found = [x if first is None else first + x for first, x in zip(found, further, strict=True)]
    return _by_inputs(ctx, found, _NUM_INPUTS + _NUM_OF_SUM)


divergence.register_autograd(_autograd, setup_context=_save)
divergence_backward.register_autograd(_refuse)
divergence_sum.register_autograd(_autograd_of_sum, setup_context=_save_sum)
_call_backward = transformable(divergence_backward, backward=_refuse, jvp=_refuse)
_call = transformable(divergence, setup_context=_save, backward=_autograd, jvp=_refuse)


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
    if not torch.compiler.is_compiling():
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
    if not torch.compiler.is_compiling():
        register_flop_formulas()
    flat = (*student.flat(), *teacher.flat(), beta, has_targets, by_kernels)
    found = divergence_sum(*flat, weights, tolerance, *needed.flat(), is_computed_again())
    return DivergenceSum(*found)
