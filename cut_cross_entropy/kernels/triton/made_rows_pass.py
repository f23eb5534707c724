"""Triton kernels of ``kernels.made_rows_pass``."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])
def scale_sums_kernel(
    flag_ptr,  # (blocks,)
    before_ptr,  # (N,) bounds before this chunk, log2
    bound_ptr,  # (N,)
    sums_ptr,  # (N, D) in, out
    N,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scale the sums of a block whose bounds were raised."""
    block = tl.program_id(0)
    if tl.load(flag_ptr + block) == 0:
        return
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    before = tl.load(before_ptr + tokens, mask=tokens < N, other=0.0)
    bound = tl.load(bound_ptr + tokens, mask=tokens < N, other=0.0)
    factor = tl.where(before == bound, 1.0, tl.exp2(before - bound))  # both may be +inf
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = sums_ptr + tokens.to(tl.int64)[:, None] * D + columns[None, :]
    mask = (tokens < N)[:, None] & (columns < D)[None, :]
    sums = tl.load(place, mask=mask, other=0.0)
    tl.store(place, sums * factor[:, None], mask=mask)
