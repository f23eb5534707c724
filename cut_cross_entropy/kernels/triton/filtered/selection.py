"""Triton kernels of ``kernels.filtered.selection``."""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.triton.primitives import (
    ABSENT,
    BYTE_STEPS,
    FLAT,
    FORCED,
    byte_to_log,
    byte_to_value,
    popcount,
)

# Shares of a class's mass, each 2^(1/4) times the next, from 1 down; of more blocks than EVEN all
# are smaller in proportion.
SHARES = tl.constexpr(16)
EVEN = tl.constexpr(64)
WEIGHTLESS = tl.constexpr(1024)  # weight of a block whose tokens have no gradient
GROUPS = tl.constexpr(3)  # of classes by mass: 0 the least, 1 below the mean, 2 above it
LEAST = tl.constexpr(2.0)  # standard deviations below the mean that the least are
DROPPED_UNIT = tl.constexpr(2.0**20)  # of the dropped probability, counted as an integer


@triton.jit(do_not_specialize=["N", "num_blocks"])
def weigh_blocks_kernel(
    a_ptr,  # (N,)
    b_ptr,  # (N,)
    weights_ptr,  # (blocks,) int32 out: see Kept
    largest_ptr,  # () out: largest absolute value of a and b
    histogram_ptr,  # (256 + SHARES,) int64 out: zeros
    N,
    num_blocks,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compare the largest upstream gradient of each block with that of all, in one program."""
    tl.store(histogram_ptr + tl.arange(0, 256), tl.zeros((256,), tl.int64))
    tl.store(histogram_ptr + 256 + tl.arange(0, SHARES), tl.zeros((SHARES,), tl.int64))
    largest = 0.0
    for start in range(0, num_blocks, ROWS):
        own = largest_of(a_ptr, b_ptr=b_ptr, first_block=start, N=N, BLOCK_T=BLOCK_T, ROWS=ROWS)
        largest = tl.maximum(largest, tl.max(own, 0))
    tl.store(largest_ptr, largest)
    for start in range(0, num_blocks, ROWS):
        own = largest_of(a_ptr, b_ptr=b_ptr, first_block=start, N=N, BLOCK_T=BLOCK_T, ROWS=ROWS)
        ratio = tl.log2(tl.maximum(largest, 1e-37)) - tl.log2(tl.maximum(own, 1e-37))
        # Rounded down: a block may weigh too much, never too little.
        steps = (ratio * (2.0 * BYTE_STEPS)).to(tl.int32)
        steps = tl.where(own > 0, steps, WEIGHTLESS)
        blocks = start + tl.arange(0, ROWS)
        tl.store(weights_ptr + blocks, steps, mask=blocks < num_blocks)


@triton.jit
def largest_of(a_ptr, b_ptr, first_block, N, BLOCK_T: tl.constexpr, ROWS: tl.constexpr):
    """Return the largest finite absolute value of a and b in each of some blocks, (ROWS,)."""
    blocks = first_block + tl.arange(0, ROWS)
    tokens = blocks[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    a = tl.abs(tl.load(a_ptr + tokens, mask=tokens < N, other=0.0))
    b = tl.abs(tl.load(b_ptr + tokens, mask=tokens < N, other=0.0))
    either = tl.maximum(tl.where(a < float("inf"), a, 0.0), tl.where(b < float("inf"), b, 0.0))
    return tl.max(either, 1)


@triton.jit
def weighted(energy, weight):
    """Return energy bytes weighted by the upstream gradient of their block."""
    lighter = tl.maximum(energy - weight, 0)
    return tl.where((energy == FORCED) & (weight < WEIGHTLESS), energy, lighter)


@triton.jit(do_not_specialize=["num_blocks"])
def histogram_kernel(
    strips_ptr,  # (blocks, V) int16
    weights_ptr,  # (blocks,)
    counts_ptr,  # (256,) int64, in, out
    class_mass_ptr,  # (V,) out: log2
    V,
    num_blocks,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the histogram of the weighted energies of a chunk of classes; sum their masses.

    Sums of integers do not depend on their order.
    """
    classes = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    counts = tl.zeros((256,), tl.int32)
    mass = tl.zeros((CHUNK,), tl.float32)
    bins = tl.arange(0, 256)
    outside = 0
    for start in range(0, num_blocks, ROWS):
        blocks = start + tl.arange(0, ROWS)
        here = (blocks < num_blocks)[:, None] & (classes < V)[None, :]
        place = blocks.to(tl.int64)[:, None] * V + classes[None, :]
        both = tl.load(strips_ptr + place, mask=here, other=0).to(tl.int32)
        weights = tl.load(weights_ptr + blocks, mask=blocks < num_blocks, other=0)
        energies = weighted(both & 255, weights[:, None])
        counts += tl.histogram(tl.reshape(energies, (ROWS * CHUNK,)), 256)
        outside += tl.sum(tl.sum((~here).to(tl.int32), 0), 0)
        # Half the weight of an energy.
        scale = tl.exp2(weights.to(tl.float32) * (-0.5 / BYTE_STEPS))
        mass += tl.sum(byte_to_value((both >> 8) & 255) * scale[:, None], 0)
    counts -= tl.where(bins == 0, outside, 0)
    tl.atomic_add(counts_ptr + bins, counts.to(tl.int64), sem="relaxed")
    tl.store(class_mass_ptr + classes, tl.log2(tl.maximum(mass, 1e-37)), mask=classes < V)


@triton.jit(do_not_specialize=["token_counts_ptr", "N", "first", "step", "num_samples"])
def threshold_kernel(
    histogram_ptr,  # (256,) int64
    target_grad_ptr,  # (N,) see BackwardTokens
    class_mass_ptr,  # (V,) log2
    largest_ptr,  # ()
    tolerance,
    max_mass,
    threshold_ptr,  # () out: the first byte that is kept
    most_ptr,  # () out: the same for max_mass alone
    num_kept_ptr,  # () int64 out: strips that are kept for it
    token_counts_ptr,  # (3,) out: dropped probability (0: not known), flat tokens, valid tokens
    mean_mass_ptr,  # () out: of sampled classes
    mass_deviation_ptr,  # () out
    N,
    first,  # sampled class, their distance and number
    step,
    num_samples,
    SAMPLES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the energy below which strips are dropped, and groups of classes, in one program."""
    samples = tl.arange(0, SAMPLES)
    inside = samples < num_samples
    class_mass = tl.load(class_mass_ptr + first + samples * step, mask=inside, other=0.0)
    mean = tl.sum(class_mass, 0) / num_samples
    apart = tl.where(inside, class_mass - mean, 0.0)
    tl.store(mean_mass_ptr, mean)
    tl.store(mass_deviation_ptr, tl.sqrt(tl.sum(apart * apart, 0) / num_samples))
    at_targets = 0.0
    num_flat = 0
    num_tokens = 0
    largest = tl.maximum(tl.load(largest_ptr), 1e-37)
    for start in range(0, N, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        grad = tl.load(target_grad_ptr + tokens, mask=tokens < N, other=ABSENT)
        grad_ratio = grad / largest
        at_targets += tl.sum(tl.where(grad < 0, 0.0, grad_ratio * grad_ratio), 0)  # NaN stays NaN
        num_flat += tl.sum((grad == FLAT).to(tl.int32), 0)
        num_tokens += tl.sum((grad != ABSENT).to(tl.int32), 0)
    bins = tl.arange(0, 256)
    strips = tl.load(histogram_ptr + bins)
    counts = strips.to(tl.float32)
    # Byte 0 is the floor of the scale and FORCED marks a target: neither stands for an energy.
    per_strip = tl.exp2(byte_to_log(bins))
    energy = tl.where((bins == 0) | (bins == FORCED), 0.0, counts * per_strip)
    dropped = tl.cumsum(energy, 0)
    # The bytes are relative to a lower bound of the log-sum-exp, so they overstate; the gradients
    # at the targets do not, and the whole gradient's energy is at least theirs.
    allowed = tolerance * tolerance * at_targets
    # The mass of a strip is at most the root of BLOCK_T times its energy, and that is below what
    # the next byte stands for.
    most = tl.exp2(0.5 * byte_to_log(bins + 0.5))
    mass = tl.cumsum(tl.where(energy > 0, counts * most, 0.0), 0)
    within_mass = mass * tl.sqrt(BLOCK_T * 1.0) <= max_mass * num_tokens
    most = tl.minimum(tl.maximum(tl.sum(within_mass.to(tl.int32), 0), 1), FORCED)
    below = tl.sum(((dropped <= allowed) & within_mass).to(tl.int32), 0)
    threshold = tl.minimum(tl.maximum(below, 1), FORCED)
    tl.store(threshold_ptr, threshold)
    tl.store(most_ptr, most)
    tl.store(num_kept_ptr, tl.sum(tl.where(bins >= threshold, strips, 0), 0))
    tl.store(token_counts_ptr, 0)
    tl.store(token_counts_ptr + 1, num_flat)
    tl.store(token_counts_ptr + 2, num_tokens)


@triton.jit
def share_steps(energy, weighted_energy, weight, class_mass):
    """Return the share of root energy in a mass: steps of 2^(-1/4), 0 for 1 or more."""
    log_energy = byte_to_log(energy) - weight.to(tl.float32) / BYTE_STEPS
    steps = tl.clamp(4.0 * (class_mass - 0.5 * log_energy), 0.0, SHARES - 1.0).to(tl.int32)
    # A strip without energy has the least share.
    return tl.where(weighted_energy > 0, steps, SHARES - 1)


@triton.jit
def even_mass(class_mass_ptr, classes, V, num_blocks):
    """Return the log2 of the masses of classes, in EVEN average blocks if there are more."""
    crowd = tl.log2(num_blocks.to(tl.float32) / EVEN)
    return tl.load(class_mass_ptr + classes, mask=classes < V, other=0.0) - tl.maximum(crowd, 0.0)


@triton.jit(do_not_specialize=["num_blocks"])
def shares_histogram_kernel(
    strips_ptr,  # (blocks, V) int16
    weights_ptr,  # (blocks,)
    class_mass_ptr,  # (V,) log2
    threshold_ptr,  # ()
    counts_ptr,  # (SHARES,) int64, in, out
    V,
    num_blocks,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the histogram of the shares of the strips under the threshold, of a chunk of classes."""
    classes = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    threshold = tl.load(threshold_ptr)
    class_mass = even_mass(class_mass_ptr, classes, V, num_blocks)
    counts = tl.zeros((SHARES,), tl.int32)
    for start in range(0, num_blocks, ROWS):
        blocks = start + tl.arange(0, ROWS)
        here = (blocks < num_blocks)[:, None] & (classes < V)[None, :]
        place = blocks.to(tl.int64)[:, None] * V + classes[None, :]
        energies = tl.load(strips_ptr + place, mask=here, other=0).to(tl.int32) & 255
        weights = tl.load(weights_ptr + blocks, mask=blocks < num_blocks, other=0)[:, None]
        own = weighted(energies, weights)
        steps = share_steps(energies, own, weights, class_mass[None, :])
        # Strips above the threshold go where they do not count.
        steps = tl.where(here & (own < threshold), steps, SHARES - 1)
        counts += tl.histogram(tl.reshape(steps, (ROWS * CHUNK,)), SHARES)
    tl.atomic_add(counts_ptr + tl.arange(0, SHARES), counts.to(tl.int64), sem="relaxed")


@triton.jit
def dropped_mass(strips, masks, blocks):
    """Return the bytes of mass of strips, 0 of those that their class's mask keeps."""
    kept = ((masks >> blocks.to(tl.int64)) & 1) != 0
    return tl.where(kept, 0, (strips >> 8) & 255)


@triton.jit
def class_group(
    masses,  # class_mass_ptr, mean_mass_ptr, mass_deviation_ptr: see Kept
    classes,  # (R,)
    inside,  # (R,)
):
    """Return the groups of some classes, int32; 0 where there is none."""
    class_mass_ptr, mean_mass_ptr, mass_deviation_ptr = masses
    mass = tl.load(class_mass_ptr + classes, mask=inside, other=-float("inf"))
    mean = tl.load(mean_mass_ptr)
    least = mean - LEAST * tl.load(mass_deviation_ptr)
    return (mass >= least).to(tl.int32) + (mass >= mean).to(tl.int32)


@triton.jit
def parts_used(mask, size, PARTS: tl.constexpr):
    """Return which of PARTS about equal parts of ``size`` bits have one set, a bit for each."""
    parts = tl.zeros_like(mask).to(tl.int32)
    for part in tl.static_range(PARTS):
        first = (part * size + (PARTS - 1)) // PARTS
        stop = ((part + 1) * size + (PARTS - 1)) // PARTS
        # The bits below stop, in two steps: at most 63 can be shifted by.
        below = (tl.cast(1, tl.int64) << tl.maximum(stop - 1, 0).to(tl.int64)) * 2 - 1
        used = ((mask & below) >> first.to(tl.int64)) != 0
        parts |= (used & (stop > first)).to(tl.int32) << part
    return parts


@triton.jit
def cluster_key(mask, size):
    """Return a sort key (30 bits) that clusters masks of ``size`` bits with similar blocks.

    From the top: which eighths of the blocks, which sixteenths, and a fold of the blocks (but for
    each seventh) to tell the rest apart. A plain order by mask makes five to seven times the fewest
    possible pairs of tile and block, this one 3.5 to 4.5 (docs/engineering_log.md). The eighths are
    ranked as a Gray code, which is cyclic, starting from "all of them": tiles with most blocks then
    start first.
    """
    every7: tl.constexpr = 0x0204081020408102  # bits 1, 8, 15 and so on
    fold = tl.zeros_like(mask).to(tl.int32)
    for k in tl.static_range(6):
        fold |= ((mask & (every7 << k)) != 0).to(tl.int32) << k
    rank = parts_used(mask, size, PARTS=8)
    rank = rank ^ (rank >> 1)
    rank = rank ^ (rank >> 2)
    rank = rank ^ (rank >> 4)
    rank = (rank - 0xAA) & 0xFF
    return (rank << 22) | (parts_used(mask, size, PARTS=16) << 6) | fold


@triton.jit(do_not_specialize=["active_ptr", "num_blocks", "num_superblocks", "num_chunks"])
def kept_strips_kernel(
    strips_ptr,  # (blocks, V) int16
    weights_ptr,  # (blocks,)
    class_mass_ptr,  # (V,) log2
    mean_mass_ptr,  # ()
    mass_deviation_ptr,  # ()
    threshold_ptr,  # ()
    num_kept_ptr,  # ()
    shares_ptr,  # (SHARES,) see shares_histogram_kernel
    masks_ptr,  # (superblocks, V) int64, out
    keys_ptr,  # (superblocks, V) int32, out
    offsets_ptr,  # (superblocks, V) int32, out: strips in earlier classes of the chunk
    sums_ptr,  # (3, blocks, chunks) out: of w, w log2(w) and w log2(w)^2 over the dropped masses
    counts_ptr,  # (blocks, chunks) int32, out
    active_ptr,  # (superblocks, chunks) int32, out
    V,
    num_blocks,
    num_superblocks,
    num_chunks,
    row_strips,
    SUPERBLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Decide for a chunk of classes which blocks keep them."""
    chunk = tl.program_id(0)
    classes = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = classes < V
    threshold = tl.load(threshold_ptr)
    class_mass = even_mass(class_mass_ptr, classes, V, num_blocks)
    # The largest shares, as many as the limit allows.
    counts = tl.cumsum(tl.load(shares_ptr + tl.arange(0, SHARES)), 0).to(tl.float32)
    most = row_strips * tl.load(num_kept_ptr).to(tl.float32)
    decisive = tl.minimum(tl.sum((counts <= most).to(tl.int32), 0), SHARES - 1)
    masses = (class_mass_ptr, mean_mass_ptr, mass_deviation_ptr)
    rank = GROUPS - 1 - class_group(masses, classes, inside)
    bits_at_once = tl.arange(0, ROWS)
    for superblock in range(num_superblocks):
        mask = tl.zeros((CHUNK,), tl.int64)
        size = min(SUPERBLOCK, num_blocks - superblock * SUPERBLOCK)
        for start in range(0, size, ROWS):
            bits = start + bits_at_once
            blocks = superblock * SUPERBLOCK + bits
            is_block = bits < size
            here = is_block[:, None] & inside[None, :]
            place = blocks.to(tl.int64)[:, None] * V + classes[None, :]
            both = tl.load(strips_ptr + place, mask=here, other=0).to(tl.int32)
            energy = both & 255
            weight = tl.load(weights_ptr + blocks, mask=is_block, other=0)[:, None]
            own = weighted(energy, weight)
            kept = own >= threshold
            kept |= (own > 0) & (share_steps(energy, own, weight, class_mass[None, :]) < decisive)
            kept &= here
            mask += tl.sum(kept.to(tl.int64) << bits.to(tl.int64)[:, None], 0)
            dropped = tl.where(kept, 0, (both >> 8) & 255)
            mass = byte_to_value(dropped)
            log = byte_to_log(dropped)
            row = blocks * num_chunks + chunk
            table = num_blocks * num_chunks
            tl.store(sums_ptr + row, tl.sum(mass, 1), mask=is_block)
            tl.store(sums_ptr + table + row, tl.sum(mass * log, 1), mask=is_block)
            tl.store(sums_ptr + 2 * table + row, tl.sum(mass * log * log, 1), mask=is_block)
            tl.store(counts_ptr + row, tl.sum(kept.to(tl.int32), 1), mask=is_block)
        member = tl.cast(superblock, tl.int64) * V + classes
        tl.store(masks_ptr + member, mask, mask=inside)
        active = mask != 0
        # The two bits of the sign on tell groups apart, and classes that keep no strip.
        key = ((rank - 2) << 30) | cluster_key(mask, size)
        key = tl.where(active, key, (1 << 30) | rank)
        tl.store(keys_ptr + member, key, mask=inside)
        tl.store(active_ptr + superblock * num_chunks + chunk, tl.sum(active.to(tl.int32), 0))
        strips = popcount(mask)
        tl.store(offsets_ptr + member, tl.cumsum(strips, 0) - strips, mask=inside)
