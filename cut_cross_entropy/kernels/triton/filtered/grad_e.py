"""Triton kernels of ``kernels.filtered.grad_e``."""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.triton.filtered.strips import stored_rows
from cut_cross_entropy.kernels.triton.primitives import gather_rows


@triton.jit
def tilted_rows(
    e_ptr,  # (N, D)
    multiplier_ptr,  # (N,), or None
    mass_ptr,  # (N,) dropped probability
    tokens,  # (BLOCK_T,)
    inside,  # (BLOCK_T,)
    columns,  # (BLOCK_N,)
    D,
):
    """Return the embeddings of a block less their mean, which the dropped masses weight."""
    mass = tl.load(mass_ptr + tokens, mask=inside, other=0.0)
    counted = mass > 0  # nor NaN
    mass = tl.where(counted, mass, 0.0)
    e = gather_rows(e_ptr, tokens, counted, columns, D).to(tl.float32)
    if multiplier_ptr is not None:
        e *= tl.load(multiplier_ptr + tokens, mask=counted, other=0.0)[:, None]
    total = tl.sum(mass, 0)
    mean = tl.sum(mass[:, None] * e, 0) / tl.where(total > 0, total, 1.0)
    return tl.where(counted[:, None], e - mean[None, :], 0.0)


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
    tilts_ptr,  # (blocks,) see TailSample; None for zeros, like the next two
    mass_ptr,  # (N,) dropped probability
    e_ptr,  # (N, D)
    multiplier_ptr,  # (N,), or None for ones
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
    elif tilts_ptr is not None:
        total = tilted_rows(
            e_ptr,
            multiplier_ptr=multiplier_ptr,
            mass_ptr=mass_ptr,
            tokens=tokens,
            inside=tokens < N,
            columns=column,
            D=D,
        )
        tail = tl.load(tail_ptr + tokens, mask=tokens < N, other=0.0)
        total *= (tail * tl.load(tilts_ptr + first_block + block) * scale)[:, None]
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
