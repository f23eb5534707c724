"""Triton kernels of ``kernels.made_rows``."""

import triton
import triton.language as tl


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
