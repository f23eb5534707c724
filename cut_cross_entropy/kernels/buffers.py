"""Vectors that share one allocation."""

import torch
from torch import Tensor


def aligned_rows(
    count: int, length: int, dtype: torch.dtype, device: torch.device, zeros: bool = False
) -> tuple[Tensor, ...]:
    """``count`` vectors of ``length``, each aligned to 16 bytes, as the kernels are compiled for.

    Were a vector to begin where the one before ends, it would be aligned for some lengths only, and
    a run whose lengths change would stop to compile.
    """
    step = -(-length * dtype.itemsize // 16) * 16 // dtype.itemsize
    make = torch.zeros if zeros else torch.empty
    return make((count, step), dtype=dtype, device=device)[:, :length].unbind()
