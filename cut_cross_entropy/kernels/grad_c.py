"""dC from the stored strips: tiles of classes that share token blocks, one owner a tile.

Most classes keep a strip in a few blocks only. Sorted by likeness (``selection``), classes with
like masks fall into one tile, and the tile walks the union of its blocks. Rows of classes with no
strip hold the tail alone. Shape legend: ``cut_cross_entropy.kernels``.
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
from cut_cross_entropy.kernels.listing import Places
from cut_cross_entropy.kernels.primitives import load_rows
from cut_cross_entropy.kernels.selection import CHUNK, GROUP, Kept

BLOCK_C = 128  # classes a tile
BLOCK_K = 64  # tokens a step


@triton.jit
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


@triton.jit
def grad_c_kernel(
    grad_ptr,  # (K, BLOCK_T) scaled logit gradients, numbered by class
    e,  # (N, D)
    order_ptr,  # (classes,) of the group, like masks_ptr and the three that follow
    masks_ptr,  # (V,)
    offsets_ptr,  # (V,) number of a class's first strip in its chunk
    unions_ptr,  # (tiles, GROUP)
    sizes_ptr,  # (tiles,)
    chunk_starts_ptr,  # (chunks,) number of a chunk's first strip
    scale_ptr,  # ()
    weights_ptr,  # (V,) of the tail; unused if PARTIAL, like the two that follow
    inverse_ptr,  # () 1 / sum of the weights
    mean_ptr,  # (D,) tail-weighted sum of e
    out_ptr,  # (V, D); (classes, D) float32 sums, in and out, if PARTIAL
    num_listed,
    N,
    D,
    first_block,
    first_number,
    first_class,
    stride_out,
    PARTIAL: tl.constexpr,
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
    here = inside[:, None] & (columns < D)[None, :]
    if PARTIAL:
        rows = out_ptr + (classes - first_class).to(tl.int64)[:, None] * D + columns[None, :]
        tl.store(rows, tl.load(rows, mask=here, other=0.0) + total, mask=here)
    else:
        weights = tl.load(weights_ptr + classes, mask=inside, other=0.0) * tl.load(inverse_ptr)
        mean = tl.load(mean_ptr + columns, mask=columns < D, other=0.0)
        total = total / tl.load(scale_ptr) + weights[:, None] * mean[None, :]
        tl.store(
            out_ptr + classes.to(tl.int64)[:, None] * stride_out + columns[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=here,
        )


@triton.jit
def tail_rows_kernel(
    order_ptr,  # (rows,); unused if SUMS
    sums_ptr,  # (rows, D) float32, of consecutive classes from first_class on; only if SUMS
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
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of the tail: alone for classes that keep no strip, else beside their sums."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    places = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = places < num_rows
    here = inside[:, None] & (columns < D)[None, :]
    if SUMS:  # noqa: SIM108 (order_ptr is None then)
        classes = first_class + places
    else:
        classes = tl.load(order_ptr + places, mask=inside, other=0)
    weights = tl.load(weights_ptr + classes, mask=inside, other=0.0) * tl.load(inverse_ptr)
    mean = tl.load(mean_ptr + columns, mask=columns < D, other=0.0)
    values = weights[:, None] * mean[None, :]
    if SUMS:
        rows = sums_ptr + places.to(tl.int64)[:, None] * D + columns[None, :]
        values += tl.load(rows, mask=here, other=0.0) / tl.load(scale_ptr)
    tl.store(
        out_ptr + classes.to(tl.int64)[:, None] * stride_out + columns[None, :],
        values.to(out_ptr.dtype.element_ty),
        mask=here,
    )


def find_unions(order: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The token blocks of every tile of classes (groups, tiles, GROUP), and how many: int32.

    ``order`` (groups, classes) from :meth:`Kept.order`; tiles of idle classes alone touch none.
    """
    num_groups, num_listed = order.shape
    num_tiles = triton.cdiv(num_listed, BLOCK_C)
    unions = torch.empty((num_groups, num_tiles, GROUP), dtype=torch.int32, device=masks.device)
    sizes = torch.empty((num_groups, num_tiles), dtype=torch.int32, device=masks.device)
    union_kernel[(num_tiles, num_groups)](
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


def classes_at_once(dim: int, memory: int) -> int:
    """How many classes, a multiple of CHUNK, have float32 sums of dim features in memory."""
    return max(1, memory // (4 * dim * CHUNK)) * CHUNK


def grad_c(
    grads: Tensor,  # (K, 128)
    e: Tensor,  # (N, D)
    kept: Kept,
    places: Places,
    classes: tuple[int, int],
    first_number: int,
    order: Tensor,  # (groups, classes) from Kept.order
    unions: tuple[Tensor, Tensor],  # from find_unions
    active: list[int],
    scale: Tensor,  # ()
    mean: Tensor,  # (D,)
    out: Tensor,  # (V, D)
    tiles: Tiles,
) -> None:
    """Write the rows of a range of classes to ``out``.

    ``active`` says how many classes in front of each group's order keep strips there. With one
    group a tile's sums end in registers. With more, classes that are alike in one group are not in
    the next, so each has its own tiles, and the sums of the range are kept in float32 between them.
    """
    num_groups, dim = order.shape[0], e.shape[1]
    rows = classes[1] - classes[0]
    sums = None if num_groups == 1 else e.new_zeros((rows, dim), dtype=torch.float32)
    block_n = min(tiles.block_n, max(32, triton.next_power_of_2(dim)))
    block_k = min(BLOCK_K, tiles.block_d)
    e_operand, e_tma = rows_operand(e, block_k, block_n, tiles)
    for group in range(num_groups):
        if active[group] == 0:
            continue
        grad_c_kernel[(triton.cdiv(dim, block_n), triton.cdiv(active[group], BLOCK_C))](
            grads,
            e_operand,
            order[group],
            kept.masks[group],
            kept.offsets[group],
            unions[0][group],
            unions[1][group],
            places.chunk_starts,
            scale,
            kept.weights,
            places.tail,
            mean,
            out if sums is None else sums,
            active[group],
            e.shape[0],
            dim,
            group * GROUP,
            first_number,
            classes[0],
            out.stride(0),
            PARTIAL=sums is not None,
            E_TMA=e_tma,
            BLOCK_C=BLOCK_C,
            BLOCK_K=block_k,
            BLOCK_T=BLOCK_T,
            BLOCK_N=block_n,
            GROUP=GROUP,
            CHUNK=CHUNK,
            **half_of_a_processor(e.device, tiles),
        )
    idle = order[0, active[0] :] if sums is None else None
    num_rows = rows if idle is None else idle.shape[0]
    if num_rows:
        block_r, block_d = 32, min(512, triton.next_power_of_2(dim))
        tail_rows_kernel[(triton.cdiv(dim, block_d), triton.cdiv(num_rows, block_r))](
            idle,
            sums,
            scale,
            kept.weights,
            places.tail,
            mean,
            out,
            num_rows,
            dim,
            classes[0],
            out.stride(0),
            SUMS=sums is not None,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
        )
