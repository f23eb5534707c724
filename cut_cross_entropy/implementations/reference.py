"""Full logits in high precision: slow, large, and what defines correct.

Half precision inputs are widened to float32 before the product, float64 stays float64, and PyTorch
differentiates it (twice, if asked). Shape legend: ``cut_cross_entropy.implementations``.
"""

import torch
from torch import Tensor


def target_logits_and_lse(
    e: Tensor,  # (N, D)
    c: Tensor,  # (V, D)
    targets: Tensor,  # (N,) counted from the first row of c
    bias: Tensor | None,  # (V,)
    kept: Tensor,  # (N,) bool
    multiplier: Tensor | None,  # (N,)
    *,
    softcap: float | None,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Logit of the target and log-sum-exp of every token, (N,) each.

    The logit is +inf where the target is not a row of ``c``. Values of tokens that are not kept
    are undefined.
    """
    wide = torch.promote_types(compute_dtype, torch.float32)
    here = (targets >= 0) & (targets < c.shape[0])

    # An ignored token contributes nothing, whatever its embedding holds: a NaN there would reach
    # the classifier's gradient as 0 * NaN.
    e = torch.where(kept[:, None], e, 0)
    logits = e.to(compute_dtype).to(wide) @ c.to(compute_dtype).to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if multiplier is not None:
        logits = logits * multiplier[:, None]

    safe = torch.where(here, targets, 0).long()
    logit = logits.gather(1, safe[:, None]).squeeze(1)
    return torch.where(here, logit, torch.inf), torch.logsumexp(logits, dim=1)
