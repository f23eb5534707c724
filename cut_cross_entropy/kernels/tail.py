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
from cut_cross_entropy.kernels.primitives import LOG2E

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
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    stop = min(num_rows, (split + 1) * rows_per_split)
    for start in tl.range(split * rows_per_split, stop, BLOCK_R, num_stages=3):
        rows = start + tl.arange(0, BLOCK_R)
        weights = tl.load(weights_ptr + rows, mask=rows < stop, other=0.0)
        values = tl.load(
            rows_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :],
            mask=(rows < stop)[:, None] & (columns < D)[None, :],
            other=0.0,
        )
        total += weights[:, None] * values.to(tl.float32)
    tl.store(out_ptr + split * D + columns, tl.sum(total, 0), mask=columns < D)


def weighted_row_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """``weights @ rows`` in float32: (R,) and contiguous (R, D) to (D,)."""
    num_rows, dim = rows.shape
    block_r, block_d = 32, min(256, triton.next_power_of_2(dim))
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


@triton.jit
def tails_kernel(
    held_ptr,  # (blocks of the list * BLOCK_T,) what the kept strips of a token hold
    a_ptr,  # (N,)
    lse_ptr,  # (N,) log2
    sharp_ptr,  # (N,) negative for tokens without a filtered gradient
    moments_ptr,  # (2,) mean of log(share) and of its square over the tail
    tails_ptr,  # (N,) out
    mass_ptr,  # (N,) out
    first_token,
    N,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What each token's tail weighs: a times the dropped mass, times the slope of the softcap.

    In the rank-one model a dropped probability is ``mass * share``, so its logit is
    ``lse + log(mass) + log(share)``, and the mean of its square has a closed form.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tokens = first_token + place
    inside = tokens < N
    # Not ">= 0": a NaN has to go on.
    sharp = inside & ~(tl.load(sharp_ptr + tokens, mask=inside, other=-2.0) < 0)
    held = tl.load(held_ptr + place, mask=inside, other=1.0)
    mass = tl.where(sharp, tl.maximum(1.0 - held, 0.0, propagate_nan=tl.PropagateNan.ALL), 0.0)
    weight = mass
    if SOFTCAP:
        lse = tl.load(lse_ptr + tokens, mask=inside & sharp, other=0.0)
        base = (lse + tl.log2(tl.maximum(mass, 1e-30))) / LOG2E
        square = base * base + 2 * base * tl.load(moments_ptr) + tl.load(moments_ptr + 1)
        weight *= tl.minimum(tl.maximum(1.0 - square / (softcap * softcap), 0.0), 1.0)
    a = tl.load(a_ptr + tokens, mask=inside, other=0.0)
    tl.store(tails_ptr + tokens, tl.where(sharp, a * weight, 0.0), mask=inside)
    tl.store(mass_ptr + tokens, mass, mask=inside)


def write_tails(
    held: Tensor,  # (blocks, 128)
    a: Tensor,  # (N,)
    lse: Tensor,  # (N,) log2
    sharp: Tensor,  # (N,)
    moments: Tensor | None,  # (2,) from share_moments; only with a softcap
    softcap: float | None,
    first_block: int,
    tails: Tensor,  # (N,) out
    mass: Tensor,  # (N,) out
) -> None:
    """Write tail weights and dropped masses of the tokens in a range of blocks."""
    block = held.shape[1]
    with launch_device(a.device):
        tails_kernel[(held.shape[0],)](
            held,
            a,
            lse,
            sharp,
            moments,
            tails,
            mass,
            first_block * block,
            a.shape[0],
            softcap or 0.0,
            SOFTCAP=softcap is not None,
            BLOCK=block,
        )


def share_moments(shares: Tensor) -> Tensor:
    """Mean of log(share) and of its square, weighted by the shares (V,): (2,)."""
    log_share = torch.where(shares > 0, shares.log(), 0)
    return torch.stack([(shares * log_share).sum(), (shares * log_share.square()).sum()])
