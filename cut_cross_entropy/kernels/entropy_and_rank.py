"""Reduces the further sums of the segments to entropy, rank and so on of each token.

A pass of ``lse`` makes the sums; ``logit_gradient`` of ``triton.primitives`` has the gradient of
the entropy. Shape legend: ``cut_cross_entropy.kernels``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.launch import cdiv, launch, pointers
from cut_cross_entropy.kernels.lse import Segments
from cut_cross_entropy.kernels.tokens import Tokens
from cut_cross_entropy.kernels.triton.entropy_and_rank import further_sums_kernel
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
