"""Block sizes, descriptors and launch options by architecture: how a stage runs on a device.

Nothing is tuned at run time: the capability of the device and the shared memory of a block choose a
row of the table, whose last row fits 64 KiB. Shape legend: ``cut_cross_entropy.kernels``.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cut_cross_entropy.constants import BLOCK_TOKENS
from cut_cross_entropy.device_support import triton_version
from cut_cross_entropy.kernels.launch import planned_device

SWIZZLE_BYTES = 34 * 2**20
"""Embeddings of the token blocks that are processed together; an L2 cache holds them."""


@dataclass(frozen=True)
class Tiles:
    """Block sizes of the matrix products.

    Args:
        block_v: classes per tile; a multiple of 128.
        block_d: features per step.
        num_warps, num_stages: launch options of the kernels.
        block_n: columns per tile of dE or dC.
        use_tma: whether to load tiles by tensor descriptors where the strides allow it.
        adds_low_rank: whether a tile may end with the product of an adapter's columns.
    """

    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    block_n: int
    use_tma: bool
    adds_low_rank: bool = True


WITHOUT_TMA = 160 * 2**10  # most bytes of shared memory used without descriptors

# (smallest shared memory of a block in bytes, tiles); the first row that fits is taken
_TABLE = (
    (220 * 2**10, Tiles(256, 64, 8, 4, 128, use_tma=True)),  # sm_90, sm_100
    (WITHOUT_TMA, Tiles(128, 64, 8, 3, 128, use_tma=False)),  # sm_80
    (99 * 2**10, Tiles(128, 32, 8, 3, 128, use_tma=False)),  # sm_86, sm_89, sm_120
    (0, Tiles(128, 32, 8, 2, 64, use_tma=False)),  # 64 KiB: AMD CDNA
)


def tiles_for(shared_memory: int, major: int = 9) -> Tiles:
    """Return the row for a block's shared memory in bytes and a major compute capability."""
    if major < 9 or not _has_host_descriptors():
        shared_memory = min(shared_memory, WITHOUT_TMA)
    tiles = next(tiles for needed, tiles in _TABLE if shared_memory >= needed)
    if major >= 10 and tiles.block_v > 128:
        # Accumulators live in a memory of their own there; the part that leaves it at once has to
        # fit the registers. Chosen from the compiler's report of spills, not from a measurement.
        # A second product into one, under a condition, is more than the compiler takes there.
        return dataclasses.replace(tiles, block_v=128, adds_low_rank=False)
    return tiles


@functools.cache
def _tiles_of(device: torch.device) -> Tiles:
    if device.type == "cpu":  # Triton's interpreter
        return Tiles(128, 32, 4, 2, 64, use_tma=False)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 64 * 2**10)
    return tiles_for(shared, properties.major)


def tiles_on(device: torch.device) -> Tiles:
    """Return the block sizes for ``device``."""
    return _tiles_of(planned_device(device))


@functools.cache
def _has_host_descriptors() -> bool:
    return (triton_version() or (0,)) >= (3, 4)


def rows_operand(tensor: Tensor, rows: int, columns: int, tiles: Tiles) -> Any:
    """Return the operand for contiguous rows: a tensor descriptor where the device loads by them.

    Descriptors need a 16-byte aligned start and row; otherwise the operand is the tensor.
    """
    aligned = tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0
    if not (tiles.use_tma and aligned and tensor.numel() > 0):
        return tensor
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, [rows, columns])


def product_arguments(e: Tensor, c: Tensor, tiles: Tiles) -> dict[str, Any]:
    """Return the arguments of a kernel that multiplies tiles of ``e`` (N, D) and ``c`` (V, D)."""
    return {
        "e": rows_operand(e, BLOCK_TOKENS, tiles.block_d, tiles),
        "c": rows_operand(c, tiles.block_v, tiles.block_d, tiles),
        "D": e.shape[1],
        "BLOCK_T": BLOCK_TOKENS,
        "BLOCK_V": tiles.block_v,
        "BLOCK_D": tiles.block_d,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def swizzle_width(num_blocks: int, e: Tensor) -> int:
    """Return how many token blocks to process together: as many as stay in the L2 cache."""
    fitting = SWIZZLE_BYTES // (BLOCK_TOKENS * e.shape[1] * e.element_size())
    return min(num_blocks, max(8, 1 << min(5, max(0, fitting.bit_length() - 1))))


class Programs(NamedTuple):
    """Programs of a kernel, each of which takes a block of tokens and a segment of the classes.

    Args:
        num_blocks: of tokens.
        segment_tiles: tiles of classes in a segment; the last one may have fewer.
        num_segments: of the classes.
        swizzle_width: blocks whose programs run together, see ``swizzle_program``.
    """

    num_blocks: int
    segment_tiles: int
    num_segments: int
    swizzle_width: int

    @property
    def grid(self) -> tuple[int]:
        """The grid of the launch."""
        return (self.num_blocks * self.num_segments,)


def two_per_sm(device: torch.device, tiles: Tiles) -> dict[str, int]:
    """Return launch options with which two programs share a multiprocessor.

    They are for kernels whose loops are too short to hide the latency of their gathered loads; the
    second program hides it. On NVIDIA that takes at most 128 registers per thread.
    """
    options = {"num_warps": 8, "num_stages": min(3, tiles.num_stages)}
    if planned_device(device).type == "cuda" and torch.version.hip is None:
        options["maxnreg"] = 128
    return options
