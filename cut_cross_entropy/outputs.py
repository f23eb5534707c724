"""Sums over the classes of each token, other than its loss: what a call asks for and gets.

Shape legend: ``cut_cross_entropy.implementations``.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

from torch import Tensor

from cut_cross_entropy.problem import Flat

OutputName: TypeAlias = Literal["lse", "entropy", "mean_logit", "log_sum_sq", "rank", "max_logit"]
"""Values of ``outputs=``."""

OUTPUT_NAMES: tuple[str, ...] = get_args(OutputName)


@dataclass(frozen=True)
class Asked(Flat):
    """The sums that a forward pass has to compute in addition to loss and log-sum-exp.

    Args:
        entropy, log_sum_sq, mean_logit, rank, max_logit: see :class:`TokenOutputs`.
        top_k: how many of the likeliest classes to return.
    """

    entropy: bool = False
    log_sum_sq: bool = False
    mean_logit: bool = False
    rank: bool = False
    max_logit: bool = False
    top_k: int = 0

    @classmethod
    def of(cls, outputs: Collection[str], top_k: int = 0) -> "Asked":
        """Return the sums that outputs of these names need."""
        *sums, _ = cls.__match_args__
        return cls(*[name in outputs for name in sums], top_k)  # type: ignore[call-arg]

    def __bool__(self) -> bool:
        return any(self.flat())


class TokenOutputs(NamedTuple):
    """Results of a walk over the classes, 0 for ignored tokens; empty where not asked for.

    Args:
        nll: (N,), ``lse`` less the logit of the target; never below 0.
        lse: (N,), log-sum-exp of the logits z.
        entropy: (N,), ``lse - sum p z`` with the probabilities ``p = exp(z - lse)``.
        log_sum_sq: (N,), ``log sum p^2``.
        mean_logit: (N,), mean of the logits over the classes, weighted if there are weights.
        rank: (N,) int32, number of classes whose logit is higher than the target's, or equal with
            a lower id; -1 where the logit of the target is NaN.
        max_logit: (N,), the highest logit.
        top_ids: (N, k) int64, the classes of the highest logits, in falling order.
        top_logits: (N, k), their logits.
    """

    nll: Tensor
    lse: Tensor
    entropy: Tensor
    log_sum_sq: Tensor
    mean_logit: Tensor
    rank: Tensor
    max_logit: Tensor
    top_ids: Tensor
    top_logits: Tensor


NUM_DIFFERENTIABLE = 5
"""The first outputs, which have a gradient."""


class SavedOutputs(NamedTuple):
    """The first results, which the backward pass reads."""

    nll: Tensor
    lse: Tensor
    entropy: Tensor
    log_sum_sq: Tensor


class OutputGrads(NamedTuple):
    """Gradients of the differentiable outputs, (N,) each; None for 0."""

    nll: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    log_sum_sq: Tensor | None
    mean_logit: Tensor | None
