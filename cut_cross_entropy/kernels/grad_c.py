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
    order_ptr,  # (classes,) class ids, like masks side by side
    masks_ptr,  # (groups, V)
    unions_ptr,  # (tiles, groups, GROUP) out: blocks of the union, in order
    sizes_ptr,  # (tiles, groups) out
    num_listed,
    V,
    num_groups,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The token blocks that a tile of classes touches in one group."""
    tile = tl.program_id(0)
    group = tl.program_id(1)
    places = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = places < num_listed
    classes = tl.load(order_ptr + places, mask=inside, other=0)
    masks = tl.load(masks_ptr + tl.cast(group, tl.int64) * V + classes, mask=inside, other=0)
    bits = tl.arange(0, GROUP)
    members = ((masks[:, None] >> bits[None, :].to(tl.int64)) & 1).to(tl.int32)
    used = tl.max(members, 0)
    place = tl.cumsum(used, 0) - 1
    row = tile * num_groups + group
    tl.store(unions_ptr + row * GROUP + place, bits, mask=used > 0)
    tl.store(sizes_ptr + row, tl.sum(used, 0))


@triton.jit
def grad_c_kernel(
    grad_ptr,  # (K, BLOCK_T) scaled logit gradients, numbered by class
    e,  # (N, D)
    order_ptr,  # (classes,)
    masks_ptr,  # (groups, V)
    offsets_ptr,  # (groups, V) number of a class's first strip in its chunk
    chunk_starts_ptr,  # (chunks,) number of a chunk's first strip
    unions_ptr,  # (tiles, groups, GROUP)
    sizes_ptr,  # (tiles, groups)
    scale_ptr,  # ()
    weights_ptr,  # (V,) of the tail
    inverse_ptr,  # () 1 / sum of the weights
    mean_ptr,  # (D,) tail-weighted sum of e
    out_ptr,  # (V, D)
    num_listed,
    N,
    V,
    D,
    num_groups,
    first_number,
    stride_out,
    E_TMA: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One tile of classes, BLOCK_N features."""
    column = tl.program_id(0) * BLOCK_N
    tile = tl.program_id(1)
    places = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = places < num_listed
    classes = tl.load(order_ptr + places, mask=inside, other=0)
    total = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    lanes = tl.arange(0, BLOCK_K)
    parts: tl.constexpr = BLOCK_T // BLOCK_K
    first = tl.load(chunk_starts_ptr + classes // CHUNK, mask=inside, other=0) - first_number
    for group in range(num_groups):
        member = tl.cast(group, tl.int64) * V + classes
        masks = tl.load(masks_ptr + member, mask=inside, other=0)
        # Strips of a class are numbered in the order of its blocks, which is that of the walk.
        number = first + tl.load(offsets_ptr + member, mask=inside, other=0)
        row = tile * num_groups + group
        for i in range(tl.load(sizes_ptr + row) * parts):
            bit = tl.load(unions_ptr + row * GROUP + i // parts)
            kept = ((masks >> bit.to(tl.int64)) & 1) != 0
            part = i % parts
            # 32 bits reach: the stored strips are bounded in bytes
            grads = tl.load(
                grad_ptr + (number * BLOCK_T + part * BLOCK_K)[:, None] + lanes[None, :],
                mask=kept[:, None],
                other=0.0,
            )
            token = (group * GROUP + bit) * BLOCK_T + part * BLOCK_K
            e_tile = load_rows(e, token, N, column, D, E_TMA, BLOCK_K, BLOCK_N)
            total = tl.dot(grads, e_tile, total, input_precision="ieee")
            number += (kept & (part == parts - 1)).to(tl.int32)
    columns = column + tl.arange(0, BLOCK_N)
    weights = tl.load(weights_ptr + classes, mask=inside, other=0.0) * tl.load(inverse_ptr)
    mean = tl.load(mean_ptr + columns, mask=columns < D, other=0.0)
    total = total / tl.load(scale_ptr) + weights[:, None] * mean[None, :]
    tl.store(
        out_ptr + classes.to(tl.int64)[:, None] * stride_out + columns[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (columns < D)[None, :],
    )


@triton.jit
def tail_rows_kernel(
    order_ptr,  # (rows,)
    weights_ptr,  # (V,)
    inverse_ptr,  # () 1 / sum of the weights
    mean_ptr,  # (D,)
    out_ptr,  # (V, D)
    num_rows,
    D,
    stride_out,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of classes that keep no strip: the tail alone."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    places = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = places < num_rows
    classes = tl.load(order_ptr + places, mask=inside, other=0)
    weights = tl.load(weights_ptr + classes, mask=inside, other=0.0) * tl.load(inverse_ptr)
    mean = tl.load(mean_ptr + columns, mask=columns < D, other=0.0)
    tl.store(
        out_ptr + classes.to(tl.int64)[:, None] * stride_out + columns[None, :],
        (weights[:, None] * mean[None, :]).to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (columns < D)[None, :],
    )


def find_unions(order: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The token blocks of every tile of classes (tiles, groups, GROUP), and how many: int32.

    ``order`` (classes,) from :meth:`Kept.order`; tiles of idle classes alone touch none.
    """
    num_groups, num_classes = masks.shape
    num_tiles = triton.cdiv(order.shape[0], BLOCK_C)
    unions = torch.empty((num_tiles, num_groups, GROUP), dtype=torch.int32, device=masks.device)
    sizes = torch.empty((num_tiles, num_groups), dtype=torch.int32, device=masks.device)
    union_kernel[(num_tiles, num_groups)](
        order,
        masks,
        unions,
        sizes,
        order.shape[0],
        num_classes,
        num_groups,
        BLOCK_C=BLOCK_C,
        GROUP=GROUP,
    )
    return unions, sizes


def grad_c(
    grads: Tensor,  # (K, 128)
    e: Tensor,  # (N, D)
    kept: Kept,
    places: Places,
    first_number: int,
    order: Tensor,  # (classes,) from Kept.order
    unions: tuple[Tensor, Tensor],  # from find_unions
    num_active: int,
    scale: Tensor,  # ()
    mean: Tensor,  # (D,)
    out: Tensor,  # (V, D)
    tiles: Tiles,
) -> None:
    """Write the rows of ``out`` in ``order``, the first ``num_active`` of which keep strips."""
    num_groups, num_classes = kept.masks.shape
    num_idle, dim = order.shape[0] - num_active, e.shape[1]
    block_n = min(tiles.block_n, max(32, triton.next_power_of_2(dim)))
    block_k = min(BLOCK_K, tiles.block_d)
    if num_active:
        e_operand, e_tma = rows_operand(e, block_k, block_n, tiles)
        grad_c_kernel[(triton.cdiv(dim, block_n), triton.cdiv(num_active, BLOCK_C))](
            grads,
            e_operand,
            order,
            kept.masks,
            kept.offsets,
            places.chunk_starts,
            *unions,
            scale,
            kept.weights,
            places.tail,
            mean,
            out,
            num_active,
            e.shape[0],
            num_classes,
            dim,
            num_groups,
            first_number,
            out.stride(0),
            E_TMA=e_tma,
            BLOCK_C=BLOCK_C,
            BLOCK_K=block_k,
            BLOCK_T=BLOCK_T,
            BLOCK_N=block_n,
            GROUP=GROUP,
            CHUNK=CHUNK,
            **half_of_a_processor(e.device, tiles),
        )
    if num_idle:
        block_r, block_d = 32, min(512, triton.next_power_of_2(dim))
        tail_rows_kernel[(triton.cdiv(dim, block_d), triton.cdiv(num_idle, block_r))](
            order[num_active:],
            kept.weights,
            places.tail,
            mean,
            out,
            num_idle,
            dim,
            out.stride(0),
            BLOCK_R=block_r,
            BLOCK_D=block_d,
        )
