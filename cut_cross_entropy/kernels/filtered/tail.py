"""The tail: the rank-one matrix that stands in for the dropped strips.

Dropped probabilities become the matrix ``m w^T / sum(w)``, with m the mass that a token lost and w
the weight that a class lost. Its products with c and e are a vector each: the centre of the dropped
rows of c, and the sum of the tokens weighted by their tails. Shape legend:
``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.filtered.strips import StoredStrips
from cut_cross_entropy.kernels.launch import aligned_rows, launch
from cut_cross_entropy.kernels.primitives import ABSENT, LOG2E
from cut_cross_entropy.kernels.tokens import BackwardTokens
from cut_cross_entropy.problem import Problem

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
    """Sum weight times row over one split of the rows."""
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
    """Compute ``weights @ rows`` times the first element of ``factor``, in float32.

    ``weights`` is (R,), ``rows`` a contiguous (R, D), the result (D,).
    """
    num_rows, dim = rows.shape
    block_r, block_d = 32, min(256, triton.next_power_of_2(dim))
    per_split = block_r * triton.cdiv(triton.cdiv(num_rows, block_r), MAX_SPLITS)
    splits = triton.cdiv(num_rows, per_split)
    partial = torch.empty((splits, dim), dtype=torch.float32, device=rows.device)
    launch(
        weighted_row_sum_kernel,
        (triton.cdiv(dim, block_d), splits),
        weights_ptr=weights,
        factor_ptr=factor,
        rows_ptr=rows,
        out_ptr=partial,
        num_rows=num_rows,
        D=dim,
        rows_per_split=per_split,
        HAS_FACTOR=factor is not None,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=8,
    )
    return partial.sum(0)


@triton.jit(do_not_specialize=["N", "first_block"])
def tails_kernel(
    tiles_ptr,  # (tiles, BLOCK) mass of each token in the strips of a tile
    first_tile_ptr,  # (blocks of the list + 1,)
    kept_mass_ptr,  # (N,) in, out: mass of a token in its kept strips
    a_ptr,  # (N,)
    lse_ptr,  # (N,) log2
    target_miss_ptr,  # (N,) negative for tokens without a filtered gradient
    share_ptr,  # (3,) 1 / W, means of log(share) and of its square over the tail
    shard_mass_ptr,  # (N,) probability of this shard's classes; only if SHARDED
    tails_ptr,  # (N,) out
    mass_ptr,  # (N,) out
    first_block,
    N,
    softcap,
    SOFTCAP: tl.constexpr,
    SHARDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the weight of each token's tail: a times its dropped mass times the softcap's slope.

    In the rank-one model a dropped probability is ``mass * share``, so its logit is
    ``lse + log(mass) + log(share)``, and the mean of its square has a closed form.
    """
    block = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    tokens = (first_block + block) * BLOCK + lanes
    inside = tokens < N
    kept_mass = tl.load(kept_mass_ptr + tokens, mask=inside, other=1.0)
    first, stop = tl.load(first_tile_ptr + block), tl.load(first_tile_ptr + block + 1)
    for tile in range(first, stop):  # in order, whatever the number of tiles
        kept_mass += tl.load(tiles_ptr + tile * BLOCK + lanes)
    tl.store(kept_mass_ptr + tokens, kept_mass, mask=inside)
    # Not ">= 0": a NaN has to propagate.
    filtered = inside & ~(tl.load(target_miss_ptr + tokens, mask=inside, other=ABSENT) < 0)
    whole = tl.load(shard_mass_ptr + tokens, mask=inside, other=1.0) if SHARDED else 1.0
    mass = tl.where(
        filtered, tl.maximum(whole - kept_mass, 0.0, propagate_nan=tl.PropagateNan.ALL), 0.0
    )
    weight = mass
    if SOFTCAP:
        lse = tl.load(lse_ptr + tokens, mask=inside & filtered, other=0.0)
        base = (lse + tl.log2(tl.maximum(mass, 1e-30))) / LOG2E
        square = base * base + 2 * base * tl.load(share_ptr + 1) + tl.load(share_ptr + 2)
        weight *= tl.minimum(tl.maximum(1.0 - square / (softcap * softcap), 0.0), 1.0)
    a = tl.load(a_ptr + tokens, mask=inside, other=0.0)
    tl.store(tails_ptr + tokens, tl.where(filtered, a * weight, 0.0), mask=inside)
    tl.store(mass_ptr + tokens, mass, mask=inside)


@dataclass(frozen=True)
class TokenTails:
    """Tails of the tokens, (N,) float32 each.

    Args:
        kept_mass: probability in the kept strips that were computed so far.
        weights: factor of the centre of the dropped rows of c, once all strips were computed.
        mass: dropped probability, likewise.
    """

    kept_mass: Tensor
    weights: Tensor
    mass: Tensor

    @classmethod
    def zeros(cls, num_tokens: int, device: torch.device) -> "TokenTails":
        """Return tails of tokens of which no strip was computed yet."""
        return cls(*aligned_rows(3, num_tokens, torch.float32, device, zeros=True))


def update_tails(
    problem: Problem, tokens: BackwardTokens, stored: StoredStrips, tails: TokenTails
) -> None:
    """Add the kept mass of stored strips to ``tails``; recompute weights and masses, in place.

    Once all strips of a block were added, the weights and masses of its tokens are final.
    """
    strips = stored.strips
    launch(
        tails_kernel,
        (strips.num_blocks,),
        tiles_ptr=stored.kept_mass,
        first_tile_ptr=strips.index.first_tile,
        kept_mass_ptr=tails.kept_mass,
        a_ptr=tokens.a,
        lse_ptr=tokens.lse,
        target_miss_ptr=tokens.target_miss,
        share_ptr=strips.index.share,
        shard_mass_ptr=tokens.shard_mass,
        tails_ptr=tails.weights,
        mass_ptr=tails.mass,
        first_block=strips.first_block,
        N=tokens.a.shape[0],
        softcap=problem.softcap or 0.0,
        SOFTCAP=problem.softcap is not None,
        SHARDED=tokens.shard_mass is not None,
        BLOCK=BLOCK_T,
    )
