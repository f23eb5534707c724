"""Logit gradients of the kept strips, recomputed and stored compactly.

A program takes TILE strips of one block, gathers their rows of c, recomputes the logits and writes
their gradients in the compute dtype, one row of 128 tokens per strip; and for every token the
probability mass that its kept strips hold. Shape legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.block_sizes import rows_operand, tiles_on, two_per_sm
from cut_cross_entropy.kernels.filtered.index import TILE, Range, StripList
from cut_cross_entropy.kernels.filtered.selection import CHUNK, Kept
from cut_cross_entropy.kernels.launch import cdiv, launch, pointers
from cut_cross_entropy.kernels.primitives import (
    gather_rows,
    load_rows,
    logit_gradient,
    low_rank_product,
    popcount,
    transform_logits,
)
from cut_cross_entropy.kernels.tokens import BackwardTokens
from cut_cross_entropy.problem import Problem, low_columns


@triton.jit
def stored_rows(grad_ptr, borrowed_ptr, slots, first_borrowed, BLOCK_T: tl.constexpr):
    """Return where the logit gradients of strips are stored, a pointer for each slot."""
    slots = slots.to(tl.int64)
    own = grad_ptr + slots * BLOCK_T
    borrowed = borrowed_ptr + (slots - first_borrowed) * BLOCK_T
    # Rows are aligned to 16 bytes, which Triton does not see through the choice.
    return tl.multiple_of(tl.where(slots < first_borrowed, own, borrowed), (16,))


@triton.jit(do_not_specialize=["num_tiles_ptr", "first_block", "first_borrowed"])
def strip_gradients_kernel(
    e,  # (N, D)
    c_ptr,  # (V, D)
    bias_ptr,  # (V,), or None
    low_e_ptr,  # (N, LOW_RANK)
    low_c_ptr,  # (V, LOW_RANK)
    lse_ptr,  # (N,) log2; +inf: no token
    a_ptr,  # (N,)
    b_ptr,  # (N,)
    targets_ptr,  # (N,)
    scale_ptr,  # ()
    eta_ptr,  # (N,), or None, like the one that follows
    multiplier_ptr,
    classes_ptr,  # (K,)
    slots_ptr,  # (K,)
    starts_ptr,  # (blocks + 1,)
    first_tile_ptr,  # (blocks + 1,)
    num_tiles_ptr,  # () int32, or None if there are as many as programs
    tile_block_ptr,  # (tiles,) block of each program's tile, counted from first_block
    tile_start_ptr,  # (tiles,) its first strip
    grad_ptr,  # (first_borrowed, BLOCK_T) out
    borrowed_ptr,  # (K - first_borrowed, BLOCK_T) out
    bias_grad_ptr,  # (K,) out
    kept_mass_ptr,  # (tiles, BLOCK_T) out
    N,
    D,
    softcap,  # or None
    first_block,
    first_borrowed,
    BIAS_GRAD: tl.constexpr,
    LOW_RANK: tl.constexpr,
    E_TMA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the logit gradients of one tile of strips."""
    place = tl.program_id(0)
    if num_tiles_ptr is not None:  # noqa: SIM102 (a constant, then a value of the device)
        if place >= tl.load(num_tiles_ptr):
            return
    local_block = tl.load(tile_block_ptr + place)
    start = tl.load(tile_start_ptr + place)
    strips = start + tl.arange(0, BLOCK_S)
    inside = strips < tl.load(starts_ptr + local_block + 1)
    classes = tl.load(classes_ptr + strips, mask=inside, other=0)
    first_token = (first_block + local_block) * BLOCK_T
    features = tl.arange(0, BLOCK_D)
    tokens = first_token + tl.arange(0, BLOCK_T)
    is_token = tokens < N
    product = low_rank_product(
        low_e_ptr, low_c_ptr, (tokens, classes), (is_token, inside), LOW_RANK
    )
    for d in range(0, D, BLOCK_D):
        c_tile = gather_rows(c_ptr, classes, inside, d + features, D)
        e_tile = load_rows(e, first_token, N, d, D, USE_TMA=E_TMA, ROWS=BLOCK_T, COLUMNS=BLOCK_D)
        product = tl.dot(c_tile, e_tile.T, product, input_precision="ieee")

    # The tile ends in two halves, which need fewer registers at a time: what is spilled here goes
    # to the L2 cache.
    HALF: tl.constexpr = BLOCK_T // 2
    left, right = tl.split(tl.permute(tl.reshape(product, (BLOCK_S, 2, HALF)), (0, 2, 1)))
    slots = tl.load(slots_ptr + strips, mask=inside, other=0)
    rows = stored_rows(grad_ptr, borrowed_ptr, slots, first_borrowed, BLOCK_T=BLOCK_T)
    scale = tl.load(scale_ptr)
    tile = tl.load(first_tile_ptr + local_block)
    tile += (start - tl.load(starts_ptr + local_block)) // BLOCK_S
    bias_grad = tl.zeros((BLOCK_S,), tl.float32)
    for half in tl.static_range(2):
        columns = half * HALF + tl.arange(0, HALF)
        tokens = first_token + columns
        is_token = tokens < N
        lse = tl.load(lse_ptr + tokens, mask=is_token, other=float("inf"))
        a = tl.load(a_ptr + tokens, mask=is_token, other=0.0)
        b = tl.load(b_ptr + tokens, mask=is_token, other=0.0)
        targets = tl.load(targets_ptr + tokens, mask=is_token, other=-1).to(tl.int32)
        eta = None
        multiplier = None
        if eta_ptr is not None:
            eta = tl.load(eta_ptr + tokens, mask=is_token, other=0.0)
        if multiplier_ptr is not None:
            multiplier = tl.load(multiplier_ptr + tokens, mask=is_token, other=1.0)
        part = left if half == 0 else right
        logits = transform_logits(part, classes, inside, bias_ptr, softcap, multiplier=multiplier)
        p = tl.exp2(logits - lse[None, :])
        grad = logit_gradient(
            logits,
            p,
            (classes[:, None] == targets[None, :]) & inside[:, None],
            inside,
            a,
            b=b,
            lse=lse,
            softcap=softcap,
            multiplier=multiplier,
            eta=eta,
        )
        tl.store(kept_mass_ptr + tile * BLOCK_T + columns, tl.sum(p, 0))
        if BIAS_GRAD:
            bias_grad += tl.sum(grad, 1)
        out = rows[:, None] + columns[None, :]
        tl.store(out, (grad * scale).to(grad_ptr.dtype.element_ty), mask=inside[:, None])
    if BIAS_GRAD:
        tl.store(bias_grad_ptr + slots, bias_grad, mask=inside)


