"""Triton kernels of ``kernels.filtered.partial_sums``."""

import triton
import triton.language as tl

APART = tl.constexpr(16)  # distance of two columns whose 4 bits share a byte: a thread holds both


@triton.jit
def low_bytes_per_row(D, LOW_BITS: tl.constexpr):
    """Return how many bytes hold the low bits of a row of D sums."""
    return tl.cdiv(D, 2 * APART) * APART if LOW_BITS == 4 else D


@triton.jit
def load_sums(
    high_ptr,  # (V, D) float32 sums or, as int16, their upper bits
    low_ptr,  # (classes, bytes per row) uint8: the next bits; those of two columns if there are 4
    cells,  # classes (R,), columns (C,), whether there is such a class (R,)
    table,  # first class of ``low_ptr``, D, stride of ``high_ptr``
    LOW_BITS: tl.constexpr,  # 0, 4 or 8
):
    """Load the sums of some rows and columns, float32 (R, C)."""
    classes, columns, inside = cells
    first_class, D, stride = table
    here = inside[:, None] & (columns < D)[None, :]
    elements = classes.to(tl.int64)[:, None] * stride + columns[None, :]
    if LOW_BITS == 0:
        sums = tl.load(high_ptr + elements, mask=here, other=0.0)
    else:
        own = columns
        if LOW_BITS == 4:
            own = columns // (2 * APART) * APART + columns % APART
        size = low_bytes_per_row(D, LOW_BITS)
        below = (classes - first_class).to(tl.int64)[:, None] * size + own[None, :]
        low = tl.load(low_ptr + below, mask=here, other=0).to(tl.int32)
        if LOW_BITS == 4:
            low = (low >> (columns // APART % 2 * 4)[None, :]) & 15
        high = tl.load(high_ptr + elements, mask=here, other=0).to(tl.int32)
        sums = ((high << 16) | (low << (16 - LOW_BITS))).to(tl.float32, bitcast=True)
    return sums


@triton.jit
def store_sums(
    high_ptr,  # see load_sums
    low_ptr,
    sums,  # (R, C)
    cells,  # the same with the first column instead of all, a multiple of 2 * APART
    table,
    LOW_BITS: tl.constexpr,
):
    """Store the sums that :func:`load_sums` loads."""
    classes, column, inside = cells
    first_class, D, stride = table
    num_rows: tl.constexpr = sums.shape[0]
    num_columns: tl.constexpr = sums.shape[1]
    columns = column + tl.arange(0, num_columns)
    here = inside[:, None] & (columns < D)[None, :]
    elements = classes.to(tl.int64)[:, None] * stride + columns[None, :]
    if LOW_BITS == 0:
        tl.store(high_ptr + elements, sums, mask=here)
    else:
        # Round to the nearest, in magnitude; NaN and infinity stay as they are.
        bits = sums.to(tl.int32, bitcast=True)
        bits = tl.where(tl.abs(sums) < float("inf"), bits + (1 << (15 - LOW_BITS)), bits)
        tl.store(high_ptr + elements, (bits >> 16).to(tl.int16), mask=here)
        low = (bits >> (16 - LOW_BITS)) & ((1 << LOW_BITS) - 1)
        own = columns
        if LOW_BITS == 4:
            pairs = tl.reshape(low, (num_rows, num_columns // (2 * APART), 2, APART))
            first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            low = tl.reshape(first | (second << 4), (num_rows, num_columns // 2))
            own = column // 2 + tl.arange(0, num_columns // 2)
        size = low_bytes_per_row(D, LOW_BITS)
        below = (classes - first_class).to(tl.int64)[:, None] * size + own[None, :]
        here = inside[:, None] & (own < size)[None, :]
        tl.store(low_ptr + below, low.to(tl.uint8), mask=here)
