"""Logit gradients of the kept strips, recomputed and stored compactly.

A program takes TILE strips of one block, gathers their rows of c, recomputes the logits and writes
their gradients in the compute dtype, one row of 128 tokens per strip; and for every token the
probability mass that its kept strips hold. Shape legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.block_sizes import rows_operand, tiles_on, two_per_sm
from cut_cross_entropy.kernels.filtered.index import TILE, Range, StripList
from cut_cross_entropy.kernels.filtered.selection import CHUNK, Kept
from cut_cross_entropy.kernels.launch import cdiv, launch, pointers
from cut_cross_entropy.kernels.tokens import BackwardTokens
from cut_cross_entropy.kernels.triton.filtered.strips import (
    strip_gradients_kernel,
    sum_classes_kernel,
)
from cut_cross_entropy.problem import Problem, low_columns


@dataclass(frozen=True)
class StoredStrips:
    """Kept strips of a rectangle with their logit gradients.

    Args:
        strips: the list of the strips.
        grads: (slots, 128) gradients of the compute dtype times ``tokens.scale``, by slot.
        borrowed: (slots, 128) the same of the slots behind those, in rows of dC that are not
            written yet.
        bias_grads: (K,) float32 sums of the gradients over the tokens, by slot; may be empty.
        kept_mass: (tiles, 128) float32 probability of each token in the strips of a tile.
        first_slot: that of the first row of ``grads``.
    """

    strips: StripList
    grads: Tensor
    borrowed: Tensor
    bias_grads: Tensor
    kept_mass: Tensor
    first_slot: int = 0

    def of_last_classes(self) -> "StoredStrips":
        """Return the strips whose gradients are in borrowed memory as a range of their own."""
        return replace(self, grads=self.borrowed, first_slot=self.grads.shape[0])


def strip_gradients(
    problem: Problem,
    tokens: BackwardTokens,
    strips: StripList,
    bias_grad: bool,
    *,
    is_counted: bool = True,
    borrowed: Tensor | None = None,
) -> StoredStrips:
    """Compute the logit gradients of listed strips, and their sums if ``bias_grad``.

    Unless ``is_counted``, the list has room for more strips than there are. ``borrowed``
    (slots, 128) receives the gradients of the last slots.
    """
    e, c, tiles = tokens.e, problem.c, tiles_on(tokens.e.device)
    num_strips, num_tiles = strips.classes.shape[0], strips.tile_block.shape[0]
    num_own = num_strips - (0 if borrowed is None else borrowed.shape[0])
    grads = torch.empty((num_own, BLOCK_T), dtype=e.dtype, device=e.device)
    borrowed = grads[:0] if borrowed is None else borrowed
    size = num_strips if bias_grad else 0
    bias_grads = torch.empty(size, dtype=torch.float32, device=e.device)
    kept_mass = torch.empty((num_tiles, BLOCK_T), dtype=torch.float32, device=e.device)
    stored = StoredStrips(strips, grads, borrowed, bias_grads, kept_mass)
    if num_tiles == 0:
        return stored
    low_c = low_columns(problem)
    launch(
        strip_gradients_kernel,
        (num_tiles,),
        e=rows_operand(e, BLOCK_T, tiles.block_d, tiles),
        c_ptr=c,
        bias_ptr=problem.bias,
        low_c_ptr=low_c,
        values=tokens.values,
        **pointers(tokens, "low_e eta multiplier"),
        **pointers(strips, "classes slots tile_block tile_start"),
        starts_ptr=strips.index.block_starts,
        first_tile_ptr=strips.index.first_tile,
        num_tiles_ptr=None if is_counted else strips.index.first_tile[-1],
        grad_ptr=grads,
        borrowed_ptr=borrowed,
        bias_grad_ptr=bias_grads,
        kept_mass_ptr=kept_mass,
        N=e.shape[0],
        D=e.shape[1],
        softcap=problem.softcap,
        first_block=strips.first_block,
        first_borrowed=num_own,
        BIAS_GRAD=bias_grad,
        LOW_RANK=0 if low_c is None else low_c.shape[1],
        BLOCK_T=BLOCK_T,
        BLOCK_S=TILE,
        BLOCK_D=tiles.block_d,
        **two_per_sm(e.device, tiles),
    )
    return stored


@dataclass(frozen=True)
class Part:
    """Contribution of one superblock to a range of classes.

    Args:
        superblock: index of the superblock.
        first_slot: offset that converts its slots among all strips into those that are stored.
        chunks: range of chunks of classes.
        classes: the same range as class ids.
    """

    superblock: int
    first_slot: int
    chunks: Range
    classes: Range


def add_bias_grads(
    stored: StoredStrips,
    kept: Kept,
    part: Part,
    out: Tensor,  # (V,) float32, in, out
) -> None:
    """Add the stored bias gradients of one superblock to the sums of their classes."""
    block = 128
    first, stop = part.classes
    launch(
        sum_classes_kernel,
        (cdiv(stop - first, block),),
        values_ptr=stored.bias_grads,
        masks_ptr=kept.masks[part.superblock],
        offsets_ptr=kept.offsets[part.superblock],
        chunk_starts_ptr=stored.strips.index.chunk_starts[part.superblock],
        out_ptr=out,
        first_class=first,
        stop_class=stop,
        first_slot=part.first_slot,
        CHUNK=CHUNK,
        BLOCK=block,
    )
