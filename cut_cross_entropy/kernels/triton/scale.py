"""Triton kernels of ``kernels.scale``."""

import triton
import triton.language as tl


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
