"""Index of the kept strips, like a sparse matrix's: lists by block, storage slots by class.

dE reads the strips of a block, so they are listed by block. dC reads those of a class in a
superblock, so their gradients are stored by superblock and class: the position of a gradient is its
strip's *slot*. The host needs a few of the counts; it reads them while the device continues. Shape
legend: ``cut_cross_entropy.kernels``.
"""

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T, SUPERBLOCK
from cut_cross_entropy.kernels.filtered.selection import CHUNK, Kept
from cut_cross_entropy.kernels.launch import (
    HostCopy,
    aligned_rows,
    launch,
    next_power_of_2,
    pointers,
)
from cut_cross_entropy.kernels.primitives import popcount

TILE = 128  # strips whose logits are recomputed together
TURN = 16  # blocks whose tiles take turns
COUNTS_AT_ONCE = 4096  # counts per step of the scan
# Elements per sum on the host. PyTorch wakes its threads for twice as many, and the device then
# waited 20 to 60 ms for them in every step of 65,536 tokens.
SERIAL = 16384

Range = tuple[int, int]
"""First index and the index after the last."""


@dataclass(frozen=True)
class Rectangle:
    """Strips that are stored together: some blocks of tokens times some chunks of classes.

    Args:
        blocks: range of blocks; of whole superblocks if ``by_class``.
        chunks: range of chunks of CHUNK classes.
        by_class: whether slots are numbered by superblock and class, or by block.
    """

    blocks: Range
    chunks: Range
    by_class: bool

    @property
    def superblocks(self) -> Range:
        """Range of the superblocks of its blocks."""
        return self.blocks[0] // SUPERBLOCK, -(-self.blocks[1] // SUPERBLOCK)


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


@dataclass(frozen=True)
class StripIndex:
    """Position of the strips of a rectangle in its list and in storage, on the device.

    Args:
        starts: (blocks, chunks) int32 position in the list of the first strip of a block and chunk.
        block_starts: (blocks + 1,) int32 position where a block's strips begin.
        first_tile: (blocks + 1,) int32 index of a block's first tile of TILE strips.
        chunk_starts: (superblocks, chunks) int32 slot of the first strip that a chunk keeps in a
            superblock, if all strips are stored.
    """

    starts: Tensor
    block_starts: Tensor
    first_tile: Tensor
    chunk_starts: Tensor


