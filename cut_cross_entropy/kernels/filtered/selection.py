"""Chooses the strips whose gradient is computed.

The forward leaves one byte per strip, the log2 of its energy (sum of squared probabilities). The
error that a set of dropped strips makes is about the root of their energy relative to the norm of
the whole gradient, so the lightest strips are dropped while that stays under a tolerance: one
threshold for all blocks, found in a histogram of the bytes. Strips that hold a target are kept.

The blocks that keep a class are a mask of int64s, one for each superblock of 64 blocks. A sort key
made of each mask clusters classes that are kept by similar blocks, which is what the tiles of dC
need. Shape legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.launch import launch
from cut_cross_entropy.kernels.primitives import (
    ABSENT,
    ENERGY_FLOOR,
    ENERGY_STEPS,
    FLAT,
    FORCED,
    byte_to_weight,
    popcount,
)
from cut_cross_entropy.problem import Filter

SUPERBLOCK = 64  # token blocks whose bits share an int64
CHUNK = 1024  # classes per program of the selection
IDLE = 2**31 - 1  # key of a class that keeps no strip in a superblock: behind all others


@triton.jit(do_not_specialize=["total"])
def histogram_kernel(
    energy_ptr,  # (blocks * V,)
    counts_ptr,  # (256,) int64, in, out
    total,
    per_program,
    BLOCK: tl.constexpr,
):
    """Add the histogram of a stretch of bytes; sums of integers do not depend on their order."""
    start = tl.program_id(0).to(tl.int64) * per_program
    bins = tl.arange(0, 256)
    counts = tl.zeros((256,), tl.int32)
    for i in range(0, per_program, BLOCK):
        offsets = start + i + tl.arange(0, BLOCK)
        inside = offsets < total
        bytes_ = tl.load(energy_ptr + offsets, mask=inside, other=0).to(tl.int32)
        counts += tl.histogram(bytes_, 256)  # accepts a mask from Triton 3.4 on
        counts -= tl.where(bins == 0, tl.sum((offsets >= total).to(tl.int32), 0), 0)
    tl.atomic_add(counts_ptr + bins, counts.to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["token_counts_ptr", "N"])
def threshold_kernel(
    histogram_ptr,  # (256,) int64
    target_miss_ptr,  # (N,) see BackwardTokens
    tolerance,
    max_mass,
    threshold_ptr,  # () out: the first byte that is kept
    token_counts_ptr,  # (2,) out: flat tokens, valid tokens
    N,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the energy below which strips are dropped, in one program."""
    at_targets = 0.0
    num_flat = 0
    num_tokens = 0
    for start in range(0, N, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        target_miss = tl.load(target_miss_ptr + tokens, mask=tokens < N, other=ABSENT)
        at_targets += tl.sum(tl.where(target_miss < 0, 0.0, target_miss), 0)  # NaN stays NaN
        num_flat += tl.sum((target_miss == FLAT).to(tl.int32), 0)
        num_tokens += tl.sum((target_miss != ABSENT).to(tl.int32), 0)
    bins = tl.arange(0, 256)
    counts = tl.load(histogram_ptr + bins).to(tl.float32)
    # Byte 0 is the floor of the scale and FORCED marks a target: neither stands for an energy.
    per_strip = tl.exp2((bins.to(tl.float32) + 0.5) / ENERGY_STEPS + ENERGY_FLOOR)
    energy = tl.where((bins == 0) | (bins == FORCED), 0.0, counts * per_strip)
    dropped = tl.cumsum(energy, 0)
    # The bytes are relative to a lower bound of the log-sum-exp, so they overstate; the misses at
    # the targets do not, and the gradient's energy is at least theirs.
    allowed = tolerance * tolerance * at_targets
    # The mass of a strip is at most the root of BLOCK_T times its energy, and that is below what
    # the next byte stands for.
    most = tl.exp2(0.5 * ((bins.to(tl.float32) + 1.0) / ENERGY_STEPS + ENERGY_FLOOR))
    mass = tl.cumsum(tl.where(energy > 0, counts * most, 0.0), 0)
    light = (dropped <= allowed) & (mass * tl.sqrt(BLOCK_T * 1.0) <= max_mass * num_tokens)
    below = tl.sum(light.to(tl.int32), 0)
    tl.store(threshold_ptr, tl.minimum(tl.maximum(below, 1), FORCED))
    tl.store(token_counts_ptr, num_flat)
    tl.store(token_counts_ptr + 1, num_tokens)


def choose_threshold(
    energy: Tensor,  # (blocks, V) uint8
    target_miss: Tensor,  # (N,)
    filter_: Filter,
    token_counts: Tensor,  # (2,) int32, out: flat tokens, valid tokens
) -> Tensor:
    """Return the first byte that is kept, () int32 on the device.

    ``filter_.tolerance`` bounds the root of the dropped energy relative to that of the whole
    gradient, ``filter_.max_mass`` the dropped probability, a mean over tokens.
    """
    block = 2**12
    # Enough programs to fill a GPU, few enough not to queue up at the counters.
    per_program = min(2**17, max(block, triton.next_power_of_2(energy.numel()) // 512))
    histogram = torch.zeros(256, dtype=torch.int64, device=energy.device)
    threshold = torch.empty((), dtype=torch.int32, device=energy.device)
    launch(
        histogram_kernel,
        (triton.cdiv(energy.numel(), per_program),),
        energy_ptr=energy,
        counts_ptr=histogram,
        total=energy.numel(),
        per_program=per_program,
        BLOCK=block,
    )
    launch(
        threshold_kernel,
        (1,),
        histogram_ptr=histogram,
        target_miss_ptr=target_miss,
        tolerance=filter_.tolerance,
        max_mass=filter_.max_mass,
        threshold_ptr=threshold,
        token_counts_ptr=token_counts,
        N=target_miss.shape[0],
        BLOCK_T=BLOCK_T,
        BLOCK=4096,
    )
    return threshold


@triton.jit
def cluster_key(ranges8, ranges16, fold7):
    """Return a sort key (int32) that clusters masks with similar blocks.

    From the top: which eighths of the blocks, which sixteenths, and a fold of the blocks to tell
    the rest apart. A plain order by mask makes five to seven times the fewest possible pairs of
    tile and block, this one 3.5 to 4.5 (docs/engineering_log.md). The eighths are ranked as a Gray
    code, which is cyclic, starting from "all of them": tiles with most blocks then start first.
    """
    rank = ranges8 ^ (ranges8 >> 1)
    rank = rank ^ (rank >> 2)
    rank = rank ^ (rank >> 4)
    rank = (rank - 0xAA) & 0xFF
    return (rank << 23) | (ranges16 << 7) | fold7


@triton.jit(do_not_specialize=["active_ptr", "num_blocks", "num_superblocks", "num_chunks"])
def kept_strips_kernel(
    energy_ptr,  # (blocks, V)
    threshold_ptr,  # ()
    masks_ptr,  # (superblocks, V) int64, out
    keys_ptr,  # (superblocks, V) int32, out
    offsets_ptr,  # (superblocks, V) int32, out: strips in earlier classes of the chunk
    weights_ptr,  # (V,) out: dropped root energy of each class
    sums_ptr,  # (3, chunks) out: of w, w log(w) and w log(w)^2 over the weights
    counts_ptr,  # (blocks, chunks) int32, out
    active_ptr,  # (superblocks, chunks) int32, out
    V,
    num_blocks,
    num_superblocks,
    num_chunks,
    IDLE: tl.constexpr,
    SUPERBLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Decide for a chunk of classes which blocks keep them."""
    chunk = tl.program_id(0)
    classes = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = classes < V
    threshold = tl.load(threshold_ptr)
    weights = tl.zeros((CHUNK,), tl.float32)
    for superblock in range(num_superblocks):
        mask = tl.zeros((CHUNK,), tl.int64)
        ranges8 = tl.zeros((CHUNK,), tl.int32)
        ranges16 = tl.zeros((CHUNK,), tl.int32)
        fold7 = tl.zeros((CHUNK,), tl.int32)
        size = min(SUPERBLOCK, num_blocks - superblock * SUPERBLOCK)
        for bit in range(size):
            block = superblock * SUPERBLOCK + bit
            byte = tl.load(
                energy_ptr + tl.cast(block, tl.int64) * V + classes, mask=inside, other=0
            )
            byte = byte.to(tl.int32)
            kept = (byte >= threshold) & inside
            one = tl.full((CHUNK,), 1, tl.int64)
            mask = tl.where(kept, mask | (one << bit), mask)
            weights += tl.where(kept, 0.0, byte_to_weight(byte))
            bit_set = kept.to(tl.int32)
            tl.store(counts_ptr + block * num_chunks + chunk, tl.sum(bit_set, 0))
            ranges8 |= bit_set << (bit * 8 // size)
            ranges16 |= bit_set << (bit * 16 // size)
            fold7 |= bit_set << (bit % 7)
        member = tl.cast(superblock, tl.int64) * V + classes
        tl.store(masks_ptr + member, mask, mask=inside)
        active = mask != 0
        key = tl.where(active, cluster_key(ranges8, ranges16, fold7), IDLE)
        tl.store(keys_ptr + member, key, mask=inside)
        tl.store(active_ptr + superblock * num_chunks + chunk, tl.sum(active.to(tl.int32), 0))
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
        masks: (superblocks, V) int64; bit i of superblock s: block 64 s + i keeps the class.
        keys: (superblocks, V) int32 sort key of the classes; IDLE for those that keep no strip.
        offsets: (superblocks, V) int32 number of strips that earlier classes of the chunk keep in
            the superblock. Strips are numbered by superblock, then by class, then by block.
        weights: (V,) float32 root energies dropped of each class, summed over the blocks.
        sums: (3, chunks) float32 sums of w, w log(w) and w log(w)^2 over the weights.
        statistics: int32, in a row: kept strips (blocks, chunks), active classes (superblocks,
            chunks), flat tokens, valid tokens.
        shape: number of blocks, and of chunks of CHUNK classes.
    """

    masks: Tensor
    keys: Tensor
    offsets: Tensor
    weights: Tensor
    sums: Tensor
    statistics: Tensor
    shape: tuple[int, int]

    @property
    def num_superblocks(self) -> int:
        """Number of superblocks."""
        return self.masks.shape[0]

    def order(self, first: int, stop: int, superblocks: slice = slice(None)) -> Tensor:
        """Sort the classes [first, stop) of each superblock: clustered, idle ones last.

        Returns:
            (superblocks, classes) int64 class ids.
        """
        indices = torch.sort(self.keys[superblocks, first:stop], dim=1, stable=True).indices
        return indices if first == 0 else first + indices


def keep_strips(
    energy: Tensor,  # (blocks, V) uint8
    target_miss: Tensor,  # (N,)
    filter_: Filter,
) -> Kept:
    """Choose the strips to keep; nothing here waits for the device."""
    num_blocks, num_classes = energy.shape
    num_superblocks = triton.cdiv(num_blocks, SUPERBLOCK)
    num_chunks = triton.cdiv(num_classes, CHUNK)
    device = energy.device
    size = (num_blocks + num_superblocks) * num_chunks + 2
    statistics = torch.empty(size, dtype=torch.int32, device=device)
    kept = Kept(
        masks=torch.empty((num_superblocks, num_classes), dtype=torch.int64, device=device),
        keys=torch.empty((num_superblocks, num_classes), dtype=torch.int32, device=device),
        offsets=torch.empty((num_superblocks, num_classes), dtype=torch.int32, device=device),
        weights=torch.empty(num_classes, dtype=torch.float32, device=device),
        sums=torch.empty((3, num_chunks), dtype=torch.float32, device=device),
        statistics=statistics,
        shape=(num_blocks, num_chunks),
    )
    threshold = choose_threshold(energy, target_miss, filter_, statistics[-2:])
    launch(
        kept_strips_kernel,
        (num_chunks,),
        energy_ptr=energy,
        threshold_ptr=threshold,
        masks_ptr=kept.masks,
        keys_ptr=kept.keys,
        offsets_ptr=kept.offsets,
        weights_ptr=kept.weights,
        sums_ptr=kept.sums,
        counts_ptr=statistics,
        active_ptr=statistics[num_blocks * num_chunks :],
        V=num_classes,
        num_blocks=num_blocks,
        num_superblocks=num_superblocks,
        num_chunks=num_chunks,
        IDLE=IDLE,
        SUPERBLOCK=SUPERBLOCK,
        CHUNK=CHUNK,
    )
    return kept
