"""Triton kernels of ``kernels.class_logits``."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["K"])
def class_products_kernel(
    e_ptr,  # (N, D)
    c_ptr,  # (V, D)
    ids_ptr,  # (N, K) row of c; -1 for none
    out_ptr,  # (N, K) out
    K,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Multiply one token by some of its classes; 0 where there is none."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.load(ids_ptr + token * K + k, mask=k < K, other=-1).to(tl.int64)
    present = rows >= 0
    if tl.max(present.to(tl.int32), 0) > 0:
        total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            e = tl.load(e_ptr + token * D + d, mask=d < D, other=0.0).to(tl.float32)
            mask = present[:, None] & (d < D)[None, :]
            c = tl.load(c_ptr + rows[:, None] * D + d[None, :], mask=mask, other=0.0)
            total += e[None, :] * c.to(tl.float32)
        product = tl.where(present, tl.sum(total, 1), 0.0)
    else:  # the embedding of an ignored token is not read: it may be NaN
        product = tl.zeros((BLOCK_K,), tl.float32)
    tl.store(out_ptr + token * K + k, product, mask=k < K)


@triton.jit(do_not_specialize=["K"])
def class_grad_e_kernel(
    c_ptr,  # (V, D)
    ids_ptr,  # (N, K) row of c; -1 for none
    weights_ptr,  # (N, K)
    grad_e_ptr,  # (N, D) out
    K,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the rows of one token's classes for some of the features."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        rows = tl.load(ids_ptr + token * K + k, mask=k < K, other=-1).to(tl.int64)
        present = rows >= 0
        weight = tl.load(weights_ptr + token * K + k, mask=present, other=0.0)
        mask = present[:, None] & (d < D)[None, :]
        c = tl.load(c_ptr + rows[:, None] * D + d[None, :], mask=mask, other=0.0)
        total += weight[:, None] * c.to(tl.float32)
    grad = tl.sum(total, 0)
    tl.store(grad_e_ptr + token * D + d, grad.to(grad_e_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["K"])
def class_grad_c_kernel(
    e_ptr,  # (N, D)
    pairs_ptr,  # (N * K,) token * K + k in order of class
    starts_ptr,  # (V + 1,) first pair of each class
    weights_ptr,  # (N, K)
    grad_c_ptr,  # (V, D) out
    grad_bias_ptr,  # (V,) out
    K,
    D,
    NEED_C: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the embeddings of one class's tokens for some of the features."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    for start in range(first, last, ROWS):
        place = start + tl.arange(0, ROWS)
        present = place < last
        pair = tl.load(pairs_ptr + place, mask=present, other=0)
        weight = tl.load(weights_ptr + pair, mask=present, other=0.0)
        mask = present[:, None] & (d < D)[None, :] & NEED_C
        e = tl.load(e_ptr + (pair // K)[:, None] * D + d[None, :], mask=mask, other=0.0)
        total += weight[:, None] * e.to(tl.float32)
        sums += weight
    if NEED_C:
        grad = tl.sum(total, 0).to(grad_c_ptr.dtype.element_ty)
        tl.store(grad_c_ptr + row * D + d, grad, mask=d < D)
    if NEED_BIAS:
        tl.store(grad_bias_ptr + row, tl.sum(sums, 0), mask=tl.program_id(1) == 0)
