"""Logit gradients of the kept strips, recomputed and stored compactly.

A program takes BLOCK_S strips of one block, gathers their rows of c, makes the logits again and
writes ``(a * p - b * onehot) * slope`` in the compute dtype, one row of 128 tokens a strip, and for
every token the probability that its kept strips hold. Shape legend: ``cut_cross_entropy.kernels``.
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
from cut_cross_entropy.kernels.listing import TILE, Places, StripList
from cut_cross_entropy.kernels.primitives import (
    load_rows,
    logit_slope,
    popcount,
    transform_logits,
)
from cut_cross_entropy.kernels.selection import CHUNK, Kept


@triton.jit(do_not_specialize=["first_block"])
def strip_gradients_kernel(
    e,  # (N, D)
    c_ptr,  # (V, D)
    bias_ptr,  # (V,)
    lse_ptr,  # (N,) log2; +inf: no token
    a_ptr,  # (N,)
    b_ptr,  # (N,)
    targets_ptr,  # (N,)
    scale_ptr,  # ()
    classes_ptr,  # (K,)
    numbers_ptr,  # (K,)
    starts_ptr,  # (blocks + 1,)
    tile_block_ptr,  # (tiles,) block of a tile, counted from first_block
    tile_start_ptr,  # (tiles,) its first strip
    grad_ptr,  # (K, BLOCK_T) out
    bias_grad_ptr,  # (K,) out
    held_ptr,  # (tiles, BLOCK_T) out
    N,
    D,
    softcap,
    first_block,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    E_TMA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of strips."""
    tile = tl.program_id(0)
    local_block = tl.load(tile_block_ptr + tile)
    strips = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_S)
    inside = strips < tl.load(starts_ptr + local_block + 1)
    classes = tl.load(classes_ptr + strips, mask=inside, other=0)
    rows = c_ptr + classes.to(tl.int64)[:, None] * D
    first_token = (first_block + local_block) * BLOCK_T
    features = tl.arange(0, BLOCK_D)
    product = tl.zeros((BLOCK_S, BLOCK_T), tl.float32)
    for d in range(0, D, BLOCK_D):
        c_tile = tl.load(
            rows + (d + features)[None, :],
            mask=inside[:, None] & (d + features < D)[None, :],
            other=0.0,
        )
        e_tile = load_rows(e, first_token, N, d, D, E_TMA, BLOCK_T, BLOCK_D)
        product = tl.dot(c_tile, e_tile.T, product, input_precision="ieee")

    tokens = first_token + tl.arange(0, BLOCK_T)
    is_token = tokens < N
    lse = tl.load(lse_ptr + tokens, mask=is_token, other=float("inf"))
    a = tl.load(a_ptr + tokens, mask=is_token, other=0.0)
    b = tl.load(b_ptr + tokens, mask=is_token, other=0.0)
    targets = tl.load(targets_ptr + tokens, mask=is_token, other=-1)
    scale = tl.load(scale_ptr)
    logits = transform_logits(product, bias_ptr, classes, inside, softcap, HAS_BIAS, SOFTCAP)
    p = tl.exp2(logits - lse[None, :])
    onehot = (classes[:, None] == targets[None, :]) & inside[:, None]
    grad = p * a[None, :] - tl.where(onehot, b[None, :], 0.0)
    if SOFTCAP:
        slope = tl.where(inside[:, None], logit_slope(logits, softcap), 0.0)
        grad = grad * slope
    tl.store(held_ptr + tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.sum(p, 0))
    numbers = tl.load(numbers_ptr + strips, mask=inside, other=0).to(tl.int64)
    if BIAS_GRAD:
        tl.store(bias_grad_ptr + numbers, tl.sum(grad, 1), mask=inside)
    out = grad_ptr + numbers[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    tl.store(out, (grad * scale).to(grad_ptr.dtype.element_ty), mask=inside[:, None])


def strip_gradients(
    e: Tensor,  # (N, D)
    c: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    lse: Tensor,  # (N,) log2
    a: Tensor,  # (N,)
    b: Tensor,  # (N,)
    targets: Tensor,  # (N,)
    scale: Tensor,  # ()
    strips: StripList,
    softcap: float | None,
    tiles: Tiles,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logit gradients (K, 128) times ``scale``, their sums (K,), and what each token's strips hold.

    The last is (tiles, 128): the probability of the classes of each tile of strips.
    """
    num_strips, num_tiles = strips.classes.shape[0], strips.tile_block.shape[0]
    device = e.device
    grads = torch.empty((num_strips, BLOCK_T), dtype=e.dtype, device=device)
    bias_grads = torch.empty(num_strips if bias_grad else 0, dtype=torch.float32, device=device)
    held = torch.empty((num_tiles, BLOCK_T), dtype=torch.float32, device=device)
    if num_tiles == 0:
        return grads, bias_grads, held
    e_operand, e_tma = rows_operand(e, BLOCK_T, tiles.block_d, tiles)
    launch(
        strip_gradients_kernel,
        (num_tiles,),
        e_operand,
        c,
        bias,
        lse,
        a,
        b,
        targets,
        scale,
        strips.classes,
        strips.numbers,
        strips.places.block_starts,
        strips.tile_block,
        strips.tile_start,
        grads,
        bias_grads,
        held,
        e.shape[0],
        e.shape[1],
        softcap or 0.0,
        strips.first_block,
        HAS_BIAS=bias is not None,
        SOFTCAP=softcap is not None,
        BIAS_GRAD=bias_grad,
        E_TMA=e_tma,
        BLOCK_T=BLOCK_T,
        BLOCK_S=TILE,
        BLOCK_D=tiles.block_d,
        **half_of_a_processor(device, tiles),
    )
    return grads, bias_grads, held


@triton.jit(
    do_not_specialize=[
        "masks_ptr",
        "offsets_ptr",
        "chunk_starts_ptr",
        "first_class",
        "stop_class",
        "first_number",
    ]
)
def sum_classes_kernel(
    values_ptr,  # (K,) by strip, numbered by group and class
    masks_ptr,  # (V,) of one group, like the two that follow
    offsets_ptr,  # (V,) see Kept
    chunk_starts_ptr,  # (chunks,) number of a chunk's first strip
    out_ptr,  # (V,) float32, in, out
    first_class,
    stop_class,
    first_number,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the strips of each class in their order."""
    classes = first_class + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = classes < stop_class
    count = popcount(tl.load(masks_ptr + classes, mask=inside, other=0))
    start = tl.load(chunk_starts_ptr + classes // CHUNK, mask=inside, other=0) - first_number
    start += tl.load(offsets_ptr + classes, mask=inside, other=0)
    total = tl.load(out_ptr + classes, mask=inside, other=0.0)
    for i in range(tl.max(count, 0)):
        total += tl.load(values_ptr + start + i, mask=inside & (i < count), other=0.0)
    tl.store(out_ptr + classes, total, mask=inside)


def add_by_class(
    values: Tensor,  # (K,) of all strips that are stored
    kept: Kept,
    places: Places,
    group: int,
    first_number: int,
    classes: tuple[int, int],
    out: Tensor,  # (V,) float32, in, out
) -> None:
    """Add per-strip values of one group of blocks to the sums of their classes."""
    block = 128
    launch(
        sum_classes_kernel,
        (triton.cdiv(classes[1] - classes[0], block),),
        values,
        kept.masks[group],
        kept.offsets[group],
        places.chunk_starts[group],
        out,
        classes[0],
        classes[1],
        first_number,
        CHUNK=CHUNK,
        BLOCK=block,
    )
