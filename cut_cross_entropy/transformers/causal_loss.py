"""The loss function of most language models of transformers, by one call of the operator.

``ForCausalLMLoss`` casts, shifts and flattens before it calls ``F.cross_entropy``. Lazy logits
record each of these, but that takes as long as all else that a patched step adds on the host.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cut_cross_entropy.lazy.cross_entropy import fused_cross_entropy
from cut_cross_entropy.lazy.logits import LazyLogits, is_untouched
from cut_cross_entropy.lazy.recipe import is_foldable

try:
    from transformers.loss import loss_utils
except ImportError:  # before 4.46
    loss_utils = None  # type: ignore[assignment]

_OWN: Any = getattr(loss_utils, "ForCausalLMLoss", None)
_HELPER: Any = getattr(loss_utils, "fixed_cross_entropy", None)
_CROSS_ENTROPY = F.cross_entropy
_NAME = "_loss_function"  # where a model keeps a loss function that was assigned to it


def install(model: nn.Module) -> None:
    """Let ``model`` call :func:`causal_loss` for ``ForCausalLMLoss`` until :func:`remove`."""
    if _IS_KNOWN and _NAME not in model.__dict__ and getattr(model, "loss_function", 0) is _OWN:
        model.__dict__[_NAME] = causal_loss


def remove(model: nn.Module) -> None:
    """Undo :func:`install`; nothing where another thread has done so."""
    if model.__dict__.get(_NAME) is causal_loss:
        model.__dict__.pop(_NAME, None)


def causal_loss(
    logits: Any,  # (B, T, V)
    labels: Any,  # (B, T)
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Any = None,
    **kwargs: Any,
) -> Any:
    """Compute ``ForCausalLMLoss``, whose arguments these are, or call it where it may differ."""
    targets = labels if shift_labels is None else shift_labels
    if (
        kwargs
        or type(logits) is not LazyLogits
        or type(targets) is not Tensor
        or targets.dtype != torch.int64
        or not is_untouched(logits)
        or (lazy := logits.lazy).num_classes != vocab_size
        or lazy.shape[:-1] != targets.shape
        or lazy.ndim == 1
        or not is_foldable(lazy.recipe)
        or torch._C._len_torch_function_stack()
        or F.cross_entropy is not _CROSS_ENTROPY
        or loss_utils.fixed_cross_entropy is not _HELPER
    ):
        if shift_labels is not None:
            kwargs["shift_labels"] = shift_labels
        return _OWN(logits, labels, vocab_size, num_items_in_batch, ignore_index, **kwargs)
    if targets.device != lazy.device:
        targets = targets.to(lazy.device)
    reduction, shift = "mean" if num_items_in_batch is None else "sum", shift_labels is None
    loss = fused_cross_entropy(
        lazy, targets, ignore_index, reduction, dtype=torch.float32, shift=shift
    )
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def _is_known() -> bool:
    """Return whether ``ForCausalLMLoss`` of this transformers computes what is computed here."""
    modules = {_OWN: loss_utils, _HELPER: loss_utils, _CROSS_ENTROPY: F}
    if any(getattr(f, "__module__", 0) != getattr(m, "__name__", 1) for f, m in modules.items()):
        return False  # there is none, or somebody has replaced what it calls
    if list(inspect.signature(_OWN).parameters) != list(inspect.signature(causal_loss).parameters):
        return False
    logits = torch.linspace(-2, 3, 30, dtype=torch.float32, device="cpu").sin().view(2, 3, 5)
    labels = torch.tensor([[4, 1, -100], [-100, 2, 0]], device="cpu")
    targets = torch.tensor([[1, -100, -100], [2, 0, -100]], device="cpu")
    expected = F.cross_entropy(logits.view(6, 5), targets.view(6), reduction="none")
    mean, of_seven = expected.sum() / 3, expected[:4].sum() / 7
    return torch.allclose(_OWN(logits, labels, 5), mean) and torch.allclose(
        _OWN(logits, labels, 5, 7, ignore_index=0, shift_labels=targets.clamp_min(0)), of_seven
    )


_IS_KNOWN = _is_known()
