"""Triton kernels of ``kernels.counted_products``."""

import triton
import triton.language as tl


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