@dataclass(frozen=True)
class StoredStrips:
    """Kept strips of a rectangle with their logit gradients.

    Args:
        strips: the list of the strips.
        grads: (slots, 128) gradients of the compute dtype times ``tokens.scale``, by slot.
        borrowed: (slots, 128) the same of the slots behind those, in rows of dC that are not
            written yet.
        bias_grads: (K,) float32 sums of the gradients over the tokens, by slot; may be empty.
        kept_mass: (tiles, 128) float32 probability of each token in the strips of a tile.
        first_slot: that of the first row of ``grads``.
    """

    strips: StripList
    grads: Tensor
    borrowed: Tensor
    bias_grads: Tensor
    kept_mass: Tensor
    first_slot: int = 0

    def of_last_classes(self) -> "StoredStrips":
        """Return the strips whose gradients are in borrowed memory as a range of their own."""
        return replace(self, grads=self.borrowed, first_slot=self.grads.shape[0])


def strip_gradients(
    problem: Problem,
    tokens: BackwardTokens,
    strips: StripList,
    bias_grad: bool,
    *,
    is_counted: bool = True,
    borrowed: Tensor | None = None,
) -> StoredStrips:
    """Compute the logit gradients of listed strips, and their sums if ``bias_grad``.

    Unless ``is_counted``, the list has room for more strips than there are. ``borrowed``
    (slots, 128) receives the gradients of the last slots.
    """
    e, c, tiles = tokens.e, problem.c, tiles_on(tokens.e.device)
    num_strips, num_tiles = strips.classes.shape[0], strips.tile_block.shape[0]
    num_own = num_strips - (0 if borrowed is None else borrowed.shape[0])
    grads = torch.empty((num_own, BLOCK_T), dtype=e.dtype, device=e.device)
    borrowed = grads[:0] if borrowed is None else borrowed
    size = num_strips if bias_grad else 0
    bias_grads = torch.empty(size, dtype=torch.float32, device=e.device)
    kept_mass = torch.empty((num_tiles, BLOCK_T), dtype=torch.float32, device=e.device)
    stored = StoredStrips(strips, grads, borrowed, bias_grads, kept_mass)
    if num_tiles == 0:
        return stored
    e_operand, e_tma = rows_operand(e, BLOCK_T, tiles.block_d, tiles)
    low_c = low_columns(problem)
    launch(
        strip_gradients_kernel,
        (num_tiles,),
        e=e_operand,
        c_ptr=c,
        bias_ptr=problem.bias,
        low_c_ptr=low_c,
        **pointers(tokens, "low_e lse a b targets scale eta multiplier"),
        **pointers(strips, "classes slots tile_block tile_start"),
        starts_ptr=strips.index.block_starts,
        first_tile_ptr=strips.index.first_tile,
        num_tiles_ptr=None if is_counted else strips.index.first_tile[-1],
        grad_ptr=grads,
        borrowed_ptr=borrowed,
        bias_grad_ptr=bias_grads,
        kept_mass_ptr=kept_mass,
        N=e.shape[0],
        D=e.shape[1],
        softcap=problem.softcap,
        first_block=strips.first_block,
        first_borrowed=num_own,
        BIAS_GRAD=bias_grad,
        LOW_RANK=0 if low_c is None else low_c.shape[1],
        E_TMA=e_tma,
        BLOCK_T=BLOCK_T,
        BLOCK_S=TILE,
        BLOCK_D=tiles.block_d,
        **two_per_sm(e.device, tiles),
    )
    return stored


