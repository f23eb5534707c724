"""The loss of a patched model whose ``utils.apply_lce`` somebody has replaced.

Trainers replace it to weight tokens or to move devices. It gets what it gets in Apple's patches:
the hidden states (B, T, D), the head and the labels (B, T), unshifted, with the arguments of the
model's loss function.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from cut_cross_entropy.lazy.logits import LazyLogits, is_untouched
from cut_cross_entropy.lazy.notices import warn_once
from cut_cross_entropy.lazy.recipe import Recipe, fold, is_foldable
from cut_cross_entropy.transformers import utils
from cut_cross_entropy.transformers.utils import PatchOptions


def is_replaced() -> bool:
    """Whether ``utils.apply_lce`` is not the one that is defined there."""
    return utils.apply_lce is not utils.ORIGINAL_APPLY_LCE


@contextmanager
def calling_the_replacement(model: nn.Module, options: PatchOptions) -> Iterator[None]:
    """Let the loss function of ``model`` be the replacement within this context."""
    own: Any = getattr(model, "loss_function", None)
    kept = {k: v for k, v in model.__dict__.items() if k in ("loss_function", "_loss_function")}
    called = False

    def loss_function(logits: Any, labels: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal called
        lazy = logits.lazy if isinstance(logits, LazyLogits) and is_untouched(logits) else None
        if lazy is None or lazy.ndim != 3 or not is_foldable(lazy.recipe):
            return own(logits, labels, *args, **kwargs)
        called = True
        kwargs.pop("vocab_size", None)

        def compute(recipe: Recipe) -> Tensor:
            folded = fold(recipe, as_matrix=True)
            e, c = folded.e, folded.c
            assert isinstance(c, Tensor)
            return utils.apply_lce(
                e.to(c.dtype),
                c,
                labels,
                options,
                bias=folded.bias,
                softcap=folded.softcap,
                **kwargs,
            )

        loss = lazy.call.compute(lazy.recipe, compute)
        lazy.call.record.note_loss(lazy.call.uses)
        return loss

    model.__dict__.pop("loss_function", None)
    model.__dict__["_loss_function"] = loss_function
    try:
        yield
    finally:
        model.__dict__.pop("_loss_function", None)
        model.__dict__.update(kept)
    if not called:
        warn_once(
            type(model).__name__,
            "apply_lce",
            "apply_lce was replaced, but the model does not compute its loss from its logits by "
            "self.loss_function, so the replacement was not called",
        )
