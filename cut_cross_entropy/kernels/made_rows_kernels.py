"""Kernels of the walk over classes whose rows are made chunk by chunk (``made_rows``).

Shape legend: ``cut_cross_entropy.kernels``.
"""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.primitives import transform_logits
from cut_cross_entropy.kernels.tokens import add_low_rank, move_and_score


@triton.jit(do_not_specialize=["N", "V", "stride_n", "first_class"])
def score_chunk_kernel(
    source_ptr,  # (N, D) embeddings of the caller
    c_ptr,  # (V, D) rows of the chunk
    bias_ptr,  # (V,) of the chunk, or None
    low_e_ptr,  # (N, LOW_RANK) of the caller
    low_c_ptr,  # (V, LOW_RANK) of the chunk
    all_targets_ptr,  # (N,) of the caller
    origin_ptr,  # (N,)
    multiplier_ptr,  # (N,) in the order of the rows, or None
    e_ptr,  # (N, D) out if COMPACT, else in
    targets_ptr,  # (N,) out: row of c; -1 for none
    logits_ptr,  # (N,) logit of the target, log2: out where it is in this chunk
    rows_ptr,  # (N, D) out likewise, in the caller's order: the target's row of c; or None
    N,
    V,
    D,
    stride_n,
    stride_d,
    softcap,  # or None
    first_class,
    COMPACT: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the logit of one token's target, and keep its row, if it is in this chunk."""
    row, position, target, usable, product = move_and_score(
        source_ptr,
        c_ptr=c_ptr,
        all_targets_ptr=all_targets_ptr,
        origin_ptr=origin_ptr,
        e_ptr=e_ptr,
        N=N,
        V=V,
        D=D,
        stride_n=stride_n,
        stride_d=stride_d,
        first_class=first_class,
        COMPACT=COMPACT,
        BLOCK_D=BLOCK_D,
        rows_ptr=rows_ptr,
    )
    product = add_low_rank(
        product,
        low_e_ptr=low_e_ptr,
        low_c_ptr=low_c_ptr,
        position=position,
        target=target,
        usable=usable,
        LOW_RANK=LOW_RANK,
    )
    multiplier = None
    if multiplier_ptr is not None:
        multiplier = tl.load(multiplier_ptr + row)
    logit = transform_logits(product, target, usable, bias_ptr, softcap, multiplier=multiplier)
    tl.store(targets_ptr + row, target)
    tl.store(logits_ptr + row, tl.reshape(logit, (1,)), mask=usable)


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
