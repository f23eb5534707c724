"""Log-sum-exp of every token in one pass over the vocabulary, and the energy of every strip.

A program owns a block of tokens and a segment of the classes. Segments depend on V alone, so the
sums of a token do not depend on the other tokens. Exponentials are taken relative to a bound known
before the pass (from the frequent classes and from the target), so there is no running maximum to
carry: partial sums stay in the thread that made them until the segment ends. Should a bound be so
loose that a sum overflows, the block is flagged and computed again with a running maximum
(``ONLINE``). A last kernel reduces the segments to loss and log-sum-exp. Other sums over the
classes of a token are further outputs of a pass, compiled away where nobody asks for them. Shape
legend: ``cut_cross_entropy.kernels``.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.distributed.collectives import gather_shards, maximum_over_group
from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.block_sizes import (
    Programs,
    Tiles,
    product_arguments,
    swizzle_width,
    tiles_on,
)
from cut_cross_entropy.kernels.launch import cdiv, launch, pointers
from cut_cross_entropy.kernels.tokens import Tokens
from cut_cross_entropy.kernels.triton.lse import (
    bound_kernel,
    finish_kernel,
    vocabulary_pass_kernel,
)
from cut_cross_entropy.kernels.triton.primitives import LN2
from cut_cross_entropy.outputs import Asked
from cut_cross_entropy.problem import KernelState

MAX_SEGMENTS = 16
NOTHING = Asked()
CLASS_GROUPS = 64 * MAX_SEGMENTS  # groups of classes whose sums a pass ends with, at most


@dataclass(frozen=True)
class PassInputs:
    """Inputs that all passes of one forward share.

    Args:
        e: (N, D) contiguous, of the compute dtype.
        c: (V, D) contiguous, of the compute dtype.
        bias: (V,) contiguous.
        softcap: as in the problem.
        bound: (N,) float32 lower bound of the log-sum-exp, log2; +inf: no token.
        flags: (blocks,) int32, set for blocks whose sums overflowed.
        energy_bound: (N,) float32 lower bound of the log-sum-exp, log2, at least ``bound``, which
            may depend on the other tokens: energies and masses of strips are relative to it. None
            without strips.
        multiplier: (N,) float32 of the logits of each token; None for 1.
        limits: (N,) float32 logits of the targets, log2; for the rank.
        targets: (N,) int64 row of c; for the rank.
        low_e, low_c: (N, R) and (V, R), see ``AdaptedProblem``; None if there are none.
    """

    e: Tensor
    c: Tensor
    bias: Tensor | None
    softcap: float | None
    bound: Tensor
    flags: Tensor
    energy_bound: Tensor | None = None
    multiplier: Tensor | None = None
    limits: Tensor | None = None
    targets: Tensor | None = None
    low_e: Tensor | None = None
    low_c: Tensor | None = None

    @property
    def strip_bound(self) -> Tensor:
        """The bound to which strips are relative."""
        return self.bound if self.energy_bound is None else self.energy_bound

    @functools.cached_property
    def strip_factor(self) -> Tensor:
        """Factor of powers relative to ``bound`` that makes them relative to that of strips."""
        return (self.bound - self.strip_bound).exp2_()

    @functools.cached_property
    def tiles(self) -> Tiles:
        """Block sizes of the passes."""
        return tiles_on(self.e.device)

    @functools.cached_property
    def products(self) -> dict[str, Any]:
        """Arguments of kernels that multiply ``e`` and ``c``; made once, to save host time."""
        return product_arguments(self.e, self.c, self.tiles)


@dataclass(frozen=True)
class Segments:
    """Sums of each segment of the classes, (segments, N) float32 each, log2.

    Args:
        lse: log-sum-exp.
        squares: sum over groups of classes of their squared probability; (0, N) without energies.
        entropy: of the classes of the segment alone; None if not asked for, like all that follow.
        p_squares: sum of the squared exponentials.
        rank: int32 number of classes ahead of the target; not log2.
        highest: the highest logit.
    """

    lse: Tensor
    squares: Tensor
    entropy: Tensor | None = None
    p_squares: Tensor | None = None
    rank: Tensor | None = None
    highest: Tensor | None = None


def vocabulary_pass(
    inputs: PassInputs,
    num_classes: int,
    strips: Tensor | None,  # (blocks, V) int16, out
    *,
    asked: Asked = NOTHING,
    online: bool = False,
    repair: Segments | None = None,
) -> Segments:
    """Sum the first ``num_classes`` classes by segment.

    Args:
        inputs: shared by the passes.
        num_classes: how many of the rows of c to read.
        strips: receives energy and mass of each strip; None to compute none.
        asked: further sums to compute.
        online: carry a running maximum, for bounds that may be too loose.
        repair: results of an earlier pass, whose flagged blocks are overwritten.
    """
    e, tiles = inputs.e, inputs.tiles
    num_tokens = e.shape[0]
    num_blocks = cdiv(num_tokens, BLOCK_T)
    num_tiles = cdiv(num_classes, tiles.block_v)
    segment_tiles = cdiv(num_tiles, MAX_SEGMENTS)
    num_segments = cdiv(num_tiles, segment_tiles)
    results, energy = repair, None
    if strips is not None:
        energy = inputs.strip_bound if online else inputs.strip_factor
    if results is None:
        shape = (num_segments, num_tokens)
        squares_shape = shape if strips is not None else (0, num_tokens)
        results = Segments(
            torch.empty(shape, dtype=torch.float32, device=e.device),
            torch.empty(squares_shape, dtype=torch.float32, device=e.device),
            entropy=_further(shape, asked.entropy, e.device),
            p_squares=_further(shape, asked.log_sum_sq, e.device),
            rank=_further(shape, asked.rank, e.device, torch.int32),
            highest=_further(shape, asked.max_logit, e.device),
        )
    programs = Programs(num_blocks, segment_tiles, num_segments, swizzle_width(num_blocks, e))
    launch(
        vocabulary_pass_kernel,
        programs.grid,
        **pointers(inputs, "bias low_e low_c bound multiplier limits targets"),
        **pointers(results, "lse squares entropy p_squares rank highest"),
        strips_ptr=strips,
        energy_ptr=energy,
        flag_ptr=inputs.flags,
        N=num_tokens,
        V=num_classes,
        softcap=inputs.softcap,
        **programs._asdict(),
        ONLINE=online,
        ONLY_FLAGGED=repair is not None,
        LOW_RANK=0 if inputs.low_c is None else inputs.low_c.shape[1],
        **inputs.products,
    )
    return results


def _further(
    shape: tuple[int, int],
    wanted: bool,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    return torch.empty(shape, dtype=dtype, device=device) if wanted else None


def segments_without_classes(bound: Tensor) -> Segments:
    """Return the result of a pass over no class: sums of 0, -inf in log2."""
    nothing = torch.full_like(bound, -torch.inf)[None]
    return Segments(nothing, nothing)


def raise_bound(
    bound: Tensor,
    segments: Segments,
    num_summed: int = 1,
    num_classes: int = 1,
    *,
    set_apart: bool = False,
) -> None:
    """Raise ``bound`` (N,) to the log-sum-exp over the segments, in place.

    If ``segments`` have ``p_squares``, the bounds of tokens that are spread over many of the
    ``num_summed`` classes of the segments are extrapolated to all ``num_classes``. They may then be
    above the log-sum-exp, see :func:`finish`. With ``set_apart`` those of flat tokens surely are:
    strips relative to them have no part of these tokens.
    """
    num_segments, num_tokens = segments.lse.shape
    launch(
        bound_kernel,
        (cdiv(num_tokens, BLOCK_T),),
        lse_ptr=segments.lse,
        squares_ptr=segments.p_squares,
        bound_ptr=bound,
        N=num_tokens,
        num_segments=num_segments,
        num_summed=num_summed,
        num_classes=num_classes,
        SET_APART=set_apart,
        BLOCK_T=BLOCK_T,
    )


def exchange_bound(bound: Tensor, group: str) -> None:
    """Raise ``bound`` (N,) to the highest of the shards, in place; exchanges N floats."""
    maximum_over_group(bound, group)


def finish(
    segments: Segments,
    logits: Tensor,  # (N,) of the targets, log2
    tokens: Tokens,
    strips: Tensor | None,  # (blocks, V) int16, in, out; None without a filter
    bound: Tensor,  # (N,) of the passes
) -> KernelState:
    """Reduce the segments to the results of the forward; mark the strips that hold a target.

    With strips, tokens whose bound is above their log-sum-exp get the support of a flat one.
    """
    num_segments, num_tokens = segments.lse.shape
    nll = torch.zeros(num_tokens, dtype=torch.float32, device=logits.device)
    lse = torch.zeros(num_tokens, dtype=torch.float32, device=logits.device)
    support = nll.new_empty(0 if strips is None else num_tokens)
    launch(
        finish_kernel,
        (cdiv(num_tokens, BLOCK_T),),
        **pointers(segments, "lse squares", "{}_parts_ptr"),
        **pointers(tokens, "targets origin"),
        logits_ptr=logits,
        bound_ptr=bound,
        nll_ptr=nll,
        lse_ptr=lse,
        support_ptr=support,
        strips_ptr=None if strips is None else strips.view(torch.uint8),
        N=num_tokens,
        V=0 if strips is None else strips.shape[1],
        num_segments=num_segments,
        BLOCK_T=BLOCK_T,
    )
    if strips is None:
        strips, origin = nll.new_empty(0, dtype=torch.int16), tokens.origin.new_empty(0)
    else:
        origin = tokens.origin
    return KernelState(
        nll, lse, strips=strips, origin=origin, support=support, shard_mass=nll.new_empty(0)
    )


def finish_shards(
    segments: Segments,  # of this shard
    logits: Tensor,  # (N,) +inf where the target is in another shard
    tokens: Tokens,
    strips: Tensor | None,  # (blocks, V) int16, in, out; None without a filter
    bound: Tensor,  # (N,) of the passes
    group: str,
) -> KernelState:
    """Reduce the segments of all shards; like :func:`finish`, with the probability of this shard.

    Every process finishes from the same gathered numbers, so all have the same bits. With energies
    the squares are exchanged as well as the pairs of lse and logit.
    """
    own = sum_of_powers(segments.lse)
    shards, logits = gather_sums(segments, logits, group, squared=strips is not None)
    result = finish(shards, logits, tokens, strips, bound)
    if strips is None:
        return result
    support = coarser_support(result.support, segments.lse.shape[0] * shards.lse.shape[0])
    shard_mass = torch.exp2(own - sum_of_powers(shards.lse))
    return result._replace(support=support, shard_mass=shard_mass)


def coarser_support(support: Tensor, num_segments: int) -> Tensor:
    """Return the support of tokens, log2, as if it were that of the groups of a single pass.

    Several passes have more and finer groups. If a token's classes were spread over CLASS_GROUPS of
    them, so many of these would meet in one; correcting for it keeps the same tokens flat.
    """
    num_groups = 64 * num_segments
    if num_groups <= CLASS_GROUPS:
        return support
    return -torch.log2(torch.exp2(-support) + (1 / CLASS_GROUPS - 1 / num_groups))


def gather_sums(
    segments: Segments, logits: Tensor, group: str, *, squared: bool = False
) -> tuple[Segments, Tensor]:
    """Exchange the sums of all shards: a segment for each, and the logits of the targets.

    Args:
        segments: of this shard.
        logits: (N,) of the targets, log2; +inf where the target is in another shard. In the result
            NaN where no shard holds it.
        group: of the shards.
        squared: whether the sums of squares are exchanged as well.
    """
    numbers = [sum_of_powers(segments.lse), logits]
    if squared:
        numbers.append(sum_of_powers(segments.squares))
    gathered = gather_shards(torch.stack(numbers), group)  # (shards, 2 or 3, N)
    lse, squares = (gathered[:, i].contiguous() for i in (0, -1))
    least = gathered[:, 1].amin(0)
    return Segments(lse, squares), torch.where(least == torch.inf, torch.nan, least)


def sum_of_powers(parts: Tensor) -> Tensor:
    """Return log2 of the sum of 2^x over the first axis: (parts, N) to (N,)."""
    ln2: float = LN2.value
    return torch.logsumexp(parts * ln2, 0) / ln2
