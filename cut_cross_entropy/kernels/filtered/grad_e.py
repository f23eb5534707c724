"""dE from the stored strips: one owner per output tile, sums in float32 registers, no atomics.

Shape legend: ``cut_cross_entropy.kernels``.
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.block_sizes import tiles_on, two_per_sm
from cut_cross_entropy.kernels.filtered.strips import StoredStrips, stored_rows
from cut_cross_entropy.kernels.filtered.tail import TokenTails
from cut_cross_entropy.kernels.launch import cdiv, launch, next_power_of_2
from cut_cross_entropy.kernels.primitives import gather_rows
from cut_cross_entropy.kernels.tokens import BackwardTokens, scatter_rows

BLOCK_K = 64  # strips per step
STAGES = 5  # loads depend on the list: two steps ahead of their product, where three are one


@triton.jit(do_not_specialize=["N", "first_block", "first_borrowed"])
def grad_e_kernel(
    grad_ptr,  # (first_borrowed, BLOCK_T) scaled logit gradients
    borrowed_ptr,  # (K - first_borrowed, BLOCK_T) those of the slots behind them
    c_ptr,  # (V, D)
    classes_ptr,  # (K,)
    slots_ptr,  # (K,)
    starts_ptr,  # (blocks + 1,)
    scale_ptr,  # ()
    tail_ptr,  # (N,) weight of the tail; None: sums of other strips are in ``out_ptr``
    centers_ptr,  # (blocks, D) mean row of c over the dropped strips of each block
    origin_ptr,  # (N,); None, like the centres, without a tail
    out_ptr,  # (N, D) in the caller's order, or in, out: in that of the tokens without a tail
    N,
    D,
    first_block,
    first_borrowed,
    stride_out,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write BLOCK_N features of dE for one block of tokens, or add to them."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    start = tl.load(starts_ptr + block)
    stop = tl.load(starts_ptr + block + 1)
    lanes = tl.arange(0, BLOCK_T)
    tokens = (first_block + block) * BLOCK_T + lanes
    scale = tl.load(scale_ptr)
    if tail_ptr is None:  # the sum goes on, as long as it is in registers
        place = out_ptr + tokens.to(tl.int64)[:, None] * stride_out + column[None, :]
        mask = (tokens < N)[:, None] & (column < D)[None, :]
        total = tl.load(place, mask=mask, other=0.0) * scale
    else:
        total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for i in range(tl.cdiv(stop - start, BLOCK_K)):
        strips = start + i * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = strips < stop
        slots = tl.load(slots_ptr + strips, mask=inside, other=0)
        classes = tl.load(classes_ptr + strips, mask=inside, other=0)
        stored = stored_rows(grad_ptr, borrowed_ptr, slots, first_borrowed, BLOCK_T=BLOCK_T)
        grads = tl.load(stored[:, None] + lanes[None, :], mask=inside[:, None], other=0.0)
        rows = gather_rows(c_ptr, classes, inside, column, D)
        total = tl.dot(grads.T, rows, total, input_precision="ieee")
    row = tokens
    total /= scale
    if tail_ptr is not None:
        row = tl.load(origin_ptr + tokens, mask=tokens < N, other=N)
        tail = tl.load(tail_ptr + tokens, mask=tokens < N, other=0.0)
        center = tl.load(
            centers_ptr + (first_block + block) * D + column, mask=column < D, other=0.0
        )
        total += tail[:, None] * center[None, :]
    tl.store(
        out_ptr + row.to(tl.int64)[:, None] * stride_out + column[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(row < N)[:, None] & (column < D)[None, :],
    )


def write_grad_e(
    c: Tensor,
    tokens: BackwardTokens,
    stored: StoredStrips,  # all kept strips of their blocks
    tails: TokenTails,
    *,
    centers: Tensor,  # (blocks, D) float32
    out: Tensor,  # (N, D) in the caller's order
) -> None:
    """Write the rows of dE that belong to the blocks of the stored strips."""
    _launch(c, tokens, stored, out, weights=tails.weights, centers=centers)


def add_grad_e(
    c: Tensor,  # (classes, D) rows of the classes that the stored strips name
    tokens: BackwardTokens,
    stored: StoredStrips,  # some kept strips of their blocks
    out: Tensor,  # (whole blocks of tokens, D) float32, in, out: in the order of the tokens
) -> None:
    """Add stored strips to the sums of dE, without the tail."""
    _launch(c, tokens, stored, out)


def finish_grad_e(
    sums: Tensor,  # from add_grad_e; is overwritten
    tokens: BackwardTokens,
    tails: TokenTails,
    centers: Tensor,  # (blocks, D) float32
    out: Tensor,  # (N, D) in the caller's order
) -> None:
    """Write dE from the sums of all strips and the tail."""
    num_tokens, (num_rows, dim) = tails.weights.shape[0], sums.shape
    weights = F.pad(tails.weights, (0, num_rows - num_tokens))
    blocks = sums.view(-1, BLOCK_T, dim)
    blocks.addcmul_(weights.view(-1, BLOCK_T, 1), centers[: blocks.shape[0], None])
    scatter_rows(sums[:num_tokens], tokens.origin, out)


def _launch(
    c: Tensor,
    tokens: BackwardTokens,
    stored: StoredStrips,
    out: Tensor,
    weights: Tensor | None = None,
    centers: Tensor | None = None,
) -> None:
    strips, tiles, dim = stored.strips, tiles_on(tokens.e.device), c.shape[1]
    block_n = min(tiles.block_n, max(32, next_power_of_2(dim)))
    options = two_per_sm(c.device, tiles)
    if weights is not None and tiles.block_v > BLOCK_T:  # the memory of these is large enough
        options["num_stages"] = STAGES
    launch(
        grad_e_kernel,
        (cdiv(dim, block_n), strips.num_blocks),
        grad_ptr=stored.grads,
        borrowed_ptr=stored.borrowed,
        c_ptr=c,
        classes_ptr=strips.classes,
        slots_ptr=strips.slots,
        starts_ptr=strips.index.block_starts,
        scale_ptr=tokens.scale,
        tail_ptr=weights,
        centers_ptr=centers,
        origin_ptr=None if weights is None else tokens.origin,
        out_ptr=out,
        N=out.shape[0],
        D=dim,
        first_block=strips.first_block,
        first_borrowed=stored.grads.shape[0],
        stride_out=out.stride(0),
        BLOCK_T=BLOCK_T,
        BLOCK_K=min(BLOCK_K, tiles.block_d),
        BLOCK_N=block_n,
        **options,
    )
