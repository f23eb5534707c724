"""Exact gradients by chunks of classes, where nothing can be skipped.

A kernel makes the logit gradients of a chunk; the two products with c and e are the vendor
library's. Rows of dC are complete after their chunk, dE is summed in float32. Shape legend:
``cut_cross_entropy.kernels``.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.device_support import has_wide_products
from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.config import Tiles, rows_operand
from cut_cross_entropy.kernels.launch import launch
from cut_cross_entropy.kernels.primitives import (
    load_rows,
    logit_slope,
    place_program,
    transform_logits,
)

# The sums of dE are read and written once a chunk, so chunks are not made smaller than this; nor,
# for more than MAX_TOKENS, than half of these sums, if the budget allows it.
MIN_CHUNK_BYTES = 32 * 2**20
MAX_SCRATCH_BYTES = 160 * 2**20  # of dE's sums and a chunk otherwise: larger chunks gain little
COPIED_BYTES = 32 * 2**20  # of factors in float32 at a time, where the library needs them so
MAX_ELEMENTS = 2**30  # of any factor or result of a library product: 32 bits reach them
MAX_TOKENS = 16384  # whose logit gradients are stored together
SIDE_BY_SIDE = 128  # programs that fill a GPU, of which GROUP_BLOCKS share their classes
GROUP_BLOCKS = 16

_setting = threading.Lock()


@triton.jit
def store_gradients(
    product,  # (BLOCK_T, classes) rows of e times rows of c
    grad_ptr,  # (N, chunk) out
    bias_ptr,  # (V,)
    classes,  # (classes,) class ids
    tokens,  # (BLOCK_T,)
    lse,  # (BLOCK_T,) log2, like the three that follow
    a,
    b,
    targets,
    scale,
    N,
    V,
    softcap,
    first_class,
    stride_out,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Logit gradients of a tile of products."""
    inside = classes < V
    logits = transform_logits(
        product, bias_ptr, classes, inside, softcap, HAS_BIAS, SOFTCAP, TOKEN_AXIS=0
    )
    grad = tl.exp2(logits - lse[:, None]) * a[:, None]
    grad -= tl.where(classes[None, :] == targets[:, None], b[:, None], 0.0)
    if SOFTCAP:
        grad *= tl.where(inside[None, :], logit_slope(logits, softcap), 0.0)
    # 32 bits reach: a chunk is bounded in elements
    out = tokens[:, None] * stride_out + (classes - first_class)[None, :]
    grad = (grad * scale).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + out, grad, mask=(tokens < N)[:, None] & inside[None, :])


