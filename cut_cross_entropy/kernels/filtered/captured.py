"""The filtered backward of a CUDA graph: counts stay on the device, which chooses the path.

The strips are stored at once, in memory for as many as the filter may keep; programs beyond their
number leave at once. If there are more, or the data are too flat, the lists are emptied, so the
filtered kernels find nothing to compute, and the products of the exact path, which are launched
behind them, overwrite what they wrote. Otherwise those leave at once. Shape legend:
``cut_cross_entropy.kernels``.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.counted_products import counted_product
from cut_cross_entropy.kernels.exact import (
    MAX_TOKENS,
    MIN_CHUNK_BYTES,
    ChunkBuffer,
    Wanted,
    chunk_gradients,
)
from cut_cross_entropy.kernels.filtered.index import StripList
from cut_cross_entropy.kernels.filtered.selection import Kept
from cut_cross_entropy.kernels.launch import launch
from cut_cross_entropy.kernels.tokens import BackwardTokens, scatter_rows
from cut_cross_entropy.kernels.triton.filtered.captured import choose_path_kernel
from cut_cross_entropy.problem import MadeProblem, Problem, low_columns

BUDGETS = 2  # of memory for the strips, which cannot be computed in passes
MAX_STRIPS = 2**31  # that the index can count


def is_supported(problem: Problem, tokens: BackwardTokens, wanted: Wanted) -> bool:
    """Whether the filter of a captured step computes these gradients; all strips are taken else."""
    num_strips = -(-problem.e.shape[0] // BLOCK_T) * problem.c.shape[0]
    return (
        not isinstance(problem, MadeProblem)
        and wanted.bias is None
        and low_columns(problem) is None
        and tokens.eta is None
        and problem.e.shape[0] <= MAX_TOKENS
        and num_strips < MAX_STRIPS
    )


@dataclass(frozen=True)
class Choice:
    """The path of a captured backward, on the device: () int32 each.

    Args:
        num_flat: flat tokens that are computed besides the strips; 0 on the exact path.
        num_exact: tokens of the exact path; 0 on the filtered one.
    """

    num_flat: Tensor
    num_exact: Tensor

    @classmethod
    def of(
        cls,
        kept: Kept,
        listed: StripList,
        most_flat: int,
        *,
        share: float,
        flat_share: float,
        most_dropped: float,
    ) -> "Choice":
        """Choose, and empty ``kept.masks`` and the lists' index if the path is the exact one.

        Args:
            kept: the selection.
            listed: all strips, as many as have memory.
            most_flat: flat tokens that have memory.
            share, flat_share, most_dropped: largest parts of all strips, of flat tokens, and of
                dropped probability, of the filter.
        """
        choice = torch.empty(3, dtype=torch.int32, device=kept.masks.device)
        launch(
            choose_path_kernel,
            (1,),
            token_counts_ptr=kept.statistics[-3:],
            block_starts_ptr=listed.index.block_starts,
            first_tile_ptr=listed.index.first_tile,
            choice_ptr=choice,
            num_blocks=kept.shape[0],
            most_strips=listed.classes.shape[0],
            most_flat=most_flat,
            V=kept.masks.shape[1],
            share=share,
            flat_share=flat_share,
            most_dropped=most_dropped,
            BLOCK_T=BLOCK_T,
            BLOCK=1024,
        )
        kept.masks.mul_(choice[0])
        return cls(*choice[1:].unbind())


def first_flat(tokens: BackwardTokens, most: int) -> BackwardTokens:
    """Return ``most`` tokens: the flat ones first, the others marked absent."""
    order = torch.sort(tokens.is_flat.to(torch.uint8), stable=True, descending=True).indices
    some = tokens.at(order[:most])
    others, num_tokens = ~some.is_flat, tokens.origin.shape[0]
    return replace(some.without(others), origin=some.origin.masked_fill(others, num_tokens))


def exact_if(
    num_rows: Tensor,
    problem: Problem,
    tokens: BackwardTokens,
    wanted: Wanted,
    grad_e: Tensor | None,
) -> None:
    """Compute the gradients of the first tokens from all strips, as ``exact_gradients`` does.

    Args:
        num_rows: () int32, their number. Of 0 nothing is written.
        problem: with c contiguous and of the compute dtype.
        tokens: the valid ones first.
        wanted: receives dC.
        grad_e: (N, D) receives dE in the caller's order.
    """
    e, c, grad_c = tokens.e, problem.c, wanted.c
    (num_tokens, dim), num_classes = e.shape, c.shape[0]
    total = None if grad_e is None else e.new_empty((num_tokens, dim), dtype=torch.float32)
    sums = 0 if total is None else total.nbytes
    borrowed = None
    if grad_c is not None and grad_c.dtype == e.dtype and grad_c.is_contiguous():
        borrowed = grad_c
    chunks = ChunkBuffer(e, max(MIN_CHUNK_BYTES, problem.memory_budget - sums), 0, borrowed)
    features = wanted.features(tokens).contiguous()
    product = functools.partial(counted_product, count=num_rows, scale=tokens.scale)
    first = 0
    while first < num_classes:
        size, buffer = chunks.next(first, num_classes)
        classes = slice(first, first + size)
        chunk_gradients(problem, tokens, (first, first + size), buffer, num_rows)
        if total is not None:
            product(buffer, c[classes], total, of_rows=True, accumulate=first > 0)
        if grad_c is not None:
            product(buffer.T, features, grad_c[classes], of_rows=False)
        first += size
    if total is not None and grad_e is not None:
        nowhere = tokens.origin.masked_fill(num_rows == 0, num_tokens)
        scatter_rows(total, nowhere, grad_e)
