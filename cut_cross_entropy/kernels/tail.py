"""The tail: what the dropped strips are replaced by.

Dropped probabilities become the rank-one matrix ``m w^T / sum(w)``, with m the mass that a token
lost and w what a class lost. Its products with c and e are a vector each: the centre of the dropped
rows of c, and the sum of the tokens weighted by their tails. Shape legend:
``cut_cross_entropy.kernels``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels.config import launch_device

MAX_SPLITS = 256


@triton.jit
def weighted_row_sum_kernel(
    weights_ptr,  # (rows,)
    rows_ptr,  # (rows, D)
    out_ptr,  # (splits, D) out
    num_rows,
    D,
    rows_per_split,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of weight times row over one split of the rows."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    total = tl.zeros((BLOCK_D,), tl.float32)
    stop = min(num_rows, (split + 1) * rows_per_split)
    for start in tl.range(split * rows_per_split, stop, BLOCK_R, num_stages=3):
        rows = start + tl.arange(0, BLOCK_R)
        weights = tl.load(weights_ptr + rows, mask=rows < stop, other=0.0)
        values = tl.load(
            rows_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :],
            mask=(rows < stop)[:, None] & (columns < D)[None, :],
            other=0.0,
        )
        total += tl.sum(weights[:, None] * values.to(tl.float32), 0)
    tl.store(out_ptr + split * D + columns, total, mask=columns < D)


def weighted_row_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """``weights @ rows`` in float32: (R,) and contiguous (R, D) to (D,)."""
    num_rows, dim = rows.shape
    block_r, block_d = 64, min(256, triton.next_power_of_2(dim))
    per_split = block_r * triton.cdiv(triton.cdiv(num_rows, block_r), MAX_SPLITS)
    splits = triton.cdiv(num_rows, per_split)
    partial = torch.empty((splits, dim), dtype=torch.float32, device=rows.device)
    with launch_device(rows.device):
        weighted_row_sum_kernel[(triton.cdiv(dim, block_d), splits)](
            weights,
            rows,
            partial,
            num_rows,
            dim,
            per_split,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            num_warps=8,
        )
    return partial.sum(0)


def tail_slope(
    lse: Tensor,  # (N,) natural
    mass: Tensor,  # (N,) dropped mass
    shares: Tensor,  # (V,) w / sum(w)
    softcap: float,
) -> Tensor:
    """Mean derivative of the softcap over the dropped part of each token, (N,).

    In the rank-one model a dropped probability is ``mass * share``, so its logit is
    ``lse + log(mass) + log(share)``, whose square has a mean in closed form.
    """
    log_share = torch.where(shares > 0, shares.log(), 0)
    first, second = (shares * log_share).sum(), (shares * log_share.square()).sum()
    base = lse + mass.clamp_min(1e-30).log()
    mean_square = base.square() + 2 * base * first + second
    return (1 - mean_square / softcap**2).clamp(0, 1)
