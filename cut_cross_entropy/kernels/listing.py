"""Where the kept strips are stored and who computes them: lists by block, numbers by class.

dE walks the strips of a block, so they are listed by block; dC walks those of a class in a group of
blocks, so they are stored by group and class. The host needs a few of the counts; it reads them
while the device goes on. Shape legend: ``cut_cross_entropy.kernels``.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.buffers import aligned_rows
from cut_cross_entropy.kernels.host_copy import HostCopy
from cut_cross_entropy.kernels.launch import launch
from cut_cross_entropy.kernels.primitives import popcount
from cut_cross_entropy.kernels.selection import CHUNK, GROUP, Kept

TILE = 128  # strips whose logits are made again together
COUNTS_AT_ONCE = 4096  # counts that one step of the scan holds
# Elements of a sum on the host. PyTorch wakes its threads for twice as many, and the device then
# waited 20 to 60 ms for them in every step of 65,536 tokens.
SERIAL = 16384


@triton.jit(
    do_not_specialize=["first_block", "first_chunk", "num_blocks", "num_chunks", "all_chunks"]
)
def places_kernel(
    counts_ptr,  # (all blocks, all chunks) int32
    sums_ptr,  # (3, chunks) of w, w log(w) and w log(w)^2; only if WHOLE
    starts_ptr,  # (blocks, chunks) int32, out
    block_starts_ptr,  # (blocks + 1,) int32, out
    first_tile_ptr,  # (blocks + 1,) int32, out
    chunk_starts_ptr,  # (groups, chunks) int32, out; only if WHOLE
    tail_ptr,  # (3,) out: 1 / W, means of log(share) and of its square; only if WHOLE
    first_block,
    first_chunk,
    num_blocks,
    num_chunks,
    all_chunks,
    WHOLE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: exclusive sums of the counts of a rectangle, by row, by tile and by column.

    ROWS divides GROUP.
    """
    chunks = tl.arange(0, COLUMNS)
    wanted = chunks < num_chunks
    strips_before = 0
    tiles_before = 0
    for group in range(tl.cdiv(num_blocks, GROUP)):
        before_group = strips_before
        by_chunk = tl.zeros((COLUMNS,), tl.int32)
        for first in range(group * GROUP, min(num_blocks, (group + 1) * GROUP), ROWS):
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
            chunk_starts = before_group + tl.cumsum(by_chunk, 0) - by_chunk
            tl.store(chunk_starts_ptr + group * num_chunks + chunks, chunk_starts, mask=wanted)
    tl.store(block_starts_ptr + num_blocks, strips_before)
    tl.store(first_tile_ptr + num_blocks, tiles_before)
    if WHOLE:
        total = tl.sum(tl.load(sums_ptr + chunks, mask=wanted, other=0.0), 0)
        first_moment = tl.sum(tl.load(sums_ptr + num_chunks + chunks, mask=wanted, other=0.0), 0)
        second = tl.sum(tl.load(sums_ptr + 2 * num_chunks + chunks, mask=wanted, other=0.0), 0)
        # Weights are non-negative: where their sum is 0, so are they. A NaN goes on.
        inverse = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
        log_total = tl.log(tl.where(total == 0, 1.0, total))
        mean = first_moment * inverse
        tl.store(tail_ptr, inverse)
        tl.store(tail_ptr + 1, mean - log_total)
        tl.store(tail_ptr + 2, second * inverse - log_total * (2.0 * mean - log_total))


@dataclass(frozen=True)
class Places:
    """Where the strips of a rectangle of blocks and class chunks go, on the device.

    Args:
        starts: (blocks, chunks) int32: place of the first strip in the list.
        block_starts: (blocks + 1,) int32: where each block's strips begin.
        first_tile: (blocks + 1,) int32: where each block's tiles of TILE strips begin.
        chunk_starts: (groups, chunks) int32: number of the first strip that each chunk of classes
            keeps in each group of blocks.
        tail: (3,) float32: 1 / sum of the dropped weights, and the mean of log(share) and of its
            square, where the share of a class is its part of that sum.
    """

    starts: Tensor
    block_starts: Tensor
    first_tile: Tensor
    chunk_starts: Tensor
    tail: Tensor


