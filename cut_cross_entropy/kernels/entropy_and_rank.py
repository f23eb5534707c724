"""Reduces the further sums of the segments to entropy, rank and so on of each token.

A pass of ``lse`` makes the sums; ``primitives.logit_gradient`` has the gradient of the entropy.
Shape legend: ``cut_cross_entropy.kernels``.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.launch import cdiv, launch, pointers
from cut_cross_entropy.kernels.lse import LN2, Segments, highest_of_segments, logsumexp2
from cut_cross_entropy.kernels.tokens import Tokens
from cut_cross_entropy.outputs import Asked


class FurtherSums(NamedTuple):
    """Sums over the classes in the caller's order, 0 for ignored tokens; empty if not asked for.

    See :class:`cut_cross_entropy.outputs.TokenOutputs`.
    """

    entropy: Tensor
    log_sum_sq: Tensor
    rank: Tensor
    max_logit: Tensor


def no_further_sums(like: Tensor) -> FurtherSums:
    """Return empty results; of an operator, so that no two share memory."""
    float_, int_ = like.dtype, torch.int32
    return FurtherSums(*(like.new_empty(0, dtype=x) for x in (float_, float_, int_, float_)))


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


def further_sums(
    segments: Segments,
    limits: Tensor,  # (N,) logits of the targets, log2
    tokens: Tokens,
    asked: Asked,
) -> FurtherSums:
    """Reduce the segments to the further sums."""
    num_segments, num_tokens = segments.lse.shape

    def zeros(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        return limits.new_zeros(num_tokens if wanted else 0, dtype=dtype)

    results = FurtherSums(
        zeros(asked.entropy),
        zeros(asked.log_sum_sq),
        zeros(asked.rank, torch.int32),
        zeros(asked.max_logit),
    )
    if asked and num_tokens:
        launch(
            further_sums_kernel,
            (cdiv(num_tokens, BLOCK_T),),
            **pointers(segments, "lse entropy p_squares rank highest", form="{}_parts_ptr"),
            limits_ptr=limits,
            origin_ptr=tokens.origin,
            **pointers(results, "entropy log_sum_sq rank max_logit"),
            N=num_tokens,
            num_segments=num_segments,
            BLOCK_T=BLOCK_T,
        )
    return results
