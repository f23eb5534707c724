"""Triton kernels of ``kernels.filtered.tail``."""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.triton.filtered.selection import dropped_mass
from cut_cross_entropy.kernels.triton.primitives import (
    ABSENT,
    LN2,
    LOG2E,
    byte_to_value,
    gather_rows,
)


@triton.jit
def tail_product(left, right, total, BF16: tl.constexpr):
    """Add the product of masses with rows or sums of rows, whose range float16 does not have."""
    if BF16:
        total = tl.dot(left.to(tl.bfloat16), right.to(tl.bfloat16), total)
    else:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="tf32")
    return total


@triton.jit
def load_dropped(
    kept,  # pointers to (blocks, V) int16 and (superblocks, V) int64; V and the number of blocks
    superblock,
    classes,  # (R,) ascending, consecutive or nearly
    inside,  # (R,)
    SUPERBLOCK: tl.constexpr,
):
    """Load the dropped masses of some classes in the blocks of one superblock, (SUPERBLOCK, R)."""
    strips_ptr, masks_ptr, V, num_blocks = kept
    bits = tl.arange(0, SUPERBLOCK)
    blocks = superblock * SUPERBLOCK + bits
    here = (blocks < num_blocks)[:, None] & inside[None, :]
    place = blocks.to(tl.int64)[:, None] * V + classes[None, :]
    both = tl.load(strips_ptr + place, mask=here, other=0).to(tl.int32)
    masks = tl.load(masks_ptr + tl.cast(superblock, tl.int64) * V + classes, mask=inside, other=0)
    return byte_to_value(dropped_mass(both, masks[None, :], bits[:, None]))