def find_places(
    kept: Kept,
    blocks: tuple[int, int] | None = None,
    chunks: tuple[int, int] | None = None,
    whole: Places | None = None,
) -> Places:
    """Where the strips of a range of blocks and of class chunks go; does not wait.

    Without ranges it is about all strips; with, ``whole`` says what concerns all of them.
    """
    blocks, chunks = blocks or (0, kept.shape[0]), chunks or (0, kept.shape[1])
    num_blocks, num_chunks = blocks[1] - blocks[0], chunks[1] - chunks[0]
    num_groups, device = kept.masks.shape[0], kept.masks.device
    starts = torch.empty((num_blocks, num_chunks), dtype=torch.int32, device=device)
    block_starts, first_tile = aligned_rows(2, num_blocks + 1, torch.int32, device)
    columns = triton.next_power_of_2(num_chunks)
    places = Places(
        starts,
        block_starts,
        first_tile,
        torch.empty((num_groups, num_chunks), dtype=torch.int32, device=device)
        if whole is None
        else whole.chunk_starts,
        torch.empty(3, dtype=torch.float32, device=device) if whole is None else whole.tail,
    )
    launch(
        places_kernel,
        (1,),
        kept.statistics,
        kept.sums,
        starts,
        block_starts,
        first_tile,
        places.chunk_starts,
        places.tail,
        blocks[0],
        chunks[0],
        num_blocks,
        num_chunks,
        kept.shape[1],
        WHOLE=whole is None,
        GROUP=GROUP,
        TILE=TILE,
        ROWS=min(GROUP, max(1, COUNTS_AT_ONCE // columns)),
        COLUMNS=columns,
        num_warps=8,
    )
    return places


class Counts:
    """How much is kept where, on the host.

    Made before the device is done; the first attribute that is asked for waits for it.
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
        """(blocks, chunks) int32: kept strips."""
        return self._parts[0].view(self._shape)

    @functools.cached_property
    def by_block(self) -> list[int]:
        """Kept strips of each block."""
        return _row_sums(self.strips)

    @functools.cached_property
    def by_chunk(self) -> list[list[int]]:
        """Kept strips of each chunk of classes in each group of blocks: (groups, chunks)."""
        return [_column_sums(group) for group in self.strips.split(GROUP)]

    def in_rectangle(self, blocks: tuple[int, int], chunks: tuple[int, int]) -> list[int]:
        """Kept strips of each block of a range, in a range of chunks."""
        return _row_sums(self.strips[slice(*blocks), slice(*chunks)])

    def first_number(self, group: int, first_group: int, chunks: tuple[int, int]) -> int:
        """What to take from the number of a group's strip among all strips, to have that among the
        strips of a rectangle of groups from ``first_group`` on and a range of chunks.
        """
        before = sum(map(sum, self.by_chunk[:group])) + sum(self.by_chunk[group][: chunks[0]])
        return before - sum(sum(row[slice(*chunks)]) for row in self.by_chunk[first_group:group])

    @functools.cached_property
    def active_by_chunk(self) -> list[list[int]]:
        """Classes of each chunk that keep a strip in each group of blocks: (groups, chunks)."""
        return list(self._parts[1].view(-1, self._shape[1]).tolist())

    def active(self, group: int, chunks: tuple[int, int]) -> int:
        """Classes in a range of chunks that keep a strip in a group of blocks."""
        return sum(self.active_by_chunk[group][slice(*chunks)])

    @functools.cached_property
    def flat_tokens(self) -> int:
        """Tokens whose distribution is flat."""
        return int(self._parts[2][0])

    @functools.cached_property
    def tokens(self) -> int:
        """Tokens that are not ignored."""
        return int(self._parts[2][1])


def _row_sums(table: Tensor) -> list[int]:
    return [total for part in _serial_parts(table) for total in part.sum(1).tolist()]


def _column_sums(table: Tensor) -> list[int]:
    parts = [part.sum(0) for part in _serial_parts(table)]
    return list(functools.reduce(torch.add, parts).tolist())


def _serial_parts(table: Tensor) -> tuple[Tensor, ...]:
    """Rows in parts that PyTorch sums in the thread that asks."""
    return tuple(table.split(max(1, SERIAL // max(1, table.shape[1]))))


@triton.jit(do_not_specialize=["first_block", "first_chunk", "num_chunks", "all_chunks"])
def list_strips_kernel(
    masks_ptr,  # (groups, V)
    offsets_ptr,  # (groups, V) see Kept; only if BY_CLASS
    chunk_starts_ptr,  # (groups, all chunks) see Places; only if BY_CLASS
    starts_ptr,  # (blocks, chunks) place of the first strip in the list
    block_starts_ptr,  # (blocks + 1,)
    first_tile_ptr,  # (blocks + 1,)
    classes_ptr,  # (K,) out: class of each strip, by block
    numbers_ptr,  # (K,) out: number of each strip
    tile_block_ptr,  # (tiles,) out
    tile_start_ptr,  # (tiles,) out
    V,
    first_block,
    first_chunk,
    num_chunks,
    all_chunks,
    BY_CLASS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Lists the strips of one block and one chunk of classes, in class order."""
    chunk = tl.program_id(0)
    block = tl.program_id(1)
    classes = (first_chunk + chunk) * CHUNK + tl.arange(0, CHUNK)
    inside = classes < V
    bit = (first_block + block) % GROUP
    group = (first_block + block) // GROUP
    row = group.to(tl.int64) * V
    mask = tl.load(masks_ptr + row + classes, mask=inside, other=0)
    kept = ((mask >> bit) & 1) != 0
    place = tl.load(starts_ptr + block * num_chunks + chunk)
    place += tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(classes_ptr + place, classes, mask=kept)
    if BY_CLASS:
        one = tl.full((CHUNK,), 1, tl.int64)
        # Behind the strips of earlier groups and, in its group, of earlier chunks of the rectangle.
        starts = chunk_starts_ptr + group * all_chunks + first_chunk
        number = tl.load(block_starts_ptr + group * GROUP - first_block)
        number += tl.load(starts + chunk) - tl.load(starts)
        number += tl.load(offsets_ptr + row + classes, mask=kept, other=0)
        number += popcount(mask & ((one << bit) - 1))
    else:
        number = place
    tl.store(numbers_ptr + place, number, mask=kept)
    if chunk == 0:
        first = tl.load(first_tile_ptr + block)
        count = tl.load(first_tile_ptr + block + 1) - first
        start = tl.load(block_starts_ptr + block)
        for i in range(0, count, CHUNK):
            tile = i + tl.arange(0, CHUNK)
            tl.store(tile_block_ptr + first + tile, block + tile * 0, mask=tile < count)
            tl.store(tile_start_ptr + first + tile, start + tile * TILE, mask=tile < count)


@dataclass(frozen=True)
class StripList:
    """Kept strips of a rectangle of blocks and classes, by block, with their storage numbers.

    Args:
        classes: (K,) int32.
        numbers: (K,) int32: row of each strip's logit gradient.
        tile_block, tile_start: (tiles,) int32: block, counted from ``first_block``, and first strip
            of each tile of TILE strips.
        places: of the rectangle.
        first_block: its first block.
    """

    classes: Tensor
    numbers: Tensor
    tile_block: Tensor
    tile_start: Tensor
    places: Places
    first_block: int


def list_strips(
    kept: Kept,
    sizes: list[int],
    blocks: tuple[int, int],
    chunks: tuple[int, int],
    places: Places,
    by_class: bool,
) -> StripList:
    """List the strips of a range of blocks and a range of class chunks.

    ``sizes`` are the strips of each block. With ``by_class`` the blocks are those of whole groups,
    and strips are numbered from 0 on by group and class; without, by block.
    """
    device = kept.masks.device
    num_blocks, num_chunks = blocks[1] - blocks[0], chunks[1] - chunks[0]
    num_strips, num_tiles = sum(sizes), sum(-(-size // TILE) for size in sizes)
    classes, numbers = aligned_rows(2, num_strips, torch.int32, device)
    tile_block, tile_start = aligned_rows(2, num_tiles, torch.int32, device)
    if num_strips:
        launch(
            list_strips_kernel,
            (num_chunks, num_blocks),
            kept.masks,
            kept.offsets,
            places.chunk_starts,
            places.starts,
            places.block_starts,
            places.first_tile,
            classes,
            numbers,
            tile_block,
            tile_start,
            kept.masks.shape[1],
            blocks[0],
            chunks[0],
            num_chunks,
            kept.shape[1],
            BY_CLASS=by_class,
            GROUP=GROUP,
            CHUNK=CHUNK,
            TILE=TILE,
        )
    return StripList(classes, numbers, tile_block, tile_start, places, blocks[0])
