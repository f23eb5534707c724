"""Divergences of models of which one or both have a head that is more than a matrix.

The implementations for matrices ask a problem for the rows of a block of classes, which are made
then, and return their gradient block by block. Nothing is merged.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cut_cross_entropy.budget import divergence_tokens_per_chunk
from cut_cross_entropy.call_context import is_computed_again
from cut_cross_entropy.dispatch import gradients_needed
from cut_cross_entropy.divergence_problem import (
    DivergenceGrads,
    DivergenceProblem,
    DivergenceState,
    DivergenceSum,
    Summation,
)
from cut_cross_entropy.heads.chunks import HeadProblem
from cut_cross_entropy.implementations import chunked_divergence
from cut_cross_entropy.implementations.token_chunks import ALIGNED
from cut_cross_entropy.operators.divergences import implementation, sum_by
from cut_cross_entropy.operators.flop_formulas import counted
from cut_cross_entropy.operators.sums import scaled_gradients
from cut_cross_entropy.problem import Gradients, Needed, Problem

TENSORS = ("e", "c", "targets", "bias", "multiplier")
NUM_RESULTS = len(DivergenceGrads._fields)
LEAST_TOKENS = 512
"""Tokens of a chunk, at least, for which rows are made again: two products less take as long as
to make the rows of all classes from 4 bits three times, with some 400 tokens on an H200."""


def run_divergence(problem: DivergenceProblem, by_kernels: bool) -> DivergenceState:
    """Divergence in bounded memory, differentiable in the student and the parts of its head.

    Args:
        problem: of two models of which one or both have a head.
        by_kernels: as in ``operators.divergences.run_divergence``.
    """
    _, *state = _run(problem, by_kernels, None)
    return DivergenceState(*state)


def run_divergence_sum(
    problem: DivergenceProblem, summation: Summation, by_kernels: bool
) -> tuple[Tensor, DivergenceState]:
    """Sum of divergences, and the results of each token.

    Args:
        problem: of two models of which one or both have a head.
        summation: with gradients that :func:`needed_in_the_forward` returned. The tolerance is for
            a student whose head is a matrix; others are exact.
        by_kernels: as in ``operators.divergences.run_divergence``.
    """
    total, *state = _run(problem, by_kernels, summation)
    return total, DivergenceState(*state)


def needed_in_the_forward(student: Problem, teacher: Problem, by_kernels: bool) -> Needed | None:
    """Return which gradients of a sum the forward is to compute; None if it is to leave them.

    The parts of a head have none there, and the rows of both are made for each chunk of tokens.
    """
    if not torch.is_grad_enabled():
        return None
    if isinstance(student, HeadProblem) and student.anchor is not None:
        return None
    features = [p.features for p in getattr(student, "products", ())] or [student.e]
    needed = replace(gradients_needed(student), e=any(x.requires_grad for x in features))
    student, teacher = _half_budget(student, student.e), _half_budget(teacher, teacher.e)
    most = divergence_tokens_per_chunk if by_kernels else chunked_divergence.tokens_per_chunk
    enough = most(student, teacher, needed) >= max(1, min(LEAST_TOKENS, student.targets.shape[0]))
    for side in (student, teacher):
        enough = enough and side.most_classes >= min(ALIGNED, side.c.shape[0])
    return needed if enough and any(needed.flat()) else None


def _run(
    problem: DivergenceProblem, by_kernels: bool, summed: Summation | None
) -> tuple[Tensor, ...]:
    student, teacher, *options = problem
    with torch.no_grad():
        teacher = _half_budget(teacher, _features(teacher))
    e = _features(student)
    c = student.anchor if isinstance(student, HeadProblem) else student.c
    with torch.no_grad():
        walked = _half_budget(student, e)
    further = (*options, by_kernels)
    found: tuple[Tensor, ...] = _Divergence.apply(
        e, c, student.bias, walked, teacher, further, summed
    )
    return found


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
    """A sum, if it is wanted, and the results of each token.

    Of these the first three have a gradient by the student, the divergence only without a sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        e: Tensor,
        c: Tensor | None,  # of a head, its anchor
        bias: Tensor | None,
        student: Problem,
        teacher: Problem,
        options: tuple[float, bool, bool],
        summed: Summation | None,
    ) -> tuple[Tensor, ...]:
        beta, has_targets, by_kernels = options
        problem = DivergenceProblem(student, teacher, beta, has_targets)
        found = _compute(problem, by_kernels, summed, (e, c, bias))
        tensors = [getattr(side, x) for side in (student, teacher) for x in _saved_of(side)]
        ctx.save_for_backward(e, c, bias, *tensors, *found.state, *found.gradients)
        ctx.sides, ctx.options = (_without_tensors(student), _without_tensors(teacher)), options
        first = 0 if summed is None else 1
        ctx.mark_non_differentiable(*found.state[:first], *found.state[NUM_RESULTS:])
        ctx.set_materialize_grads(False)
        return found.total, *found.state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_total: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
        e, c, bias, *saved = ctx.saved_tensors
        sides = []
        for side in ctx.sides:
            names = _saved_of(side)
            own, saved = saved[: len(names)], saved[len(names) :]
            sides.append(replace(side, **dict(zip(names, own, strict=True))))
        student, teacher = sides
        state, sums = saved[: len(DivergenceState._fields)], saved[len(DivergenceState._fields) :]
        found: list[Tensor | None] = [None, None, None]
        needed = Needed(*ctx.needs_input_grad[:3])
        if of_total is not None:
            # Of a batch without labels a model may ask for 0 / 0, whose gradients are 0 in PyTorch.
            ignored = (student.targets == student.ignore_index).all()
            sums = [x if need else None for x, need in zip(sums, needed.flat(), strict=True)]
            dtypes = [None if x is None else x.dtype for x in (e, c, bias)]
            scaled = scaled_gradients(
                torch.where(ignored, 0.0, of_total), *sums, None, None, None, *dtypes
            )
            found = [
                x if total is not None else None for x, total in zip(scaled, sums, strict=True)
            ]
        beta, has_targets, by_kernels = ctx.options
        of_divergence, of_entropy, of_logprobs = grads[:NUM_RESULTS]
        upstream = DivergenceGrads(of_divergence, of_entropy, of_logprobs if has_targets else None)
        if any(x is not None for x in upstream):
            if isinstance(student, HeadProblem):
                student.rows.forget_gradients()
            problem = DivergenceProblem(student, teacher, beta, has_targets)
            width = student.c.shape[1]
            columns = width * (1 + int(needed.e)) + (width - student.frozen_columns) * needed.c
            if by_kernels or of_divergence is not None:
                columns += teacher.c.shape[1]
            with (
                implementation(by_kernels, student.e.device) as chosen,
                counted(student.e, student.c.shape[0], columns),
            ):
                walked = chosen.backward(upstream, DivergenceState(*state), problem, needed)
            if isinstance(student, HeadProblem) and needed.c:
                walked = walked._replace(c=torch.zeros_like(c))
            found = [
                (new if old is None else old + new) if need else None
                for old, new, need in zip(found, walked, needed.flat(), strict=True)
            ]
        return *found, None, None, None, None


