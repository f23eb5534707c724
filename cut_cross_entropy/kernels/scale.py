"""Multiplies a tensor by a number on the device, into another dtype.

PyTorch's own kernel for this reads and writes one element at a time when the dtypes differ, and
takes three times as long.
"""

import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels.launch import cdiv, launch

BLOCK = 4096


@triton.jit  # specialised on the number of elements: a mask of any number would forbid vectors
def scale_kernel(
    total_ptr,  # (num_elements,)
    factor_ptr,  # ()
    out_ptr,  # (num_elements,) out
    num_elements,
    BLOCK: tl.constexpr,
):
    """Scale one block of elements."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < num_elements
    factor = tl.load(factor_ptr)
    values = tl.load(total_ptr + places, mask=inside, other=0.0) * factor
    tl.store(out_ptr + places, values.to(out_ptr.dtype.element_ty), mask=inside)


def scale(total: Tensor, factor: Tensor, out: Tensor) -> None:
    """Write ``total`` times ``factor`` (), both float32, to ``out``; all contiguous."""
    launch(
        scale_kernel,
        (cdiv(total.numel(), BLOCK),),
        total_ptr=total,
        factor_ptr=factor,
        out_ptr=out,
        num_elements=total.numel(),
        BLOCK=BLOCK,
    )
