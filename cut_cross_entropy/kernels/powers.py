"""Powers of the logits of a chunk of tokens, stored, and their sums.

A kernel stores ``2^(logit - bound)`` of all classes but the target, with a bound known beforehand,
and sums it in float32. The powers are probabilities times one number per token, which the last
kernel here computes with the loss. A bound so low that a sum overflows is found on the device, and
the block is computed again. Energies and masses of the strips are stored as well where one gradient
is filtered. Shape legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.block_sizes import Programs, swizzle_width
from cut_cross_entropy.kernels.exact import PROGRAMS_IN_FLIGHT
from cut_cross_entropy.kernels.launch import cdiv, launch, pointers
from cut_cross_entropy.kernels.lse import (
    MAX_SEGMENTS,
    PassInputs,
    Segments,
    gather_sums,
    segments_without_classes,
    vocabulary_pass,
)
from cut_cross_entropy.kernels.tokens import Tokens
from cut_cross_entropy.kernels.triton.lse import OVERFLOW as OVERFLOW_OF_SQUARES
from cut_cross_entropy.kernels.triton.powers import (
    chunk_sums_kernel,
    powers_kernel,
    repair_bound_kernel,
    strip_sums_kernel,
)

# log2 of a sum over its bound: e over it has to stay normal, and in float16 a power has to fit.
OVERFLOW, OVERFLOW_FLOAT16 = 100.0, 14.0
STRIPS, ROWS = 512, 8  # classes of a program that sums strips, and tokens at a time
SEGMENTS = range(16, 49)  # of the classes, each of which takes a program for a block of tokens


@dataclass(frozen=True)
class StripSums:
    """Values that a filter needs besides, which a pass over the logits leaves.

    Args:
        strips: (blocks, V) int16, zeros before; see ``KernelState``.
        support: (N,) float32, likewise.
        lse: (N,) float32 log2; +inf where absent.
        target_grad: (N,) float32, see ``BackwardTokens``.
        flat_support: log2 of the support above which a token counts as flat.
    """

    strips: Tensor
    support: Tensor
    lse: Tensor
    target_grad: Tensor
    flat_support: float

    def at(self, part: slice) -> "StripSums":
        """Return those of some tokens, which begin with a block."""
        blocks = slice(part.start // BLOCK_T, cdiv(part.stop, BLOCK_T))
        return StripSums(
            self.strips[blocks],
            support=self.support[part],
            lse=self.lse[part],
            target_grad=self.target_grad[part],
            flat_support=self.flat_support,
        )


@dataclass(frozen=True)
class Chunk:
    """Some tokens, and the values that a pass over their logits leaves."""

    tokens: Tokens
    inputs: PassInputs
    logits: Tensor  # (N,) of the targets, log2
    weights: Tensor | None  # (N,) of the losses; None for 1
    nll: Tensor  # (N,) weighted
    factor: Tensor  # (N,)
    target: Tensor  # (N,)
    segment_tiles: int
    of_strips: StripSums | None = None
    group: str | None = None  # of the processes that hold the classes together


def choose_segment_tiles(num_blocks: int, num_tiles: int) -> int:
    """Return how many tiles of classes a program takes, so that a GPU is busy to the end."""
    sizes = {cdiv(num_tiles, segments) for segments in SEGMENTS}

    def duration(tiles: int) -> int:
        programs = num_blocks * cdiv(num_tiles, tiles)
        return int(cdiv(programs, PROGRAMS_IN_FLIGHT)) * tiles

    return int(min(sorted(sizes, reverse=True), key=duration))


def store_powers(chunk: Chunk, powers: Tensor) -> None:
    """Store the powers (N, V) of a chunk and compute its losses and factors.

    With a group the sums of its processes are exchanged, two floats a token.
    """
    inputs, of_strips = chunk.inputs, chunk.of_strips
    if powers.shape[1] == 0:
        finish_sums(chunk, segments_without_classes(inputs.bound))
        return
    segments = sum_powers(
        inputs,
        chunk.tokens.targets,
        powers,
        chunk.segment_tiles,
        squared=of_strips is not None,
    )
    finish_sums(chunk, segments)
    if of_strips is not None:
        num_tokens, num_classes = powers.shape
        launch(
            strip_sums_kernel,
            (cdiv(num_classes, STRIPS), cdiv(num_tokens, BLOCK_T)),
            powers_ptr=powers,
            bound_ptr=inputs.bound,
            targets_ptr=chunk.tokens.targets,
            **pointers(of_strips, "lse strips"),
            N=num_tokens,
            V=num_classes,
            softcap=inputs.softcap,
            stride=powers.stride(0),
            BLOCK_T=BLOCK_T,
            BLOCK_V=STRIPS,
            ROWS=ROWS,
        )


def sum_powers(
    inputs: PassInputs,
    targets: Tensor,  # (N,) row of c; -1 for none
    powers: Tensor,  # (N, V) out
    segment_tiles: int,
    *,
    squared: bool = False,
) -> Segments:
    """Store the powers of all classes but the targets, and return their sums.

    Bounds that were too low are raised. If ``squared``, squares are summed too, each class a group.
    """
    e, tiles = inputs.e, inputs.tiles
    num_tokens, num_classes = e.shape[0], inputs.c.shape[0]
    num_blocks = cdiv(num_tokens, BLOCK_T)
    num_tiles = cdiv(num_classes, tiles.block_v)
    num_segments = cdiv(num_tiles, segment_tiles)
    parts = torch.empty((num_segments, num_tokens), dtype=torch.float32, device=e.device)
    squares = torch.empty_like(parts) if squared else parts[:0]
    inputs.flags.zero_()
    overflow = OVERFLOW_FLOAT16 if powers.dtype == torch.float16 else OVERFLOW
    if squared:
        overflow = min(overflow, OVERFLOW_OF_SQUARES.value)

    programs = Programs(num_blocks, segment_tiles, num_segments, swizzle_width(num_blocks, e))

    def store(only_flagged: bool) -> None:
        launch(
            powers_kernel,
            programs.grid,
            **pointers(inputs, "bias bound multiplier"),
            targets_ptr=targets,
            powers_ptr=powers,
            lse_ptr=parts,
            squares_ptr=squares if squared else None,
            flag_ptr=inputs.flags,
            N=num_tokens,
            V=num_classes,
            softcap=inputs.softcap,
            stride_out=powers.stride(0),
            **programs._asdict(),
            OVERFLOW=overflow,
            ONLY_FLAGGED=only_flagged,
            **inputs.products,
        )

    store(only_flagged=False)
    # Blocks with a bound that was too low, if any: better bounds, and the same again.
    tiles_of_pass = cdiv(num_tiles, MAX_SEGMENTS)
    better = parts.new_full((cdiv(num_tiles, tiles_of_pass), num_tokens), torch.inf)
    repaired = Segments(better, parts.new_empty((0, num_tokens)))
    vocabulary_pass(inputs, num_classes, None, online=True, repair=repaired)
    launch(
        repair_bound_kernel,
        (num_blocks,),
        lse_ptr=better,
        flag_ptr=inputs.flags,
        bound_ptr=inputs.bound,
        N=num_tokens,
        num_segments=len(better),
        OVERFLOW=overflow,
        BLOCK_T=BLOCK_T,
    )
    store(only_flagged=True)
    return Segments(parts, squares)


def finish_sums(chunk: Chunk, segments: Segments) -> None:
    """Reduce the sums of all classes but the targets, of all shards, to losses and factors."""
    inputs, logits = chunk.inputs, chunk.logits
    if chunk.group is not None:
        segments, logits = gather_sums(segments, logits, chunk.group)
    num_segments, num_tokens = segments.lse.shape
    num_classes, found, num_groups = inputs.c.shape[0], chunk.of_strips, 0
    if found is not None:  # as many groups as a pass of the filter's forward has
        num_tiles = cdiv(num_classes, inputs.tiles.block_v)
        num_groups = 64 * cdiv(num_tiles, cdiv(num_tiles, MAX_SEGMENTS))
    launch(
        chunk_sums_kernel,
        (cdiv(num_tokens, BLOCK_T),),
        lse_parts_ptr=segments.lse,
        squares_parts_ptr=None if found is None else segments.squares,
        logits_ptr=logits,
        **pointers(inputs, "bound multiplier"),
        **pointers(chunk, "weights nll factor target"),
        **pointers(found, "lse support target_grad"),
        N=num_tokens,
        num_segments=num_segments,
        softcap=inputs.softcap,
        num_groups=float(num_groups),
        flat_support=0.0 if found is None else found.flat_support,
        BLOCK_T=BLOCK_T,
    )
