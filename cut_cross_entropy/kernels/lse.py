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
import triton
import triton.language as tl
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
from cut_cross_entropy.kernels.primitives import (
    FORCED,
    fold_rows,
    load_rows,
    low_rank_product,
    next_above,
    strip_bytes,
    swizzle_program,
    transform_logits,
)
from cut_cross_entropy.kernels.tokens import Tokens
from cut_cross_entropy.outputs import Asked
from cut_cross_entropy.problem import KernelState

MAX_SEGMENTS = 16
OVERFLOW = tl.constexpr(60.0)  # log2 of a sum relative to its bound; its square overflows at 128
LN2 = tl.constexpr(0.6931471805599453)
NOTHING = Asked()
CLASS_GROUPS = 64 * MAX_SEGMENTS  # groups of classes whose sums a pass ends with, at most
MOST_SUPPORT = tl.constexpr(10.0)  # log2 of CLASS_GROUPS
# A token is spread over the frequent classes from this effective share of them (real text: none of
# 9,216 tokens of two models). Its bound is then extrapolated to all classes, less a margin: of
# trained classifiers the log-sum-exp was lower than extrapolated by 0.7 at most (log2).
SPREAD = tl.constexpr(1 / 16)
MARGIN = tl.constexpr(0.5)
# A token is flat, and set apart from the strips, from this effective share of the likely classes.
# No token of two models' text comes near (0.03); with logits times 0.2 to 0.5, nearly all that do
# are flat by their sums over all classes.
FLAT_SHARE = tl.constexpr(1 / 8)
APART = tl.constexpr(100.0)  # log2, added to its bound: its energies and masses are 0
LOOSE = tl.constexpr(0.1)  # by which a bound may be too high (log2): a byte is a fourth


