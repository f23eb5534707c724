"""Log-sum-exp of every token in one pass over the classes, and the energy byte of every strip.

A program owns a block of tokens and a segment of the classes. Segments depend on V alone, so the
sums of a token do not depend on the tokens beside it. Exponentials are taken against a bound known
before the walk (from the classes that are frequent and from the target), which leaves no running
maximum to carry: partial sums stay in the thread that made them until the segment ends. Should a
bound be so loose that a sum overflows, the block is flagged and walked again with a running
maximum (``ONLINE``). Shape legend: ``cut_cross_entropy.kernels``.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.config import Tiles, group_size, rows_operand
from cut_cross_entropy.kernels.launch import launch
from cut_cross_entropy.kernels.primitives import (
    energy_to_byte,
    fold_rows,
    load_rows,
    place_program,
    transform_logits,
)

MAX_SEGMENTS = 16
OVERFLOW = tl.constexpr(60.0)  # log2 of a sum beside its bound; its square overflows at 128


@triton.jit(do_not_specialize=["N", "segment_tiles", "num_segments", "num_blocks", "group_blocks"])
def walk_classes_kernel(
    e,  # (N, D) descriptor or pointer
    c,  # (V, D) descriptor or pointer
    bias_ptr,  # (V,)
    bound_ptr,  # (N,)
    lse_ptr,  # (segments, N) out, log2
    spread_ptr,  # (segments, N) out, log2 of the sum of squared group sums
    energy_ptr,  # (blocks, V) out, bytes
    flag_ptr,  # (blocks,) out, or in if ONLINE
    N,
    V,
    D,
    softcap,
    segment_tiles,
    num_segments,
    num_blocks,
    group_blocks,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WRITE_ENERGY: tl.constexpr,
    ONLINE: tl.constexpr,
    ONLY_FLAGGED: tl.constexpr,
    E_TMA: tl.constexpr,
    C_TMA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of tokens against one segment of the classes."""
    block, segment = place_program(num_blocks, group_blocks, num_segments)
    if ONLY_FLAGGED:  # noqa: SIM102 (a constant, and a value of the device)
        if tl.load(flag_ptr + block) == 0:
            return
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    bound = tl.load(bound_ptr + tokens, mask=tokens < N, other=float("inf"))
    is_token = bound != float("inf")
    known = bound
    if tl.sum(is_token.to(tl.int32), 0) == 0:
        return

    sums = tl.zeros((64, BLOCK_T), tl.float32)
    product = tl.zeros((BLOCK_V, BLOCK_T), tl.float32)
    first_class = segment * segment_tiles * BLOCK_V
    tiles = min(segment_tiles, tl.cdiv(V - first_class, BLOCK_V))
    steps = tl.cdiv(D, BLOCK_D)
    # One loop over tiles and features, so that loads of the next tile overlap a tile's end.
    for i in tl.range(0, tiles * steps, flatten=True):
        step = i % steps
        v = first_class + (i // steps) * BLOCK_V
        c_tile = load_rows(c, v, V, step * BLOCK_D, D, C_TMA, BLOCK_V, BLOCK_D)
        e_tile = load_rows(e, block * BLOCK_T, N, step * BLOCK_D, D, E_TMA, BLOCK_T, BLOCK_D)
        product = tl.dot(c_tile, e_tile.T, product, input_precision="ieee")
        if step == steps - 1:
            classes = v + tl.arange(0, BLOCK_V)
            inside = classes < V
            logits = transform_logits(
                product, bias_ptr, classes, inside, softcap, HAS_BIAS, SOFTCAP
            )
            if ONLINE:
                higher = tl.maximum(bound, tl.max(logits, 0), propagate_nan=tl.PropagateNan.ALL)
                # -inf - -inf: nothing seen yet, nothing to scale
                scale = tl.where(bound == higher, 1.0, tl.exp2(bound - higher))
                sums = sums * scale[None, :]
                bound = higher
            reference = tl.where(bound == float("-inf"), 0.0, bound) if ONLINE else bound
            p = tl.exp2(logits - reference[None, :])
            sums += fold_rows(p, BLOCK_V, BLOCK_T)
            if WRITE_ENERGY:
                byte = energy_to_byte(tl.sum(p * p, axis=1))
                tl.store(energy_ptr + block.to(tl.int64) * V + classes, byte, mask=inside)
            product = tl.zeros((BLOCK_V, BLOCK_T), tl.float32)

    total = tl.sum(sums, 0)
    out = segment.to(tl.int64) * N + tokens
    wanted = is_token
    if ONLY_FLAGGED:
        # Only sums that overflowed: a token must not change by what stands beside it.
        first_lse = tl.load(lse_ptr + out, mask=is_token, other=0.0)
        wanted = is_token & ~(first_lse - known < OVERFLOW)
    lse = bound + tl.log2(total)
    tl.store(lse_ptr + out, lse, mask=wanted)
    if WRITE_ENERGY:
        squares = 2.0 * bound + tl.log2(tl.sum(sums * sums, 0))
        tl.store(spread_ptr + out, squares, mask=wanted)
    if not ONLINE:
        overflown = tl.sum((is_token & ~(lse - known < OVERFLOW)).to(tl.int32), 0)
        if overflown > 0:
            tl.store(flag_ptr + block, 1)


@dataclass(frozen=True)
class Walk:
    """What all walks of one forward share.

    Args:
        e: (N, D) contiguous, tokens that count in front.
        c: (V, D) contiguous, of the dtype of ``e``.
        bias: (V,) contiguous.
        softcap, tiles: of the problem.
        flags: (blocks,) int32: blocks whose sums overflowed; written by the walks.
    """

    e: Tensor
    c: Tensor
    bias: Tensor | None
    softcap: float | None
    tiles: Tiles
    flags: Tensor

    @functools.cached_property
    def operands(self) -> tuple[tuple[Any, bool], tuple[Any, bool]]:
        """How the kernels read ``e`` and ``c``; made once, since the host pays for it."""
        tiles = self.tiles
        return (
            rows_operand(self.e, BLOCK_T, tiles.block_d, tiles),
            rows_operand(self.c, tiles.block_v, tiles.block_d, tiles),
        )


def walk_classes(
    walk: Walk,
    num_classes: int,
    bound: Tensor,  # (N,)
    energy: Tensor | None,  # (blocks, V) uint8, out
    online: bool = False,
    only_flagged: bool = False,
    results: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and spread of the first classes by segment, (segments, N) each, log2.

    ``results`` of an earlier walk are written again where ``only_flagged``.
    """
    e, tiles = walk.e, walk.tiles
    num_tokens, dim = e.shape
    num_blocks = triton.cdiv(num_tokens, BLOCK_T)
    num_tiles = triton.cdiv(num_classes, tiles.block_v)
    segment_tiles = triton.cdiv(num_tiles, MAX_SEGMENTS)
    num_segments = triton.cdiv(num_tiles, segment_tiles)
    if results is None:
        shape = (num_segments, num_tokens)
        spread_shape = shape if energy is not None else (0, num_tokens)
        results = (
            torch.empty(shape, dtype=torch.float32, device=e.device),
            torch.empty(spread_shape, dtype=torch.float32, device=e.device),
        )
    (e_operand, e_tma), (c_operand, c_tma) = walk.operands
    launch(
        walk_classes_kernel,
        (num_blocks * num_segments,),
        e_operand,
        c_operand,
        walk.bias,
        bound,
        results[0],
        results[1],
        energy,
        walk.flags,
        num_tokens,
        num_classes,
        dim,
        walk.softcap or 0.0,
        segment_tiles,
        num_segments,
        num_blocks,
        group_size(num_blocks, e),
        HAS_BIAS=walk.bias is not None,
        SOFTCAP=walk.softcap is not None,
        WRITE_ENERGY=energy is not None,
        ONLINE=online,
        ONLY_FLAGGED=only_flagged,
        E_TMA=e_tma,
        C_TMA=c_tma,
        BLOCK_T=BLOCK_T,
        BLOCK_V=tiles.block_v,
        BLOCK_D=tiles.block_d,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return results