@triton.jit(do_not_specialize=["first_class", "stop_class", "rows_per_split", "num_blocks"])
def centers_kernel(
    strips_ptr,  # (blocks, V)
    masks_ptr,  # (superblocks, V)
    c_ptr,  # (classes, D) rows from the first class on
    out_ptr,  # (splits, blocks, D) out
    V,
    D,
    first_class,
    stop_class,
    rows_per_split,
    num_blocks,
    BF16: tl.constexpr,
    SUPERBLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum mass times row of c over one split of the classes, for the blocks of a superblock."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    superblock = tl.program_id(2)
    total = tl.zeros((SUPERBLOCK, BLOCK_D), tl.float32)
    first = first_class + split * rows_per_split
    stop = min(stop_class, first + rows_per_split)
    kept = (strips_ptr, masks_ptr, V, num_blocks)
    for start in tl.range(first, stop, BLOCK_R, num_stages=3):
        classes = start + tl.arange(0, BLOCK_R)
        inside = classes < stop
        masses = load_dropped(kept, superblock, classes, inside, SUPERBLOCK)
        rows = gather_rows(c_ptr, classes - first_class, inside, columns, D)
        total = tail_product(masses, rows, total, BF16)
    blocks = superblock * SUPERBLOCK + tl.arange(0, SUPERBLOCK)
    out = out_ptr + (split * tl.num_programs(2) * SUPERBLOCK + blocks).to(tl.int64)[:, None] * D
    tl.store(out + columns[None, :], total, mask=(columns < D)[None, :])


@triton.jit(do_not_specialize=["num_blocks", "num_chunks", "num_splits"])
def finish_centers_kernel(
    sums_ptr,  # (3, num_blocks, chunks) see Kept
    parts_ptr,  # (splits, blocks, D)
    shares_ptr,  # (blocks, 3) out, see Tail
    out_ptr,  # (blocks, D) out
    D,
    num_blocks,
    num_chunks,
    num_splits,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Reduce the splits of one block, and its sums over the chunks."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    block = tl.program_id(1)
    chunks = tl.arange(0, COLUMNS)
    wanted = chunks < tl.where(block < num_blocks, num_chunks, 0)  # blocks beyond are padding
    row = sums_ptr + block * num_chunks + chunks
    mass = tl.sum(tl.load(row, mask=wanted, other=0.0), 0)
    # Masses are not negative: where their sum is 0, so are they. A NaN propagates.
    inverse = tl.where(mass == 0, 0.0, 1.0 / tl.where(mass == 0, 1.0, mass))
    if tl.program_id(0) == 0:
        table = num_blocks * num_chunks
        first = tl.sum(tl.load(row + table, mask=wanted, other=0.0), 0)
        second = tl.sum(tl.load(row + 2 * table, mask=wanted, other=0.0), 0)
        log_mass = tl.log2(tl.where(mass == 0, 1.0, mass))
        mean = first * inverse
        tl.store(shares_ptr + block * 3, inverse)
        tl.store(shares_ptr + block * 3 + 1, (mean - log_mass) * LN2)
        square = second * inverse - log_mass * (2.0 * mean - log_mass)
        tl.store(shares_ptr + block * 3 + 2, square * LN2 * LN2)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for split in range(num_splits):
        part = parts_ptr + (tl.cast(split, tl.int64) * tl.num_programs(1) + block) * D
        total += tl.load(part + columns, mask=columns < D, other=0.0)
    tl.store(out_ptr + block * D + columns, total * inverse, mask=columns < D)


@triton.jit(do_not_specialize=["N", "first_block"])
def tails_kernel(
    tiles_ptr,  # (tiles, BLOCK) mass of each token in the strips of a tile
    first_tile_ptr,  # (blocks of the list + 1,)
    kept_mass_ptr,  # (N,) in, out: mass of a token in its kept strips
    a_ptr,  # (N,)
    eta_ptr,  # (N,), or None
    lse_ptr,  # (N,) log2
    target_grad_ptr,  # (N,) negative for tokens without a filtered gradient
    shares_ptr,  # (blocks, 3) see Tail
    shard_mass_ptr,  # (N,) probability of this shard's classes; None: it has all
    tails_ptr,  # (N,) out
    mass_ptr,  # (N,) out
    first_block,
    N,
    softcap,  # or None
    BLOCK: tl.constexpr,
):
    """Write the weight of each token's tail: its gradient per mass times mass and softcap's slope.

    In the rank-one model a dropped probability is ``mass * share``, so its logarithm is
    ``log(mass) + log(share)`` and its logit higher by ``lse``. The mean of the logarithm, which the
    gradient of an entropy needs, and that of the squared logit have a closed form.
    """
    block = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    tokens = (first_block + block) * BLOCK + lanes
    inside = tokens < N
    kept_mass = tl.load(kept_mass_ptr + tokens, mask=inside, other=1.0)
    first, stop = tl.load(first_tile_ptr + block), tl.load(first_tile_ptr + block + 1)
    for tile in range(first, stop):  # in order, whatever the number of tiles
        kept_mass += tl.load(tiles_ptr + tile * BLOCK + lanes)
    tl.store(kept_mass_ptr + tokens, kept_mass, mask=inside)
    # Not ">= 0": a NaN has to propagate.
    filtered = inside & ~(tl.load(target_grad_ptr + tokens, mask=inside, other=ABSENT) < 0)
    whole = 1.0
    if shard_mass_ptr is not None:
        whole = tl.load(shard_mass_ptr + tokens, mask=inside, other=1.0)
    mass = tl.where(
        filtered, tl.maximum(whole - kept_mass, 0.0, propagate_nan=tl.PropagateNan.ALL), 0.0
    )
    weight = mass
    share = shares_ptr + (first_block + block) * 3
    log_mass = tl.log2(tl.maximum(mass, 1e-30)) / LOG2E
    if softcap is not None:
        lse = tl.load(lse_ptr + tokens, mask=inside & filtered, other=0.0)
        base = lse / LOG2E + log_mass
        square = base * base + 2 * base * tl.load(share + 1) + tl.load(share + 2)
        weight *= tl.minimum(tl.maximum(1.0 - square / (softcap * softcap), 0.0), 1.0)
    a = tl.load(a_ptr + tokens, mask=inside, other=0.0)
    if eta_ptr is not None:
        eta = tl.load(eta_ptr + tokens, mask=inside, other=0.0)
        a += eta * (log_mass + tl.load(share + 1))
    tl.store(tails_ptr + tokens, tl.where(filtered, a * weight, 0.0), mask=inside)
    tl.store(mass_ptr + tokens, mass, mask=inside)


@triton.jit(do_not_specialize=["N"])
def block_sums_kernel(
    tails_ptr,  # (N,) weight of each token's tail
    own_ptr,  # (GROUPS - 1, N) see ClassWeights, like the next; None: all classes are one group
    own_mass_ptr,  # (GROUPS, blocks)
    e_ptr,  # (N, D)
    shares_ptr,  # (blocks, 3)
    sums_ptr,  # (1 or GROUPS, blocks, D) out, in the dtype of the products
    weights_ptr,  # (blocks,) out
    N,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the tokens of one block, weighted by their tails."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    block = tl.program_id(1)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    tails = tl.load(tails_ptr + tokens, mask=tokens < N, other=0.0)
    rows = tl.load(
        e_ptr + tokens.to(tl.int64)[:, None] * D + columns[None, :],
        mask=(tokens < N)[:, None] & (columns < D)[None, :],
        other=0.0,
    )
    inverse = tl.load(shares_ptr + block * 3)
    weights = tails * inverse
    group = tl.program_id(2)
    place = group * tl.num_programs(1) + block
    if tl.program_id(0) == 0:
        tl.store(weights_ptr + block, tl.sum(weights, 0))
    if own_ptr is not None:
        mass = tl.load(own_mass_ptr + place)
        known = tl.where(mass > 0, N, 0)
        own = tl.load(own_ptr + group * N + tokens, mask=tokens < known, other=0.0)
        weights = tl.where(mass > 0, own / tl.where(mass > 0, mass, 1.0), weights)
    total = tl.sum(weights[:, None] * rows.to(tl.float32), 0)
    tl.store(sums_ptr + place * D + columns, total.to(sums_ptr.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=["first_class", "stop_class", "num_superblocks", "num_blocks"])
def tail_bias_kernel(
    strips_ptr,  # (blocks, V)
    masks_ptr,  # (superblocks, V)
    weights_ptr,  # (blocks,) see BlockSums
    kept_ptr,  # (V,) float32 sums over the kept strips
    out_ptr,  # (V,) out
    V,
    first_class,
    stop_class,
    num_superblocks,
    num_blocks,
    SUPERBLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write dbias: the kept strips and the tail."""
    classes = first_class + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = classes < stop_class
    total = tl.load(kept_ptr + classes, mask=inside, other=0.0)
    blocks = tl.arange(0, SUPERBLOCK)
    kept = (strips_ptr, masks_ptr, V, num_blocks)
    for superblock in range(num_superblocks):
        masses = load_dropped(kept, superblock, classes, inside, SUPERBLOCK)
        weights = tl.load(weights_ptr + superblock * SUPERBLOCK + blocks)
        total += tl.sum(masses * weights[:, None], 0)
    tl.store(out_ptr + classes, total.to(out_ptr.dtype.element_ty), mask=inside)
