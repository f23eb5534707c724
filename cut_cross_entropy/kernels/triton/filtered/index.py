"""Triton kernels of ``kernels.filtered.index``."""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.triton.primitives import popcount


@triton.jit(
    do_not_specialize=["first_block", "first_chunk", "num_blocks", "num_chunks", "all_chunks"]
)
def index_kernel(
    counts_ptr,  # (all blocks, all chunks) int32
    starts_ptr,  # (blocks, chunks) int32, out
    block_starts_ptr,  # (blocks + 1,) int32, out
    first_tile_ptr,  # (blocks + 1,) int32, out
    chunk_starts_ptr,  # (superblocks, chunks) int32, out; only if WHOLE
    first_block,
    first_chunk,
    num_blocks,
    num_chunks,
    all_chunks,
    WHOLE: tl.constexpr,
    SUPERBLOCK: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write exclusive sums of a rectangle's counts by row, tile and column, in one program.

    ROWS divides SUPERBLOCK.
    """
    chunks = tl.arange(0, COLUMNS)
    wanted = chunks < num_chunks
    strips_before = 0
    tiles_before = 0
    for superblock in range(tl.cdiv(num_blocks, SUPERBLOCK)):
        before_superblock = strips_before
        by_chunk = tl.zeros((COLUMNS,), tl.int32)
        for first in range(
            superblock * SUPERBLOCK, min(num_blocks, (superblock + 1) * SUPERBLOCK), ROWS
        ):
            rows = first + tl.arange(0, ROWS)
            inside = rows < num_blocks
            here = inside[:, None] & wanted[None, :]
            source = (first_block + rows)[:, None] * all_chunks + (first_chunk + chunks)[None, :]
            counts = tl.load(counts_ptr + source, mask=here, other=0)
            sizes = tl.sum(counts, 1)
            tiles = (sizes + (TILE - 1)) // TILE
            block_starts = strips_before + tl.cumsum(sizes, 0) - sizes
            starts = block_starts[:, None] + tl.cumsum(counts, 1) - counts
            tl.store(starts_ptr + rows[:, None] * num_chunks + chunks[None, :], starts, mask=here)
            tl.store(block_starts_ptr + rows, block_starts, mask=inside)
            first_tile = tiles_before + tl.cumsum(tiles, 0) - tiles
            tl.store(first_tile_ptr + rows, first_tile, mask=inside)
            strips_before += tl.sum(sizes, 0)
            tiles_before += tl.sum(tiles, 0)
            by_chunk += tl.sum(counts, 0)
        if WHOLE:
            chunk_starts = before_superblock + tl.cumsum(by_chunk, 0) - by_chunk
            tl.store(chunk_starts_ptr + superblock * num_chunks + chunks, chunk_starts, mask=wanted)
    tl.store(block_starts_ptr + num_blocks, strips_before)
    tl.store(first_tile_ptr + num_blocks, tiles_before)


@triton.jit(
    do_not_specialize=[
        "first_block", "first_chunk", "num_chunks", "all_chunks", "most_strips", "most_tiles"
    ]
)  # fmt: skip
def list_strips_kernel(
    masks_ptr,  # (superblocks, V)
    offsets_ptr,  # (superblocks, V) see Kept; only if BY_CLASS
    chunk_starts_ptr,  # (superblocks, all chunks) see StripIndex; only if BY_CLASS
    starts_ptr,  # (blocks, chunks) see StripIndex, like the two that follow
    block_starts_ptr,  # (blocks + 1,)
    first_tile_ptr,  # (blocks + 1,)
    classes_ptr,  # (K,) out: class of each strip, by block
    slots_ptr,  # (K,) out: slot of each strip
    tile_block_ptr,  # (tiles,) out
    tile_start_ptr,  # (tiles,) out
    V,
    first_block,
    first_chunk,
    num_chunks,
    all_chunks,
    most_strips,  # strips beyond are left out, like tiles
    most_tiles,
    BY_CLASS: tl.constexpr,
    SUPERBLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    TURN: tl.constexpr,
):
    """List the strips of one block and one chunk of classes, in class order."""
    chunk = tl.program_id(0)
    block = tl.program_id(1)
    classes = (first_chunk + chunk) * CHUNK + tl.arange(0, CHUNK)
    inside = classes < V
    bit = (first_block + block) % SUPERBLOCK
    superblock = (first_block + block) // SUPERBLOCK
    row = superblock.to(tl.int64) * V
    mask = tl.load(masks_ptr + row + classes, mask=inside, other=0)
    kept = ((mask >> bit) & 1) != 0
    position = tl.load(starts_ptr + block * num_chunks + chunk)
    position += tl.cumsum(kept.to(tl.int32), 0) - 1
    # Counts beyond 2^31 wrap around: the host refuses so many strips after the lists are made.
    kept = kept & (position >= 0) & (position < most_strips)
    tl.store(classes_ptr + position, classes, mask=kept)
    if BY_CLASS:
        one = tl.full((CHUNK,), 1, tl.int64)
        # After the strips of earlier superblocks and of earlier chunks of the rectangle.
        starts = chunk_starts_ptr + superblock * all_chunks + first_chunk
        slot = tl.load(block_starts_ptr + superblock * SUPERBLOCK - first_block)
        slot += tl.load(starts + chunk) - tl.load(starts)
        slot += tl.load(offsets_ptr + row + classes, mask=kept, other=0)
        slot += popcount(mask & ((one << bit) - 1))
    else:
        slot = position
    tl.store(slots_ptr + position, slot, mask=kept)
    if chunk == 0:
        # Tiles of some blocks take turns, each block at its own pace: those that are computed at a
        # time read about the same rows of c, from the L2 cache.
        count = tl.load(first_tile_ptr + block + 1) - tl.load(first_tile_ptr + block)
        start = tl.load(block_starts_ptr + block)
        first_of_turn = block // TURN * TURN
        first = tl.load(first_tile_ptr + first_of_turn)
        for i in range(0, count, CHUNK):
            tile = i + tl.arange(0, CHUNK)
            place = tl.zeros((CHUNK,), tl.int64) + first
            for other in range(first_of_turn, min(first_of_turn + TURN, tl.num_programs(1))):
                size = tl.load(first_tile_ptr + other + 1) - tl.load(first_tile_ptr + other)
                # Tiles k of the other block with (k + 1/2) / size below the own; of earlier blocks
                # those at the same place as well.
                scaled = (2 * tile + 1).to(tl.int64) * size
                scaled = tl.maximum(scaled - (other >= block).to(tl.int32), 0)
                place += (scaled // count + 1) // 2
            inside = (tile < count) & (place < most_tiles)
            tl.store(tile_block_ptr + place, block + tile * 0, mask=inside)
            tl.store(tile_start_ptr + place, start + tile * TILE, mask=inside)
