"""Partial sums of dC, kept in little memory from one superblock to the next.

Their upper 16 bits are stored in dC itself, whatever its format, and the next 4 or 8 bits in a
buffer, which leaves an error of at most 2^-12 or 2^-16 per superblock. Shape legend:
``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Up to this number of superblocks 4 bits suffice: independent errors, at most 2^-12 each, then add
# up to a third of the error of rounding to bfloat16, on average.
FEW_SUPERBLOCKS = 32
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


def choose_low_bits(out: Tensor, num_superblocks: int) -> int:
    """Return how many bits of a sum to store besides those in ``out`` (V, D).

    0 for float32, which is wide enough itself. The fewer bits, the more classes are summed
    together, and the fewer strips are computed twice.
    """
    if out.dtype == torch.float32:
        return 0
    return 4 if out.dtype == torch.bfloat16 and num_superblocks <= FEW_SUPERBLOCKS else 8


def bytes_per_row(out: Tensor, num_superblocks: int) -> int:
    """Return the bytes that the sums of one row of ``out`` (V, D) need besides it."""
    bits, dim = choose_low_bits(out, num_superblocks), out.shape[1]
    return -(-dim // (2 * APART.value)) * APART.value if bits == 4 else dim * bits // 8


@dataclass(frozen=True)
class PartialSums:
    """Sums of a range of rows of dC between superblocks.

    Args:
        high: (V, D) dC as float32 sums, or as int16 with their upper bits.
        low: (classes, bytes per row) uint8 with the next bits; None for float32 sums.
        low_bits: how many bits ``low`` holds of a sum.
        classes: range of class ids.
    """

    high: Tensor
    low: Tensor | None
    low_bits: int
    classes: tuple[int, int]

    @classmethod
    def zeros(cls, out: Tensor, num_superblocks: int, classes: tuple[int, int]) -> "PartialSums":
        """Return sums of 0 for a range of the rows of ``out`` (V, D), which they overwrite."""
        rows, bits = out[slice(*classes)].zero_(), choose_low_bits(out, num_superblocks)
        if bits == 0:
            return cls(out, None, bits, classes)
        size = (rows.shape[0], bytes_per_row(out, num_superblocks))
        low = rows.new_zeros(size, dtype=torch.uint8)
        return cls(out.view(torch.int16), low, bits, classes)
