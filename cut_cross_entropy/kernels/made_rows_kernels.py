"""Kernels of the walk over classes whose rows are made chunk by chunk (``made_rows``).

Shape legend: ``cut_cross_entropy.kernels``.
"""

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


@triton.jit(do_not_specialize=["num_tokens"])
def finish_rows_kernel(
    sums_ptr,  # (N, D) powers times rows
    factor_ptr,  # (N,)
    target_ptr,  # (N,)
    origin_ptr,  # (N,) row of out; num_tokens for none
    out_ptr,  # (num_tokens, D) row of the target, in; dE, out
    num_tokens,
    D,
    BLOCK_D: tl.constexpr,
):
    """Turn the sums of one token into its gradient."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row)
    weight = tl.load(target_ptr + row)
    origin = tl.load(origin_ptr + row)
    of_token = tl.where(origin < num_tokens, D, 0)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        sums = tl.load(sums_ptr + row * D + d, mask=d < of_token, other=0.0)
        c = tl.load(out_ptr + origin * D + d, mask=d < of_token, other=0.0)
        tl.store(out_ptr + origin * D + d, sums * factor - weight * c, mask=d < of_token)
