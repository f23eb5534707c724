"""Triton kernels of ``kernels.divergence_columns``."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens", "num_classes"])
def column_energies_kernel(
    grad_ptr,  # (T, stride) logit gradients
    unit_ptr,  # () what they are multiplied by before they are squared
    energies_ptr,  # (V,) out: sums of their squares
    num_tokens,
    num_classes,
    stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the squares of the logit gradients of a block of classes."""
    classes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = classes < num_classes
    unit = tl.load(unit_ptr)
    energy = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, num_tokens, ROWS):
        tokens = start + tl.arange(0, ROWS)
        grad = tl.load(
            grad_ptr + tokens.to(tl.int64)[:, None] * stride + classes[None, :],
            mask=(tokens < num_tokens)[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        energy += (grad * unit) * (grad * unit)
    tl.store(energies_ptr + classes, tl.sum(energy, 0), mask=inside)


@triton.jit(do_not_specialize=["num_kept"])
def move_columns_kernel(
    grad_ptr,  # (T, stride) in, out: logit gradients, in which kept classes become 0
    ids_ptr,  # (K,) int64 kept classes, ascending
    columns_ptr,  # (T, K) out
    num_kept,
    stride,
    BLOCK: tl.constexpr,
):
    """Move the kept classes of one token."""
    row = tl.program_id(0)
    for start in range(0, num_kept, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < num_kept
        place = row.to(tl.int64) * stride + tl.load(ids_ptr + places, mask=inside, other=0)
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0)
        tl.store(columns_ptr + row.to(tl.int64) * num_kept + places, grad, mask=inside)
        tl.store(grad_ptr + place, tl.zeros_like(grad), mask=inside)


@triton.jit
def add_rows_kernel(
    rows_ptr,  # (K, D)
    ids_ptr,  # (K,) int64, each once
    out_ptr,  # (V, D) in, out
    D,
    BLOCK: tl.constexpr,
):
    """Add a part of one row to that of its class."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    out = out_ptr + tl.load(ids_ptr + row) * D + columns
    rows = tl.load(rows_ptr + row.to(tl.int64) * D + columns, mask=inside, other=0.0)
    tl.store(out, tl.load(out, mask=inside, other=0.0) + rows, mask=inside)
