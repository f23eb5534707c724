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

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.config import launch_device
from cut_cross_entropy.kernels.primitives import FORCED, byte_to_weight, popcount

GROUP = 64  # token blocks whose bits share an int64
CHUNK = 1024  # classes that one program of the selection looks at


@triton.jit
def mark_targets_kernel(
    energy_ptr,  # (blocks, V) in, out
    targets_ptr,  # (N,)
    N,
    V,
    BLOCK_T: tl.constexpr,
):
    """Marks the strips that hold a target. Programs that meet write the same byte."""
    block = tl.program_id(0)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    targets = tl.load(targets_ptr + tokens, mask=tokens < N, other=-1)
    marks = tl.full((BLOCK_T,), FORCED, tl.uint8)
    tl.store(energy_ptr + block.to(tl.int64) * V + targets, marks, mask=targets >= 0)


def mark_targets(energy: Tensor, targets: Tensor) -> None:
    """Mark the strips that hold a target, in place."""
    with launch_device(energy.device):
        mark_targets_kernel[(energy.shape[0],)](
            energy, targets, targets.shape[0], energy.shape[1], BLOCK_T=BLOCK_T
        )


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


def choose_threshold(
    energy: Tensor,  # (blocks, V) uint8
    gradient_energy: Tensor,  # () of the part that does not depend on the tail
    tolerance: float,
) -> Tensor:
    """The first byte that is kept, () int32 on the device.

    ``tolerance`` is the root of the dropped energy beside that of the whole gradient.
    """
    per_program, block = 2**17, 2**12
    counts = torch.zeros(256, dtype=torch.int64, device=energy.device)
    with launch_device(energy.device):
        histogram_kernel[(triton.cdiv(energy.numel(), per_program),)](
            energy, counts, energy.numel(), PER_PROGRAM=per_program, BLOCK=block
        )
    bins = torch.arange(256, dtype=torch.float64, device=energy.device)
    per_strip = torch.exp2((bins + 0.5) / 4.0 - 55.0)
    per_strip[0] = 0  # the floor of the scale: nothing, not half a step
    per_strip[int(FORCED.value)] = 0
    # A running sum as a product with a triangle: PyTorch's scan has no fixed order on a GPU.
    cumulative = torch.ones(256, 256, dtype=torch.float64, device=energy.device).tril() @ (
        per_strip * counts
    )
    allowed = tolerance**2 * (gradient_energy.double() + cumulative[-1])
    below = (cumulative <= allowed).sum()
    return below.clamp(1, int(FORCED.value)).int()


@triton.jit
def kept_strips_kernel(
    energy_ptr,  # (blocks, V)
    threshold_ptr,  # ()
    masks_ptr,  # (groups, V) int64, out
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
        tl.store(masks_ptr + tl.cast(group, tl.int64) * V + classes, mask, mask=inside)
        active |= (mask != 0).to(tl.int32)
    tl.store(weights_ptr + classes, weights, mask=inside)
    tl.store(active_ptr + chunk, tl.sum(active, 0))


@dataclass(frozen=True)
class Kept:
    """The strips that are kept.

    Args:
        masks: (groups, V) int64: bit i of group g says that block 64 g + i keeps the class.
        weights: (V,) float32: root energies dropped of each class, summed over the blocks.
        counts: (blocks, chunks) int32: kept strips by block and chunk of CHUNK classes.
        active: (chunks,) int32: classes that keep a strip.
    """

    masks: Tensor
    weights: Tensor
    counts: Tensor
    active: Tensor


def kept_strips(energy: Tensor, threshold: Tensor) -> Kept:
    """Apply a threshold to the bytes of all strips."""
    num_blocks, num_classes = energy.shape
    num_groups, num_chunks = triton.cdiv(num_blocks, GROUP), triton.cdiv(num_classes, CHUNK)
    device = energy.device
    kept = Kept(
        masks=torch.empty((num_groups, num_classes), dtype=torch.int64, device=device),
        weights=torch.empty(num_classes, dtype=torch.float32, device=device),
        counts=torch.empty((num_blocks, num_chunks), dtype=torch.int32, device=device),
        active=torch.empty(num_chunks, dtype=torch.int32, device=device),
    )
    with launch_device(device):
        kept_strips_kernel[(num_chunks,)](
            energy,
            threshold,
            kept.masks,
            kept.weights,
            kept.counts,
            kept.active,
            num_classes,
            num_blocks,
            num_groups,
            num_chunks,
            GROUP=GROUP,
            CHUNK=CHUNK,
        )
    return kept


@triton.jit
def class_counts_kernel(masks_ptr, counts_ptr, total, BLOCK: tl.constexpr):
    """Ones of each membership mask."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < total
    masks = tl.load(masks_ptr + offsets, mask=inside, other=0)
    tl.store(counts_ptr + offsets, popcount(masks), mask=inside)


def exclusive_sum(counts: Tensor) -> Tensor:
    """Sum of what stands before each element, in row-major order, int64."""
    flat = counts.reshape(-1)
    return (flat.cumsum(0, dtype=torch.int64) - flat).reshape(counts.shape)


def class_offsets(masks: Tensor) -> Tensor:
    """Number of the first strip of each (group, class), int64, of the shape of ``masks``.

    Strips are numbered by class, then by group, then by block, so those of a range of classes are
    consecutive.
    """
    counts = torch.empty(masks.shape, dtype=torch.int32, device=masks.device)
    block = 1024
    with launch_device(masks.device):
        class_counts_kernel[(triton.cdiv(masks.numel(), block),)](
            masks, counts, masks.numel(), BLOCK=block
        )
    return exclusive_sum(counts.T.contiguous()).T.contiguous()


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
        number = tl.load(offsets_ptr + row + classes, mask=inside, other=0) + before
    else:
        number = place
    tl.store(numbers_ptr + place, number.to(tl.int32), mask=kept)


@dataclass(frozen=True)
class StripList:
    """Kept strips of a rectangle of blocks and classes, by block, with their storage numbers.

    Args:
        classes: (K,) int32.
        numbers: (K,) int32: row of each strip's logit gradient.
        block_starts: (blocks + 1,) int64: where each block's strips begin.
        first_block: the block that ``block_starts[0]`` belongs to.
    """

    classes: Tensor
    numbers: Tensor
    block_starts: Tensor
    first_block: int


def list_strips(
    kept: Kept,
    num_strips: int,
    blocks: tuple[int, int],
    chunks: tuple[int, int],
    offsets: Tensor | None,
) -> StripList:
    """List the ``num_strips`` strips of a range of blocks and a range of class chunks.

    With ``offsets`` (from :func:`class_offsets`, less that of the first strip listed) strips are
    numbered by class, without by block.
    """
    counts = kept.counts[blocks[0] : blocks[1], chunks[0] : chunks[1]].contiguous()
    starts = exclusive_sum(counts)
    device = counts.device
    classes = torch.empty(num_strips, dtype=torch.int32, device=device)
    numbers = torch.empty(num_strips, dtype=torch.int32, device=device)
    total = starts.new_full((1,), num_strips)
    with launch_device(device):
        list_strips_kernel[(counts.shape[1], counts.shape[0])](
            kept.masks,
            offsets,
            starts,
            classes,
            numbers,
            kept.masks.shape[1],
            blocks[0],
            chunks[0],
            counts.shape[1],
            BY_CLASS=offsets is not None,
            GROUP=GROUP,
            CHUNK=CHUNK,
        )
    return StripList(classes, numbers, torch.cat([starts[:, 0], total]), blocks[0])
