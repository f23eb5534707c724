"""Triton kernels of ``kernels.entropy_and_rank``."""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.triton.lse import highest_of_segments, logsumexp2
from cut_cross_entropy.kernels.triton.primitives import LN2


@triton.jit(do_not_specialize=["N", "num_segments"])
def further_sums_kernel(
    lse_parts_ptr,  # (segments, N) log2, like the two that follow
    entropy_parts_ptr,  # or None, like the three that follow
    p_squares_parts_ptr,
    rank_parts_ptr,  # (segments, N) int32
    highest_parts_ptr,  # (segments, N) log2
    limits_ptr,  # (N,) logits of the targets, log2
    origin_ptr,  # (N,)
    entropy_ptr,  # (N,) out, in the caller's order, like all that follow
    log_sum_sq_ptr,
    rank_ptr,  # int32
    max_logit_ptr,
    N,
    num_segments,
    BLOCK_T: tl.constexpr,
):
    """Reduce the further sums of the segments, in their order."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < N
    origin = tl.load(origin_ptr + tokens, mask=inside, other=N)
    present = origin < N
    if entropy_parts_ptr is not None or p_squares_parts_ptr is not None:
        lse = logsumexp2(lse_parts_ptr, tokens, present, N, num_segments, BLOCK_T=BLOCK_T)
    if entropy_parts_ptr is not None:
        # The entropy of the whole is that within the segments and that of the choice among them: a
        # sum of terms that are not below 0, with nothing to cancel.
        entropy = tl.zeros((BLOCK_T,), tl.float32)
        for segment in range(num_segments):
            part = tl.cast(segment, tl.int64) * N + tokens
            surprise = lse - tl.load(lse_parts_ptr + part, mask=present, other=0.0)
            share = tl.exp2(0.0 - surprise)
            within = tl.load(entropy_parts_ptr + part, mask=present, other=0.0)
            entropy += tl.where(share == 0, 0.0, share * (within + surprise))
        entropy = tl.maximum(entropy * LN2, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(entropy_ptr + origin, entropy, mask=present)
    if p_squares_parts_ptr is not None:
        squares = logsumexp2(p_squares_parts_ptr, tokens, present, N, num_segments, BLOCK_T=BLOCK_T)
        tl.store(log_sum_sq_ptr + origin, (squares - 2 * lse) * LN2, mask=present)
    if rank_parts_ptr is not None:
        rank = tl.zeros((BLOCK_T,), tl.int32)
        for segment in range(num_segments):
            part = tl.cast(segment, tl.int64) * N + tokens
            rank += tl.load(rank_parts_ptr + part, mask=present, other=0)
        limit = tl.load(limits_ptr + tokens, mask=present, other=0.0)
        tl.store(rank_ptr + origin, tl.where(limit == limit, rank, -1), mask=present)
    if highest_parts_ptr is not None:
        highest = highest_of_segments(
            highest_parts_ptr, tokens, present, N, num_segments, BLOCK_T=BLOCK_T
        )
        tl.store(max_logit_ptr + origin, highest * LN2, mask=present)
