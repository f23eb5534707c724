"""Objectives that a run minimises: the loss of the next token, or an objective of post-training.

An objective asks a loss of ``training/losses.py`` for what it needs, so that it never knows whether
there are logits. Legend: B sequences, T tokens each.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from training.losses import Divergence, FullLogits
from training.packing import IGNORED, Row

CROSS_ENTROPY, DPO, DISTILLATION = "cross_entropy", "dpo", "distillation"
OBJECTIVES = (CROSS_ENTROPY, DPO, DISTILLATION)
"""Names on the command line."""

Count: TypeAlias = Tensor | int | None

DEFAULT_BETA = {DPO: 0.1, DISTILLATION: 0.0}


class NextToken:
    """Cross-entropy of each token but the first.

    Attributes:
        is_by_token: whether the loss of several batches is the mean over all of their tokens,
            instead of the mean of their means.
    """

    is_by_token = True

    def __call__(
        self, loss: FullLogits, model: Any, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return losses, here (B, T - 1), and labels that are ignored where there is no loss."""
        return loss.token_losses(model, inputs), inputs["labels"][:, 1:].contiguous()

    def mean(
        self, loss: FullLogits, model: Any, inputs: Mapping[str, Tensor], count: Count = None
    ) -> Tensor:
        """Return the mean of what a call returns, to train by; 0 if nothing is learned.

        ``count`` divides the sum in place of the batch's own number of tokens.
        """
        losses, labels = self(loss, model, inputs)
        kept = losses[labels != IGNORED]
        return kept.sum() / (max(1, len(kept)) if count is None else count)


class Preferences(NextToken):
    """Direct preference optimisation (`Rafailov et al. <https://arxiv.org/abs/2305.18290>`_).

    Batches are those of :func:`training.packing.collate_pairs`; the reference is the model as it
    was when :meth:`add_references` was called.

    Args:
        beta: weight of the divergence from the reference.
    """

    is_by_token = False

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def __call__(
        self, loss: FullLogits, model: Any, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return losses of pairs, (B / 2, 1); see :class:`NextToken`."""
        policy = {name: value for name, value in inputs.items() if name != "reference"}
        gains = self._margins(loss, model, policy) - inputs["reference"]
        losses = -F.logsigmoid(self.beta * gains)[:, None]
        return losses, torch.zeros_like(losses, dtype=torch.int64)

    @torch.no_grad()
    def add_references(
        self,
        loss: FullLogits,
        model: Any,
        rows: Sequence[Row],
        collate: Callable[[Sequence[Row]], Row],
        batch_size: int,
    ) -> None:
        """Store in each of ``rows`` what the model, not trained yet, makes of the pair."""
        device = next(model.parameters()).device
        before = model.training
        model.eval()
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            inputs = {name: value.to(device) for name, value in collate(part).items()}
            for row, margin in zip(part, self._margins(loss, model, inputs).cpu(), strict=True):
                row["reference"] = margin
        model.train(before)

    def _margins(self, loss: FullLogits, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return log-probabilities of the chosen rows less those of the rejected, (B / 2,)."""
        chosen, rejected = loss.token_losses(model, inputs).float().sum(-1).chunk(2)
        return rejected - chosen


class Distillation(NextToken):
    """Divergence from a teacher at each token (`Agarwal et al. <https://arxiv.org/abs/2306.13649>`_).

    Args:
        teacher: a model with the same classes, in evaluation mode on the student's device.
        beta: see ``cut_cross_entropy.linear_divergence``.
    """

    def __init__(self, teacher: Any, beta: float) -> None:
        self.teacher, self.beta = teacher, beta

    def __call__(
        self, loss: FullLogits, model: Any, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """See :class:`NextToken`."""
        values = loss.divergences(model, self.teacher, inputs, Divergence(self.beta))
        return values, inputs["labels"][:, 1:].contiguous()

    def mean(
        self, loss: FullLogits, model: Any, inputs: Mapping[str, Tensor], count: Count = None
    ) -> Tensor:
        """See :class:`NextToken`; the gradients are computed in the forward."""
        return loss.divergences(model, self.teacher, inputs, Divergence(self.beta, "mean", count))
