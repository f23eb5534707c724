"""Kernels that estimate the error of a tail from sampled tokens, for two thresholds at once.

Shape legend: ``cut_cross_entropy.kernels``.
"""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.triton.filtered.selection import DROPPED_UNIT, weighted
from cut_cross_entropy.kernels.triton.filtered.tail_sample import load_risk, sum_risks
from cut_cross_entropy.kernels.triton.order import random_signs
from cut_cross_entropy.kernels.triton.primitives import (
    byte_to_value,
    gather_rows,
    load_rows,
    logit_gradient,
    low_rank_product,
    transform_logits,
)

ROWS = tl.constexpr(128)  # of the product with c: sampled tokens, then projections
SAMPLES = tl.constexpr(96)  # tokens drawn; a token may be drawn more than once
SKETCH = tl.constexpr(32)  # random projections of a row of c, of which the last is the constant 1
EVENLY = tl.constexpr(0.2)  # share of the risk that is the upstream gradient alone
STEP = tl.constexpr(8)  # bytes from the lower threshold to the other: a factor of 2 in tolerance
MASS_GROWTH = tl.constexpr(0.25)  # of the dropped mass per byte, in octaves: at most as energies
SUMS = 5  # of logit gradients: dropped by the lower threshold, by the other, all; of masses: two


@triton.jit(do_not_specialize=["N", "search_steps"])
def draw_tokens_kernel(
    a_ptr,  # (N,)
    b_ptr,  # (N,)
    target_grad_ptr,  # (N,) negative for tokens without a filtered gradient
    mass_ptr,  # (N,) dropped probability of each token, roughly
    sums_ptr,  # (N,) scratch: inclusive sums of the risks
    rows_ptr,  # (ROWS,) int64 out, of which SAMPLES count
    factors_ptr,  # (ROWS,) out: inverse of the expected number of draws of the token, then 0
    weight_ptr,  # () out: sum of the upstream gradients
    N,
    search_steps,  # N < 2 ** search_steps
    SCAN: tl.constexpr,
):
    """Draw a systematic sample of tokens by their risk, in one program.

    The error of a token is about its upstream gradient times the mass that it drops. A share of the
    upstream gradient alone leaves no token out.
    """
    of_tokens = (a_ptr, b_ptr, target_grad_ptr, mass_ptr)
    by_mass, evenly = sum_risks(of_tokens, N, SCAN)
    tl.store(weight_ptr, evenly)
    by_mass = 1.0 / tl.maximum(by_mass, 1e-37)
    evenly = EVENLY / tl.maximum(evenly, 1e-37)
    total = 0.0
    for start in range(0, N, SCAN):
        tokens = start + tl.arange(0, SCAN)
        weight, mass = load_risk(of_tokens, tokens, N)
        risk = weight * (by_mass * mass + evenly)
        tl.store(sums_ptr + tokens, total + tl.cumsum(risk, 0), mask=tokens < N)
        total += tl.sum(risk, 0)
    tl.debug_barrier()  # other threads have written the sums that this one reads
    total = tl.load(sums_ptr + N - 1)
    draws = tl.arange(0, ROWS)
    place = (draws + 0.5) * (total / SAMPLES)
    low = tl.zeros((ROWS,), tl.int32)
    high = low + (N - 1)
    for _ in range(search_steps):  # the first token whose sum is larger
        middle = (low + high) // 2
        beyond = tl.load(sums_ptr + middle) > place
        high = tl.where(beyond, middle, high)
        low = tl.where(beyond, low, tl.minimum(middle + 1, high))
    before = tl.load(sums_ptr + high - 1, mask=high > 0, other=0.0)
    risk = tl.load(sums_ptr + high) - before
    tl.store(rows_ptr + draws, high.to(tl.int64))
    factor = total / (SAMPLES * tl.maximum(risk, 1e-37))
    tl.store(factors_ptr + draws, tl.where((risk > 0) & (draws < SAMPLES), factor, 0.0))


