"""dC from the stored strips: tiles of classes that share token blocks, one owner a tile.

Most classes keep a strip in a few blocks only. Sorted by likeness (``selection``), classes with
like masks fall into one tile, and the tile walks the union of its blocks. Rows of classes with no
strip hold the tail alone.

The order is one for a group of 64 blocks: classes that are alike in one group are not in the next.
With one group a tile's sums end in registers. With more, the sums of the rows wait from one group
to the next (``sums``).
Shape legend: ``cut_cross_entropy.kernels``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.config import (
    Tiles,
    half_of_a_processor,
    rows_operand,
)
from cut_cross_entropy.kernels.launch import launch
from cut_cross_entropy.kernels.listing import Places
from cut_cross_entropy.kernels.primitives import load_rows
from cut_cross_entropy.kernels.selection import CHUNK, GROUP, Kept
from cut_cross_entropy.kernels.sums import Sums, load_sums, store_sums

BLOCK_C = 128  # classes a tile
BLOCK_K = 64  # tokens a step


@triton.jit(do_not_specialize=["order_ptr", "masks_ptr", "num_listed", "num_tiles"])
def union_kernel(
    order_ptr,  # (groups, classes) class ids, like masks side by side
    masks_ptr,  # (groups, V)
    unions_ptr,  # (groups, tiles, GROUP) out: blocks of the union, in order
    sizes_ptr,  # (groups, tiles) out
    num_listed,
    V,
    num_tiles,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The token blocks that a tile of classes touches in one group."""
    tile = tl.program_id(0)
    group = tl.program_id(1)
    places = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = places < num_listed
    listed = order_ptr + tl.cast(group, tl.int64) * num_listed + places
    classes = tl.load(listed, mask=inside, other=0)
    masks = tl.load(masks_ptr + tl.cast(group, tl.int64) * V + classes, mask=inside, other=0)
    bits = tl.arange(0, GROUP)
    members = ((masks[:, None] >> bits[None, :].to(tl.int64)) & 1).to(tl.int32)
    used = tl.max(members, 0)
    place = tl.cumsum(used, 0) - 1
    row = group * num_tiles + tile
    tl.store(unions_ptr + row * GROUP + place, bits, mask=used > 0)
    tl.store(sizes_ptr + row, tl.sum(used, 0))


