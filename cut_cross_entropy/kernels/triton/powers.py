"""Triton kernels of ``kernels.powers``."""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.triton.lse import logsumexp2
from cut_cross_entropy.kernels.triton.primitives import (
    ABSENT,
    FLAT,
    FORCED,
    LN2,
    LOG2E,
    halves,
    logit_slope,
    multiply_step,
    strip_bytes,
    swizzle_program,
    transform_logits,
)

NOTHING = tl.constexpr(-3.0e38)  # a finite bound of which nothing is a multiple


@triton.jit
def store_tile(
    product,  # (BLOCK_T, classes) rows of e times rows of c
    classes,  # (classes,) class ids
    tokens,  # (BLOCK_T,)
    values,  # (BLOCK_T,) each: targets, bound (log2)
    out,  # pointer to (N, V), its stride, numbers of tokens and classes
    bias_ptr,  # (V,), or None
    softcap,  # or None
    multiplier,  # (BLOCK_T,), or None
):
    """Store powers of a tile, 0 for targets, times the slope of a softcap; return them without."""
    targets, bound = values
    powers_ptr, stride, N, V = out
    inside = classes < V
    logits = transform_logits(
        product, classes, inside, bias_ptr, softcap, multiplier=multiplier, TOKEN_AXIS=0
    )
    powers = tl.exp2(logits - bound[:, None])
    powers = tl.where(classes[None, :] == targets[:, None], 0.0, powers)
    stored = powers
    if softcap is not None:
        if multiplier is not None:
            logits = logits / multiplier[:, None]
        stored = powers * logit_slope(logits, softcap)
    # 32 bits reach: a chunk is bounded in elements
    place = tokens[:, None] * stride + classes[None, :]
    stored = stored.to(powers_ptr.dtype.element_ty)
    tl.store(powers_ptr + place, stored, mask=(tokens < N)[:, None] & inside[None, :])
    return powers


