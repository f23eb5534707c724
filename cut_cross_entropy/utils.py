"""Small functions around the loss: z-loss and softcap."""

import torch
from torch import Tensor

from cut_cross_entropy.compatibility import (
    TensorInfo,
    handle_reduction_none,
    recommend_c_grad_chunk_size,
    to_full_tensor,
)
from cut_cross_entropy.compatibility import build_flat_valids as _build_flat_valids
from cut_cross_entropy.compatibility import handle_eps as _handle_eps
from cut_cross_entropy.constants import IGNORE_INDEX
from cut_cross_entropy.options import Reduction
from cut_cross_entropy.reductions import reduce_tokens
from cut_cross_entropy.validation import check_reduction, check_shift

__all__ = [
    "TensorInfo",
    "_build_flat_valids",
    "_handle_eps",
    "compute_z_loss",
    "handle_reduction_none",
    "recommend_c_grad_chunk_size",
    "softcapping",
    "to_full_tensor",
]


def softcapping(logits: Tensor, softcap: float) -> Tensor:
    """``softcap * tanh(logits / softcap)``; any shape, dtype kept."""
    return softcap * torch.tanh(logits / softcap)


def compute_z_loss(
    lse: Tensor,
    targets: Tensor | None = None,
    shift: bool | int = False,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
) -> Tensor:
    """The square of the log-sum-exp, which keeps the softmax normaliser near 1.

    Source: the auxiliary loss of PaLM (arXiv 2204.02311, section 5).

    Examples:
        >>> from cut_cross_entropy import linear_cross_entropy
        >>> e, c, targets = torch.randn(6, 8), torch.randn(11, 8), torch.randint(0, 11, (6,))
        >>> loss, lse = linear_cross_entropy(e, c, targets, return_lse=True)
        >>> loss = loss + 1e-4 * compute_z_loss(lse, targets)

    Args:
        lse: per token, as ``linear_cross_entropy(..., return_lse=True)`` returns it.
        targets: class ids of the unshifted tokens, whose ignored tokens are left out. None leaves
            out none.
        shift: the shift that ``lse`` was computed with.
        ignore_index: target value of tokens without a loss.
        reduction: ``"mean"`` over the tokens that count, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or with ``"none"`` the shape of ``lse``, 0 at ignored tokens.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: unknown reduction, negative shift, or shapes that do not fit.
    """
    for name, x in (("lse", lse), ("targets", targets)):
        if not isinstance(x, Tensor) and not (name == "targets" and x is None):
            hint = ": pass the second of the pair" if isinstance(x, tuple) else ""
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}{hint}")
    check_reduction(reduction)
    check_shift(shift)
    z_loss = lse.square()
    if targets is not None:
        shifted = targets[..., int(shift) :] if shift else targets  # may have no dimension
        if shifted.numel() != lse.numel():
            raise ValueError(
                f"targets less shift={int(shift)} must have as many elements as lse, "
                f"{tuple(lse.shape)}, got {tuple(shifted.shape)}"
            )
        targets = shifted.reshape(lse.shape)
        z_loss = torch.where(targets != ignore_index, z_loss, 0)
    return reduce_tokens(z_loss, targets, ignore_index, reduction)