# Rows of tables are aligned or not from one group to the next.
_UNALIGNED = [
    "order_ptr", "masks_ptr", "offsets_ptr", "unions_ptr", "sizes_ptr", "chunk_starts_ptr",
]  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "num_listed", "N", "first_block", "first_number", "first_class", "has_sums", *_UNALIGNED
    ]
)  # fmt: skip
def grad_c_kernel(
    grad_ptr,  # (K, BLOCK_T) scaled logit gradients, numbered by group and class
    e,  # (N, D)
    order_ptr,  # (classes,) of the group, like masks_ptr and the four that follow
    masks_ptr,  # (V,)
    offsets_ptr,  # (V,) see Kept
    unions_ptr,  # (tiles, GROUP)
    sizes_ptr,  # (tiles,)
    chunk_starts_ptr,  # (chunks,) number of a chunk's first strip
    scale_ptr,  # ()
    weights_ptr,  # (V,) of the tail; unused if PARTIAL, like the two that follow
    inverse_ptr,  # () 1 / sum of the weights
    mean_ptr,  # (D,) tail-weighted sum of e
    out_ptr,  # (V, D), out; sums or their upper bits (int16), in and out, if PARTIAL
    low_ptr,  # the next bits of the sums, in and out, see load_sums; only if LOW_BITS
    num_listed,
    N,
    D,
    first_block,
    first_number,
    first_class,
    stride_out,
    has_sums,
    PARTIAL: tl.constexpr,
    LOW_BITS: tl.constexpr,
    E_TMA: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One tile of classes, BLOCK_N features, one group of token blocks."""
    column = tl.program_id(0) * BLOCK_N
    tile = tl.program_id(1)
    places = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = places < num_listed
    classes = tl.load(order_ptr + places, mask=inside, other=0)
    total = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    lanes = tl.arange(0, BLOCK_K)
    parts: tl.constexpr = BLOCK_T // BLOCK_K
    masks = tl.load(masks_ptr + classes, mask=inside, other=0)
    # Strips of a class are numbered in the order of its blocks, which is that of the walk.
    number = tl.load(chunk_starts_ptr + classes // CHUNK, mask=inside, other=0) - first_number
    number += tl.load(offsets_ptr + classes, mask=inside, other=0)
    for i in range(tl.load(sizes_ptr + tile) * parts):
        bit = tl.load(unions_ptr + tile * GROUP + i // parts)
        kept = ((masks >> bit.to(tl.int64)) & 1) != 0
        part = i % parts
        # 32 bits reach: the stored strips are bounded in bytes
        grads = tl.load(
            grad_ptr + (number * BLOCK_T + part * BLOCK_K)[:, None] + lanes[None, :],
            mask=kept[:, None],
            other=0.0,
        )
        token = (first_block + bit) * BLOCK_T + part * BLOCK_K
        e_tile = load_rows(e, token, N, column, D, E_TMA, BLOCK_K, BLOCK_N)
        total = tl.dot(grads, e_tile, total, input_precision="ieee")
        number += (kept & (part == parts - 1)).to(tl.int32)
    columns = column + tl.arange(0, BLOCK_N)
    if PARTIAL:
        if has_sums:
            total += load_sums(
                out_ptr, low_ptr, classes, columns, inside, first_class, D, stride_out, LOW_BITS
            )
        store_sums(
            out_ptr, low_ptr, total, classes, column, inside, first_class, D, stride_out, LOW_BITS
        )
    else:
        weights = tl.load(weights_ptr + classes, mask=inside, other=0.0) * tl.load(inverse_ptr)
        mean = tl.load(mean_ptr + columns, mask=columns < D, other=0.0)
        total = total / tl.load(scale_ptr) + weights[:, None] * mean[None, :]
        here = inside[:, None] & (columns < D)[None, :]
        rows = classes.to(tl.int64)[:, None] * stride_out + columns[None, :]
        tl.store(out_ptr + rows, total.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["order_ptr", "num_rows", "first_class"])
def tail_rows_kernel(
    order_ptr,  # (rows,); unused if SUMS
    high_ptr,  # (V, D) sums or their upper bits, in the memory of the result; only if SUMS
    low_ptr,  # the next bits of the sums, see load_sums; only if LOW_BITS
    scale_ptr,  # (); only if SUMS
    weights_ptr,  # (V,)
    inverse_ptr,  # () 1 / sum of the weights
    mean_ptr,  # (D,)
    out_ptr,  # (V, D)
    num_rows,
    D,
    first_class,
    stride_out,
    SUMS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of the tail: alone for classes that keep no strip, else beside their sums."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    places = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = places < num_rows
    here = inside[:, None] & (columns < D)[None, :]
    if SUMS:
        classes = (first_class + places).to(tl.int64)
    else:
        classes = tl.load(order_ptr + places, mask=inside, other=0)
    weights = tl.load(weights_ptr + classes, mask=inside, other=0.0) * tl.load(inverse_ptr)
    mean = tl.load(mean_ptr + columns, mask=columns < D, other=0.0)
    values = weights[:, None] * mean[None, :]
    if SUMS:
        values += load_sums(
            high_ptr, low_ptr, classes, columns, inside, first_class, D, stride_out, LOW_BITS
        ) / tl.load(scale_ptr)
    rows = classes[:, None] * stride_out + columns[None, :]
    tl.store(out_ptr + rows, values.to(out_ptr.dtype.element_ty), mask=here)


def find_unions(order: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The token blocks of every tile of classes (groups, tiles, GROUP), and how many: int32.

    ``order`` (groups, classes) from :meth:`Kept.order`; tiles of idle classes alone touch none.
    """
    num_groups, num_listed = order.shape
    num_tiles = triton.cdiv(num_listed, BLOCK_C)
    unions = torch.empty((num_groups, num_tiles, GROUP), dtype=torch.int32, device=masks.device)
    sizes = torch.empty((num_groups, num_tiles), dtype=torch.int32, device=masks.device)
    launch(
        union_kernel,
        (num_tiles, num_groups),
        order,
        masks,
        unions,
        sizes,
        num_listed,
        masks.shape[1],
        num_tiles,
        BLOCK_C=BLOCK_C,
        GROUP=GROUP,
    )
    return unions, sizes


def grad_c(
    grads: Tensor,  # (K, 128)
    e: Tensor,  # (N, D)
    kept: Kept,
    places: Places,
    group: int,
    num_active: int,
    first_number: int,
    order: Tensor,  # (classes,) of the group, from Kept.order
    unions: tuple[Tensor, Tensor],  # of the group, from find_unions
    scale: Tensor,  # ()
    mean: Tensor | None,  # (D,); only without sums
    out: Tensor,  # (V, D)
    sums: Sums | None,
    tiles: Tiles,
) -> None:
    """Write the rows of the active classes of one group to ``out``, or add them to ``sums``.

    ``num_active`` classes in front of the order keep strips.
    """
    if num_active == 0:
        return
    dim = e.shape[1]
    block_n = min(tiles.block_n, max(32, triton.next_power_of_2(dim)))
    block_k = min(BLOCK_K, tiles.block_d)
    e_operand, e_tma = rows_operand(e, block_k, block_n, tiles)
    launch(
        grad_c_kernel,
        (triton.cdiv(dim, block_n), triton.cdiv(num_active, BLOCK_C)),
        grads,
        e_operand,
        order,
        kept.masks[group],
        kept.offsets[group],
        unions[0],
        unions[1],
        places.chunk_starts[group],
        scale,
        kept.weights,
        places.tail,
        mean,
        out if sums is None else sums.high,
        None if sums is None else sums.low,
        num_active,
        e.shape[0],
        dim,
        group * GROUP,
        first_number,
        0 if sums is None else sums.classes[0],
        out.stride(0),
        group > 0,
        PARTIAL=sums is not None,
        LOW_BITS=0 if sums is None else sums.low_bits,
        E_TMA=e_tma,
        BLOCK_C=BLOCK_C,
        BLOCK_K=block_k,
        BLOCK_T=BLOCK_T,
        BLOCK_N=block_n,
        GROUP=GROUP,
        CHUNK=CHUNK,
        **half_of_a_processor(e.device, tiles),
    )


def write_rest(
    kept: Kept,
    places: Places,
    idle: Tensor | None,  # (classes,) without a strip; only without sums
    scale: Tensor,  # ()
    mean: Tensor,  # (D,)
    out: Tensor,  # (V, D)
    sums: Sums | None,
) -> None:
    """Write the rows that hold the tail alone, or all rows of the sums with their tail."""
    dim = out.shape[1]
    num_rows = idle.shape[0] if idle is not None else 0
    if sums is not None:
        num_rows = sums.classes[1] - sums.classes[0]
    if num_rows == 0:
        return
    block_r, block_d = 32, min(512, triton.next_power_of_2(dim))
    launch(
        tail_rows_kernel,
        (triton.cdiv(dim, block_d), triton.cdiv(num_rows, block_r)),
        idle,
        None if sums is None else sums.high,
        None if sums is None else sums.low,
        scale,
        kept.weights,
        places.tail,
        mean,
        out,
        num_rows,
        dim,
        0 if sums is None else sums.classes[0],
        out.stride(0),
        SUMS=sums is not None,
        LOW_BITS=0 if sums is None else sums.low_bits,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
    )
