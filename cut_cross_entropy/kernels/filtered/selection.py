"""Chooses the strips whose gradient is computed.

The forward leaves two bytes per strip, the log2 of its energy (sum of squared probabilities) and of
its mass (sum of probabilities). The energy is weighted by the largest upstream gradient of a token
in the block. The error that a set of dropped strips makes is about the root of their energy
relative to the norm of the whole gradient, so the lightest strips are dropped while that stays
under a tolerance: one threshold for all blocks, found in a histogram of the bytes. Strips that hold
a target are kept, and so are some that decide the direction of their class's row of dC: those whose
root energy is the largest share of all the mass of the class.

The blocks that keep a class are a mask of int64s, one for each superblock of 64 blocks. A sort key
made of each mask clusters classes that are kept by similar blocks, which is what the tiles of dC
need. Three groups of classes, by their mass in the batch, are sorted apart, since their tails
differ (``class_weights``). Shape legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T, SUPERBLOCK
from cut_cross_entropy.kernels.launch import aligned_rows, cdiv, launch, pointers
from cut_cross_entropy.kernels.tokens import BackwardTokens
from cut_cross_entropy.kernels.triton.filtered.selection import (
    SHARES,
    histogram_kernel,
    kept_strips_kernel,
    shares_histogram_kernel,
    threshold_kernel,
    weigh_blocks_kernel,
)
from cut_cross_entropy.problem import Filter

CHUNK = 1024  # classes per program of the selection
ROWS_AT_ONCE = 4  # blocks per step of it
# The same for each histogram, and its warps: measured, docs/engineering_log.md.
HISTOGRAM = {"CHUNK": 128, "ROWS": 16, "num_warps": 4}
SHARES_HISTOGRAM = {"CHUNK": 256, "ROWS": 8, "num_warps": 4}
ROW_STRIPS = (
    0.08  # strips kept for the rows of dC, at most: relative to those kept for their energy
)
# The logarithm of a probability that is dropped, at most: of smaller ones the energy is negligible.
DEEPEST = 16.0
# Evenly spaced classes that stand for all: one of so many, within these limits.
CLASS_SHARE, FEWEST_CLASSES, MOST_CLASSES = 128, 256, 512


@dataclass(frozen=True)
class Kept:
    """The strips that are kept, on the device.

    Args:
        strips: (blocks, V) int16 energies and masses of all strips.
        masks: (superblocks, V) int64; bit i of superblock s: block 64 s + i keeps the class.
        keys: (superblocks, V) int32 sort key of the classes: those that keep no strip last, and
            among them as among the others group 2 first, group 0 last.
        offsets: (superblocks, V) int32 number of strips that earlier classes of the chunk keep in
            the superblock. Strips are numbered by superblock, then by class, then by block.
        class_mass, mean_mass, mass_deviation: see Threshold.
        sums: (3, blocks, chunks) float32 sums of w, w log2(w) and w log2(w)^2 over these masses.
        statistics: int32, in a row: kept strips (blocks, chunks), active classes (superblocks,
            chunks), dropped probability of a token in the mean, in units of 1 / DROPPED_UNIT (an
            estimate; 0, which is within every limit, if there is none), flat tokens, valid
            tokens.
        shape: number of blocks, and of chunks of CHUNK classes.
    """

    strips: Tensor
    masks: Tensor
    keys: Tensor
    offsets: Tensor
    class_mass: Tensor
    mean_mass: Tensor
    mass_deviation: Tensor
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

    def by_group(self, first: int, stop: int) -> Tensor:
        """Sort the classes [first, stop) by their groups alone; return their ids, int64."""
        group_and_rest = self.keys[0, first:stop]
        is_active = group_and_rest < 2**30
        rank = torch.where(is_active, (group_and_rest >> 30) + 2, group_and_rest & 3)
        indices = torch.sort(rank.to(torch.uint8), stable=True).indices
        return indices if first == 0 else first + indices


@dataclass(frozen=True)
class Threshold:
    """The energy below which strips are dropped, and what it follows from, on the device.

    Args:
        strips: (blocks, V) int16 energies and masses of all strips.
        weights: (blocks,) int32 bytes by which the energies of a block are lowered, since its
            tokens have smaller upstream gradients than others.
        value: (1,) int32 first byte of weighted energy that is kept.
        most: (1,) int32 the highest value that ``Filter.max_mass`` allows.
        num_kept: () int64 strips at or above the value.
        histogram: (256 + SHARES,) int64 strips by weighted energy, and room for their shares.
        class_mass: (V,) float32 log2 of the mass of each class.
        mean_mass, mass_deviation: (1,) float32 mean and standard deviation of these over a sample.
        statistics: see Kept; its last two elements are final, and the one before after
            ``calibrate`` or ``TailSample.write_dropped``.
    """

    strips: Tensor
    weights: Tensor
    value: Tensor
    most: Tensor
    num_kept: Tensor
    histogram: Tensor
    class_mass: Tensor
    mean_mass: Tensor
    mass_deviation: Tensor
    statistics: Tensor


def sampled_classes(num_classes: int) -> slice:
    """Return evenly spaced classes, by sixteens: kernels are compiled for such numbers."""
    wanted = min(max(num_classes // CLASS_SHARE, FEWEST_CLASSES), MOST_CLASSES)
    step = cdiv(num_classes, wanted)
    first = step // 2
    count = cdiv(num_classes - first, step)
    return slice(first, first + (count // 16 * 16 or count) * step, step)


def most_upstream(tokens: BackwardTokens) -> Tensor:
    """Return the factor of a probability in the gradient, (N,): of an entropy's, its largest."""
    if tokens.eta is None:
        return tokens.a
    return tokens.a.abs() + DEEPEST * tokens.eta.abs()


