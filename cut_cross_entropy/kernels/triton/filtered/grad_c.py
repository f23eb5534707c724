"""Triton kernels of ``kernels.filtered.grad_c``."""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.triton.filtered.flat import add_flat
from cut_cross_entropy.kernels.triton.filtered.partial_sums import load_sums, store_sums
from cut_cross_entropy.kernels.triton.filtered.selection import class_group, dropped_mass
from cut_cross_entropy.kernels.triton.filtered.tail import load_dropped, tail_product
from cut_cross_entropy.kernels.triton.primitives import (
    byte_to_value,
    gather_rows,
    load_rows,
    popcount,
)


@triton.jit
def either(a, b):
    """Return the bits of both."""
    return a | b


@triton.jit
def tail_of(
    sums,  # block_sums_ptr, and how far apart its groups are
    masses,  # see class_group, like all that follow
    classes,
    inside,
):
    """Return the sums of blocks (blocks, D) of the group of a tile; of several, the highest."""
    block_sums_ptr, stride = sums
    return block_sums_ptr + tl.max(class_group(masses, classes, inside), 0) * stride


# Rows of tables are aligned for some superblocks and not for others.
_UNALIGNED = ["order_ptr", "masks_ptr", "offsets_ptr", "chunk_starts_ptr"]


@triton.jit(
    do_not_specialize=[
        "num_listed", "N", "first_block", "first_slot", "first_class", "has_sums", "num_flat_ptr",
        *_UNALIGNED,
    ]
)  # fmt: skip
def grad_c_kernel(
    grad_ptr,  # (K, BLOCK_T) scaled logit gradients, by slot
    e,  # (N, D)
    order_ptr,  # (classes,) of the superblock, like the three that follow
    masks_ptr,  # (V,)
    offsets_ptr,  # (V,) see Kept
    chunk_starts_ptr,  # (chunks,) slot of a chunk's first strip
    scale_ptr,  # ()
    dropped_ptr,  # (classes, SUPERBLOCK) see list_dropped; unused if PARTIAL, like the next
    block_sums_ptr,  # (GROUPS, SUPERBLOCK, D) see BlockSums
    class_mass_ptr,  # (V,) see class_group, like the two that follow
    mean_mass_ptr,  # ()
    mass_deviation_ptr,  # ()
    flat_grads_ptr,  # see add_flat, like the next; None if PARTIAL or without flat tokens
    flat_rows_ptr,
    out_ptr,  # (V, D), out; sums or their upper bits (int16), in and out, if PARTIAL
    low_ptr,  # the next bits of the sums, in and out, see load_sums; only if LOW_BITS
    num_listed,
    N,
    V,
    D,
    first_block,
    first_slot,
    first_class,
    stride_out,
    stride_sums,
    has_sums,
    num_flat_ptr,
    flat_stride,
    PARTIAL: tl.constexpr,
    LOW_BITS: tl.constexpr,
    BF16: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUPERBLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write BLOCK_N features of dC for one tile of classes and one superblock."""
    column = tl.program_id(0) * BLOCK_N
    positions = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = positions < num_listed
    classes = tl.load(order_ptr + positions, mask=inside, other=0)
    masks = tl.load(masks_ptr + classes, mask=inside, other=0)
    # The blocks that some of the classes keep, taken off one by one: a load from a list of them
    # would have to end before those that it decides on can start.
    left = tl.reduce(masks, 0, either)
    if left == 0:  # no class keeps a strip
        return
    if not PARTIAL:
        masses_of = (class_mass_ptr, mean_mass_ptr, mass_deviation_ptr)
        sums_ptr = tail_of((block_sums_ptr, stride_sums), masses_of, classes, inside)
    columns = column + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    if not PARTIAL:  # at the end of a tile registers would be spilled for them
        cells = (classes, columns, inside)
        total = add_flat(
            total, flat_grads_ptr, flat_rows_ptr, num_flat_ptr, cells, stride=flat_stride, D=D
        )
    lanes = tl.arange(0, BLOCK_K)
    parts: tl.constexpr = BLOCK_T // BLOCK_K
    # Slots of a class are in the order of its blocks, which is that of the loop.
    slot = tl.load(chunk_starts_ptr + classes // CHUNK, mask=inside, other=0) - first_slot
    slot += tl.load(offsets_ptr + classes, mask=inside, other=0)
    for i in range(popcount(left) * parts):
        bit = popcount((left & -left) - 1)
        kept = ((masks >> bit.to(tl.int64)) & 1) != 0
        part = i % parts
        # 32 bits reach: the stored strips are bounded in bytes
        grads = tl.load(
            grad_ptr + (slot * BLOCK_T + part * BLOCK_K)[:, None] + lanes[None, :],
            mask=kept[:, None],
            other=0.0,
        )
        token = (first_block + bit) * BLOCK_T + part * BLOCK_K
        e_tile = load_rows(e, token, N, column, D, ROWS=BLOCK_K, COLUMNS=BLOCK_N)
        total = tl.dot(grads, e_tile, total, input_precision="ieee")
        is_last = part == parts - 1
        slot += (kept & is_last).to(tl.int32)
        left = tl.where(is_last, left & (left - 1), left)
    if PARTIAL:
        table = (first_class, D, stride_out)
        if has_sums:
            total += load_sums(
                out_ptr, low_ptr, (classes, columns, inside), table, LOW_BITS=LOW_BITS
            )
        store_sums(out_ptr, low_ptr, total, (classes, column, inside), table, LOW_BITS=LOW_BITS)
    else:
        blocks = tl.arange(0, SUPERBLOCK)
        dropped = dropped_ptr + positions[:, None] * SUPERBLOCK + blocks[None, :]
        masses = byte_to_value(tl.load(dropped, mask=inside[:, None], other=0))
        block_sums = gather_rows(sums_ptr, blocks, blocks >= 0, columns, D)
        total = tail_product(masses, block_sums, total / tl.load(scale_ptr), BF16)
        here = inside[:, None] & (columns < D)[None, :]
        rows = classes.to(tl.int64)[:, None] * stride_out + columns[None, :]
        tl.store(out_ptr + rows, total.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["order_ptr", "num_listed", "num_blocks"])
def list_dropped_kernel(
    order_ptr,  # (classes,)
    strips_ptr,  # (blocks, V)
    masks_ptr,  # (V,)
    out_ptr,  # (classes, SUPERBLOCK) uint8 out
    num_listed,
    V,
    num_blocks,
    SUPERBLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """List the masses of the dropped strips of some classes, in the only superblock.

    Where BLOCK_R classes keep no strip, nothing is written.
    """
    positions = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = positions < num_listed
    classes = tl.load(order_ptr + positions, mask=inside, other=0)
    masks = tl.load(masks_ptr + classes, mask=inside, other=0)
    if tl.reduce(masks, 0, either) == 0:
        return
    blocks = tl.arange(0, SUPERBLOCK)
    strips = tl.load(
        strips_ptr + blocks.to(tl.int64)[None, :] * V + classes[:, None],
        mask=inside[:, None] & (blocks < num_blocks)[None, :],
        other=0,
    ).to(tl.int32)
    dropped = dropped_mass(strips, masks[:, None], blocks[None, :])
    out = out_ptr + positions[:, None] * SUPERBLOCK + blocks[None, :]
    tl.store(out, dropped.to(tl.uint8), mask=inside[:, None])


@triton.jit(
    do_not_specialize=[
        "order_ptr", "num_rows", "first_class", "num_superblocks", "num_blocks", "num_flat_ptr",
    ]
)  # fmt: skip
def tail_rows_kernel(
    high_ptr,  # (V, D) sums or their upper bits, in the memory of dC; only if SUMS
    low_ptr,  # the next bits of the sums, see load_sums; only if LOW_BITS
    scale_ptr,  # (); only if SUMS or with flat tokens
    order_ptr,  # (rows,) classes
    strips_ptr,  # (blocks, V)
    masks_ptr,  # (superblocks, V)
    block_sums_ptr,  # (GROUPS, blocks, D) see BlockSums
    class_mass_ptr,  # (V,) see class_group, like the two that follow
    mean_mass_ptr,  # ()
    mass_deviation_ptr,  # ()
    flat_grads_ptr,  # see add_flat, like the next; None without flat tokens
    flat_rows_ptr,
    out_ptr,  # (V, D)
    num_rows,
    V,
    D,
    first_class,
    num_superblocks,
    num_blocks,
    stride_out,
    stride_sums,
    num_flat_ptr,
    flat_stride,
    SUMS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    BF16: tl.constexpr,
    SUPERBLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write rows of the tail: alone for classes that keep no strip, else added to their sums.

    With sums a program writes BLOCK_D columns, without, all of them.
    """
    positions = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = positions < num_rows
    classes = tl.load(order_ptr + positions, mask=inside, other=0).to(tl.int32)
    all_sums = (block_sums_ptr, stride_sums)
    masses_of = (class_mass_ptr, mean_mass_ptr, mass_deviation_ptr)
    rows = classes.to(tl.int64)[:, None] * stride_out
    kept = (strips_ptr, masks_ptr, V, num_blocks)
    if SUMS:
        columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
        values = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        sums_ptr = tail_of(all_sums, masses_of, classes, inside)
        for superblock in range(num_superblocks):
            masses = load_dropped(kept, superblock, classes, inside, SUPERBLOCK)
            blocks = superblock * SUPERBLOCK + tl.arange(0, SUPERBLOCK)
            block_sums = gather_rows(sums_ptr, blocks, blocks >= 0, columns, D)
            values = tail_product(masses.T, block_sums, values, BF16)
        table = (first_class, D, stride_out)
        cells = (classes, columns, inside)
        sums = load_sums(high_ptr, low_ptr, cells, table, LOW_BITS=LOW_BITS)
        if flat_grads_ptr is not None:
            # Sums that other instructions have written would serialise the products.
            sums += add_flat(
                tl.zeros((BLOCK_R, BLOCK_D), tl.float32),
                flat_grads_ptr,
                flat_rows_ptr,
                num_flat_ptr,
                cells,
                stride=flat_stride,
                D=D,
            )
        values += sums / tl.load(scale_ptr)
        here = inside[:, None] & (columns < D)[None, :]
        out = out_ptr + rows + columns[None, :]
        tl.store(out, values.to(out_ptr.dtype.element_ty), mask=here)
    else:
        idle = inside & (tl.load(masks_ptr + classes, mask=inside, other=1) == 0)
        if tl.max(idle.to(tl.int32), 0) == 0:
            return
        sums_ptr = tail_of(all_sums, masses_of, classes, idle)
        masses = load_dropped(kept, 0, classes, idle, SUPERBLOCK).T
        blocks = tl.arange(0, SUPERBLOCK)
        for start in range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            block_sums = gather_rows(sums_ptr, blocks, blocks >= 0, columns, D)
            values = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
            if flat_grads_ptr is not None:
                cells = (classes, columns, idle)
                values = add_flat(
                    values,
                    flat_grads_ptr,
                    flat_rows_ptr,
                    num_flat_ptr,
                    cells,
                    stride=flat_stride,
                    D=D,
                )
                values /= tl.load(scale_ptr)
            values = tail_product(masses, block_sums, values, BF16)
            here = idle[:, None] & (columns < D)[None, :]
            out = out_ptr + rows + columns[None, :]
            tl.store(out, values.to(out_ptr.dtype.element_ty), mask=here)