def _compute(
    problem: DivergenceProblem,
    by_kernels: bool,
    summed: Summation | None,
    inputs: tuple[Tensor, Tensor | None, Tensor | None],
) -> DivergenceSum:
    """Compute the results of each token, and a sum with its gradients if it is wanted."""
    student, teacher, *_ = problem
    e, width = inputs[0], student.c.shape[1]
    columns = width + teacher.c.shape[1]
    if summed is not None and is_computed_again():
        return _sum_alone(_compute(problem, by_kernels, None, inputs).state, summed, inputs)
    if summed is not None:
        columns += width * (int(summed.needed.e) + int(summed.needed.c))
    elif not by_kernels:
        columns *= 2
    with (
        implementation(by_kernels, e.device) as chosen,
        counted(e, student.c.shape[0], columns),
    ):
        if summed is not None:
            return sum_by(problem, summed, by_kernels)
        state = chosen.forward(problem)
    return DivergenceSum(e.new_empty(0), state, Gradients(*e.new_empty(3, 0)))


def _sum_alone(
    state: DivergenceState, summed: Summation, inputs: tuple[Tensor | None, ...]
) -> DivergenceSum:
    """Return a sum without its gradients, for a forward that will run again before the backward.

    The checkpoint compares what the second forward saves with the first, by shape.
    """
    values = state.divergence
    total = (values if summed.weights is None else values * summed.weights).sum()
    saved = (
        total.expand(x.shape) if x is not None and need else total.new_empty(0)
        for x, need in zip(inputs, summed.needed.flat(), strict=True)
    )
    return DivergenceSum(total, state, Gradients(*saved))


def _saved_of(problem: Problem) -> list[str]:
    """Name the tensors to save: not a head's ``c``, which has a shape, but no memory.

    Hooks of saved tensors, such as offloading, would copy all of its elements.
    """
    return [x for x in TENSORS if x != "c" or not isinstance(problem, HeadProblem)]


def _without_tensors(problem: Problem) -> Problem:
    nothing = problem.e.new_empty(0)
    c = problem.c if isinstance(problem, HeadProblem) else nothing
    return replace(problem, e=nothing, c=c, targets=nothing, bias=None, multiplier=None)
