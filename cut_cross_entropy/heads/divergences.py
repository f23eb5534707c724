"""Divergences of models of which one or both have a head that is more than a matrix.

The implementations for matrices ask a problem for the rows of a block of classes, which are made
then, and return their gradient block by block. Nothing is merged.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cut_cross_entropy.divergence_problem import DivergenceGrads, DivergenceProblem, DivergenceState
from cut_cross_entropy.heads.chunks import HeadProblem
from cut_cross_entropy.operators.divergences import implementation
from cut_cross_entropy.problem import Needed, Problem

TENSORS = ("e", "c", "targets", "bias", "multiplier")
NUM_RESULTS = len(DivergenceGrads._fields)


def run_divergence(problem: DivergenceProblem, by_kernels: bool) -> DivergenceState:
    """Divergence in bounded memory, differentiable in the student and the parts of its head.

    Args:
        problem: of two models of which one or both have a head.
        by_kernels: as in ``operators.divergences.run_divergence``.
    """
    student, teacher, *options = problem
    with torch.no_grad():
        teacher = _half_budget(teacher, _features(teacher))
    e = _features(student)
    c = student.anchor if isinstance(student, HeadProblem) else student.c
    with torch.no_grad():
        walked = _half_budget(student, e)
    found = _Divergence.apply(e, c, student.bias, walked, teacher, (*options, by_kernels))
    return DivergenceState(*found)


def joined(problem: Problem) -> Problem:
    """Return a problem with the same logits and a matrix: a copy of the head, differentiable."""
    if not isinstance(problem, HeadProblem):
        return problem
    with problem.rows.chunk(problem.anchor, slice(0, problem.rows.num_classes)) as rows:
        return problem.as_problem(e=problem.features(), c=rows)


def _features(problem: Problem) -> Tensor:
    return problem.features() if isinstance(problem, HeadProblem) else problem.e


def _half_budget(problem: Problem, e: Tensor) -> Problem:
    """Return a problem without a graph, with half of the budget: the other half is for rows."""
    if isinstance(problem, HeadProblem):
        problem = problem.without_graph()
    return replace(
        problem,
        e=e.detach(),
        c=problem.c.detach(),
        bias=None if problem.bias is None else problem.bias.detach(),
        memory_budget=max(1, problem.memory_budget // 2),
    )


class _Divergence(Function):
    """Results of :func:`run_divergence`, whose first three have a gradient by the student."""

    @staticmethod
    def forward(
        ctx: Any,
        e: Tensor,
        c: Tensor | None,  # of a head, its anchor
        bias: Tensor | None,
        student: Problem,
        teacher: Problem,
        options: tuple[float, bool, bool],
    ) -> tuple[Tensor, ...]:
        beta, has_targets, by_kernels = options
        with implementation(by_kernels, e.device) as chosen:
            found = chosen.forward(DivergenceProblem(student, teacher, beta, has_targets))
        tensors = [getattr(side, x) for side in (student, teacher) for x in _saved_of(side)]
        ctx.save_for_backward(e, c, bias, *tensors, *found)
        ctx.sides, ctx.options = (_without_tensors(student), _without_tensors(teacher)), options
        ctx.mark_non_differentiable(*found[NUM_RESULTS:])
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        _, c, _, *saved = ctx.saved_tensors
        sides = []
        for side in ctx.sides:
            names = _saved_of(side)
            own, saved = saved[: len(names)], saved[len(names) :]
            sides.append(replace(side, **dict(zip(names, own, strict=True))))
        student, teacher = sides
        beta, has_targets, by_kernels = ctx.options
        of_divergence, of_entropy, of_logprobs = grads[:NUM_RESULTS]
        upstream = DivergenceGrads(of_divergence, of_entropy, of_logprobs if has_targets else None)
        need_e, need_c, need_bias, *_ = ctx.needs_input_grad
        if isinstance(student, HeadProblem):
            student.rows.forget_gradients()
        with implementation(by_kernels, student.e.device) as chosen:
            problem = DivergenceProblem(student, teacher, beta, has_targets)
            needed = Needed(need_e, need_c, need_bias)
            found = chosen.backward(upstream, DivergenceState(*saved), problem, needed)
        grad_c = torch.zeros_like(c) if isinstance(student, HeadProblem) and need_c else found.c
        grad_e, grad_bias = found.e if need_e else None, found.bias if need_bias else None
        return grad_e, grad_c if need_c else None, grad_bias, None, None, None


def _saved_of(problem: Problem) -> list[str]:
    """Name the tensors to save: not a head's ``c``, which has a shape, but no memory.

    Hooks of saved tensors, such as offloading, would copy all of its elements.
    """
    return [x for x in TENSORS if x != "c" or not isinstance(problem, HeadProblem)]


def _without_tensors(problem: Problem) -> Problem:
    nothing = problem.e.new_empty(0)
    c = problem.c if isinstance(problem, HeadProblem) else nothing
    return replace(problem, e=nothing, c=c, targets=nothing, bias=None, multiplier=None)
