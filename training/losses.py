"""Losses of a language model: from its full logits, and by ``linear_cross_entropy``.

With either the model is called with labels and computes its own loss, so shifts, scales and
softcaps are the model's. The training loop and the memory measurement never ask which one it is.
Legend: B sequences, T tokens each, D features.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from cut_cross_entropy import linear_cross_entropy, linear_divergence
from cut_cross_entropy.lazy.logits import LazyLogits
from cut_cross_entropy.lazy.recipe import Recipe, fold, is_foldable
from cut_cross_entropy.lazy.value import LazyValue
from cut_cross_entropy.options import ImplName, Reduction
from training.packing import IGNORED

FULL = "full"
"""Name of the loss from the model's own logits."""

TRIAL_FACTOR = 1000.0
"""Factor of the hidden states in :func:`plain_head`."""


class IdlePatchError(RuntimeError):
    """A loss was to be computed without logits and was not."""


@dataclass(frozen=True)
class Divergence:
    """The divergence to compute, by arguments of ``linear_divergence``."""

    beta: float
    reduction: Reduction = "none"
    num_items_in_batch: int | Tensor | None = None


class FullLogits:
    """Loss of the next-token prediction as the model itself computes it, from its logits."""

    def prepare(self, model: Any) -> None:
        """Make ``model`` compute this loss when it is called with labels."""
        from cut_cross_entropy.transformers import cce_unpatch

        cce_unpatch(model)

    @contextmanager
    def guard(self, model: Any) -> Iterator[None]:
        """Check in this context that a call of a prepared ``model`` computes this loss."""
        yield

    def token_losses(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the loss of each token but the first of each sequence, (B, T - 1).

        ``inputs`` are those of a call of ``model``, ``labels`` (B, T) among them. The loss is 0 at
        ignored tokens.
        """
        logits = model(**_without_labels(inputs), use_cache=False).logits[:, :-1]
        return F.cross_entropy(
            logits.float().transpose(1, 2), inputs["labels"][:, 1:], reduction="none"
        )

    def divergences(
        self, model: Any, teacher: Any, inputs: Mapping[str, Tensor], wanted: "Divergence"
    ) -> Tensor:
        """Compute the divergence of ``model`` from ``teacher`` at each token but the last.

        Ignored are tokens whose next one has no label. Returns (B, T - 1), or a scalar by another
        reduction, for ``inputs`` of a call of either.
        """
        others = _without_labels(inputs)
        p = model(**others, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        with torch.no_grad():
            q = teacher(**others, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        kept = inputs["labels"][:, 1:] != IGNORED
        values = divergence(p, q, wanted.beta).where(kept, 0.0)
        if wanted.reduction == "none":
            return values
        count = wanted.num_items_in_batch
        count = kept.sum().clamp(min=1) if count is None else count
        return values.sum() / (1 if wanted.reduction == "sum" else count)

    def __call__(self, model: Any, input_ids: Tensor) -> Tensor:
        """Compute the mean loss of a prepared ``model`` on ``input_ids`` (B, T), differentiable."""
        with self.guard(model):
            loss: Tensor = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        return loss

    def head(self, model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        """Compute the output layer and the cross-entropy alone, for the memory measurement.

        ``hidden`` (B, T, D) and ``labels`` (B, T) to a loss. Scales and softcaps of a family in
        between are left out.
        """
        logits = model.get_output_embeddings()(hidden)
        loss: Tensor = model.loss_function(
            logits=logits, labels=labels, vocab_size=model.config.get_text_config().vocab_size
        )
        return loss


def divergence(
    p: Tensor,  # (..., V)
    q: Tensor,  # (..., V)
    beta: float,
) -> Tensor:
    """Compute the divergence (...) of a student from a teacher, as in ``linear_divergence``.

    Args:
        p: log-probabilities of the student.
        q: log-probabilities of the teacher.
        beta: from 0 to 1.
    """

    def kl(of: Tensor, from_: Tensor) -> Tensor:
        return F.kl_div(from_, of, log_target=True, reduction="none").sum(-1)

    if beta in (0, 1):
        return kl(p, q) if beta else kl(q, p)
    m = torch.logaddexp(p + math.log1p(-beta), q + math.log(beta))
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


class CutLogits(FullLogits):
    """The same loss by ``linear_cross_entropy``, in a model that ``cce_patch`` patched.

    Args:
        impl: implementation, as ``linear_cross_entropy`` names them.

    Raises:
        IdlePatchError: by a call, if the loss came from full logits all the same.
    """

    def __init__(self, impl: ImplName) -> None:
        self.impl = impl

    def prepare(self, model: Any, **options: Any) -> None:
        """Patch ``model``, with further ``options`` of ``cce_patch``.

        Raises:
            RuntimeError: the forward of the model takes no labels.
        """
        from cut_cross_entropy.transformers import cce_patch

        cce_patch(model, impl=self.impl, **options)

    def token_losses(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """See :class:`FullLogits`."""
        self.prepare(model, reduction="none")
        try:
            with self.guard(model):
                losses: Tensor = model(**inputs, use_cache=False).loss
        finally:
            self.prepare(model)
        return losses

    def divergences(
        self, model: Any, teacher: Any, inputs: Mapping[str, Tensor], wanted: "Divergence"
    ) -> Tensor:
        """See :class:`FullLogits`."""
        others = _without_labels(inputs)
        lazy = self._lazy_logits(model, others)
        with torch.no_grad():
            teachers = self._lazy_logits(teacher, others)

        def compute(recipe: Recipe) -> Tensor:
            return linear_divergence(
                **_side("student", recipe),
                **_side("teacher", teachers.recipe),
                **vars(wanted),
                mask=inputs["labels"][:, 1:] != IGNORED,
                impl=self.impl,
            ).divergence

        return lazy.call.compute(lazy.recipe, compute)

    def _lazy_logits(self, model: Any, inputs: Mapping[str, Tensor]) -> LazyValue:
        self.prepare(model, lazy_logits=True)
        logits = model(**inputs, use_cache=False).logits
        if not isinstance(logits, LazyLogits) or not is_foldable(logits.lazy.recipe):
            raise IdlePatchError(
                f"loss={self.impl!r} was asked for, but the patch of {type(model).__name__} cannot "
                f"do without its logits; loss={FULL!r} allows that"
            )
        return logits.lazy

    @contextmanager
    def guard(self, model: Any) -> Iterator[None]:
        """See :class:`FullLogits`."""
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

    def head(self, model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        """See :class:`FullLogits`."""
        output = model.get_output_embeddings()
        return linear_cross_entropy(
            hidden, output.weight, labels, bias=output.bias, shift=True, impl=self.impl
        )


def _side(name: str, recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of ``linear_divergence`` for recorded logits, less the last token."""
    folded = fold(recipe.on_features(lambda e: e[:, :-1]), with_scale=True)
    return {
        f"e_{name}": folded.e,
        f"head_{name}": folded.c,
        f"{name}_bias": folded.bias,
        f"{name}_softcap": folded.softcap,
        f"{name}_logit_scale": folded.logit_scale,
    }


def _without_labels(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name != "labels"}


def hidden_states(model: Any, input_ids: Tensor) -> Tensor:
    """Return the input (B, T, D) of the output layer of ``model`` for ``input_ids`` (B, T)."""
    backbone = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    hidden: Tensor = backbone(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


def plain_head(model: Any) -> Tensor:
    """Return the weight (V, D) of the output layer, of a model whose logits are nothing more than
    the product of :func:`hidden_states` and it.

    Raises:
        ValueError: the logits have a bias, a softcap or a scale.
    """
    head, training = model.get_output_embeddings(), model.training
    ids = torch.arange(8, device=head.weight.device)[None]  # padding among them embeds as zeros
    # Logits large enough for a softcap to show, which small ones pass unchanged.
    enlarge = head.register_forward_pre_hook(lambda _, inputs: (TRIAL_FACTOR * inputs[0],))
    try:
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, use_cache=False).logits
            hidden = hidden_states(model, ids)
    finally:
        enlarge.remove()
        model.train(training)
    expected = F.linear(TRIAL_FACTOR * hidden, head.weight)
    error = (logits - expected).norm() / expected.norm()
    if getattr(head, "bias", None) is not None or not error < 0.02:  # rounding of bfloat16: 0.003
        raise ValueError(
            f"the output layer of {type(model).__name__} must be a product without bias, softcap "
            "and scale; cce_patch supports others"
        )
    weight: Tensor = head.weight
    return weight


def make_loss(name: str, device: torch.device) -> FullLogits:
    """Return the loss ``name``: ``"full"`` or an implementation of ``linear_cross_entropy``.

    A tiny loss is computed on ``device`` first, to refuse an implementation that cannot run there
    before a model is loaded.

    Raises:
        ValueError: no such loss.
        RuntimeError: it cannot run on ``device``.
    """
    if name == FULL:
        return FullLogits()
    impl = cast(ImplName, name)  # the call checks it
    one = torch.ones(1, 1, device=device)
    linear_cross_entropy(one, one, torch.zeros(1, dtype=torch.int64, device=device), impl=impl)
    return CutLogits(impl)
