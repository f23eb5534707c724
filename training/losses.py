"""The two ways from a model and its tokens to a loss: full logits, and ``linear_cross_entropy``.

Both are objects with the same two methods, so the training loop and the memory measurement never
ask which one they have. Legend: B sequences, T tokens each, D features, V classes.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from cut_cross_entropy import linear_cross_entropy

FULL = "full"
"""Name of the loss that goes through the model's own logits."""

# Attributes by which some families scale their logits; the head below applies no such factor.
_SCALES = ("logit_scale", "logits_scaling")


class Loss(Protocol):
    """The loss of the next-token prediction."""

    def __call__(self, model: Any, input_ids: Tensor) -> Tensor:
        """The mean loss of ``model`` on ``input_ids`` (B, T), differentiable."""
        ...

    def head(self, model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        """The part after the backbone: ``hidden`` (B, T, D) and ``labels`` (B, T) to the loss."""
        ...


class FullLogits:
    """What the model itself computes: logits (B, T, V), then cross-entropy."""

    def __call__(self, model: Any, input_ids: Tensor) -> Tensor:
        """See :class:`Loss`."""
        loss: Tensor = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        return loss

    def head(self, model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        """See :class:`Loss`."""
        logits = model.get_output_embeddings()(hidden)
        loss: Tensor = model.loss_function(
            logits=logits, labels=labels, vocab_size=model.config.get_text_config().vocab_size
        )
        return loss


class CutLogits:
    """The backbone's hidden states straight into ``linear_cross_entropy``.

    Args:
        impl: implementation, as ``linear_cross_entropy`` names them.
        memory_budget: bytes of scratch memory, for implementations that bound it.
    """

    def __init__(self, impl: str, memory_budget: int) -> None:
        self.impl, self.memory_budget = impl, memory_budget

    def __call__(self, model: Any, input_ids: Tensor) -> Tensor:
        """See :class:`Loss`.

        Raises:
            NotImplementedError: the model scales its logits.
        """
        hidden = hidden_states(model, input_ids)
        return self.head(model, hidden, input_ids)

    def head(self, model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        """See :class:`Loss`.

        Raises:
            NotImplementedError: the model scales its logits.
        """
        config = model.config.get_text_config()
        for name in _SCALES:
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise NotImplementedError(
                    f"{type(model).__name__} scales its logits ({name}), which only "
                    f"loss={FULL!r} follows"
                )
        output = model.get_output_embeddings()
        loss = linear_cross_entropy(
            hidden,
            output.weight,
            labels,
            bias=output.bias,
            softcap=getattr(config, "final_logit_softcapping", None),
            shift=True,
            impl=self.impl,
            memory_budget=self.memory_budget,
        )
        assert isinstance(loss, Tensor)  # return_lse was not asked for
        return loss


def hidden_states(model: Any, input_ids: Tensor) -> Tensor:
    """What ``model`` gives to its output layer for ``input_ids`` (B, T): (B, T, D)."""
    backbone = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    hidden: Tensor = backbone(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


def make_loss(name: str, memory_budget: int, device: torch.device) -> Loss:
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
    return CutLogits(name, memory_budget)
