"""Matrix products whose number of rows or of terms is known on the device only.

While a CUDA graph is captured the host knows neither how many tokens count nor whether a product
is wanted at all. The vendor library would compute all of it; these programs read the number and
leave at once if there is nothing to do. Shape legend: ``cut_cross_entropy.kernels``.
"""

import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.block_sizes import tiles_on
from cut_cross_entropy.kernels.launch import cdiv, launch, next_power_of_2


@triton.jit(do_not_specialize=["has_sums"])
def counted_product_kernel(
    left_ptr,  # (M, K)
    right_ptr,  # (K, D) rows are contiguous
    scale_ptr,  # () what the product is divided by
    count_ptr,  # () int32 rows of the result if COUNTS_ROWS, else terms of the sums
    out_ptr,  # (splits, M, D) contiguous splits, out; in and out if has_sums
    M,
    K,
    D,
    left_m,  # strides
    left_k,
    right_k,
    out_m,
    terms,  # of a split
    has_sums,
    COUNTS_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write one tile of a product, or of the sums over one split of its terms."""
    count = tl.load(count_ptr)
    first_row = tl.program_id(1) * BLOCK_M
    num_rows = min(M, count) if COUNTS_ROWS else tl.where(count > 0, M, 0)
    if first_row >= num_rows:
        return
    num_terms = K if COUNTS_ROWS else min(K, count)
    split = tl.program_id(2)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    left_rows = left_ptr + rows.to(tl.int64)[:, None] * left_m
    right_columns = right_ptr + columns[None, :]
    for start in range(split * terms, min(num_terms, (split + 1) * terms), BLOCK_K):
        k = start + lanes
        left = tl.load(
            left_rows + k.to(tl.int64)[None, :] * left_k,
            mask=(rows < M)[:, None] & (k < num_terms)[None, :],
            other=0.0,
        )
        right = tl.load(
            right_columns + k.to(tl.int64)[:, None] * right_k,
            mask=(k < num_terms)[:, None] & (columns < D)[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    total /= tl.load(scale_ptr)
    out = out_ptr + (split.to(tl.int64) * M + rows)[:, None] * out_m + columns[None, :]
    here = (rows < num_rows)[:, None] & (columns < D)[None, :]
    if has_sums:
        total += tl.load(out, mask=here, other=0.0).to(tl.float32)
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=here)


def counted_product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    count: Tensor,
    scale: Tensor,
    of_rows: bool,
    accumulate: bool = False,
) -> None:
    """Compute ``out = left @ right / scale``, with float32 sums, as far as a count says.

    Args:
        left: (M, K); rows or columns are contiguous.
        right: (K, D) with contiguous rows.
        out: (M, D), or (S, M, D) for S sums over consecutive parts of the terms, contiguous.
        count: () int32. Of 0 nothing is written.
        scale: () float32.
        of_rows: whether ``count`` rows are computed, or all rows of the first ``count`` terms.
        accumulate: add to ``out``.
    """
    tiles, dim = tiles_on(out.device), right.shape[1]
    (num_rows, num_terms), num_splits = left.shape, 1 if out.dim() == 2 else out.shape[0]
    block_n = min(tiles.block_v, max(32, next_power_of_2(dim)))
    launch(
        counted_product_kernel,
        (cdiv(dim, block_n), cdiv(num_rows, BLOCK_T), num_splits),
        left_ptr=left,
        right_ptr=right,
        scale_ptr=scale,
        count_ptr=count,
        out_ptr=out,
        M=num_rows,
        K=num_terms,
        D=dim,
        left_m=left.stride(0),
        left_k=left.stride(1),
        right_k=right.stride(0),
        out_m=out.stride(-2),
        terms=cdiv(cdiv(num_terms, num_splits), 64) * 64,
        has_sums=accumulate,
        COUNTS_ROWS=of_rows,
        BLOCK_M=BLOCK_T,
        BLOCK_N=block_n,
        BLOCK_K=tiles.block_d,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