@triton.jit(do_not_specialize=["N", "segment_tiles", "num_segments", "num_blocks", "swizzle_width"])
def vocabulary_pass_kernel(
    e,  # (N, D) descriptor or pointer
    c,  # (V, D) descriptor or pointer
    bias_ptr,  # (V,), or None
    low_e_ptr,  # (N, LOW_RANK)
    low_c_ptr,  # (V, LOW_RANK)
    bound_ptr,  # (N,)
    lse_ptr,  # (segments, N) out, log2
    squares_ptr,  # (segments, N) out, log2 of the sum over groups of classes of p squared
    strips_ptr,  # (blocks, V) int16 out, see strip_bytes; or None: not computed
    energy_ptr,  # (N,) factor of powers for strips, or their bound if ONLINE; None without strips
    multiplier_ptr,  # (N,), or None
    limits_ptr,  # (N,) logits of the targets, log2
    targets_ptr,  # (N,)
    entropy_ptr,  # (segments, N) out, log2, of the segment alone; or None, like the three below
    p_squares_ptr,  # (segments, N) out, log2 of the sum of exponentials squared
    rank_ptr,  # (segments, N) int32 out, classes ahead of the target
    highest_ptr,  # (segments, N) out, log2
    flag_ptr,  # (blocks,) out, or in if ONLINE
    N,
    V,
    D,
    softcap,  # or None
    segment_tiles,
    num_segments,
    num_blocks,
    swizzle_width,
    ONLINE: tl.constexpr,
    ONLY_FLAGGED: tl.constexpr,
    LOW_RANK: tl.constexpr,
    E_TMA: tl.constexpr,
    C_TMA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum one segment of the classes for one block of tokens."""
    block, segment = swizzle_program(num_blocks, swizzle_width, num_segments)
    if ONLY_FLAGGED:  # noqa: SIM102 (a constant, then a value of the device)
        if tl.load(flag_ptr + block) == 0:
            return
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    bound = tl.load(bound_ptr + tokens, mask=tokens < N, other=float("inf"))
    is_token = bound != float("inf")
    known = bound
    if tl.sum(is_token.to(tl.int32), 0) == 0:
        return

    multiplier = None
    if multiplier_ptr is not None:
        multiplier = tl.load(multiplier_ptr + tokens, mask=tokens < N, other=1.0)
    if rank_ptr is not None:
        counts = tl.zeros((64, BLOCK_T), tl.float32)
    if entropy_ptr is not None:
        first = tl.zeros((64, BLOCK_T), tl.float32)
    if p_squares_ptr is not None:
        p_squares = tl.zeros((BLOCK_T,), tl.float32)
    if highest_ptr is not None:
        highest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    sums = tl.zeros((64, BLOCK_T), tl.float32)
    first_class = segment * segment_tiles * BLOCK_V
    classes = first_class + tl.arange(0, BLOCK_V)
    product = low_rank_product(
        low_e_ptr, low_c_ptr, (tokens, classes), (is_token, classes < V), LOW_RANK
    )
    tiles = min(segment_tiles, tl.cdiv(V - first_class, BLOCK_V))
    steps = tl.cdiv(D, BLOCK_D)
    # One loop over tiles and features, so that loads of the next tile overlap a tile's end.
    for i in tl.range(0, tiles * steps, flatten=True):
        step = i % steps
        v = first_class + (i // steps) * BLOCK_V
        c_tile = load_rows(c, v, V, step * BLOCK_D, D, USE_TMA=C_TMA, ROWS=BLOCK_V, COLUMNS=BLOCK_D)
        e_tile = load_rows(
            e, block * BLOCK_T, N, step * BLOCK_D, D, USE_TMA=E_TMA, ROWS=BLOCK_T, COLUMNS=BLOCK_D
        )
        product = tl.dot(c_tile, e_tile.T, product, input_precision="ieee")
        if step == steps - 1:
            classes = v + tl.arange(0, BLOCK_V)
            inside = classes < V
            logits = transform_logits(
                product, classes, inside, bias_ptr, softcap, multiplier=multiplier
            )
            if (
                rank_ptr is not None
            ):  # loaded for each tile: between tiles, registers are for the product
                limits = tl.load(limits_ptr + tokens, mask=tokens < N, other=0.0)
                targets = tl.load(targets_ptr + tokens, mask=tokens < N, other=-1).to(tl.int32)
                # Ties count before the target, so before it the limit is reached, not exceeded.
                above = next_above(limits)
                behind = classes[:, None] - targets[None, :]
                ahead = logits >= tl.where(behind < 0, limits[None, :], above[None, :])
                ahead = ahead & (behind != 0)  # its own logit is rounded otherwise in limits
                counts += fold_rows(ahead.to(tl.float32), BLOCK_V, BLOCK_T)
            if highest_ptr is not None:
                of_tile = tl.max(logits, 0)
                highest = tl.maximum(highest, of_tile, propagate_nan=tl.PropagateNan.ALL)
            if ONLINE:
                higher = tl.maximum(bound, tl.max(logits, 0), propagate_nan=tl.PropagateNan.ALL)
                # -inf - -inf: nothing seen yet, nothing to scale
                scale = tl.where(bound == higher, 1.0, tl.exp2(bound - higher))
                if entropy_ptr is not None:  # the exponents of all classes fall
                    fall = tl.where(bound == float("-inf"), 0.0, bound - higher)
                    first = (first + fall[None, :] * sums) * scale[None, :]
                if p_squares_ptr is not None:
                    p_squares = p_squares * scale * scale
                sums = sums * scale[None, :]
                bound = higher
            reference = bound
            if ONLINE:
                reference = tl.where(bound == float("-inf"), 0.0, bound)
            p = tl.exp2(logits - reference[None, :])
            sums += fold_rows(p, BLOCK_V, BLOCK_T)
            if entropy_ptr is not None:
                # Where p is 0 the exponent may be -inf, and their product is to be 0.
                exponent = tl.maximum(logits - reference[None, :], -1000.0)
                first += fold_rows(p * exponent, BLOCK_V, BLOCK_T)
            if p_squares_ptr is not None:
                p_squares += tl.sum(p * p, 0)
            if strips_ptr is not None:
                # Loaded for each tile, like the limits.
                factor = tl.load(energy_ptr + tokens, mask=is_token, other=0.0)
                if ONLINE:
                    factor = tl.exp2(tl.minimum(reference - factor, 0.0))
                p *= factor[None, :]
                both = strip_bytes(tl.sum(p * p, axis=1), tl.sum(p, axis=1))
                tl.store(strips_ptr + block.to(tl.int64) * V + classes, both, mask=inside)
            classes += BLOCK_V
            product = low_rank_product(
                low_e_ptr, low_c_ptr, (tokens, classes), (is_token, classes < V), LOW_RANK
            )

    total = tl.sum(sums, 0)
    out = segment.to(tl.int64) * N + tokens
    wanted = is_token
    if ONLY_FLAGGED:
        # Only sums that overflowed: a token must not depend on the others in its block.
        first_lse = tl.load(lse_ptr + out, mask=is_token, other=0.0)
        wanted = is_token & ~(first_lse - known < OVERFLOW)
    lse = bound + tl.log2(total)
    tl.store(lse_ptr + out, lse, mask=wanted)
    if entropy_ptr is not None:
        divisor = tl.where(total == 0, 1.0, total)  # no class of any probability
        entropy = tl.log2(divisor) - tl.sum(first, 0) / divisor
        tl.store(entropy_ptr + out, entropy, mask=wanted)
    if p_squares_ptr is not None:
        tl.store(p_squares_ptr + out, 2.0 * bound + tl.log2(p_squares), mask=wanted)
    if rank_ptr is not None:
        # Counts are whole: those of a segment stay below 2^24.
        tl.store(rank_ptr + out, tl.sum(counts, 0).to(tl.int32), mask=wanted)
    if highest_ptr is not None:
        tl.store(highest_ptr + out, highest, mask=wanted)
    if strips_ptr is not None:
        squares = 2.0 * bound + tl.log2(tl.sum(sums * sums, 0))
        tl.store(squares_ptr + out, squares, mask=wanted)
    if not ONLINE:
        overflown = tl.sum((is_token & ~(lse - known < OVERFLOW)).to(tl.int32), 0)
        if overflown > 0:
            tl.store(flag_ptr + block, 1)


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
        return torch.exp2(self.bound - self.strip_bound)

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


@triton.jit
def highest_of_segments(ptr, tokens, present, N, num_segments, BLOCK_T: tl.constexpr):
    """Return the highest value of the segments; NaN if one is NaN."""
    highest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    for segment in range(num_segments):
        value = tl.load(ptr + tl.cast(segment, tl.int64) * N + tokens, mask=present, other=0.0)
        highest = tl.maximum(highest, value, propagate_nan=tl.PropagateNan.ALL)
    return highest


@triton.jit
def logsumexp2(ptr, tokens, present, N, num_segments, BLOCK_T: tl.constexpr):
    """Return log2 of the sum over segments of powers of two, in order; -inf stays -inf."""
    highest = highest_of_segments(ptr, tokens, present, N, num_segments, BLOCK_T=BLOCK_T)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for segment in range(num_segments):
        value = tl.load(ptr + tl.cast(segment, tl.int64) * N + tokens, mask=present, other=0.0)
        total += tl.exp2(value - base)
    return base + tl.log2(total)


@triton.jit(do_not_specialize=["N", "num_segments", "num_summed", "num_classes"])
def bound_kernel(
    lse_ptr,  # (segments, N)
    squares_ptr,  # (segments, N) log2 of the sum of exponentials squared; or None
    bound_ptr,  # (N,) in, out
    N,
    num_segments,
    num_summed,  # classes of the sums
    num_classes,  # all of them
    SET_APART: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Raise the bound to the log-sum-exp of some classes.

    With ``squares_ptr``, that of a token spread over many of them is extrapolated to all classes,
    or far above its log-sum-exp if SET_APART.
    """
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < N
    bound = tl.load(bound_ptr + tokens, mask=inside, other=float("inf"))
    present = inside & (bound != float("inf"))
    lse = logsumexp2(lse_ptr, tokens, present, N, num_segments, BLOCK_T=BLOCK_T)
    if squares_ptr is not None:
        squares = logsumexp2(squares_ptr, tokens, present, N, num_segments, BLOCK_T=BLOCK_T)
        share = tl.exp2(2.0 * lse - squares) / num_summed
        # The others, as far as this token is spread: right within a bit for tokens of two trained
        # classifiers whose logits were multiplied by 0.02 to 0.5.
        if SET_APART:
            lse += tl.where(share > FLAT_SHARE, APART, 0.0)  # a NaN changes nothing
        else:
            gain = tl.log2(1.0 + (num_classes / num_summed - 1.0) * share) - MARGIN
            lse += tl.where(share > SPREAD, tl.maximum(gain, 0.0), 0.0)
    higher = tl.maximum(bound, tl.where(lse < float("inf"), lse, float("-inf")))
    tl.store(bound_ptr + tokens, higher, mask=present)


@triton.jit(do_not_specialize=["N", "num_segments"])
def finish_kernel(
    lse_parts_ptr,  # (segments, N) log2
    squares_parts_ptr,  # (segments, N) log2
    logits_ptr,  # (N,) of the targets, log2
    targets_ptr,  # (N,)
    origin_ptr,  # (N,)
    bound_ptr,  # (N,) what the strips are relative to
    nll_ptr,  # (N,) out, in the caller's order
    lse_ptr,  # (N,) out, in the caller's order
    support_ptr,  # (N,) out, log2 of the effective support
    strips_ptr,  # (blocks, 2 V) in, out: low and high bytes in turns; or None
    N,
    V,
    num_segments,
    BLOCK_T: tl.constexpr,
):
    """Write loss and log-sum-exp of a block; mark the strips that hold its targets."""
    block = tl.program_id(0)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < N
    origin = tl.load(origin_ptr + tokens, mask=inside, other=N)
    present = origin < N
    lse = logsumexp2(lse_parts_ptr, tokens, present, N, num_segments, BLOCK_T=BLOCK_T)
    nll = lse - tl.load(logits_ptr + tokens, mask=present, other=0.0)
    # The sum and the target's logit come from different kernels; a probability stays below 1.
    nll = tl.maximum(nll, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(nll_ptr + origin, nll * LN2, mask=present)
    tl.store(lse_ptr + origin, lse * LN2, mask=present)
    if strips_ptr is not None:
        squares = logsumexp2(squares_parts_ptr, tokens, present, N, num_segments, BLOCK_T=BLOCK_T)
        support = 2 * lse - squares
        # The strips understate a token whose bound was too high: a flat one does not need them.
        bound = tl.load(bound_ptr + tokens, mask=present, other=0.0)
        support = tl.where(bound > lse + LOOSE, tl.maximum(support, MOST_SUPPORT), support)
        tl.store(support_ptr + tokens, tl.where(present, support, 0.0), mask=inside)
        target = tl.load(targets_ptr + tokens, mask=present, other=-1)
        marks = tl.full((BLOCK_T,), FORCED, tl.uint8)  # programs that meet write the same byte
        tl.store(strips_ptr + 2 * (block.to(tl.int64) * V + target), marks, mask=target >= 0)


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
