"""Chooses how a divergence is computed, and which gradients the forward makes."""

import torch
from torch import Tensor

from cut_cross_entropy.arguments import Prepared
from cut_cross_entropy.budget import divergence_tokens_per_chunk
from cut_cross_entropy.call_context import is_offloaded, is_transformed
from cut_cross_entropy.device_support import kernels_unavailable
from cut_cross_entropy.dispatch import choose_impl, filter_tolerance, gradients_needed
from cut_cross_entropy.divergence_problem import DivergenceProblem, DivergenceState, Summation
from cut_cross_entropy.heads import divergences as of_heads
from cut_cross_entropy.heads.chunks import HeadProblem
from cut_cross_entropy.implementations import chunked_divergence, reference_divergence
from cut_cross_entropy.operators import divergences as of_matrices
from cut_cross_entropy.options import FilterEps
from cut_cross_entropy.problem import Needed, Problem

FILTER_SHARE = 1.5
"""Tolerance of a divergence's filter, relative to that of a cross-entropy.

Of a dropped class the products with 64 directions are kept. With a share of 2, dE errs by 1.65 to
1.8 roundings on made data and by 1.95 on hidden states of Gemma 3 270M (docs/engineering_log.md).
"""
ROUNDING_SHARE = {torch.bfloat16: 1.0, torch.float16: 0.125}
"""Rounding error of a dtype relative to bfloat16's; in float32 nothing is small enough to drop."""


def compare(
    impl: str,
    student: Prepared,
    teacher: Prepared,
    *,
    beta: float,
    has_targets: bool,
    is_summed: bool,
    weights: Tensor | None,
    filter_eps: FilterEps,
) -> DivergenceState:
    """Compute the results of each token, or the sum of the divergences in place of them.

    Args:
        impl: a name that :func:`linear_divergence` takes.
        student, teacher: the models.
        beta: from 0 to 1.
        has_targets: whether to compute the log-probabilities of the targets.
        is_summed: whether the divergences are only needed in a sum. If the forward then computes
            its gradients, the divergence of the results is the sum, (), times the weights.
        weights: (N,), factors of the divergences in a sum, 0 for ignored tokens; None for 1.
        filter_eps: see :func:`linear_divergence`.
    """
    problem = DivergenceProblem(student.problem, teacher.problem, beta, has_targets)
    has_head = any(isinstance(side, HeadProblem) for side in problem[:2])
    run, run_sum = of_matrices.run_divergence, of_matrices.run_divergence_sum
    if has_head:
        run, run_sum = of_heads.run_divergence, of_heads.run_divergence_sum
    with student.computing():
        if impl == "reference":
            joined = of_heads.joined(problem.student), of_heads.joined(problem.teacher)
            return reference_divergence.forward(DivergenceProblem(*joined, beta, has_targets))
        by_kernels = _by_kernels(impl, problem.student, problem.teacher)
        needed = None
        if is_summed:
            needed = _gradients_in_the_forward(student, teacher, weights, by_kernels)
        if needed is None:
            return run(problem, by_kernels)
        tolerance = _tolerance(filter_eps, problem.student.compute_dtype)
        total, found = run_sum(problem, Summation(weights, needed, tolerance), by_kernels)
        return found._replace(divergence=total)


def _gradients_in_the_forward(
    student: Prepared, teacher: Prepared, weights: Tensor | None, by_kernels: bool
) -> Needed | None:
    """Return which gradients of a sum the forward is to compute; None if it is to leave them."""
    problem, other = student.problem, teacher.problem
    possible = (
        problem.group is None
        # The gradient of a weight is the divergence of its token, which a sum does not return.
        and not (weights is not None and weights.requires_grad)
        and not student.wholes  # the backward would gather them again
        and not is_transformed()
        and not is_offloaded()  # gradients would be copied to the host and back
    )
    if not possible:
        return None
    if isinstance(problem, HeadProblem) or isinstance(other, HeadProblem):
        return of_heads.needed_in_the_forward(problem, other, by_kernels)
    needed = gradients_needed(problem)
    tokens_per_chunk = (
        divergence_tokens_per_chunk if by_kernels else chunked_divergence.tokens_per_chunk
    )
    enough = any(needed.flat()) and tokens_per_chunk(problem, other, needed) > 0
    return needed if enough else None


def _tolerance(filter_eps: FilterEps, dtype: torch.dtype) -> float:
    """Return the tolerance of the kernels' filter; 0 turns it off."""
    tolerance = FILTER_SHARE * filter_tolerance(filter_eps)
    return tolerance * ROUNDING_SHARE.get(dtype, 0) if isinstance(filter_eps, str) else tolerance


def _by_kernels(impl: str, student: Problem, teacher: Problem) -> bool:
    """Return whether kernels do what lies between the products.

    Raises:
        RuntimeError: they were asked for, and cannot run here.
    """
    device, wide = student.e.device, torch.promote_types(student.wide, teacher.wide)
    if impl == "auto":
        possible = device.type == "cuda" and kernels_unavailable(device) is None
    else:
        possible = impl == "cce"
        choose_impl(impl, device, torch.float32, of_losses=False)  # refuses
    return possible and wide == torch.float32
