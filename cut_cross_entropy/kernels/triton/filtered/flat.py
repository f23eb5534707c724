"""Triton kernels of ``kernels.filtered.flat``."""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.triton.primitives import gather_rows

STEP = tl.constexpr(16)  # flat tokens per product of a tile of dC


@triton.jit
def add_flat(
    total,  # (classes, columns) sums times the scale
    grads_ptr,  # (V, stride) see FlatTokens; None: there are none
    rows_ptr,  # (F, D)
    num_flat_ptr,  # () int32
    cells,  # classes, columns, whether there is such a class
    stride,
    D,
):
    """Add the logit gradients of flat tokens times their features."""
    classes, columns, inside = cells
    if grads_ptr is not None:
        num_flat = tl.load(num_flat_ptr)
        for first in range(0, num_flat, STEP):
            tokens = first + tl.arange(0, STEP)
            grads = tl.load(
                grads_ptr + classes.to(tl.int64)[:, None] * stride + tokens[None, :],
                mask=inside[:, None],
                other=0.0,
            )
            grads = tl.where((tokens < num_flat)[None, :], grads, 0.0)
            rows = gather_rows(rows_ptr, tokens, tokens < num_flat, columns, D)
            total = tl.dot(grads, rows, total, input_precision="ieee")
    return total