@dataclass(frozen=True)
class Part:
    """Contribution of one superblock to a range of classes.

    Args:
        superblock: index of the superblock.
        first_slot: offset that converts its slots among all strips into those that are stored.
        chunks: range of chunks of classes.
        classes: the same range as class ids.
    """

    superblock: int
    first_slot: int
    chunks: Range
    classes: Range


@triton.jit(
    do_not_specialize=[
        "masks_ptr",
        "offsets_ptr",
        "chunk_starts_ptr",
        "first_class",
        "stop_class",
        "first_slot",
    ]
)
def sum_classes_kernel(
    values_ptr,  # (K,) by slot
    masks_ptr,  # (V,) of one superblock, like the two that follow
    offsets_ptr,  # (V,) see Kept
    chunk_starts_ptr,  # (chunks,) slot of a chunk's first strip
    out_ptr,  # (V,) float32, in, out
    first_class,
    stop_class,
    first_slot,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the strips of each class in their order."""
    classes = first_class + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = classes < stop_class
    count = popcount(tl.load(masks_ptr + classes, mask=inside, other=0))
    start = tl.load(chunk_starts_ptr + classes // CHUNK, mask=inside, other=0) - first_slot
    start += tl.load(offsets_ptr + classes, mask=inside, other=0)
    total = tl.load(out_ptr + classes, mask=inside, other=0.0)
    for i in range(tl.max(count, 0)):
        total += tl.load(values_ptr + start + i, mask=inside & (i < count), other=0.0)
    tl.store(out_ptr + classes, total, mask=inside)


def add_bias_grads(
    stored: StoredStrips,
    kept: Kept,
    part: Part,
    out: Tensor,  # (V,) float32, in, out
) -> None:
    """Add the stored bias gradients of one superblock to the sums of their classes."""
    block = 128
    first, stop = part.classes
    launch(
        sum_classes_kernel,
        (cdiv(stop - first, block),),
        values_ptr=stored.bias_grads,
        masks_ptr=kept.masks[part.superblock],
        offsets_ptr=kept.offsets[part.superblock],
        chunk_starts_ptr=stored.strips.index.chunk_starts[part.superblock],
        out_ptr=out,
        first_class=first,
        stop_class=stop,
        first_slot=part.first_slot,
        CHUNK=CHUNK,
        BLOCK=block,
    )
