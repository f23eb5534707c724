"""Sums of dC that wait from one group of token blocks to the next, in little memory.

Their upper 16 bits wait in the result itself, whatever its format, and the next 4 or 8 bits beside
it, which leaves an error of 2^-12 or 2^-16 at most a group. Shape legend:
``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Up to so many groups 4 bits do: independent errors, 2^-12 each at most, then add up to a third of
# what rounding to bfloat16 costs, on average.
FEW_GROUPS = 32
APART = tl.constexpr(16)  # columns whose 4 bits share a byte: a thread holds both


@triton.jit
def load_sums(
    high_ptr,  # (V, D) float32 sums or, as int16, their upper bits
    low_ptr,  # (classes, bytes of a row) uint8: the next bits; of two columns if there are 4
    classes,  # (R,)
    columns,  # (C,)
    inside,  # (R,)
    first_class,  # of ``low_ptr``
    D,
    stride,  # of ``high_ptr``
    LOW_BITS: tl.constexpr,  # 0, 4 or 8
):
    """Sums of some rows and columns, float32 (R, C)."""
    here = inside[:, None] & (columns < D)[None, :]
    places = classes.to(tl.int64)[:, None] * stride + columns[None, :]
    if LOW_BITS == 0:
        sums = tl.load(high_ptr + places, mask=here, other=0.0)
    else:
        own = columns
        row_bytes = D
        if LOW_BITS == 4:
            own = columns // (2 * APART) * APART + columns % APART
            row_bytes = tl.cdiv(D, 2 * APART) * APART
        places_below = (classes - first_class).to(tl.int64)[:, None] * row_bytes + own[None, :]
        low = tl.load(low_ptr + places_below, mask=here, other=0).to(tl.int32)
        if LOW_BITS == 4:
            low = (low >> (columns // APART % 2 * 4)[None, :]) & 15
        high = tl.load(high_ptr + places, mask=here, other=0).to(tl.int32)
        sums = ((high << 16) | (low << (16 - LOW_BITS))).to(tl.float32, bitcast=True)
    return sums


@triton.jit
def store_sums(
    high_ptr,  # see load_sums
    low_ptr,
    sums,  # (R, C)
    classes,
    column,  # the first; a multiple of 2 * APART
    inside,
    first_class,
    D,
    stride,
    LOW_BITS: tl.constexpr,
):
    """What :func:`load_sums` reads."""
    num_rows: tl.constexpr = sums.shape[0]
    num_columns: tl.constexpr = sums.shape[1]
    columns = column + tl.arange(0, num_columns)
    here = inside[:, None] & (columns < D)[None, :]
    places = classes.to(tl.int64)[:, None] * stride + columns[None, :]
    if LOW_BITS == 0:
        tl.store(high_ptr + places, sums, mask=here)
    else:
        # To the nearest, in their magnitude; what is no finite number stays none.
        bits = sums.to(tl.int32, bitcast=True)
        bits = tl.where(tl.abs(sums) < float("inf"), bits + (1 << (15 - LOW_BITS)), bits)
        tl.store(high_ptr + places, (bits >> 16).to(tl.int16), mask=here)
        low = (bits >> (16 - LOW_BITS)) & ((1 << LOW_BITS) - 1)
        own = columns
        row_bytes = D
        if LOW_BITS == 4:
            pairs = tl.reshape(low, (num_rows, num_columns // (2 * APART), 2, APART))
            first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            low = tl.reshape(first | (second << 4), (num_rows, num_columns // 2))
            own = column // 2 + tl.arange(0, num_columns // 2)
            row_bytes = tl.cdiv(D, 2 * APART) * APART
        places = (classes - first_class).to(tl.int64)[:, None] * row_bytes + own[None, :]
        here = inside[:, None] & (own < row_bytes)[None, :]
        tl.store(low_ptr + places, low.to(tl.uint8), mask=here)


def bits_beside(out: Tensor, num_groups: int) -> int:
    """Bits of a sum that are stored beside ``out`` (V, D), for so many groups of blocks.

    0 for float32, which is wide enough itself. The fewer, the more classes are at hand together,
    and the fewer strips are made twice.
    """
    if out.dtype == torch.float32:
        return 0
    return 4 if out.dtype == torch.bfloat16 and num_groups <= FEW_GROUPS else 8


def bytes_of_sums(out: Tensor, num_groups: int) -> int:
    """Bytes that the sums of one row of ``out`` (V, D) need beside it."""
    bits, dim = bits_beside(out, num_groups), out.shape[1]
    return -(-dim // (2 * APART.value)) * APART.value if bits == 4 else dim * bits // 8


@dataclass(frozen=True)
class Sums:
    """Sums of a range of rows of dC between groups of blocks.

    Args:
        high: (V, D) dC as float32 sums, or as int16 with their upper bits.
        low: (classes, bytes of a row) uint8 with the next bits; None beside float32 sums.
        low_bits: how many.
        classes: the range.
    """

    high: Tensor
    low: Tensor | None
    low_bits: int
    classes: tuple[int, int]

    @classmethod
    def of(cls, out: Tensor, num_groups: int, classes: tuple[int, int]) -> "Sums":
        """Sums of 0 for a range of the rows of ``out`` (V, D)."""
        rows, bits = out[slice(*classes)].zero_(), bits_beside(out, num_groups)
        if bits == 0:
            return cls(out, None, bits, classes)
        low = rows.new_zeros((rows.shape[0], bytes_of_sums(out, num_groups)), dtype=torch.uint8)
        return cls(out.view(torch.int16), low, bits, classes)
