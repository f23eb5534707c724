"""Exact gradients by chunks of classes, where nothing can be skipped.

A kernel makes the logit gradient of a chunk for all tokens; the two products with c and e are the
vendor library's. Rows of dC are complete after their chunk, dE is summed in float32. Shape legend:
``cut_cross_entropy.kernels``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.config import Tiles, rows_operand
from cut_cross_entropy.kernels.primitives import (
    load_rows,
    logit_slope,
    transform_logits,
)

MAX_SCRATCH_BYTES = 160 * 2**20  # of dE's sum and a chunk: larger chunks gain little
MIN_CHUNK_BYTES = 32 * 2**20  # dE's sum is read and written once a chunk
MAX_ELEMENTS = 2**30  # of any factor or result of a library product: 32 bits reach them
GROUP_TILES = 8  # class tiles that walk the token blocks together


@triton.jit
def chunk_gradients_kernel(
    e,  # (N, D)
    c,  # (V, D)
    bias_ptr,  # (V,)
    lse_ptr,  # (N,) log2; +inf: no token
    a_ptr,  # (N,)
    b_ptr,  # (N,)
    targets_ptr,  # (N,)
    scale_ptr,  # ()
    grad_ptr,  # (chunk, N) out
    N,
    V,
    D,
    softcap,
    first_class,
    num_blocks,
    group_tiles,
    num_tiles,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    E_TMA: tl.constexpr,
    C_TMA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of classes against one block of tokens."""
    program = tl.program_id(0)
    # Groups of class tiles walk the token blocks together, so both operands stay in the L2 cache.
    group = program // (group_tiles * num_blocks)
    tiles_here = min(num_tiles - group * group_tiles, group_tiles)
    inside_group = program % (group_tiles * num_blocks)
    tile = group * group_tiles + inside_group % tiles_here
    block = inside_group // tiles_here
    v = first_class + tile * BLOCK_V
    product = tl.zeros((BLOCK_V, BLOCK_T), tl.float32)
    for d in range(0, D, BLOCK_D):
        c_tile = load_rows(c, v, V, d, D, C_TMA, BLOCK_V, BLOCK_D)
        e_tile = load_rows(e, block * BLOCK_T, N, d, D, E_TMA, BLOCK_T, BLOCK_D)
        product = tl.dot(c_tile, e_tile.T, product, input_precision="ieee")
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = tokens < N
    lse = tl.load(lse_ptr + tokens, mask=is_token, other=float("inf"))
    a = tl.load(a_ptr + tokens, mask=is_token, other=0.0)
    b = tl.load(b_ptr + tokens, mask=is_token, other=0.0)
    targets = tl.load(targets_ptr + tokens, mask=is_token, other=-1)
    classes = v + tl.arange(0, BLOCK_V)
    inside = classes < V
    logits = transform_logits(product, bias_ptr, classes, inside, softcap, HAS_BIAS, SOFTCAP)
    grad = tl.exp2(logits - lse[None, :]) * a[None, :]
    grad -= tl.where(classes[:, None] == targets[None, :], b[None, :], 0.0)
    if SOFTCAP:
        grad *= tl.where(inside[:, None], logit_slope(logits, softcap), 0.0)
    # 32 bits reach: a chunk is bounded in bytes
    out = (classes - first_class)[:, None] * N + tokens[None, :]
    grad = (grad * tl.load(scale_ptr)).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + out, grad, mask=inside[:, None] & is_token[None, :])


def dense_gradients(
    e: Tensor,  # (N, D) contiguous, of the compute dtype
    c: Tensor,  # (V, D) contiguous, of the compute dtype
    bias: Tensor | None,  # (V,)
    lse: Tensor,  # (N,) log2; +inf: no token
    a: Tensor,  # (N,)
    b: Tensor,  # (N,)
    targets: Tensor,  # (N,)
    scale: Tensor,  # ()
    softcap: float | None,
    tiles: Tiles,
    memory_budget: int,
    need_e: bool,
    grad_c: Tensor | None,  # (V, D) out
    grad_bias: Tensor | None,  # (V,) out
    accumulate: bool,
) -> Tensor | None:
    """dE in float32 (N, D); writes, or adds to, ``grad_c`` and ``grad_bias``."""
    (num_tokens, dim), num_classes = e.shape, c.shape[0]
    total = e.new_zeros((num_tokens, dim), dtype=torch.float32) if need_e else None
    if num_tokens == 0:
        return total
    scratch = min(memory_budget, MAX_SCRATCH_BYTES)
    room = max(MIN_CHUNK_BYTES, scratch - (num_tokens * dim * 4 if need_e else 0))
    multiple = GROUP_TILES * tiles.block_v
    most = min(room // (num_tokens * e.element_size()), MAX_ELEMENTS // max(num_tokens, dim))
    chunk = max(multiple, most // multiple * multiple)
    chunk = min(chunk, triton.cdiv(num_classes, tiles.block_v) * tiles.block_v)
    num_blocks = triton.cdiv(num_tokens, BLOCK_T)
    buffer = e.new_empty((chunk, num_tokens))
    e_operand, e_tma = rows_operand(e, BLOCK_T, tiles.block_d, tiles)
    c_operand, c_tma = rows_operand(c, tiles.block_v, tiles.block_d, tiles)
    for first in range(0, num_classes, chunk):
        size = min(chunk, num_classes - first)
        chunk_tiles = triton.cdiv(size, tiles.block_v)
        chunk_gradients_kernel[(chunk_tiles * num_blocks,)](
            e_operand,
            c_operand,
            bias,
            lse,
            a,
            b,
            targets,
            scale,
            buffer,
            num_tokens,
            num_classes,
            dim,
            softcap or 0.0,
            first,
            num_blocks,
            GROUP_TILES,
            chunk_tiles,
            HAS_BIAS=bias is not None,
            SOFTCAP=softcap is not None,
            E_TMA=e_tma,
            C_TMA=c_tma,
            BLOCK_T=BLOCK_T,
            BLOCK_V=tiles.block_v,
            BLOCK_D=tiles.block_d,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        grads, part = buffer[:size], slice(first, first + size)
        if total is not None:
            add_product(total, grads.T, c[part])
        if grad_c is not None:
            _write(grad_c, part, grads, e, scale, accumulate)
        if grad_bias is not None:
            sums = grads.sum(1, dtype=torch.float32) / scale
            grad_bias[part] = sums + grad_bias[part] if accumulate else sums
    return None if total is None else total.div_(scale)


def _write(
    out: Tensor, part: slice, grads: Tensor, e: Tensor, scale: Tensor, accumulate: bool
) -> None:
    """Rows ``part`` of dC from the logit gradients of those classes."""
    if not accumulate and out.dtype == e.dtype and out.is_contiguous():
        torch.mm(grads, e, out=out[part])
        if e.dtype == torch.float16:
            out[part].div_(scale)
        return
    product = torch.zeros((grads.shape[0], e.shape[1]), dtype=torch.float32, device=e.device)
    add_product(product, grads, e)
    product.div_(scale)
    out[part] = product + out[part] if accumulate else product


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` with float32 sums of half precision factors."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
    else:  # the interpreter's tests
        total.addmm_(left.float(), right.float())
