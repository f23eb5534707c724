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

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.launch import launch
from cut_cross_entropy.kernels.listing import StripList
from cut_cross_entropy.kernels.primitives import LOG2E

MAX_SPLITS = 256


@triton.jit(do_not_specialize=["num_rows", "rows_per_split"])
def weighted_row_sum_kernel(
    weights_ptr,  # (rows,)
    factor_ptr,  # () of all weights; only if HAS_FACTOR
    rows_ptr,  # (rows, D)
    out_ptr,  # (splits, D) out
    num_rows,
    D,
    rows_per_split,
    HAS_FACTOR: tl.constexpr,
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
    row = tl.sum(total, 0)
    if HAS_FACTOR:
        row *= tl.load(factor_ptr)
    tl.store(out_ptr + split * D + columns, row, mask=columns < D)


def weighted_row_sum(weights: Tensor, rows: Tensor, factor: Tensor | None = None) -> Tensor:
    """``weights @ rows``, times a factor on the device: (R,) and contiguous (R, D) to (D,) float32.

    Of ``factor`` the first element counts.
    """
    num_rows, dim = rows.shape
    block_r, block_d = 32, min(256, triton.next_power_of_2(dim))
    per_split = block_r * triton.cdiv(triton.cdiv(num_rows, block_r), MAX_SPLITS)
    splits = triton.cdiv(num_rows, per_split)
    partial = torch.empty((splits, dim), dtype=torch.float32, device=rows.device)
    launch(
        weighted_row_sum_kernel,
        (triton.cdiv(dim, block_d), splits),
        weights,
        factor,
        rows,
        partial,
        num_rows,
        dim,
        per_split,
        HAS_FACTOR=factor is not None,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=8,
    )
    return partial.sum(0)


@triton.jit(do_not_specialize=["N", "first_block"])
def tails_kernel(
    tiles_ptr,  # (tiles, BLOCK) what the strips of a tile hold of each token
    first_tile_ptr,  # (blocks of the list + 1,)
    held_ptr,  # (N,) in, out: what the kept strips of a token hold
    a_ptr,  # (N,)
    lse_ptr,  # (N,) log2
    sharp_ptr,  # (N,) negative for tokens without a filtered gradient
    share_ptr,  # (3,) 1 / W, means of log(share) and of its square over the tail
    shard_ptr,  # (N,) probability of the classes that are here; only if SHARDED
    tails_ptr,  # (N,) out
    mass_ptr,  # (N,) out
    first_block,
    N,
    softcap,
    SOFTCAP: tl.constexpr,
    SHARDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What each token's tail weighs: a times the dropped mass, times the slope of the softcap.

    In the rank-one model a dropped probability is ``mass * share``, so its logit is
    ``lse + log(mass) + log(share)``, and the mean of its square has a closed form.
    """
    block = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    tokens = (first_block + block) * BLOCK + lanes
    inside = tokens < N
    held = tl.load(held_ptr + tokens, mask=inside, other=1.0)
    first, stop = tl.load(first_tile_ptr + block), tl.load(first_tile_ptr + block + 1)
    for tile in range(first, stop):  # in their order, whatever the number of tiles
        held += tl.load(tiles_ptr + tile * BLOCK + lanes)
    tl.store(held_ptr + tokens, held, mask=inside)
    # Not ">= 0": a NaN has to go on.
    sharp = inside & ~(tl.load(sharp_ptr + tokens, mask=inside, other=-2.0) < 0)
    whole = tl.load(shard_ptr + tokens, mask=inside, other=1.0) if SHARDED else 1.0
    mass = tl.where(sharp, tl.maximum(whole - held, 0.0, propagate_nan=tl.PropagateNan.ALL), 0.0)
    weight = mass
    if SOFTCAP:
        lse = tl.load(lse_ptr + tokens, mask=inside & sharp, other=0.0)
        base = (lse + tl.log2(tl.maximum(mass, 1e-30))) / LOG2E
        square = base * base + 2 * base * tl.load(share_ptr + 1) + tl.load(share_ptr + 2)
        weight *= tl.minimum(tl.maximum(1.0 - square / (softcap * softcap), 0.0), 1.0)
    a = tl.load(a_ptr + tokens, mask=inside, other=0.0)
    tl.store(tails_ptr + tokens, tl.where(sharp, a * weight, 0.0), mask=inside)
    tl.store(mass_ptr + tokens, mass, mask=inside)


def write_tails(
    held_by_tile: Tensor,  # (tiles, 128) from strip_gradients
    strips: StripList,
    a: Tensor,  # (N,)
    lse: Tensor,  # (N,) log2
    sharp: Tensor,  # (N,)
    softcap: float | None,
    shard: Tensor | None,  # (N,) probability of the classes that are here; None: all are
    held: Tensor,  # (N,) in, out
    tails: Tensor,  # (N,) out
    mass: Tensor,  # (N,) out
) -> None:
    """Add what the tiles of a list hold to ``held``; write what is left to tails and masses.

    Once all lists of a block were seen, its tails and masses are those of the tail.
    """
    num_blocks = strips.places.starts.shape[0]
    launch(
        tails_kernel,
        (num_blocks,),
        held_by_tile,
        strips.places.first_tile,
        held,
        a,
        lse,
        sharp,
        strips.places.tail,
        shard,
        tails,
        mass,
        strips.first_block,
        a.shape[0],
        softcap or 0.0,
        SOFTCAP=softcap is not None,
        SHARDED=shard is not None,
        BLOCK=BLOCK_T,
    )
