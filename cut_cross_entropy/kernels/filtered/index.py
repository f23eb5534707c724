"""Index of the kept strips, like a sparse matrix's: lists by block, storage slots by class.

dE reads the strips of a block, so they are listed by block. dC reads those of a class in a
superblock, so their gradients are stored by superblock and class: the position of a gradient is its
strip's *slot*. The host needs a few of the counts; it reads them while the device continues. Shape
legend: ``cut_cross_entropy.kernels``.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T, SUPERBLOCK
from cut_cross_entropy.kernels.filtered.selection import CHUNK, Kept
from cut_cross_entropy.kernels.launch import (
    HostCopy,
    aligned_rows,
    launch,
    next_power_of_2,
    planned_drops_much,
    planned_flat_tokens,
    pointers,
)
from cut_cross_entropy.kernels.triton.filtered.index import index_kernel, list_strips_kernel
from cut_cross_entropy.kernels.triton.filtered.selection import DROPPED_UNIT

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
            statistics[-3] = DROPPED_UNIT.value * planned_drops_much()
            statistics[-2] = planned_flat_tokens()
            statistics[-1] = BLOCK_T * kept.shape[0]
        self._copy = HostCopy(statistics)

    @functools.cached_property
    def _parts(self) -> tuple[Tensor, ...]:
        values = self._copy.wait()
        num_blocks, num_chunks = self._shape
        strips = num_blocks * num_chunks
        return tuple(values.split([strips, values.shape[0] - strips - 3, 3]))

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
        return int(self._parts[2][1])

    @functools.cached_property
    def tokens(self) -> int:
        """Valid tokens."""
        return int(self._parts[2][2])

    @functools.cached_property
    def dropped_mass(self) -> float:
        """Probability that a token drops, in the mean: an estimate; 0 if there is none."""
        return float(self._parts[2][0]) / float(DROPPED_UNIT.value)


def _row_sums(table: Tensor) -> list[int]:
    return [total for part in _serial_parts(table) for total in part.sum(1).tolist()]


def _column_sums(table: Tensor) -> list[int]:
    parts = [part.sum(0) for part in _serial_parts(table)]
    return list(functools.reduce(torch.add, parts).tolist())


def _serial_parts(table: Tensor) -> tuple[Tensor, ...]:
    """Split rows into parts small enough that PyTorch sums them in the calling thread."""
    return tuple(table.split(max(1, SERIAL // max(1, table.shape[1]))))


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
