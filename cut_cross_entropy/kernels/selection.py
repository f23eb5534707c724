"""Which strips of the gradient are computed, and in what order they are stored.

The forward leaves one byte a strip, the log2 of its energy (sum of squared probabilities). What a
set of dropped strips does to the gradient is about the root of their energy beside the norm of the
whole gradient, so the lightest strips are dropped while that stays under a tolerance: one
threshold for all blocks, found in a histogram of the bytes. Strips that hold a target are kept.

Kept strips are listed by block (for dE) and numbered by class (for dC) within groups of 64 blocks,
whose membership fits one int64 a class. Shape legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels.config import launch_device
from cut_cross_entropy.kernels.primitives import (
    ENERGY_FLOOR,
    ENERGY_STEPS,
    FORCED,
    byte_to_weight,
    popcount,
)

GROUP = 64  # token blocks whose bits share an int64
CHUNK = 1024  # classes that one program of the selection looks at
TILE = 128  # strips whose logits are made again together


@triton.jit
def histogram_kernel(
    energy_ptr,  # (blocks * V,)
    counts_ptr,  # (256,) int64, in, out
    total,
    PER_PROGRAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the histogram of a stretch of bytes; sums of integers do not depend on their order."""
    start = tl.program_id(0).to(tl.int64) * PER_PROGRAM
    bins = tl.arange(0, 256)
    counts = tl.zeros((256,), tl.int32)
    for i in range(0, PER_PROGRAM, BLOCK):
        offsets = start + i + tl.arange(0, BLOCK)
        inside = offsets < total
        bytes_ = tl.load(energy_ptr + offsets, mask=inside, other=0).to(tl.int32)
        counts += tl.histogram(bytes_, 256, mask=inside)
    tl.atomic_add(counts_ptr + bins, counts.to(tl.int64), sem="relaxed")


