"""Triton kernels of ``kernels.filtered.tail_sample``."""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.triton.filtered.selection import DROPPED_UNIT, weighted
from cut_cross_entropy.kernels.triton.primitives import (
    ABSENT,
    byte_to_value,
    gather_rows,
    load_rows,
    low_rank_product,
    transform_logits,
)


@triton.jit
def light_masses(
    strips,  # pointers to (blocks, V) int16, (blocks,) int32 weights, and () int32 threshold
    blocks,
    classes,
    inside,
):
    """Return the masses of the strips under the threshold, 0 for the others and outside."""
    strips_ptr, weights_ptr, threshold_ptr, V = strips
    place = tl.cast(blocks, tl.int64) * V + classes
    both = tl.load(strips_ptr + place, mask=inside, other=0).to(tl.int32)
    weights = tl.load(weights_ptr + blocks)
    light = inside & (weighted(both & 255, weights) < tl.load(threshold_ptr))
    return tl.where(light, byte_to_value((both >> 8) & 255), 0.0)


@triton.jit(do_not_specialize=["num_blocks", "num_chunks"])
def chunk_masses_kernel(
    strips_ptr,  # (blocks, V) int16
    weights_ptr,  # (blocks,)
    threshold_ptr,  # ()
    sums_ptr,  # (blocks, chunks) out
    V,
    num_blocks,
    num_chunks,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum the masses under the threshold of a chunk of classes, for ROWS blocks."""
    chunk = tl.program_id(0)
    classes = chunk * CHUNK + tl.arange(0, CHUNK)
    strips = (strips_ptr, weights_ptr, threshold_ptr, V)
    for row in tl.static_range(ROWS):
        block = tl.program_id(1) * ROWS + row
        if block < num_blocks:
            mass = light_masses(strips, block, classes, classes < V)
            tl.store(sums_ptr + block * num_chunks + chunk, tl.sum(mass, 0))


@triton.jit(do_not_specialize=["num_chunks"])
def draw_classes_kernel(
    strips_ptr,  # (blocks, V) int16
    weights_ptr,  # (blocks,)
    threshold_ptr,  # ()
    sums_ptr,  # (blocks, chunks) see chunk_masses_kernel
    classes_ptr,  # (blocks, DRAWS) int32 out; -1: none
    V,
    num_chunks,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DRAWS: tl.constexpr,
    HERE: tl.constexpr,
):
    """Draw HERE classes of one block by their masses under the threshold: a systematic sample."""
    block = tl.program_id(0)
    draws = tl.program_id(1) * HERE + tl.arange(0, HERE)
    chunks = tl.arange(0, COLUMNS)
    row = sums_ptr + block * num_chunks + chunks
    sums = tl.load(row, mask=chunks < num_chunks, other=0.0)
    place = (draws + 0.5) * (tl.sum(sums, 0) / DRAWS)
    passed = tl.cumsum(sums, 0)[None, :] <= place[:, None]
    chunk = tl.minimum(tl.sum(passed.to(tl.int32), 1), num_chunks - 1)
    before = tl.where(chunks[None, :] < chunk[:, None], sums[None, :], 0.0)
    # Sums in another order round otherwise: less than nothing is left at the start of a chunk, and
    # the last class of one stands for what is beyond it.
    rest = tl.maximum(place - tl.sum(before, 1), 0.0)

    lanes = tl.arange(0, CHUNK)
    classes = chunk[:, None] * CHUNK + lanes[None, :]
    strips = (strips_ptr, weights_ptr, threshold_ptr, V)
    mass = light_masses(strips, block, classes, classes < V)
    last = tl.max(tl.where(mass > 0, lanes[None, :], -1), 1)
    found = tl.sum((tl.cumsum(mass, 1) <= rest[:, None]).to(tl.int32), 1)
    drawn = tl.where(last < 0, -1, chunk * CHUNK + tl.minimum(found, last))
    tl.store(classes_ptr + block * DRAWS + draws, drawn)


@triton.jit(do_not_specialize=["N", "num_chunks"])
def sample_tail_kernel(
    e,  # (N, D)
    c_ptr,  # (V, D)
    low_e_ptr,  # (N, LOW_RANK)
    low_c_ptr,  # (V, LOW_RANK)
    strips_ptr,  # (blocks, V) int16
    classes_ptr,  # (blocks, DRAWS)
    sums_ptr,  # (blocks, chunks) see chunk_masses_kernel
    lse_ptr,  # (N,) log2
    target_grad_ptr,  # (N,) negative for tokens without a filtered gradient
    bias_ptr,  # (V,), or None, like the two that follow
    softcap,
    multiplier_ptr,  # (N,)
    tilts_ptr,  # (blocks,) out
    mass_ptr,  # (N,) out
    N,
    V,
    D,
    num_chunks,
    LOW_RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    DRAWS: tl.constexpr,
):
    """Write the tilt and the masses of one block from the logits of the classes drawn for it.

    A class that is drawn by its mass gives each token its share of that mass: means of shares are
    those of the block's mass, and the logits that they weight those of the true tail. The masses of
    strips are relative to a lower bound of the log-sum-exp; what the drawn classes have in truth
    tells by how much they overstate.
    """
    block = tl.program_id(0)
    first = block * BLOCK_T
    tokens = first + tl.arange(0, BLOCK_T)
    is_token = tokens < N
    classes = tl.load(classes_ptr + block * DRAWS + tl.arange(0, DRAWS))
    is_class = classes >= 0
    classes = tl.maximum(classes, 0)
    low = low_rank_product(
        low_e_ptr, low_c_ptr, (tokens, classes), (is_token, is_class), LOW_RANK, TOKEN_AXIS=0
    )
    product = tl.zeros((BLOCK_T, DRAWS), tl.float32)
    for d in range(0, D, BLOCK_D):
        e_tile = load_rows(e, first, N, d, D, ROWS=BLOCK_T, COLUMNS=BLOCK_D)
        c_tile = gather_rows(c_ptr, classes, is_class, d + tl.arange(0, BLOCK_D), D)
        product = tl.dot(e_tile, c_tile.T, product, input_precision="ieee")
    multiplier = None
    if multiplier_ptr is not None:
        multiplier = tl.load(multiplier_ptr + tokens, mask=is_token, other=0.0)
    logits = transform_logits(
        product + low, classes, is_class, bias_ptr, softcap, multiplier=multiplier, TOKEN_AXIS=0
    )
    lse = tl.load(lse_ptr + tokens, mask=is_token, other=0.0)
    filtered = tl.load(target_grad_ptr + tokens, mask=is_token, other=ABSENT) >= 0
    filtered &= tl.abs(lse) < float("inf")  # nor NaN
    counted = filtered[:, None] & is_class[None, :]
    p = tl.where(counted, tl.exp2(logits - lse[:, None]), 0.0)
    total = tl.sum(p, 0)
    shares = p / tl.where(total > 0, total, 1.0)[None, :]
    known = counted & (total > 0)[None, :]
    if multiplier is not None:
        product *= multiplier[:, None]
    values = tl.where(known, product, 0.0)
    count = tl.sum((total > 0).to(tl.float32), 0)
    each = 1.0 / tl.maximum(count, 1.0)
    mass = tl.sum(shares, 1) * each
    chunks = tl.arange(0, COLUMNS)
    row = sums_ptr + block * num_chunks + chunks
    whole = tl.sum(tl.load(row, mask=chunks < num_chunks, other=0.0), 0)
    place = strips_ptr + tl.cast(block, tl.int64) * V + classes
    said = byte_to_value((tl.load(place, mask=is_class, other=0).to(tl.int32) >> 8) & 255)
    whole *= tl.sum(tl.where(is_class, total / tl.where(said > 0, said, 1.0), 0.0), 0) / DRAWS
    tl.store(mass_ptr + tokens, mass * whole, mask=is_token)
    true = tl.sum(tl.sum(shares * values, 1), 0) * each
    mean = tl.sum(mass * tl.sum(values, 1), 0) * each
    # Of the pairs of classes in the mean, those of a class with itself do not belong there.
    excess = (true - mean) * count / tl.maximum(count - 1.0, 1.0)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    of_mean = 0.0
    for d in range(0, D, BLOCK_D):
        e_tile = load_rows(e, first, N, d, D, ROWS=BLOCK_T, COLUMNS=BLOCK_D).to(tl.float32)
        if multiplier is not None:
            e_tile *= multiplier[:, None]
        e_tile = tl.where(filtered[:, None], e_tile, 0.0)
        squares += tl.sum(e_tile * e_tile, 1)
        center = tl.sum(mass[:, None] * e_tile, 0)
        of_mean += tl.sum(center * center, 0)
    spread = tl.sum(mass * squares, 0) - of_mean
    sound = (excess > 0) & (spread > 0) & (excess < float("inf"))
    tl.store(tilts_ptr + block, tl.where(sound, excess / tl.where(spread > 0, spread, 1.0), 0.0))


@triton.jit
def load_risk(of_tokens, tokens, N):
    """Return the upstream gradients of tokens, 0 where the filter computes none, and their masses.

    Args:
        of_tokens: pointers to a, b, target_grad (negative: no filtered gradient) and dropped
            masses, (N,) each.
    """
    a_ptr, b_ptr, target_grad_ptr, mass_ptr = of_tokens
    inside = tokens < N
    filtered = tl.load(target_grad_ptr + tokens, mask=inside, other=-1.0) >= 0
    a = tl.abs(tl.load(a_ptr + tokens, mask=inside, other=0.0))
    b = tl.abs(tl.load(b_ptr + tokens, mask=inside, other=0.0))
    weight = tl.maximum(a, b)
    weight = tl.where(filtered & (weight < float("inf")), weight, 0.0)
    return weight, tl.load(mass_ptr + tokens, mask=inside, other=0.0)


@triton.jit
def sum_risks(of_tokens, N, SCAN: tl.constexpr):
    """Sum the upstream gradients times the dropped masses, and the upstream gradients alone."""
    by_mass = 0.0
    evenly = 0.0
    for start in range(0, N, SCAN):
        weight, mass = load_risk(of_tokens, start + tl.arange(0, SCAN), N)
        by_mass += tl.sum(weight * mass, 0)
        evenly += tl.sum(weight, 0)
    return by_mass, evenly


@triton.jit(do_not_specialize=["dropped_ptr", "N"])
def dropped_mass_kernel(
    a_ptr,  # (N,)
    b_ptr,  # (N,)
    target_grad_ptr,  # (N,) negative for tokens without a filtered gradient
    mass_ptr,  # (N,) dropped probability of each token
    dropped_ptr,  # () int32 out, see Kept.statistics
    N,
    SCAN: tl.constexpr,
):
    """Average the dropped probabilities, weighted by the upstream gradients, in one program."""
    dropped, whole = sum_risks((a_ptr, b_ptr, target_grad_ptr, mass_ptr), N, SCAN)
    mean = tl.minimum(dropped / tl.maximum(whole, 1e-37), 1.0)
    tl.store(dropped_ptr, (mean * DROPPED_UNIT).to(tl.int32))
