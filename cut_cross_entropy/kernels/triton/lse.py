"""Triton kernels of ``kernels.lse``."""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.triton.primitives import (
    FORCED,
    LN2,
    fold_rows,
    load_rows,
    low_rank_product,
    next_above,
    strip_bytes,
    swizzle_program,
    transform_logits,
)

OVERFLOW = tl.constexpr(60.0)  # log2 of a sum relative to its bound; its square overflows at 128
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
        c_tile = load_rows(c, v, V, step * BLOCK_D, D, ROWS=BLOCK_V, COLUMNS=BLOCK_D)
        e_tile = load_rows(e, block * BLOCK_T, N, step * BLOCK_D, D, ROWS=BLOCK_T, COLUMNS=BLOCK_D)
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