@triton.jit(
    do_not_specialize=[
        "first_class",
        "stop_class",
        "segment_tiles",
        "num_segments",
        "num_blocks",
        "group_blocks",
    ]
)
def chunk_gradients_kernel(
    e,  # (N, D)
    c,  # (V, D)
    bias_ptr,  # (V,)
    lse_ptr,  # (N,) log2; +inf: no token
    a_ptr,  # (N,)
    b_ptr,  # (N,)
    targets_ptr,  # (N,)
    scale_ptr,  # ()
    grad_ptr,  # (N, chunk) out
    N,
    V,
    D,
    softcap,
    first_class,
    stop_class,
    stride_out,
    segment_tiles,
    num_segments,
    num_blocks,
    group_blocks,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    E_TMA: tl.constexpr,
    C_TMA: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of tokens against one segment of a chunk of the classes.

    Tiles are (tokens, classes) here: nothing is summed over tokens, and what belongs to a token is
    then needed in few threads.
    """
    block, segment = place_program(num_blocks, group_blocks, num_segments)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = tokens < N
    lse = tl.load(lse_ptr + tokens, mask=is_token, other=float("inf"))
    a = tl.load(a_ptr + tokens, mask=is_token, other=0.0)
    b = tl.load(b_ptr + tokens, mask=is_token, other=0.0)
    targets = tl.load(targets_ptr + tokens, mask=is_token, other=-1).to(tl.int32)
    scale = tl.load(scale_ptr)
    start = first_class + segment * segment_tiles * BLOCK_V
    tiles = min(segment_tiles, tl.cdiv(stop_class - start, BLOCK_V))
    steps = tl.cdiv(D, BLOCK_D)
    # A wide tile ends in two halves, which need fewer registers at a time.
    half: tl.constexpr = BLOCK_V // 2 if HALVES else BLOCK_V
    product = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    # One loop over tiles and features, so that loads of the next tile overlap a tile's end.
    for i in tl.range(0, tiles * steps, flatten=True):
        step = i % steps
        v = start + (i // steps) * BLOCK_V
        e_tile = load_rows(e, block * BLOCK_T, N, step * BLOCK_D, D, E_TMA, BLOCK_T, BLOCK_D)
        c_tile = load_rows(c, v, V, step * BLOCK_D, D, C_TMA, BLOCK_V, BLOCK_D)
        product = tl.dot(e_tile, c_tile.T, product, input_precision="ieee")
        if step == steps - 1:
            classes = v + tl.arange(0, half)
            if HALVES:
                left, right = tl.split(
                    tl.permute(tl.reshape(product, (BLOCK_T, 2, half)), (0, 2, 1))
                )
                store_gradients(
                    left, grad_ptr, bias_ptr, classes, tokens, lse, a, b, targets, scale,
                    N, V, softcap, first_class, stride_out, HAS_BIAS, SOFTCAP,
                )  # fmt: skip
                store_gradients(
                    right, grad_ptr, bias_ptr, classes + half, tokens, lse, a, b, targets, scale,
                    N, V, softcap, first_class, stride_out, HAS_BIAS, SOFTCAP,
                )  # fmt: skip
            else:
                store_gradients(
                    product, grad_ptr, bias_ptr, classes, tokens, lse, a, b, targets, scale,
                    N, V, softcap, first_class, stride_out, HAS_BIAS, SOFTCAP,
                )  # fmt: skip
            product = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)


def chunk_gradients(
    e: Tensor,  # (N, D)
    c: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    lse: Tensor,  # (N,) log2
    a: Tensor,  # (N,)
    b: Tensor,  # (N,)
    targets: Tensor,  # (N,)
    scale: Tensor,  # ()
    classes: tuple[int, int],
    softcap: float | None,
    tiles: Tiles,
    out: Tensor,  # (N, classes)
) -> None:
    """Write the logit gradients of a range of classes, times ``scale``."""
    num_blocks = triton.cdiv(e.shape[0], BLOCK_T)
    group_blocks = min(num_blocks, GROUP_BLOCKS)
    num_tiles = triton.cdiv(classes[1] - classes[0], tiles.block_v)
    segment_tiles = triton.cdiv(num_tiles, max(1, SIDE_BY_SIDE // group_blocks))
    num_segments = triton.cdiv(num_tiles, segment_tiles)
    e_operand, e_tma = rows_operand(e, BLOCK_T, tiles.block_d, tiles)
    c_operand, c_tma = rows_operand(c, tiles.block_v, tiles.block_d, tiles)
    launch(
        chunk_gradients_kernel,
        (num_blocks * num_segments,),
        e_operand,
        c_operand,
        bias,
        lse,
        a,
        b,
        targets,
        scale,
        out,
        e.shape[0],
        c.shape[0],
        e.shape[1],
        softcap or 0.0,
        classes[0],
        classes[1],
        out.stride(0),
        segment_tiles,
        num_segments,
        num_blocks,
        group_blocks,
        HAS_BIAS=bias is not None,
        SOFTCAP=softcap is not None,
        E_TMA=e_tma,
        C_TMA=c_tma,
        HALVES=tiles.block_v > BLOCK_T,
        BLOCK_T=BLOCK_T,
        BLOCK_V=tiles.block_v,
        BLOCK_D=tiles.block_d,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


class _Room:
    """Where the logit gradients of a chunk are stored: in memory of its own, or where it can be in
    the rows of dC that are not written yet, which hold more. The fewer chunks, the less often the
    sums of dE are read and written.
    """

    def __init__(
        self, e: Tensor, block_v: int, num_bytes: int, row_bytes: int, lender: Tensor | None
    ) -> None:
        self._e, self._block_v, self._lender = e, block_v, lender
        num_tokens, dim = min(e.shape[0], MAX_TOKENS), e.shape[1]
        of_class = num_tokens * e.element_size() + row_bytes
        self._tokens = num_tokens
        self._most = self._tiled(MAX_ELEMENTS // max(num_tokens, dim))
        self._own_classes = min(self._most, self._tiled(num_bytes // of_class))
        self._own: Tensor | None = None

    def _tiled(self, num_classes: int) -> int:
        return max(1, num_classes // self._block_v) * self._block_v

    def next(self, first: int, num_classes: int) -> tuple[int, Tensor]:
        """How many classes from ``first`` on make the next chunk, and its (tokens, classes)."""
        left, size, buffer = num_classes - first, self._own_classes, None
        if self._lender is not None:
            dim = self._lender.shape[1]
            lent = min(
                self._most, left * dim // (dim + self._tokens) // self._block_v * self._block_v
            )
            if lent > size:
                size, buffer = lent, self._lender[first + lent :].view(-1)
        size = min(size, left)
        stride = -(-size // self._block_v) * self._block_v  # rows stay aligned
        if buffer is None:
            if self._own is None:
                self._own = self._e.new_empty(self._tokens * stride)
            buffer = self._own
        return size, buffer[: self._tokens * stride].view(self._tokens, stride)[:, :size]


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
    sums = num_tokens * dim * 4 if need_e else 0
    num_bytes = max(MIN_CHUNK_BYTES, scratch - sums)
    if num_tokens > MAX_TOKENS:
        num_bytes = max(num_bytes, min(memory_budget, sums // 2))
    # A single product makes the rows of dC, in place. Not in float16: the logit gradients are
    # scaled, and what overflows before the scale is taken out need not afterwards.
    direct = (
        grad_c is not None
        and not accumulate
        and grad_c.dtype == e.dtype != torch.float16
        and grad_c.is_contiguous()
        and num_tokens <= MAX_TOKENS
    )
    row_bytes = 0 if grad_c is None or direct else 4 * dim
    room = _Room(e, tiles.block_v, num_bytes, row_bytes, grad_c if direct else None)
    first = 0
    while first < num_classes:
        size, buffer = room.next(first, num_classes)
        classes = (first, first + size)
        rows, rows_bias = None, None
        if grad_c is not None and not direct:
            rows = e.new_zeros((size, dim), dtype=torch.float32)
        if grad_bias is not None:
            rows_bias = e.new_zeros(size, dtype=torch.float32)
        for start in range(0, num_tokens, MAX_TOKENS):
            part = slice(start, min(num_tokens, start + MAX_TOKENS))
            grads = buffer[: part.stop - part.start]
            chunk_gradients(
                e[part], c, bias, lse[part], a[part], b[part], targets[part], scale,
                classes, softcap, tiles, grads,
            )  # fmt: skip
            if total is not None:
                add_product(total[part], grads, c[slice(*classes)])
            if rows is not None:
                add_product(rows, grads.T, e[part])
            elif grad_c is not None:
                torch.mm(grads.T, e, out=grad_c[slice(*classes)])
            if rows_bias is not None:
                rows_bias += grads.sum(0, dtype=torch.float32)
        _finish(grad_c, classes, rows, scale, accumulate)
        _finish(grad_bias, classes, rows_bias, scale, accumulate)
        first += size
    return None if total is None else total.div_(scale)


def _finish(
    out: Tensor | None,  # (V, ...)
    classes: tuple[int, int],
    rows: Tensor | None,  # (classes, ...) float32; None: they are in ``out``, unscaled
    scale: Tensor,
    accumulate: bool,
) -> None:
    """Take the scale out of the gradients of a chunk's classes."""
    if out is None or rows is None:
        return
    here = slice(*classes)
    rows.div_(scale)
    out[here] = rows.add_(out[here]) if accumulate else rows


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` with float32 sums of half precision factors."""
    if left.is_meta:  # only kernels are planned
        return
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif has_wide_products(left.device):
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
    else:
        _add_copied_product(total, left, right)


def _add_copied_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """The same with factors copied to float32, where the library has no other way: older releases
    of PyTorch, and the interpreter's tests.
    """
    step = COPIED_BYTES // (4 * (left.shape[0] + right.shape[1]))
    step = max(64, step // 64 * 64)  # rows of the copies stay aligned
    with _tf32() if left.is_cuda else contextlib.nullcontext():
        for start in range(0, right.shape[0], step):
            part = slice(start, start + step)
            total.addmm_(left[:, part].float(), right[part].float())


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """Float32 products in TF32, which holds factors of half precision exactly.

    The setting is the process's, so one thread at a time.
    """
    library = torch.backends.cuda.matmul
    with _setting, contextlib.ExitStack() as afterwards:
        if hasattr(library, "fp32_precision"):  # PyTorch 2.9
            afterwards.callback(setattr, library, "fp32_precision", library.fp32_precision)
            library.fp32_precision = "tf32"
        else:
            before = torch.get_float32_matmul_precision()
            afterwards.callback(torch.set_float32_matmul_precision, before)
            torch.set_float32_matmul_precision("high")
        yield
