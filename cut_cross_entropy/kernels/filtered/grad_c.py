"""dC from the stored strips: tiles of classes that share token blocks, one owner per tile.

Most classes keep a strip in a few blocks only. Clustered by the selection's sort key, classes with
similar masks fall into one tile, and the tile reads the union of its blocks. Rows of classes with
no strip hold the tail alone. A tile adds the tail of a group of classes, which are sorted apart;
where two groups meet, some rows have the tail of their neighbours.

The order belongs to one superblock: classes that are similar in one are not in the next. With one
superblock a tile's sums end in registers. With more, the sums of the rows are stored from one
superblock to the next (``partial_sums``). Shape legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T, SUPERBLOCK
from cut_cross_entropy.kernels.block_sizes import rows_operand, tiles_on, two_per_sm
from cut_cross_entropy.kernels.filtered.flat import FlatTokens, flat_arguments
from cut_cross_entropy.kernels.filtered.index import Range
from cut_cross_entropy.kernels.filtered.partial_sums import PartialSums
from cut_cross_entropy.kernels.filtered.selection import CHUNK, Kept
from cut_cross_entropy.kernels.filtered.strips import Part, StoredStrips
from cut_cross_entropy.kernels.filtered.tail import BlockSums
from cut_cross_entropy.kernels.launch import cdiv, launch, next_power_of_2, pointers
from cut_cross_entropy.kernels.tokens import BackwardTokens
from cut_cross_entropy.kernels.triton.filtered.grad_c import (
    grad_c_kernel,
    list_dropped_kernel,
    tail_rows_kernel,
)

BLOCK_C = 128  # classes per tile
BLOCK_K = 64  # tokens per step
BLOCK_R = 64  # rows of the tail at once
LISTED = 2**17  # classes whose dropped masses are listed at once, 8 MiB; whole tiles


@dataclass(frozen=True)
class ClassOrder:
    """Order of a range of classes in each superblock.

    Args:
        classes: (superblocks, classes) int64 class ids, see :meth:`Kept.order`.
        first: the superblock of the first row.
    """

    classes: Tensor
    first: int = 0

    @classmethod
    def of(cls, kept: Kept, classes: Range, superblock: int | None = None) -> "ClassOrder":
        """Order a range of classes, in one superblock or in all."""
        first = 0 if superblock is None else superblock
        rows = slice(first, None if superblock is None else first + 1)
        return cls(kept.order(*classes, rows), first)


@dataclass(frozen=True)
class ClassRows:
    """Rows of dC that are being computed.

    Args:
        out: (V, D) dC.
        sums: partial sums between superblocks; None with one superblock.
        flat: flat tokens to add to the rows when they are final, if any.
    """

    out: Tensor
    sums: PartialSums | None
    flat: FlatTokens | None


def write_grad_c(
    tokens: BackwardTokens,
    stored: StoredStrips,
    kept: Kept,
    part: Part,
    *,
    order: ClassOrder,
    num_active: int,
    block_sums: BlockSums | None,  # only without partial sums
    rows: ClassRows,
) -> None:
    """Write the rows of the active classes of one superblock, or add them to the sums.

    The first ``num_active`` classes of the order keep strips in the superblock.
    """
    if num_active == 0:
        return
    e, index, sums, tiles = tokens.e, stored.strips.index, rows.sums, tiles_on(tokens.e.device)
    dim, options = e.shape[1], two_per_sm(e.device, tiles)
    block_n = min(tiles.block_n, max(32, next_power_of_2(dim)))
    if sums is None and tiles.block_v > BLOCK_C and dim % (2 * block_n) == 0:
        # One program of twice the columns reads the logit gradients half as often.
        block_n *= 2
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    block_k = min(BLOCK_K, tiles.block_d)
    e_operand = rows_operand(e, block_k, block_n, tiles)
    active = order.classes[part.superblock - order.first, :num_active]
    for listed in active.split(LISTED if sums is None else num_active):
        launch(
            grad_c_kernel,
            (cdiv(dim, block_n), cdiv(listed.shape[0], BLOCK_C)),
            grad_ptr=stored.grads,
            e=e_operand,
            order_ptr=listed,
            masks_ptr=kept.masks[part.superblock],
            offsets_ptr=kept.offsets[part.superblock],
            chunk_starts_ptr=index.chunk_starts[part.superblock],
            scale_ptr=tokens.scale,
            dropped_ptr=None if sums is not None else list_dropped(kept, listed),
            **tail_arguments(block_sums, kept),
            out_ptr=rows.out if sums is None else sums.high,
            low_ptr=None if sums is None else sums.low,
            num_listed=listed.shape[0],
            N=e.shape[0],
            V=rows.out.shape[0],
            D=dim,
            first_block=part.superblock * SUPERBLOCK,
            first_slot=part.first_slot + stored.first_slot,
            first_class=0 if sums is None else sums.classes[0],
            stride_out=rows.out.stride(0),
            has_sums=part.superblock > 0,
            PARTIAL=sums is not None,
            LOW_BITS=0 if sums is None else sums.low_bits,
            BF16=e.dtype == torch.bfloat16,
            BLOCK_C=BLOCK_C,
            BLOCK_K=block_k,
            BLOCK_T=BLOCK_T,
            BLOCK_N=block_n,
            SUPERBLOCK=SUPERBLOCK,
            CHUNK=CHUNK,
            **flat_arguments(rows.flat if sums is None else None),
            **options,
        )


def tail_arguments(block_sums: BlockSums | None, kept: Kept) -> dict[str, object]:
    """Return the arguments of a kernel that calls :func:`tail_of`."""
    return {
        "block_sums_ptr": None if block_sums is None else block_sums.rows,
        "stride_sums": 0 if block_sums is None else block_sums.rows.stride(0),
        **pointers(kept, "class_mass mean_mass mass_deviation"),
    }


def list_dropped(kept: Kept, classes: Tensor) -> Tensor:
    """Return the masses of the dropped strips of ``classes`` in the only superblock.

    The result is (classes, SUPERBLOCK) uint8, like the high byte of the strips; 0 where kept. Rows
    of classes that keep no strip may be left as they are.
    """
    shape = (classes.shape[0], SUPERBLOCK)
    dropped = torch.empty(shape, dtype=torch.uint8, device=classes.device)
    block_r = 64
    launch(
        list_dropped_kernel,
        (cdiv(classes.shape[0], block_r),),
        order_ptr=classes,
        strips_ptr=kept.strips,
        masks_ptr=kept.masks,
        out_ptr=dropped,
        num_listed=classes.shape[0],
        V=kept.strips.shape[1],
        num_blocks=kept.shape[0],
        SUPERBLOCK=SUPERBLOCK,
        BLOCK_R=block_r,
    )
    return dropped


def write_tail_rows(
    tokens: BackwardTokens,
    kept: Kept,
    block_sums: BlockSums,
    rows: ClassRows,
    classes: Tensor,  # (classes,) int64, sorted by group
    first: int = 0,  # class without a strip in this order
) -> None:
    """Write the rows of classes without a strip, or all rows of the sums with their tail."""
    classes = classes[first // BLOCK_R * BLOCK_R :]  # the same tiles, whether it is known or not
    out, sums = rows.out, rows.sums
    dim, num_rows = out.shape[1], classes.shape[0]
    if num_rows == 0:
        return
    block_d = min(128, max(16, next_power_of_2(dim)))
    launch(
        tail_rows_kernel,
        (cdiv(dim, block_d) if sums is not None else 1, cdiv(num_rows, BLOCK_R)),
        high_ptr=None if sums is None else sums.high,
        low_ptr=None if sums is None else sums.low,
        scale_ptr=tokens.scale,
        order_ptr=classes,
        strips_ptr=kept.strips,
        masks_ptr=kept.masks,
        **tail_arguments(block_sums, kept),
        out_ptr=out,
        num_rows=num_rows,
        V=out.shape[0],
        D=dim,
        first_class=0 if sums is None else sums.classes[0],
        num_superblocks=kept.num_superblocks,
        num_blocks=kept.shape[0],
        stride_out=out.stride(0),
        SUMS=sums is not None,
        LOW_BITS=0 if sums is None else sums.low_bits,
        BF16=tokens.e.dtype == torch.bfloat16,
        SUPERBLOCK=SUPERBLOCK,
        BLOCK_R=BLOCK_R,
        BLOCK_D=block_d,
        **flat_arguments(rows.flat),
    )
