"""dE from the stored strips: one owner an output tile, sums in float32 registers, no atomics.

Shape legend: ``cut_cross_entropy.kernels``.
"""

import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.config import Tiles, half_of_a_processor
from cut_cross_entropy.kernels.launch import launch
from cut_cross_entropy.kernels.listing import StripList

BLOCK_K = 64  # strips a step


@triton.jit(do_not_specialize=["N", "first_block"])
def grad_e_kernel(
    grad_ptr,  # (K, BLOCK_T) scaled logit gradients
    c_ptr,  # (V, D)
    classes_ptr,  # (K,)
    numbers_ptr,  # (K,)
    starts_ptr,  # (blocks + 1,)
    scale_ptr,  # ()
    tail_ptr,  # (N,) a * dropped mass
    center_ptr,  # (D,) mean row of c over the dropped part
    origin_ptr,  # (N,)
    out_ptr,  # (N, D) in the caller's order
    N,
    D,
    first_block,
    stride_out,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of tokens, BLOCK_N features."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    start = tl.load(starts_ptr + block)
    stop = tl.load(starts_ptr + block + 1)
    lanes = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for i in range(tl.cdiv(stop - start, BLOCK_K)):
        strips = start + i * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = strips < stop
        numbers = tl.load(numbers_ptr + strips, mask=inside, other=0).to(tl.int64)
        classes = tl.load(classes_ptr + strips, mask=inside, other=0).to(tl.int64)
        grads = tl.load(
            grad_ptr + numbers[:, None] * BLOCK_T + lanes[None, :], mask=inside[:, None], other=0.0
        )
        rows = tl.load(
            c_ptr + classes[:, None] * D + column[None, :],
            mask=inside[:, None] & (column < D)[None, :],
            other=0.0,
        )
        total = tl.dot(grads.T, rows, total, input_precision="ieee")
    tokens = (first_block + block) * BLOCK_T + lanes
    origin = tl.load(origin_ptr + tokens, mask=tokens < N, other=N)
    tail = tl.load(tail_ptr + tokens, mask=tokens < N, other=0.0)
    center = tl.load(center_ptr + column, mask=column < D, other=0.0)
    total = total / tl.load(scale_ptr) + tail[:, None] * center[None, :]
    tl.store(
        out_ptr + origin.to(tl.int64)[:, None] * stride_out + column[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(origin < N)[:, None] & (column < D)[None, :],
    )


def grad_e(
    grads: Tensor,  # (K, 128)
    c: Tensor,  # (V, D)
    strips: StripList,
    scale: Tensor,  # ()
    tail: Tensor,  # (N,)
    center: Tensor,  # (D,)
    origin: Tensor,  # (N,)
    out: Tensor,  # (N, D)
    tiles: Tiles,
) -> None:
    """Write the rows of ``out`` that belong to the blocks of ``strips``."""
    num_blocks, dim = strips.places.starts.shape[0], c.shape[1]
    block_n = min(tiles.block_n, max(32, triton.next_power_of_2(dim)))
    launch(
        grad_e_kernel,
        (triton.cdiv(dim, block_n), num_blocks),
        grads,
        c,
        strips.classes,
        strips.numbers,
        strips.places.block_starts,
        scale,
        tail,
        center,
        origin,
        out,
        out.shape[0],
        dim,
        strips.first_block,
        out.stride(0),
        BLOCK_T=BLOCK_T,
        BLOCK_K=min(BLOCK_K, tiles.block_d),
        BLOCK_N=block_n,
        **half_of_a_processor(c.device, tiles),
    )