def index_strips(
    kept: Kept, rectangle: Rectangle | None = None, whole: StripIndex | None = None
) -> StripIndex:
    """Index the strips of a rectangle, without waiting for the device.

    Without a rectangle all strips are indexed; with one, ``whole`` is their index.
    """
    blocks, chunks = (0, kept.shape[0]), (0, kept.shape[1])
    if rectangle is not None:
        blocks, chunks = rectangle.blocks, rectangle.chunks
    num_blocks, num_chunks = blocks[1] - blocks[0], chunks[1] - chunks[0]
    device = kept.masks.device
    starts = torch.empty((num_blocks, num_chunks), dtype=torch.int32, device=device)
    block_starts, first_tile = aligned_rows(2, num_blocks + 1, torch.int32, device)
    if whole is None:
        shape = (kept.num_superblocks, num_chunks)
        chunk_starts = torch.empty(shape, dtype=torch.int32, device=device)
    else:
        chunk_starts = whole.chunk_starts
    columns = next_power_of_2(num_chunks)
    launch(
        index_kernel,
        (1,),
        counts_ptr=kept.statistics,
        starts_ptr=starts,
        block_starts_ptr=block_starts,
        first_tile_ptr=first_tile,
        chunk_starts_ptr=chunk_starts,
        first_block=blocks[0],
        first_chunk=chunks[0],
        num_blocks=num_blocks,
        num_chunks=num_chunks,
        all_chunks=kept.shape[1],
        WHOLE=whole is None,
        SUPERBLOCK=SUPERBLOCK,
        TILE=TILE,
        ROWS=min(SUPERBLOCK, max(1, COUNTS_AT_ONCE // columns)),
        COLUMNS=columns,
        num_warps=8,
    )
    return StripIndex(starts, block_starts, first_tile, chunk_starts)


class Counts:
    """Numbers of kept strips, on the host.

    Made before the device has computed them; reading the first attribute waits for it.
    """

    def __init__(self, kept: Kept) -> None:
        self._shape, statistics = kept.shape, kept.statistics
        if statistics.is_meta:  # shapes without values: every chunk keeps a strip in every block
            statistics = torch.ones(statistics.shape, dtype=statistics.dtype)
            statistics[-2], statistics[-1] = 0, BLOCK_T * kept.shape[0]
        self._copy = HostCopy(statistics)

    @functools.cached_property
    def _parts(self) -> tuple[Tensor, ...]:
        values = self._copy.wait()
        num_blocks, num_chunks = self._shape
        strips = num_blocks * num_chunks
        return tuple(values.split([strips, values.shape[0] - strips - 2, 2]))

    @functools.cached_property
    def strips(self) -> Tensor:
        """(blocks, chunks) int32 kept strips."""
        return self._parts[0].view(self._shape)

    @functools.cached_property
    def by_block(self) -> list[int]:
        """Kept strips of each block."""
        return _row_sums(self.strips)

    @functools.cached_property
    def by_chunk(self) -> list[list[int]]:
        """Kept strips of each chunk of classes in each superblock: (superblocks, chunks)."""
        return [_column_sums(rows) for rows in self.strips.split(SUPERBLOCK)]

    def within(self, rectangle: Rectangle) -> list[int]:
        """Return the kept strips of each block of a rectangle."""
        if (rectangle.blocks, rectangle.chunks) == ((0, self._shape[0]), (0, self._shape[1])):
            return self.by_block
        return _row_sums(self.strips[slice(*rectangle.blocks), slice(*rectangle.chunks)])

    def rectangle(self, superblocks: Range, chunks: Range) -> Rectangle:
        """Return the rectangle of a range of superblocks and of chunks, stored by class."""
        first, stop = superblocks[0] * SUPERBLOCK, superblocks[1] * SUPERBLOCK
        return Rectangle((first, min(self._shape[0], stop)), chunks, by_class=True)

    def first_slot(self, superblock: int, stored: Rectangle) -> int:
        """Return the offset that converts a slot among all strips into one within a rectangle."""
        first, chunks = stored.superblocks[0], stored.chunks
        before = sum(map(sum, self.by_chunk[:superblock]))
        before += sum(self.by_chunk[superblock][: chunks[0]])
        return before - sum(sum(row[slice(*chunks)]) for row in self.by_chunk[first:superblock])

    @functools.cached_property
    def _active_by_chunk(self) -> list[list[int]]:
        return list(self._parts[1].view(-1, self._shape[1]).tolist())

    def active(self, superblock: int, chunks: Range) -> int:
        """Return the number of classes in a range of chunks that keep a strip in a superblock."""
        return sum(self._active_by_chunk[superblock][slice(*chunks)])

    @functools.cached_property
    def flat_tokens(self) -> int:
        """Tokens whose distribution is flat."""
        return int(self._parts[2][0])

    @functools.cached_property
    def tokens(self) -> int:
        """Valid tokens."""
        return int(self._parts[2][1])


def _row_sums(table: Tensor) -> list[int]:
    return [total for part in _serial_parts(table) for total in part.sum(1).tolist()]


def _column_sums(table: Tensor) -> list[int]:
    parts = [part.sum(0) for part in _serial_parts(table)]
    return list(functools.reduce(torch.add, parts).tolist())


def _serial_parts(table: Tensor) -> tuple[Tensor, ...]:
    """Split rows into parts small enough that PyTorch sums them in the calling thread."""
    return tuple(table.split(max(1, SERIAL // max(1, table.shape[1]))))


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


@dataclass(frozen=True)
class StripList:
    """Kept strips of a rectangle, by block.

    Args:
        classes: (K,) int32 class of each strip.
        slots: (K,) int32 row of each strip's logit gradient.
        tile_block: (tiles,) int32 block of each tile of TILE strips, counted within the rectangle,
            in the order in which tiles are computed.
        tile_start: (tiles,) int32 first strip of each tile.
        index: index of the rectangle.
        rectangle: blocks and chunks of the strips.
    """

    classes: Tensor
    slots: Tensor
    tile_block: Tensor
    tile_start: Tensor
    index: StripIndex
    rectangle: Rectangle

    @property
    def first_block(self) -> int:
        """First block of the rectangle."""
        return self.rectangle.blocks[0]

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the rectangle."""
        return self.rectangle.blocks[1] - self.rectangle.blocks[0]


def list_ahead(kept: Kept, whole: StripIndex, most_strips: int) -> StripList:
    """List all strips by class before the host knows how many they are.

    ``whole`` is their index. Of more than ``most_strips`` the list is not complete.
    """
    num_blocks, num_chunks = kept.shape
    everything = Rectangle((0, num_blocks), (0, num_chunks), by_class=True)
    most_strips = min(most_strips, num_blocks * kept.masks.shape[1])
    return _list(kept, whole, everything, most_strips, num_blocks + most_strips // TILE)


def list_strips(
    kept: Kept,
    counts: Counts,
    whole: StripIndex,
    rectangle: Rectangle,
    ahead: StripList | None = None,
) -> StripList:
    """List the strips of a rectangle; ``whole`` is the index of all strips.

    Slots count from 0, in the order that the rectangle asks for. ``ahead``, from
    :func:`list_ahead`, is taken if it is complete and the rectangle is that of all strips.
    """
    sizes = counts.within(rectangle)
    num_strips, num_tiles = sum(sizes), sum(-(-size // TILE) for size in sizes)
    if ahead is not None and rectangle == ahead.rectangle and num_strips <= len(ahead.classes):
        return replace(
            ahead,
            classes=ahead.classes[:num_strips],
            slots=ahead.slots[:num_strips],
            tile_block=ahead.tile_block[:num_tiles],
            tile_start=ahead.tile_start[:num_tiles],
        )
    blocks, chunks = rectangle.blocks, rectangle.chunks
    index = whole
    if (blocks[1] - blocks[0], chunks[1] - chunks[0]) != kept.shape:
        index = index_strips(kept, rectangle, whole)
    return _list(kept, index, rectangle, num_strips, num_tiles)


def _list(
    kept: Kept, index: StripIndex, rectangle: Rectangle, num_strips: int, num_tiles: int
) -> StripList:
    """List at most so many strips and tiles of a rectangle, whose index is given."""
    device = kept.masks.device
    blocks, chunks = rectangle.blocks, rectangle.chunks
    num_blocks, num_chunks = blocks[1] - blocks[0], chunks[1] - chunks[0]
    classes, slots = aligned_rows(2, num_strips, torch.int32, device)
    tile_block, tile_start = aligned_rows(2, num_tiles, torch.int32, device)
    listed = StripList(
        classes=classes,
        slots=slots,
        tile_block=tile_block,
        tile_start=tile_start,
        index=index,
        rectangle=rectangle,
    )
    if num_strips:
        launch(
            list_strips_kernel,
            (num_chunks, num_blocks),
            **pointers(kept, "masks offsets"),
            **pointers(index, "chunk_starts starts block_starts first_tile"),
            **pointers(listed, "classes slots tile_block tile_start"),
            V=kept.masks.shape[1],
            first_block=blocks[0],
            first_chunk=chunks[0],
            num_chunks=num_chunks,
            all_chunks=kept.shape[1],
            most_strips=num_strips,
            most_tiles=num_tiles,
            BY_CLASS=rectangle.by_class,
            SUPERBLOCK=SUPERBLOCK,
            CHUNK=CHUNK,
            TILE=TILE,
            TURN=TURN,
        )
    return listed
