"""Partial sums of dC, kept in little memory from one superblock to the next.

Their upper 16 bits are stored in dC itself, whatever its format, and the next 4 or 8 bits in a
buffer, which leaves an error of at most 2^-12 or 2^-16 per superblock. Shape legend:
``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cut_cross_entropy.kernels.triton.filtered.partial_sums import APART

# Up to this number of superblocks 4 bits suffice: independent errors, at most 2^-12 each, then add
# up to a third of the error of rounding to bfloat16, on average.
FEW_SUPERBLOCKS = 32


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
