"""Results of a walk over the classes of two models, and their gradients.

Shape legend: ``cut_cross_entropy.implementations``.
"""

from typing import NamedTuple

from torch import Tensor


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


class DivergenceSum(NamedTuple):
    """A weighted sum of divergences, the results of each token, and the gradients of the sum.

    Args:
        total: ().
        divergence, entropy, logprobs, lse, teacher_lse, relative: see :class:`DivergenceState`.
        grad_e: (N, D) by the student's e, float32; empty if not needed, like those that follow.
        grad_c: (V, D).
        grad_bias: (V,).
    """

    total: Tensor
    divergence: Tensor
    entropy: Tensor
    logprobs: Tensor
    lse: Tensor
    teacher_lse: Tensor
    relative: Tensor
    grad_e: Tensor
    grad_c: Tensor
    grad_bias: Tensor