@triton.jit(do_not_specialize=["N", "segment_tiles", "num_segments", "num_blocks", "swizzle_width"])
def powers_kernel(
    e,  # (N, D)
    c,  # (V, D)
    bias_ptr,  # (V,), or None
    bound_ptr,  # (N,) log2; +inf: no token
    targets_ptr,  # (N,)
    multiplier_ptr,  # (N,), or None
    powers_ptr,  # (N, V) out
    lse_ptr,  # (segments, N) out, log2, of all classes but the target
    squares_ptr,  # (segments, N) out, log2 of the sum of their squares; or None
    flag_ptr,  # (blocks,) out, or in if ONLY_FLAGGED
    N,
    V,
    D,
    softcap,  # or None
    stride_out,
    segment_tiles,
    num_segments,
    num_blocks,
    swizzle_width,
    OVERFLOW: tl.constexpr,
    ONLY_FLAGGED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the powers of one block of tokens for one segment of the classes, and their sums.

    Tiles are (tokens, classes): the values of a token are in few threads.
    """
    block, segment = swizzle_program(num_blocks, swizzle_width, num_segments)
    if ONLY_FLAGGED:  # noqa: SIM102 (a constant, then a value of the device)
        if tl.load(flag_ptr + block) == 0:
            return
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    bound = tl.load(bound_ptr + tokens, mask=tokens < N, other=float("inf"))
    if tl.min(bound, 0) == float("inf"):  # no token: nobody reads its powers
        return
    targets = tl.load(targets_ptr + tokens, mask=tokens < N, other=-1).to(tl.int32)
    multiplier = None
    if multiplier_ptr is not None:
        multiplier = tl.load(multiplier_ptr + tokens, mask=tokens < N, other=1.0)
    sums = tl.zeros((BLOCK_T,), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    start = segment * segment_tiles * BLOCK_V
    tiles = min(segment_tiles, tl.cdiv(V - start, BLOCK_V))
    steps = tl.cdiv(D, BLOCK_D)
    values = (targets, bound)
    # A wide tile ends in two halves, which need fewer registers at a time.
    NUM_PARTS: tl.constexpr = 2 if BLOCK_V > BLOCK_T else 1
    PART: tl.constexpr = BLOCK_V // NUM_PARTS
    product = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    shape = (N, V, D)
    for i in tl.range(0, tiles * steps, flatten=True):
        step = (i, block * BLOCK_T, start)
        product = multiply_step(product, e, c, step, shape, TILE=(BLOCK_T, BLOCK_V, BLOCK_D))
        if i % steps == steps - 1:
            v = start + (i // steps) * BLOCK_V
            left, right = halves(product, BLOCK_T=BLOCK_T, BLOCK_V=BLOCK_V)
            for part in tl.static_range(NUM_PARTS):
                some = store_tile(
                    left if part == 0 else right,
                    classes=v + part * PART + tl.arange(0, PART),
                    tokens=tokens,
                    values=values,
                    out=(powers_ptr, stride_out, N, V),
                    bias_ptr=bias_ptr,
                    softcap=softcap,
                    multiplier=multiplier,
                )
                sums += tl.sum(some, 1)
                if squares_ptr is not None:
                    squares += tl.sum(some * some, 1)
            product = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)

    is_token = bound != float("inf")
    lse = tl.where(is_token, bound, 0.0) + tl.log2(sums)
    out = segment.to(tl.int64) * N + tokens
    tl.store(lse_ptr + out, lse, mask=is_token)
    if squares_ptr is not None:
        tl.store(squares_ptr + out, 2.0 * bound + tl.log2(squares), mask=is_token)
    if not ONLY_FLAGGED:
        overflown = tl.sum((is_token & ~(lse - bound < OVERFLOW)).to(tl.int32), 0)
        if overflown > 0:
            tl.store(flag_ptr + block, 1)


@triton.jit
def without_slope(
    powers,  # (tokens, classes) times the slope
    bound,  # (tokens,) log2
    softcap,
):
    """Divide stored powers by the slope of the softcap, a sixteenth at least.

    The slope is that of nearly the same logit, whose logarithm is taken from the bits of the float.
    Both together are right within 4 %; the bytes of a strip are in steps of 19 %.
    """
    unit = 1.0 / (softcap * LOG2E)
    exponents = powers.to(tl.int32, bitcast=True).to(tl.float32) * (unit / 2**23)
    ratio = exponents + ((bound - 126.957) * unit)[:, None]
    root = tl.rsqrt(tl.maximum(1.0 - ratio * ratio, 0.0625))
    return powers * (root * root)


@triton.jit(do_not_specialize=["strips_ptr", "N"])  # rows of a table, aligned for some V only
def strip_sums_kernel(
    powers_ptr,  # (N, V) times the slope of a softcap
    bound_ptr,  # (N,) log2; +inf: no token
    lse_ptr,  # (N,) log2
    targets_ptr,  # (N,) row of c; -1 for none
    strips_ptr,  # (blocks, V) int16 out, see strip_bytes
    N,
    V,
    softcap,  # or None
    stride,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum the probabilities of a block of tokens, and their squares, for each class.

    Strips that hold a target are marked. A kernel of its own, since the one that stores powers has
    the tokens in many threads.
    """
    classes = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)  # neighbours read on in the rows
    block = tl.program_id(1)
    inside = classes < V
    mass = tl.zeros((ROWS, BLOCK_V), tl.float32)
    energy = tl.zeros((ROWS, BLOCK_V), tl.float32)
    forced = tl.zeros((BLOCK_V,), tl.int32)
    present = 0
    for start in range(0, BLOCK_T, ROWS):
        tokens = block * BLOCK_T + start + tl.arange(0, ROWS)
        bound = tl.load(bound_ptr + tokens, mask=tokens < N, other=float("inf"))
        is_token = bound != float("inf")
        lse = tl.load(lse_ptr + tokens, mask=is_token, other=0.0)
        targets = tl.load(targets_ptr + tokens, mask=is_token, other=-1).to(tl.int32)
        forced |= tl.max((classes[None, :] == targets[:, None]).to(tl.int32), 0)
        present += tl.sum(is_token.to(tl.int32), 0)
        # 32 bits reach: a chunk is bounded in elements
        powers = tl.load(
            powers_ptr + tokens[:, None] * stride + classes[None, :],
            mask=is_token[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        if softcap is not None:
            powers = without_slope(powers, tl.where(is_token, bound, 0.0), softcap)
        powers *= tl.exp2(tl.where(is_token, bound - lse, 0.0))[:, None]
        mass += powers
        energy += powers * powers
    if present > 0:
        both = strip_bytes(tl.sum(energy, 0), tl.sum(mass, 0))
        both = tl.where(forced != 0, both | FORCED, both).to(tl.int16)
        tl.store(strips_ptr + block.to(tl.int64) * V + classes, both, mask=inside)


@triton.jit(do_not_specialize=["N", "num_segments"])
def repair_bound_kernel(
    lse_ptr,  # (segments, N) log2, with a running maximum where they overflowed
    flag_ptr,  # (blocks,)
    bound_ptr,  # (N,) in, out
    N,
    num_segments,
    OVERFLOW: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Raise the bounds that were too low.

    Without a class of any probability, which a shard of the vocabulary may lack, powers are 0.
    """
    block = tl.program_id(0)
    if tl.load(flag_ptr + block) == 0:
        return
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < N
    bound = tl.load(bound_ptr + tokens, mask=inside, other=float("inf"))
    present = inside & (bound != float("inf"))
    lse = logsumexp2(lse_ptr, tokens, present, N, num_segments, BLOCK_T=BLOCK_T)
    too_low = present & ~(lse - bound < OVERFLOW) & (lse < float("inf"))
    lse = tl.where(lse == float("-inf"), NOTHING, lse)
    tl.store(bound_ptr + tokens, lse, mask=too_low)


@triton.jit(do_not_specialize=["N", "num_segments"])
def chunk_sums_kernel(
    lse_parts_ptr,  # (segments, N) log2, of all classes but the target
    squares_parts_ptr,  # (segments, N) log2 of the sum of their squares; or None
    logits_ptr,  # (N,) of the targets, log2
    bound_ptr,  # (N,) log2; +inf: no token
    weights_ptr,  # (N,), or None, like the one that follows
    multiplier_ptr,
    nll_ptr,  # (N,) out, like the two that follow times the weight
    factor_ptr,  # (N,) out: probability over power, times the multiplier
    target_ptr,  # (N,) out: 1 - p of the target, times multiplier and slope of a softcap
    lse_ptr,  # (N,) out, log2; +inf: no token; like all that follow used only with squares
    support_ptr,  # (N,) out, log2 of the effective support
    target_grad_ptr,  # (N,) out, see BackwardTokens
    N,
    num_segments,
    softcap,  # or None
    num_groups,  # of classes: the support is that of groups
    flat_support,
    BLOCK_T: tl.constexpr,
):
    """Reduce the sums of a block of tokens to their losses and factors; 0 without a token."""
    block = tl.program_id(0)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < N
    bound = tl.load(bound_ptr + tokens, mask=inside, other=float("inf"))
    present = inside & (bound != float("inf"))
    others = logsumexp2(lse_parts_ptr, tokens, present, N, num_segments, BLOCK_T=BLOCK_T)
    logit = tl.load(logits_ptr + tokens, mask=present, other=0.0)
    target_logit = logit
    excess = others - logit
    x = tl.exp2(-tl.abs(excess))
    # log(1 + x), also of an x that 1 + x does not show
    rounded = 1.0 + x
    shown = tl.where(rounded == 1.0, 1.0, rounded - 1.0)
    log1p = tl.where(rounded == 1.0, x, tl.log(rounded) * (x / shown))
    nll = tl.maximum(excess * LN2, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p
    lse = tl.maximum(others, logit, propagate_nan=tl.PropagateNan.ALL) + log1p * LOG2E
    lse = tl.where(lse == float("inf"), float("nan"), lse)
    nll = tl.where(lse == lse, nll, float("nan"))
    factor = tl.exp2(bound - lse)
    target = tl.exp2(others - lse)
    if multiplier_ptr is not None:
        multiplier = tl.load(multiplier_ptr + tokens, mask=present, other=1.0)
        factor *= multiplier
        target *= multiplier
        logit = logit / multiplier
    target_grad = target
    if softcap is not None:
        target *= logit_slope(logit, softcap)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + tokens, mask=present, other=0.0)
        nll *= weight
        factor *= weight
        target *= weight
        target_grad *= weight
    tl.store(nll_ptr + tokens, tl.where(present, nll, 0.0), mask=inside)
    tl.store(factor_ptr + tokens, tl.where(present, factor, 0.0), mask=inside)
    tl.store(target_ptr + tokens, tl.where(present, target, 0.0), mask=inside)
    if squares_parts_ptr is not None:
        squares = logsumexp2(squares_parts_ptr, tokens, present, N, num_segments, BLOCK_T=BLOCK_T)
        p_squares = tl.exp2(squares - 2 * lse) + tl.exp2(2 * (target_logit - lse))
        # Classes that are spread over the groups meet by chance.
        support = 0.0 - tl.log2(p_squares + (1.0 - p_squares) / num_groups)
        # A broken embedding keeps the strips of its own block, whose energies are NaN.
        target_grad = tl.where(lse != lse, 0.0, tl.abs(target_grad))
        target_grad = tl.where(support > flat_support, FLAT, target_grad)
        tl.store(lse_ptr + tokens, tl.where(present, lse, float("inf")), mask=inside)
        tl.store(support_ptr + tokens, tl.where(present, support, 0.0), mask=inside)
        tl.store(target_grad_ptr + tokens, tl.where(present, target_grad, ABSENT), mask=inside)