@triton.jit
def threshold_kernel(
    histogram_ptr,  # (256,) int64
    sharp_ptr,  # (N,) energy of the gradient at the target; -1: flat, -2: no token
    tolerance,
    threshold_ptr,  # () out: the first byte that is kept
    numbers_ptr,  # (2,) out: flat tokens, tokens
    N,
    BLOCK: tl.constexpr,
):
    """One program: how light a strip may be to be dropped."""
    at_targets = 0.0
    num_flat = 0
    num_tokens = 0
    for start in range(0, N, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        sharp = tl.load(sharp_ptr + tokens, mask=tokens < N, other=-2.0)
        at_targets += tl.sum(tl.where(sharp < 0, 0.0, sharp), 0)  # NaN stays NaN
        num_flat += tl.sum((sharp == -1.0).to(tl.int32), 0)
        num_tokens += tl.sum((sharp != -2.0).to(tl.int32), 0)
    bins = tl.arange(0, 256)
    counts = tl.load(histogram_ptr + bins).to(tl.float32)
    # Byte 0 is the floor of the scale and stands for nothing; FORCED for no energy at all.
    per_strip = tl.exp2((bins.to(tl.float32) + 0.5) / ENERGY_STEPS + ENERGY_FLOOR)
    energy = tl.where((bins == 0) | (bins == FORCED), 0.0, counts * per_strip)
    dropped = tl.cumsum(energy, 0)
    # The bytes stand against a bound and overstate; the misses at the targets do not, and the
    # gradient's energy is at least theirs.
    allowed = tolerance * tolerance * at_targets
    below = tl.sum((dropped <= allowed).to(tl.int32), 0)
    tl.store(threshold_ptr, tl.minimum(tl.maximum(below, 1), FORCED))
    tl.store(numbers_ptr, num_flat)
    tl.store(numbers_ptr + 1, num_tokens)


def choose_threshold(
    energy: Tensor,  # (blocks, V) uint8
    sharp: Tensor,  # (N,) from prepare_backward
    tolerance: float,
    numbers: Tensor,  # (2,) int32, out: flat tokens, tokens
) -> Tensor:
    """The first byte that is kept, () int32 on the device.

    ``tolerance`` is the root of the dropped energy beside that of the whole gradient.
    """
    per_program, block = 2**17, 2**12
    histogram = torch.zeros(256, dtype=torch.int64, device=energy.device)
    threshold = torch.empty((), dtype=torch.int32, device=energy.device)
    with launch_device(energy.device):
        histogram_kernel[(triton.cdiv(energy.numel(), per_program),)](
            energy, histogram, energy.numel(), PER_PROGRAM=per_program, BLOCK=block
        )
        threshold_kernel[(1,)](
            histogram, sharp, tolerance, threshold, numbers, sharp.shape[0], BLOCK=4096
        )
    return threshold


@triton.jit
def kept_strips_kernel(
    energy_ptr,  # (blocks, V)
    threshold_ptr,  # ()
    masks_ptr,  # (groups, V) int64, out
    sizes_ptr,  # (groups, V) int32, out: strips of each class
    weights_ptr,  # (V,) out: what was dropped of each class
    counts_ptr,  # (blocks, chunks) int32, out
    active_ptr,  # (chunks,) int32, out
    V,
    num_blocks,
    num_groups,
    num_chunks,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Membership of a chunk of classes in all blocks."""
    chunk = tl.program_id(0)
    classes = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = classes < V
    threshold = tl.load(threshold_ptr)
    active = tl.zeros((CHUNK,), tl.int32)
    weights = tl.zeros((CHUNK,), tl.float32)
    for group in range(num_groups):
        mask = tl.zeros((CHUNK,), tl.int64)
        for bit in range(min(GROUP, num_blocks - group * GROUP)):
            block = group * GROUP + bit
            byte = tl.load(
                energy_ptr + tl.cast(block, tl.int64) * V + classes, mask=inside, other=0
            )
            byte = byte.to(tl.int32)
            kept = (byte >= threshold) & inside
            one = tl.full((CHUNK,), 1, tl.int64)
            mask = tl.where(kept, mask | (one << bit), mask)
            weights += tl.where(kept, 0.0, byte_to_weight(byte))
            tl.store(counts_ptr + block * num_chunks + chunk, tl.sum(kept.to(tl.int32), 0))
        member = tl.cast(group, tl.int64) * V + classes
        tl.store(masks_ptr + member, mask, mask=inside)
        tl.store(sizes_ptr + member, popcount(mask), mask=inside)
        active |= (mask != 0).to(tl.int32)
    tl.store(weights_ptr + classes, weights, mask=inside)
    tl.store(active_ptr + chunk, tl.sum(active, 0))


@dataclass(frozen=True)
class Kept:
    """The strips that are kept, on the device and, for what the host has to know, there too.

    Args:
        masks: (groups, V) int64: bit i of group g says that block 64 g + i keeps the class.
        sizes: (groups, V) int32: ones of the masks.
        weights: (V,) float32: root energies dropped of each class, summed over the blocks.
        statistics: int32: counts, active and the number of flat tokens and of tokens, in a row.
        shape: blocks and chunks of CHUNK classes.
    """

    masks: Tensor
    sizes: Tensor
    weights: Tensor
    statistics: Tensor
    shape: tuple[int, int]

    def read(self) -> "Counts":
        """Wait for the device and read the statistics."""
        num_blocks, num_chunks = self.shape
        values = self.statistics.cpu()
        counts, active, numbers = values.split([num_blocks * num_chunks, num_chunks, 2])
        return Counts(
            counts.view(num_blocks, num_chunks).long(), active, int(numbers[0]), int(numbers[1])
        )


@dataclass(frozen=True)
class Counts:
    """How much is kept where, on the host.

    Args:
        strips: (blocks, chunks) kept strips.
        active: (chunks,) classes that keep a strip.
        flat_tokens: tokens whose distribution is flat.
        tokens: tokens that are not ignored.
    """

    strips: Tensor
    active: Tensor
    flat_tokens: int
    tokens: int


def keep_strips(
    energy: Tensor,  # (blocks, V) uint8
    sharp: Tensor,  # (N,)
    tolerance: float,
) -> Kept:
    """Choose the strips to keep; nothing here waits for the device."""
    num_blocks, num_classes = energy.shape
    num_groups, num_chunks = triton.cdiv(num_blocks, GROUP), triton.cdiv(num_classes, CHUNK)
    device = energy.device
    statistics = torch.empty((num_blocks + 1) * num_chunks + 2, dtype=torch.int32, device=device)
    kept = Kept(
        masks=torch.empty((num_groups, num_classes), dtype=torch.int64, device=device),
        sizes=torch.empty((num_groups, num_classes), dtype=torch.int32, device=device),
        weights=torch.empty(num_classes, dtype=torch.float32, device=device),
        statistics=statistics,
        shape=(num_blocks, num_chunks),
    )
    threshold = choose_threshold(energy, sharp, tolerance, statistics[-2:])
    with launch_device(device):
        kept_strips_kernel[(num_chunks,)](
            energy,
            threshold,
            kept.masks,
            kept.sizes,
            kept.weights,
            statistics,
            statistics[num_blocks * num_chunks :],
            num_classes,
            num_blocks,
            num_groups,
            num_chunks,
            GROUP=GROUP,
            CHUNK=CHUNK,
        )
    return kept


def exclusive_sum(counts: Tensor) -> Tensor:
    """Sum of what stands before each element, in row-major order, int64."""
    flat = counts.reshape(-1)
    return (flat.cumsum(0, dtype=torch.int64) - flat).reshape(counts.shape)


def class_offsets(sizes: Tensor) -> Tensor:
    """Number of the first strip of each (group, class), int64, of the shape of ``sizes``.

    Strips are numbered by class, then by group, then by block, so those of a range of classes are
    consecutive.
    """
    if sizes.shape[0] == 1:
        return exclusive_sum(sizes)
    return exclusive_sum(sizes.T.contiguous()).T.contiguous()


@triton.jit
def list_strips_kernel(
    masks_ptr,  # (groups, V)
    offsets_ptr,  # (groups, V) number of a class's first strip; only if BY_CLASS
    starts_ptr,  # (blocks, chunks) place of the first strip in the list
    classes_ptr,  # (K,) out: class of each strip, by block
    numbers_ptr,  # (K,) out: number of each strip
    V,
    first_block,
    first_chunk,
    num_chunks,
    first_number,
    BY_CLASS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Lists the strips of one block and one chunk of classes, in class order."""
    chunk = tl.program_id(0)
    block = tl.program_id(1)
    classes = (first_chunk + chunk) * CHUNK + tl.arange(0, CHUNK)
    inside = classes < V
    bit = (first_block + block) % GROUP
    row = ((first_block + block) // GROUP).to(tl.int64) * V
    mask = tl.load(masks_ptr + row + classes, mask=inside, other=0)
    kept = ((mask >> bit) & 1) != 0
    place = tl.load(starts_ptr + block * num_chunks + chunk)
    place += tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(classes_ptr + place, classes, mask=kept)
    if BY_CLASS:
        one = tl.full((CHUNK,), 1, tl.int64)
        before = popcount(mask & ((one << bit) - 1))
        number = tl.load(offsets_ptr + row + classes, mask=inside, other=0) - first_number
        number = number.to(tl.int32) + before
    else:
        number = place
    tl.store(numbers_ptr + place, number, mask=kept)


@dataclass(frozen=True)
class StripList:
    """Kept strips of a rectangle of blocks and classes, by block, with their storage numbers.

    Args:
        classes: (K,) int32.
        numbers: (K,) int32: row of each strip's logit gradient.
        block_starts: (blocks + 1,) int32: where each block's strips begin.
        tile_block, tile_start: (tiles,) int32: block, counted from ``first_block``, and first strip
            of each tile of TILE strips.
        first_tile: (blocks + 1,) int32: where each block's tiles begin.
        first_block: the block that ``block_starts[0]`` belongs to.
    """

    classes: Tensor
    numbers: Tensor
    block_starts: Tensor
    tile_block: Tensor
    tile_start: Tensor
    first_tile: Tensor
    first_block: int


@triton.jit
def tile_table_kernel(
    block_starts_ptr,  # (blocks + 1,)
    first_tile_ptr,  # (blocks + 1,)
    tile_block_ptr,  # (tiles,) out
    tile_start_ptr,  # (tiles,) out
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tiles of one block."""
    block = tl.program_id(0)
    first = tl.load(first_tile_ptr + block)
    count = tl.load(first_tile_ptr + block + 1) - first
    start = tl.load(block_starts_ptr + block)
    for i in range(0, count, BLOCK):
        tile = i + tl.arange(0, BLOCK)
        tl.store(tile_block_ptr + first + tile, block + tile * 0, mask=tile < count)
        tl.store(tile_start_ptr + first + tile, start + tile * TILE, mask=tile < count)


@dataclass(frozen=True)
class Places:
    """Where the strips of a rectangle go, on the device; see :class:`StripList`."""

    starts: Tensor  # (blocks, chunks) int64
    block_starts: Tensor  # (blocks + 1,) int32
    first_tile: Tensor  # (blocks + 1,) int32


def find_places(kept: Kept, blocks: tuple[int, int], chunks: tuple[int, int]) -> Places:
    """Where the strips of a range of blocks and of class chunks go; does not wait."""
    num_blocks, num_chunks = kept.shape
    counts = kept.statistics[: num_blocks * num_chunks].view(num_blocks, num_chunks)
    counts = counts[blocks[0] : blocks[1], chunks[0] : chunks[1]]
    ends = torch.zeros(2, counts.shape[0] + 1, dtype=torch.int32, device=counts.device)
    sizes = counts.sum(1, dtype=torch.int32)
    torch.cumsum(sizes, 0, out=ends[0, 1:])
    torch.cumsum((sizes + (TILE - 1)) // TILE, 0, out=ends[1, 1:])
    return Places(exclusive_sum(counts), ends[0], ends[1])


def list_strips(
    kept: Kept,
    counts: Counts,
    blocks: tuple[int, int],
    chunks: tuple[int, int],
    places: Places,
    offsets: Tensor | None,
    first_number: int,
) -> StripList:
    """List the strips of a range of blocks and a range of class chunks.

    With ``offsets`` (from :func:`class_offsets`) strips are numbered by class, from
    ``first_number`` on; without, by block.
    """
    device = kept.masks.device
    strips = counts.strips[blocks[0] : blocks[1], chunks[0] : chunks[1]]
    num_blocks, num_chunks = strips.shape
    sizes = strips.sum(1).tolist()
    num_strips, num_tiles = sum(sizes), sum(-(-size // TILE) for size in sizes)
    classes, numbers = torch.empty((2, num_strips), dtype=torch.int32, device=device)
    tile_block, tile_start = torch.empty((2, num_tiles), dtype=torch.int32, device=device)
    if num_strips:
        with launch_device(device):
            list_strips_kernel[(num_chunks, num_blocks)](
                kept.masks,
                offsets,
                places.starts,
                classes,
                numbers,
                kept.masks.shape[1],
                blocks[0],
                chunks[0],
                num_chunks,
                first_number,
                BY_CLASS=offsets is not None,
                GROUP=GROUP,
                CHUNK=CHUNK,
            )
            tile_table_kernel[(num_blocks,)](
                places.block_starts, places.first_tile, tile_block, tile_start, TILE=TILE, BLOCK=64
            )
    return StripList(
        classes, numbers, places.block_starts, tile_block, tile_start, places.first_tile, blocks[0]
    )
