"""Full logits in high precision: slow, large, and what defines correct.

Half precision inputs are widened to float32 before the product, float64 stays float64, and PyTorch
differentiates it (twice, if asked). Shape legend: ``cut_cross_entropy.implementations``.
"""

import torch
from torch import Tensor


def token_losses(
    e: Tensor,  # (N, D)
    c: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    *,
    ignore_index: int,
    softcap: float | None,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every token, each of shape (N,)."""
    wide = torch.promote_types(compute_dtype, torch.float32)
    kept = targets != ignore_index
    in_range = (targets >= 0) & (targets < c.shape[0])

    # An ignored token contributes nothing, whatever its embedding holds: a NaN there would reach
    # the classifier's gradient as 0 * NaN.
    e = torch.where(kept[:, None], e, 0)
    logits = e.to(compute_dtype).to(wide) @ c.to(compute_dtype).to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)

    lse = torch.logsumexp(logits, dim=1)
    safe = torch.where(in_range, targets, 0).long()
    nll = lse - logits.gather(1, safe[:, None]).squeeze(1)
    nll = torch.where(in_range, nll, torch.nan)
    return torch.where(kept, nll, 0), torch.where(kept, lse, 0)