def find_threshold(
    strips: Tensor,  # (blocks, V) int16
    tokens: BackwardTokens,
    filter_: Filter,
) -> Threshold:
    """Find the threshold by energy; nothing here waits for the device.

    ``filter_.tolerance`` bounds the root of the dropped energy relative to that of the whole
    gradient, ``filter_.max_mass`` the dropped probability, a mean over tokens that are weighted
    like their blocks.
    """
    num_blocks, num_classes = strips.shape
    num_superblocks = cdiv(num_blocks, SUPERBLOCK)
    num_chunks = cdiv(num_classes, CHUNK)
    device = strips.device
    size = (num_blocks + num_superblocks) * num_chunks + 3
    weights, value, most = aligned_rows(3, max(num_blocks, 1), torch.int32, device)
    largest, mean_mass, mass_deviation = aligned_rows(3, 1, torch.float32, device)
    threshold = Threshold(
        strips=strips,
        weights=weights,
        value=value[:1],
        most=most[:1],
        num_kept=torch.empty((), dtype=torch.int64, device=device),
        histogram=torch.empty(256 + SHARES.value, dtype=torch.int64, device=device),
        class_mass=torch.empty(num_classes, dtype=torch.float32, device=device),
        mean_mass=mean_mass,
        mass_deviation=mass_deviation,
        statistics=torch.empty(size, dtype=torch.int32, device=device),
    )
    num_tokens, classes = tokens.a.shape[0], sampled_classes(num_classes)
    launch(
        weigh_blocks_kernel,
        (1,),
        a_ptr=most_upstream(tokens),
        b_ptr=tokens.b,
        weights_ptr=weights,
        largest_ptr=largest,
        histogram_ptr=threshold.histogram,
        N=num_tokens,
        num_blocks=num_blocks,
        BLOCK_T=BLOCK_T,
        ROWS=SUPERBLOCK,
        num_warps=8,
    )
    launch(
        histogram_kernel,
        (cdiv(num_classes, HISTOGRAM["CHUNK"]),),
        strips_ptr=strips,
        weights_ptr=weights,
        counts_ptr=threshold.histogram,
        class_mass_ptr=threshold.class_mass,
        V=num_classes,
        num_blocks=num_blocks,
        **HISTOGRAM,
    )
    launch(
        threshold_kernel,
        (1,),
        histogram_ptr=threshold.histogram,
        target_grad_ptr=tokens.target_grad,
        **pointers(threshold, "class_mass mean_mass mass_deviation"),
        largest_ptr=largest,
        tolerance=filter_.tolerance,
        max_mass=filter_.max_mass,
        threshold_ptr=value,
        most_ptr=most,
        num_kept_ptr=threshold.num_kept,
        token_counts_ptr=threshold.statistics[-3:],
        N=num_tokens,
        first=classes.start,
        step=classes.step,
        num_samples=(classes.stop - classes.start) // classes.step,
        SAMPLES=MOST_CLASSES,
        BLOCK_T=BLOCK_T,
        BLOCK=4096,
    )
    return threshold


def keep_strips(threshold: Threshold) -> Kept:
    """Choose the strips to keep; nothing here waits for the device."""
    strips = threshold.strips
    num_blocks, num_classes = strips.shape
    num_superblocks = cdiv(num_blocks, SUPERBLOCK)
    num_chunks = cdiv(num_classes, CHUNK)
    device, statistics = strips.device, threshold.statistics
    kept = Kept(
        strips=strips,
        masks=torch.empty((num_superblocks, num_classes), dtype=torch.int64, device=device),
        keys=torch.empty((num_superblocks, num_classes), dtype=torch.int32, device=device),
        offsets=torch.empty((num_superblocks, num_classes), dtype=torch.int32, device=device),
        class_mass=threshold.class_mass,
        mean_mass=threshold.mean_mass,
        mass_deviation=threshold.mass_deviation,
        sums=torch.empty((3, num_blocks, num_chunks), dtype=torch.float32, device=device),
        statistics=statistics,
        shape=(num_blocks, num_chunks),
    )
    launch(
        shares_histogram_kernel,
        (cdiv(num_classes, SHARES_HISTOGRAM["CHUNK"]),),
        strips_ptr=strips,
        weights_ptr=threshold.weights,
        class_mass_ptr=threshold.class_mass,
        threshold_ptr=threshold.value,
        counts_ptr=threshold.histogram[256:],
        V=num_classes,
        num_blocks=num_blocks,
        **SHARES_HISTOGRAM,
    )
    launch(
        kept_strips_kernel,
        (num_chunks,),
        strips_ptr=strips,
        weights_ptr=threshold.weights,
        **pointers(kept, "class_mass mean_mass mass_deviation"),
        threshold_ptr=threshold.value,
        num_kept_ptr=threshold.num_kept,
        shares_ptr=threshold.histogram[256:],
        masks_ptr=kept.masks,
        keys_ptr=kept.keys,
        offsets_ptr=kept.offsets,
        sums_ptr=kept.sums,
        counts_ptr=statistics,
        active_ptr=statistics[num_blocks * num_chunks :],
        V=num_classes,
        num_blocks=num_blocks,
        num_superblocks=num_superblocks,
        num_chunks=num_chunks,
        row_strips=ROW_STRIPS,
        num_warps=4,
        SUPERBLOCK=SUPERBLOCK,
        CHUNK=CHUNK,
        ROWS=ROWS_AT_ONCE,
    )
    return kept
