"""The two ways from a model and its tokens to a loss: full logits, and ``linear_cross_entropy``.

In both the model is called with labels and computes its own loss, so shifts, scales and softcaps
are the model's. A patch decides what happens inside. The training loop and the memory measurement
never ask which one they have. Legend: B sequences, T tokens each, D features.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from cut_cross_entropy import linear_cross_entropy

FULL = "full"
"""Name of the loss that goes through the model's own logits."""


class IdlePatchError(RuntimeError):
    """A loss was to be computed without logits and was not."""


class Loss(Protocol):
    """The loss of the next-token prediction."""

    def prepare(self, model: Any) -> None:
        """Make ``model`` compute this loss when it is called with labels."""
        ...

    def guard(self, model: Any) -> Any:
        """A context for one call of a prepared ``model``; checks that the loss went this way."""
        ...

    def token_losses(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Loss of each token but the first of each sequence, (B, T - 1), 0 where it is ignored.

        ``inputs`` are those of a call of ``model``, ``labels`` (B, T) among them. Not
        differentiable.
        """
        ...

    def __call__(self, model: Any, input_ids: Tensor) -> Tensor:
        """The mean loss of a prepared ``model`` on ``input_ids`` (B, T), differentiable."""
        ...

    def head(self, model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        """The output layer and the cross-entropy alone, as the memory measurement needs them.

        ``hidden`` (B, T, D) and ``labels`` (B, T) to a loss. What a family does to its logits in
        between (a scale, a softcap) is left out.
        """
        ...


class FullLogits:
    """What the model itself computes: logits, then cross-entropy."""

    def prepare(self, model: Any) -> None:
        """See :class:`Loss`."""
        from cut_cross_entropy.transformers import cce_unpatch

        cce_unpatch(model)

    @contextmanager
    def guard(self, model: Any) -> Iterator[None]:
        """See :class:`Loss`."""
        yield

    @torch.no_grad()
    def token_losses(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """See :class:`Loss`."""
        others = {name: value for name, value in inputs.items() if name != "labels"}
        logits = model(**others, use_cache=False).logits[:, :-1]
        return F.cross_entropy(
            logits.float().transpose(1, 2), inputs["labels"][:, 1:], reduction="none"
        )

    def __call__(self, model: Any, input_ids: Tensor) -> Tensor:
        """See :class:`Loss`."""
        return _loss_of_call(model, input_ids)

    def head(self, model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        """See :class:`Loss`."""
        logits = model.get_output_embeddings()(hidden)
        loss: Tensor = model.loss_function(
            logits=logits, labels=labels, vocab_size=model.config.get_text_config().vocab_size
        )
        return loss


class CutLogits:
    """What the model computes after ``cce_patch``: its loss by ``linear_cross_entropy``.

    Args:
        impl: implementation, as ``linear_cross_entropy`` names them.
    """

    def __init__(self, impl: str) -> None:
        self.impl = impl

    def prepare(self, model: Any) -> None:
        """See :class:`Loss`.

        Raises:
            RuntimeError: the forward of the model takes no labels.
        """
        from cut_cross_entropy.transformers import cce_patch

        cce_patch(model, impl=self.impl)

    @torch.no_grad()
    def token_losses(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """See :class:`Loss`.

        Raises:
            IdlePatchError: the losses came from full logits all the same.
        """
        from cut_cross_entropy.transformers import cce_patch

        cce_patch(model, impl=self.impl, reduction="none")
        try:
            with self.guard(model):
                losses: Tensor = model(**inputs, use_cache=False).loss
        finally:
            self.prepare(model)
        return losses

    @contextmanager
    def guard(self, model: Any) -> Iterator[None]:
        """See :class:`Loss`.

        Raises:
            IdlePatchError: the loss came from full logits all the same.
        """
        from cut_cross_entropy.transformers import call_count, is_patched
        from cut_cross_entropy.transformers.patch import language_model

        model = language_model(model)
        before = call_count(model)
        yield
        if call_count(model) == before:
            what = "did nothing (a warning says why)" if is_patched(model) else "is not there"
            raise IdlePatchError(
                f"loss={self.impl!r} was asked for, but the patch of {type(model).__name__} {what} "
                f"and its loss came from full logits; loss={FULL!r} allows that"
            )

    def __call__(self, model: Any, input_ids: Tensor) -> Tensor:
        """See :class:`Loss`.

        Raises:
            IdlePatchError: the loss came from full logits all the same.
        """
        with self.guard(model):
            return _loss_of_call(model, input_ids)

    def head(self, model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        """See :class:`Loss`."""
        output = model.get_output_embeddings()
        loss = linear_cross_entropy(
            hidden, output.weight, labels, bias=output.bias, shift=True, impl=self.impl
        )
        assert isinstance(loss, Tensor)  # return_lse was not asked for
        return loss


def _loss_of_call(model: Any, input_ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    return loss


def hidden_states(model: Any, input_ids: Tensor) -> Tensor:
    """What ``model`` gives to its output layer for ``input_ids`` (B, T): (B, T, D)."""
    backbone = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    hidden: Tensor = backbone(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


def make_loss(name: str, device: torch.device) -> Loss:
    """The loss called ``name``: ``"full"`` or an implementation of ``linear_cross_entropy``.

    A tiny loss is computed on ``device`` first: what cannot run there is refused before a model
    is loaded.

    Raises:
        ValueError: no such loss.
        RuntimeError: it cannot run on ``device``.
    """
    if name == FULL:
        return FullLogits()
    one = torch.ones(1, 1, device=device)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    linear_cross_entropy(one, one, target, impl=name)
    return CutLogits(name)
