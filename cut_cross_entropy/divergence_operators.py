"""The operators of ``linear_divergence``: schemas, fakes and autograd around the implementation.

As in ``cut_cross_entropy.operators``. The gradient is that of the student alone.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.divergence_results import DivergenceGrads, DivergenceState
from cut_cross_entropy.flop_formulas import register_flop_formulas
from cut_cross_entropy.implementations import chunked_divergence
from cut_cross_entropy.operators import fake_gradients
from cut_cross_entropy.problem import Gradients, Needed, Problem
from cut_cross_entropy.transforms import refusal_of_both, transformable

_NUM_FIELDS = len(fields(Problem))
_MULTIPLIER = _NUM_FIELDS - 1  # place of a problem's last tensor
_NUM_TENSORS = 5  # of a problem
_NUM_STATE, _NUM_GRADS = len(DivergenceState._fields), len(DivergenceGrads._fields)
_STATE = ", ".join(f"Tensor {name}" for name in DivergenceState._fields)
_GRADIENTS = ", ".join(f"Tensor grad_{name}" for name in Gradients._fields)
_UPSTREAM = ", ".join(f"Tensor? grad_{name}" for name in DivergenceGrads._fields)
_TEACHER = ", ".join(
    " ".join((kind, f"teacher_{name}"))
    for kind, name in (part.split(" ") for part in Problem.SCHEMA.split(", "))
)
_INPUTS = f"{Problem.SCHEMA}, {_TEACHER}, float beta, bool has_targets, bool by_kernels"
_NUM_INPUTS = 2 * _NUM_FIELDS + 3
_refuse = refusal_of_both("linear_divergence")


def _parts(flat: tuple[Any, ...]) -> tuple[Problem, Problem, float, bool, bool]:
    student, teacher = Problem(*flat[:_NUM_FIELDS]), Problem(*flat[_NUM_FIELDS : 2 * _NUM_FIELDS])
    return student, teacher, *flat[-3:]


@contextlib.contextmanager
def _implementation(by_kernels: bool, device: torch.device) -> Iterator[ModuleType]:
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
    with _implementation(by_kernels, student.e.device) as chosen:
        found: DivergenceState = chosen.forward(student, teacher, beta, has_targets)
    return found


@divergence.register_fake
def _(*flat: Any) -> DivergenceState:
    student, _, _, has_targets, _ = _parts(flat)
    num_tokens = student.targets.shape[0]

    def empty(wanted: bool = True) -> Tensor:
        return student.e.new_empty(num_tokens if wanted else 0, dtype=student.wide)

    return DivergenceState(empty(), empty(), empty(has_targets), empty(), empty(), empty())


@torch.library.custom_op(
    "cut_cross_entropy::divergence_backward",
    mutates_args=(),
    schema=f"({_UPSTREAM}, {_STATE}, {_INPUTS}, {Needed.SCHEMA}) -> ({_GRADIENTS})",
)
def divergence_backward(*flat: Any) -> Gradients:
    """Gradients of the student's inputs of :func:`divergence`; empty where not needed."""
    stop = _NUM_GRADS + _NUM_STATE
    grads, state = DivergenceGrads(*flat[:_NUM_GRADS]), DivergenceState(*flat[_NUM_GRADS:stop])
    student, teacher, beta, _, by_kernels = _parts(flat[stop:-3])
    with _implementation(by_kernels, student.e.device) as chosen:
        found: Gradients = chosen.backward(grads, state, student, teacher, beta, Needed(*flat[-3:]))
    return found


@divergence_backward.register_fake
def _(*flat: Any) -> Gradients:
    student, *_ = _parts(flat[_NUM_GRADS + _NUM_STATE : -3])
    return fake_gradients(student, Needed(*flat[-3:]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[_NUM_GRADS:])
    ctx.set_materialize_grads(False)
    student, teacher = inputs[:_NUM_FIELDS], inputs[_NUM_FIELDS : 2 * _NUM_FIELDS]
    ctx.options = [side[4:_MULTIPLIER] for side in (student, teacher)]
    ctx.beta, ctx.has_targets, ctx.by_kernels = inputs[-3:]
    tensors = [x for side in (student, teacher) for x in (*side[:4], side[_MULTIPLIER])]
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: a checkpoint computes them again each time
    flat: list[Any] = []
    for place, options in enumerate(ctx.options):
        start = place * _NUM_TENSORS
        flat += [*saved[start : start + 4], *options, saved[start + 4]]
    upstream = list(grads[:_NUM_GRADS])
    if not ctx.has_targets:
        upstream[2] = None
    state = saved[2 * _NUM_TENSORS :]
    need_e, need_c, _, need_bias = needed = ctx.needs_input_grad[:4]
    e, c, bias = _call_backward(
        *upstream, *state, *flat, ctx.beta, ctx.has_targets, ctx.by_kernels,
        need_e, need_c, need_bias,
    )  # fmt: skip
    found = (e, c, None, bias)
    return (
        *(grad if need else None for grad, need in zip(found, needed, strict=True)),
        *(None for _ in range(_NUM_INPUTS - 4)),
    )


divergence.register_autograd(_autograd, setup_context=_save)
divergence_backward.register_autograd(_refuse)
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
