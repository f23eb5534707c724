"""A divergence of two models as the implementations see it, its results, and their gradients.

Shape legend: ``cut_cross_entropy.implementations``.
"""

from typing import NamedTuple

from torch import Tensor

from cut_cross_entropy.problem import Gradients, Needed, Problem


class DivergenceProblem(NamedTuple):
    """The inputs of a divergence and the options that every implementation shares.

    Args:
        student: the inputs; its targets name the tokens that both models have.
        teacher: the same tokens and classes, of another number of features.
        beta: from 0 to 1.
        has_targets: whether to compute the log-probabilities of the targets.
    """

    student: Problem
    teacher: Problem
    beta: float
    has_targets: bool


class DivergenceState(NamedTuple):
    """Results of a walk over the classes of student and teacher, 0 for ignored tokens.

    Args:
        divergence: (N,), never below 0.
        entropy: (N,) of the student.
        logprobs: (N,) of the targets under the student; empty without targets.
        lse: (N,) log-sum-exp of the student's logits.
        teacher_lse: (N,) of the teacher's.
        relative: (N,) ``KL(student || teacher)`` for beta 1, of the student from the mixture
            for a beta between 0 and 1; 0 for beta 0.
    """

    divergence: Tensor
    entropy: Tensor
    logprobs: Tensor
    lse: Tensor
    teacher_lse: Tensor
    relative: Tensor


class DivergenceGrads(NamedTuple):
    """Gradients (N,) of the first results of :class:`DivergenceState`; None for 0."""

    divergence: Tensor | None
    entropy: Tensor | None
    logprobs: Tensor | None


class Summation(NamedTuple):
    """A weighted sum of divergences whose gradients the forward computes.

    Args:
        weights: (N,), factors of the divergences, 0 for ignored tokens; None for 1. They have no
            gradient.
        needed: the gradients to compute.
        tolerance: of the filter that the kernels have, see ``kernels.divergence_columns``; 0 turns
            it off.
    """

    weights: Tensor | None
    needed: Needed
    tolerance: float = 0.0


class DivergenceSum(NamedTuple):
    """A weighted sum of divergences, the results of each token, and the gradients of the sum.

    Args:
        total: ().
        state: of each token.
        gradients: by the student's e, c and bias, float32 or wider; empty if not needed.
    """

    total: Tensor
    state: DivergenceState
    gradients: Gradients