@triton.jit
def left_factor_kernel(
    e_ptr,  # (N, D)
    rows_ptr,  # (ROWS,) int64
    out_ptr,  # (ROWS, D) out
    D,
    BLOCK_D: tl.constexpr,
):
    """Write the embeddings of sampled tokens, and random signs that project rows of c."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    samples, lanes = tl.arange(0, ROWS), tl.arange(0, SKETCH)
    rows = tl.load(rows_ptr + samples)
    e = gather_rows(e_ptr, rows, inside=samples < SAMPLES, columns=d, D=D)
    inside = (samples < SAMPLES)[:, None] & (d < D)[None, :]
    tl.store(out_ptr + samples[:, None] * D + d[None, :], e, mask=inside)
    signs = random_signs(d, SKETCH).to(out_ptr.dtype.element_ty)
    out = out_ptr + SAMPLES * D + lanes[None, :] * D + d[:, None]
    tl.store(out, signs, mask=(d < D)[:, None])


@triton.jit
def store_gradients(
    product,  # (ROWS, classes)
    columns,  # (classes,) of the output
    first_class,
    stop_class,
    rows_ptr,
    bias_ptr,
    values,
    multiplier_ptr,
    out_ptr,
    stride,
    softcap,
):
    """Store the logit gradients of a tile of products, and its projections as they are."""
    classes = first_class + columns
    inside = classes < stop_class
    samples = tl.arange(0, ROWS)
    tokens = tl.load(rows_ptr + samples)
    lse = tl.load(values[0] + tokens)
    a, b = tl.load(values[1] + tokens), tl.load(values[2] + tokens)
    targets = tl.load(values[3] + tokens).to(tl.int32)
    multiplier = None
    if multiplier_ptr is not None:
        multiplier = tl.load(multiplier_ptr + tokens)
    logits = transform_logits(
        product, classes, inside, bias_ptr, softcap, multiplier=multiplier, TOKEN_AXIS=0
    )
    grad = logit_gradient(
        logits,
        tl.exp2(logits - lse[:, None]),
        classes[None, :] == targets[:, None],
        inside,
        (lse, a, b),
        softcap=softcap,
        multiplier=multiplier,
        TOKEN_AXIS=0,
    )
    projection = tl.where((samples == ROWS - 1)[:, None], 1.0, product)
    both = tl.where((samples < SAMPLES)[:, None], grad, projection)
    out = out_ptr + samples[:, None] * stride + columns[None, :]
    tl.store(out, both.to(out_ptr.dtype.element_ty), mask=inside[None, :])


@triton.jit(do_not_specialize=["first_class", "stop_class"])
def sampled_gradients_kernel(
    e,  # (ROWS, D) embeddings of the sampled tokens, and random signs
    c,  # (V, D)
    low_e_ptr,  # (N, LOW_RANK)
    low_c_ptr,  # (V, LOW_RANK)
    rows_ptr,  # (ROWS,) int64
    bias_ptr,  # (V,), or None, like softcap and multiplier_ptr
    values,  # pointers to lse (log2), a, b and targets, (N,) each, and others
    multiplier_ptr,  # (N,)
    out_ptr,  # (ROWS, stride) logit gradients, and projections of the rows of c, out
    V,
    D,
    stride,
    softcap,
    first_class,
    stop_class,
    LOW_RANK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the logit gradients of sampled tokens, and projections of c, for some classes.

    The last projection is the constant 1, so its sums are those of the factors.
    """
    first_column = tl.program_id(0) * BLOCK_V
    classes = first_class + first_column + tl.arange(0, BLOCK_V)
    row = tl.arange(0, ROWS)
    is_sample = row < SAMPLES
    product = low_rank_product(
        low_e_ptr,
        low_c_ptr,
        (tl.load(rows_ptr + row, mask=is_sample, other=0), classes),
        (is_sample, classes < V),
        LOW_RANK,
        TOKEN_AXIS=0,
    )
    for d in range(0, D, BLOCK_D):
        e_tile = load_rows(e, row=0, num_rows=ROWS, column=d, D=D, ROWS=ROWS, COLUMNS=BLOCK_D)
        c_tile = load_rows(
            c,
            row=first_class + first_column,
            num_rows=V,
            column=d,
            D=D,
            ROWS=BLOCK_V,
            COLUMNS=BLOCK_D,
        )
        product = tl.dot(e_tile, c_tile.T, product, input_precision="ieee")
    # A wide tile ends in two halves, which need fewer registers at a time.
    HALVES: tl.constexpr = BLOCK_V > ROWS
    half: tl.constexpr = BLOCK_V // 2 if HALVES else BLOCK_V
    if HALVES:
        pairs = tl.permute(tl.reshape(product, (ROWS, 2, half)), (0, 2, 1))
        left, right = tl.split(pairs)
    for part in tl.static_range(2 if HALVES else 1):
        store_gradients(
            (left if part == 0 else right) if HALVES else product,
            columns=first_column + part * half + tl.arange(0, half),
            first_class=first_class,
            stop_class=stop_class,
            rows_ptr=rows_ptr,
            bias_ptr=bias_ptr,
            values=values,
            multiplier_ptr=multiplier_ptr,
            out_ptr=out_ptr,
            stride=stride,
            softcap=softcap,
        )


