"""Which strips of the gradient are computed.

The forward leaves one byte a strip, the log2 of its energy (sum of squared probabilities). What a
set of dropped strips does to the gradient is about the root of their energy beside the norm of the
whole gradient, so the lightest strips are dropped while that stays under a tolerance: one
threshold for all blocks, found in a histogram of the bytes. Strips that hold a target are kept.

Which blocks keep a class is a mask of int64s, one for each group of 64 blocks. A key made of each
puts classes side by side that are kept by like blocks, which is what the tiles of dC need.
Shape legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.launch import launch
from cut_cross_entropy.kernels.primitives import (
    ENERGY_FLOOR,
    ENERGY_STEPS,
    FORCED,
    byte_to_weight,
    popcount,
)

GROUP = 64  # token blocks whose bits share an int64
CHUNK = 1024  # classes that one program of the selection looks at
IDLE = 2**31 - 1  # key of a class that keeps no strip in a group: behind all others


@triton.jit(do_not_specialize=["total"])
def histogram_kernel(
    energy_ptr,  # (blocks * V,)
    counts_ptr,  # (256,) int64, in, out
    total,
    per_program,
    BLOCK: tl.constexpr,
):
    """Adds the histogram of a stretch of bytes; sums of integers do not depend on their order."""
    start = tl.program_id(0).to(tl.int64) * per_program
    bins = tl.arange(0, 256)
    counts = tl.zeros((256,), tl.int32)
    for i in range(0, per_program, BLOCK):
        offsets = start + i + tl.arange(0, BLOCK)
        inside = offsets < total
        bytes_ = tl.load(energy_ptr + offsets, mask=inside, other=0).to(tl.int32)
        counts += tl.histogram(bytes_, 256)  # takes a mask from Triton 3.4 on
        counts -= tl.where(bins == 0, tl.sum((offsets >= total).to(tl.int32), 0), 0)
    tl.atomic_add(counts_ptr + bins, counts.to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["numbers_ptr", "N"])
def threshold_kernel(
    histogram_ptr,  # (256,) int64
    sharp_ptr,  # (N,) energy of the gradient at the target; -1: flat, -2: no token
    tolerance,
    filter_mass,
    threshold_ptr,  # () out: the first byte that is kept
    numbers_ptr,  # (2,) out: flat tokens, tokens
    N,
    BLOCK_T: tl.constexpr,
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
    # The mass of a strip is at most the root of BLOCK_T times its energy, and that is below what
    # the next byte stands for.
    most = tl.exp2(0.5 * ((bins.to(tl.float32) + 1.0) / ENERGY_STEPS + ENERGY_FLOOR))
    mass = tl.cumsum(tl.where(energy > 0, counts * most, 0.0), 0)
    light = (dropped <= allowed) & (mass * tl.sqrt(BLOCK_T * 1.0) <= filter_mass * num_tokens)
    below = tl.sum(light.to(tl.int32), 0)
    tl.store(threshold_ptr, tl.minimum(tl.maximum(below, 1), FORCED))
    tl.store(numbers_ptr, num_flat)
    tl.store(numbers_ptr + 1, num_tokens)


def choose_threshold(
    energy: Tensor,  # (blocks, V) uint8
    sharp: Tensor,  # (N,) from prepare_backward
    tolerance: float,
    filter_mass: float,
    numbers: Tensor,  # (2,) int32, out: flat tokens, tokens
) -> Tensor:
    """The first byte that is kept, () int32 on the device.

    ``tolerance`` is the root of the dropped energy beside that of the whole gradient,
    ``filter_mass`` the most probability that may be dropped, a mean over tokens.
    """
    block = 2**12
    # Enough programs to fill a GPU, few enough not to queue up at the counters.
    per_program = min(2**17, max(block, triton.next_power_of_2(energy.numel()) // 512))
    histogram = torch.zeros(256, dtype=torch.int64, device=energy.device)
    threshold = torch.empty((), dtype=torch.int32, device=energy.device)
    launch(
        histogram_kernel,
        (triton.cdiv(energy.numel(), per_program),),
        energy,
        histogram,
        energy.numel(),
        per_program,
        BLOCK=block,
    )
    launch(
        threshold_kernel,
        (1,),
        histogram,
        sharp,
        tolerance,
        filter_mass,
        threshold,
        numbers,
        sharp.shape[0],
        BLOCK_T=BLOCK_T,
        BLOCK=4096,
    )
    return threshold


@triton.jit
def likeness_key(ranges8, ranges16, fold7):
    """Sort key (int32) that puts masks of like blocks side by side.

    From the top: which eighths of the blocks, which sixteenths, and a fold of the blocks to tell
    apart what is left. A plain order by mask is five to seven times the fewest possible pairs of
    tile and block, this 3.5 to 4.5 (docs/engineering_log.md). The eighths are ranked as a Gray
    code, which is cyclic, from "all of them" on: tiles with most blocks then start first.
    """
    rank = ranges8 ^ (ranges8 >> 1)
    rank = rank ^ (rank >> 2)
    rank = rank ^ (rank >> 4)
    rank = (rank - 0xAA) & 0xFF
    return (rank << 23) | (ranges16 << 7) | fold7


@triton.jit(do_not_specialize=["active_ptr", "num_blocks", "num_groups", "num_chunks"])
def kept_strips_kernel(
    energy_ptr,  # (blocks, V)
    threshold_ptr,  # ()
    masks_ptr,  # (groups, V) int64, out
    keys_ptr,  # (groups, V) int32, out
    offsets_ptr,  # (groups, V) int32, out: strips of the group in earlier classes of the chunk
    weights_ptr,  # (V,) out: what was dropped of each class
    sums_ptr,  # (3, chunks) out: of w, w log(w) and w log(w)^2 over the weights
    counts_ptr,  # (blocks, chunks) int32, out
    active_ptr,  # (groups, chunks) int32, out
    V,
    num_blocks,
    num_groups,
    num_chunks,
    IDLE: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Membership of a chunk of classes in all blocks."""
    chunk = tl.program_id(0)
    classes = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = classes < V
    threshold = tl.load(threshold_ptr)
    weights = tl.zeros((CHUNK,), tl.float32)
    for group in range(num_groups):
        mask = tl.zeros((CHUNK,), tl.int64)
        ranges8 = tl.zeros((CHUNK,), tl.int32)
        ranges16 = tl.zeros((CHUNK,), tl.int32)
        fold7 = tl.zeros((CHUNK,), tl.int32)
        size = min(GROUP, num_blocks - group * GROUP)
        for bit in range(size):
            block = group * GROUP + bit
            byte = tl.load(
                energy_ptr + tl.cast(block, tl.int64) * V + classes, mask=inside, other=0
            )
            byte = byte.to(tl.int32)
            kept = (byte >= threshold) & inside
            one = tl.full((CHUNK,), 1, tl.int64)
            mask = tl.where(kept, mask | (one << bit), mask)
            weights += tl.where(kept, 0.0, byte_to_weight(byte))
            number = kept.to(tl.int32)
            tl.store(counts_ptr + block * num_chunks + chunk, tl.sum(number, 0))
            ranges8 |= number << (bit * 8 // size)
            ranges16 |= number << (bit * 16 // size)
            fold7 |= number << (bit % 7)
        member = tl.cast(group, tl.int64) * V + classes
        tl.store(masks_ptr + member, mask, mask=inside)
        active = mask != 0
        key = tl.where(active, likeness_key(ranges8, ranges16, fold7), IDLE)
        tl.store(keys_ptr + member, key, mask=inside)
        tl.store(active_ptr + group * num_chunks + chunk, tl.sum(active.to(tl.int32), 0))
        strips = popcount(mask)
        tl.store(offsets_ptr + member, tl.cumsum(strips, 0) - strips, mask=inside)
    tl.store(weights_ptr + classes, weights, mask=inside)
    log = tl.log(tl.where(weights > 0, weights, 1.0))
    tl.store(sums_ptr + chunk, tl.sum(weights, 0))
    tl.store(sums_ptr + num_chunks + chunk, tl.sum(weights * log, 0))
    tl.store(sums_ptr + 2 * num_chunks + chunk, tl.sum(weights * log * log, 0))


@dataclass(frozen=True)
class Kept:
    """The strips that are kept, on the device.

    Args:
        masks: (groups, V) int64: bit i of group g says that block 64 g + i keeps the class.
        keys: (groups, V) int32: order of the classes; IDLE for those that keep no strip there.
        offsets: (groups, V) int32: how many strips of the group earlier classes of the chunk keep.
            Strips are numbered by group, then by class, then by block.
        weights: (V,) float32: root energies dropped of each class, summed over the blocks.
        sums: (3, chunks) float32: of w, w log(w) and w log(w)^2 over the weights.
        statistics: int32: counts (blocks, chunks), active classes (groups, chunks), the number of
            flat tokens and of tokens, in a row.
        shape: blocks and chunks of CHUNK classes.
    """

    masks: Tensor
    keys: Tensor
    offsets: Tensor
    weights: Tensor
    sums: Tensor
    statistics: Tensor
    shape: tuple[int, int]

    def order(self, first: int, stop: int, groups: slice = slice(None)) -> Tensor:
        """The classes [first, stop) for each group, like ones side by side and idle ones last.

        (groups, classes) int64.
        """
        indices = torch.sort(self.keys[groups, first:stop], dim=1, stable=True).indices
        return indices if first == 0 else first + indices


def keep_strips(
    energy: Tensor,  # (blocks, V) uint8
    sharp: Tensor,  # (N,)
    tolerance: float,
    filter_mass: float,
) -> Kept:
    """Choose the strips to keep; nothing here waits for the device."""
    num_blocks, num_classes = energy.shape
    num_groups, num_chunks = triton.cdiv(num_blocks, GROUP), triton.cdiv(num_classes, CHUNK)
    device = energy.device
    numbers = (num_blocks + num_groups) * num_chunks + 2
    statistics = torch.empty(numbers, dtype=torch.int32, device=device)
    kept = Kept(
        masks=torch.empty((num_groups, num_classes), dtype=torch.int64, device=device),
        keys=torch.empty((num_groups, num_classes), dtype=torch.int32, device=device),
        offsets=torch.empty((num_groups, num_classes), dtype=torch.int32, device=device),
        weights=torch.empty(num_classes, dtype=torch.float32, device=device),
        sums=torch.empty((3, num_chunks), dtype=torch.float32, device=device),
        statistics=statistics,
        shape=(num_blocks, num_chunks),
    )
    threshold = choose_threshold(energy, sharp, tolerance, filter_mass, statistics[-2:])
    launch(
        kept_strips_kernel,
        (num_chunks,),
        energy,
        threshold,
        kept.masks,
        kept.keys,
        kept.offsets,
        kept.weights,
        kept.sums,
        statistics,
        statistics[num_blocks * num_chunks :],
        num_classes,
        num_blocks,
        num_groups,
        num_chunks,
        IDLE=IDLE,
        GROUP=GROUP,
        CHUNK=CHUNK,
    )
    return kept