@triton.jit(do_not_specialize=["first_class", "num_classes"])
def sampled_sums_kernel(
    grads_ptr,  # (ROWS, stride) of the classes from first_class on
    rows_ptr,  # (ROWS,) int64
    strips_ptr,  # (blocks, V) int16
    weights_ptr,  # (blocks,) see Kept
    threshold_ptr,  # ()
    sums_ptr,  # (programs, SUMS, SAMPLES, SKETCH) out
    V,
    stride,
    first_class,
    num_classes,
    SUMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Project dropped logit gradients times c, and dropped masses times c, for some classes."""
    program = tl.program_id(0)
    samples = tl.program_id(1) * TILE + tl.arange(0, TILE)
    lanes = tl.arange(0, SKETCH)
    blocks = tl.load(rows_ptr + samples) // BLOCK_T
    weights = tl.load(weights_ptr + blocks)[:, None]
    strips = strips_ptr + blocks[:, None] * V + first_class
    high = tl.load(threshold_ptr)
    low = tl.maximum(high - STEP, 1)
    whole = tl.zeros((TILE, SKETCH), tl.float32)
    low_grads = tl.zeros((TILE, SKETCH), tl.float32)
    low_masses = tl.zeros((TILE, SKETCH), tl.float32)
    grads = tl.zeros((TILE, SKETCH), tl.float32)
    masses = tl.zeros((TILE, SKETCH), tl.float32)
    for start in range(program * BLOCK, num_classes, tl.num_programs(0) * BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = (columns < num_classes)[None, :]
        row = grads_ptr + columns[None, :]
        grad = tl.load(row + samples[:, None] * stride, mask=inside, other=0.0)
        signs = tl.load(row + (lanes + SAMPLES)[:, None] * stride, mask=inside, other=0.0).T
        both = tl.load(strips + columns[None, :], mask=inside, other=0).to(tl.int32)
        own = weighted(both & 255, weights)
        mass = byte_to_value((both >> 8) & 255).to(grad.dtype)
        zero = tl.zeros_like(grad)
        whole = tl.dot(grad, signs, whole, input_precision="tf32")
        grad = tl.where(own < high, grad, zero)
        mass = tl.where(own < high, mass, zero)
        grads = tl.dot(grad, signs, grads, input_precision="tf32")
        masses = tl.dot(mass, signs, masses, input_precision="tf32")
        grad = tl.where(own < low, grad, zero)
        mass = tl.where(own < low, mass, zero)
        low_grads = tl.dot(grad, signs, low_grads, input_precision="tf32")
        low_masses = tl.dot(mass, signs, low_masses, input_precision="tf32")
    size: tl.constexpr = SAMPLES * SKETCH
    out = sums_ptr + program * (SUMS * size)
    out += samples[:, None] * SKETCH + lanes[None, :]
    tl.store(out, low_grads)
    tl.store(out + size, grads)
    tl.store(out + 2 * size, whole)
    tl.store(out + 3 * size, low_masses)
    tl.store(out + 4 * size, masses)


@triton.jit
def squared_error(sums_ptr, factors, which: tl.constexpr):
    """Estimate the sum of squares over all tokens: of a threshold's error, or the whole (2)."""
    samples, lanes = tl.arange(0, ROWS), tl.arange(0, SKETCH)
    inside = (samples < SAMPLES)[:, None]
    size: tl.constexpr = SAMPLES * SKETCH
    place = sums_ptr + which * size + samples[:, None] * SKETCH + lanes[None, :]
    rows = tl.load(place, mask=inside, other=0.0)
    is_sum = (lanes == SKETCH - 1)[None, :]
    if which < 2:
        masses = tl.load(place + 3 * size, mask=inside, other=0.0)
        total = tl.sum(tl.where(is_sum, masses, 0.0), 1)
        dropped = tl.sum(tl.where(is_sum, rows, 0.0), 1)
        share = tl.where(total > 0, dropped / tl.where(total > 0, total, 1.0), 0.0)
        rows -= masses * share[:, None]
    squares = tl.sum(tl.where(is_sum, 0.0, rows * rows), 1)
    return tl.sum(squares * factors, 0)


@triton.jit
def dropped_gradient(sums_ptr, factors, which: tl.constexpr):
    """Estimate the sum over all tokens of what a threshold drops: upstream gradient times mass."""
    samples = tl.arange(0, ROWS)
    place = sums_ptr + which * SAMPLES * SKETCH + samples * SKETCH + SKETCH - 1
    return tl.sum(tl.abs(tl.load(place, mask=samples < SAMPLES, other=0.0)) * factors, 0)


@triton.jit(do_not_specialize=["dropped_ptr"])
def choose_threshold_kernel(
    sums_ptr,  # (SUMS, SAMPLES, SKETCH)
    factors_ptr,  # (ROWS,) 0 from SAMPLES on
    weight_ptr,  # () sum of the upstream gradients of all tokens
    histogram_ptr,  # (256,) int64
    most_ptr,  # () highest threshold that the mass allows
    threshold_ptr,  # () in, out
    num_kept_ptr,  # () int64 in, out
    dropped_ptr,  # () int32 out, see Kept.statistics
    target,  # log2 of the relative error to reach
    lowest_slope,
    highest_slope,
    most_below,
):
    """Move the threshold to where the estimated error is the target's, in one program.

    The logarithm of the error is interpolated between the two thresholds and extrapolated outside,
    at most a STEP above them; so is that of the dropped mass.
    """
    factors = tl.load(factors_ptr + tl.arange(0, ROWS))
    whole = squared_error(sums_ptr, factors, 2)
    first = 0.5 * tl.log2(squared_error(sums_ptr, factors, 0) / whole + 1e-30)
    second = 0.5 * tl.log2(squared_error(sums_ptr, factors, 1) / whole + 1e-30)
    growth = (second - first) / STEP
    slope = tl.minimum(tl.maximum(growth, lowest_slope), highest_slope)
    shift = tl.maximum((target - first) / slope, -most_below) - STEP
    if first <= target:
        shift = (target - second) / tl.maximum(growth, 1e-3)
    if second <= target:
        shift = tl.minimum((target - second) / highest_slope, STEP)
    before = tl.load(threshold_ptr)
    moved = before + tl.floor(shift).to(tl.int32)
    moved = tl.minimum(tl.maximum(moved, 1), tl.load(most_ptr))  # at most FORCED
    known = (whole > 0) & (whole < float("inf")) & (second == second)
    threshold = tl.where(known, moved, before)
    tl.store(threshold_ptr, threshold)
    weight = tl.maximum(tl.load(weight_ptr), 1e-37)
    low = tl.log2(dropped_gradient(sums_ptr, factors, 0) / weight + 1e-30)
    high = tl.log2(dropped_gradient(sums_ptr, factors, 1) / weight + 1e-30)
    growth = tl.minimum((high - low) / STEP, MASS_GROWTH)
    log_mass = high + growth * (threshold - before).to(tl.float32)
    dropped = tl.where(known, tl.exp2(tl.minimum(log_mass, 0.0)), 0.0)
    tl.store(dropped_ptr, (dropped * DROPPED_UNIT).to(tl.int32))
    bins = tl.arange(0, 256)
    strips = tl.load(histogram_ptr + bins)
    tl.store(num_kept_ptr, tl.sum(tl.where(bins >= threshold, strips, 0), 0))
