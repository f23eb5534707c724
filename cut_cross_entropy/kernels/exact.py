"""Exact gradients by chunks of classes, where no strip can be skipped.

A kernel computes the logit gradients of a chunk; the two products with c and e are the vendor
library's. Rows of dC are complete after their chunk, dE is summed in float32. Shape legend:
``cut_cross_entropy.kernels``.
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cut_cross_entropy.constants import MAX_ELEMENTS
from cut_cross_entropy.device_support import has_wide_products
from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.block_sizes import Programs, product_arguments, tiles_on
from cut_cross_entropy.kernels.launch import HostCopy, cdiv, is_captured, launch, pointers
from cut_cross_entropy.kernels.tokens import BackwardTokens, scatter_rows
from cut_cross_entropy.kernels.triton.exact import chunk_gradients_kernel
from cut_cross_entropy.problem import Filter, Problem, low_columns

# The sums of dE are read and written once per chunk, so chunks are not made smaller than this; nor,
# for more than MAX_TOKENS tokens, than half of these sums, if the budget allows it.
MIN_CHUNK_BYTES = 32 * 2**20
MAX_SCRATCH_BYTES = 160 * 2**20  # of dE's sums and a chunk otherwise: larger chunks gain little
COPIED_BYTES = 32 * 2**20  # of factors in float32 at a time, where the library needs copies
MAX_TOKENS = 16384  # tokens whose logit gradients are stored together
PROGRAMS_IN_FLIGHT = 128  # programs that fill a GPU
SWIZZLE_WIDTH = 16  # programs among them that share their classes

_setting = threading.Lock()


def chunk_gradients(
    problem: Problem,
    tokens: BackwardTokens,
    classes: tuple[int, int],
    out: Tensor,  # (N, classes), of the compute dtype or float32
    num_rows: Tensor | None = None,
) -> None:
    """Write the logit gradients of a range of classes, times ``tokens.scale``.

    With ``num_rows``, () int32 on the device, only those of the first tokens, in whole blocks.
    """
    e, c, tiles = tokens.e, problem.c, tiles_on(tokens.e.device)
    num_blocks = cdiv(e.shape[0], BLOCK_T)
    width = min(num_blocks, SWIZZLE_WIDTH)
    num_tiles = cdiv(classes[1] - classes[0], tiles.block_v)
    segment_tiles = cdiv(num_tiles, max(1, PROGRAMS_IN_FLIGHT // width))
    programs = Programs(num_blocks, segment_tiles, cdiv(num_tiles, segment_tiles), width)
    # Wider results need more shared memory, and so do further columns.
    low_c = low_columns(problem)
    is_narrow = out.dtype == e.dtype and low_c is None
    num_stages = min(tiles.num_stages, 4 if is_narrow else 3)
    launch(
        chunk_gradients_kernel,
        programs.grid,
        bias_ptr=problem.bias,
        low_c_ptr=low_c,
        values=tokens.values,
        **pointers(tokens, "low_e eta q multiplier"),
        num_rows_ptr=num_rows,
        grad_ptr=out,
        N=e.shape[0],
        V=c.shape[0],
        softcap=problem.softcap,
        first_class=classes[0],
        stop_class=classes[1],
        stride_out=out.stride(0),
        stride_class=out.stride(1),
        **programs._asdict(),
        LOW_RANK=0 if low_c is None else low_c.shape[1],
        **product_arguments(e, c, replace(tiles, num_stages=num_stages)),
    )


@dataclass(frozen=True)
class Wanted:
    """Gradients that a stage has to compute, and where it writes them.

    Args:
        e: whether dE is wanted; the stage allocates it and returns it.
        c: (V, D) receives dC; None if not wanted. Rows need not be initialised.
        bias: (V,) receives the gradient of the bias, likewise.
        first_column: the column of the classifier whose gradient is the first of ``c``.
        low_e: (N, R) receives the gradient of ``AdaptedProblem.low_e`` in the caller's order;
            0 before. ``c`` is then (V, R), that of ``low_c``.
        dtype_e: dtype of dE; None for that of the embeddings.
    """

    e: bool
    c: Tensor | None
    bias: Tensor | None
    first_column: int = 0
    low_e: Tensor | None = None
    dtype_e: torch.dtype | None = None

    def features(self, tokens: BackwardTokens) -> Tensor:
        """Return the features of the tokens that the rows of ``c`` are sums of."""
        return tokens.e[:, self.first_column :] if tokens.low_e is None else tokens.low_e

    @property
    def classes(self) -> bool:
        """True if a gradient with a row for each class is wanted."""
        return self.c is not None or self.bias is not None

    def __bool__(self) -> bool:
        return self.e or self.low_e is not None or self.classes

    def split(self, filter_: Filter) -> tuple["Wanted", "Wanted"]:
        """Return the filtered gradients, and the exact ones; dbias is as dC."""
        filtered_e, filtered_c = (filter_.is_on and x for x in (filter_.e, filter_.c))
        if filtered_e == filtered_c:
            nothing = Wanted(False, None, None)
            return (self, nothing) if filtered_e else (nothing, self)
        return tuple(  # type: ignore[return-value]
            replace(
                self,
                e=self.e and with_e,
                c=self.c if with_c else None,
                bias=self.bias if with_c else None,
                low_e=self.low_e if with_e else None,
            )
            for with_e, with_c in ((filtered_e, filtered_c), (not filtered_e, not filtered_c))
        )


class ChunkBuffer:
    """Memory for the logit gradients of a chunk.

    It is allocated, or borrowed where possible from the rows of dC that are not written yet, which
    hold more. The fewer chunks, the less often the sums of dE are read and written.

    Args:
        e: (N, D) of the tokens.
        num_bytes: allocate at most this much, including ``row_bytes`` per class.
        row_bytes: bytes that a class takes besides its logit gradients.
        borrowed: (V, D) dC whose later rows may be overwritten; None if they may not.
    """

    def __init__(self, e: Tensor, num_bytes: int, row_bytes: int, borrowed: Tensor | None) -> None:
        self._e, self._borrowed = e, borrowed
        self._block_v = tiles_on(e.device).block_v
        num_tokens, dim = min(e.shape[0], MAX_TOKENS), e.shape[1]
        class_bytes = num_tokens * e.element_size() + row_bytes
        self._tokens = num_tokens
        self._most = self._whole_tiles(MAX_ELEMENTS // max(num_tokens, dim))
        self._own_classes = min(self._most, self._whole_tiles(num_bytes // class_bytes))
        self._own: Tensor | None = None

    def _whole_tiles(self, num_classes: int) -> int:
        return max(1, num_classes // self._block_v) * self._block_v

    def next(self, first: int, num_classes: int) -> tuple[int, Tensor]:
        """Return the number of classes in the chunk that begins at ``first``, and its buffer.

        The buffer is (tokens, classes).
        """
        left, size, buffer = num_classes - first, self._own_classes, None
        if self._borrowed is not None:
            dim = self._borrowed.shape[1]
            fitting = left * dim // (dim + self._tokens) // self._block_v * self._block_v
            fitting = min(self._most, fitting)
            if fitting > size:
                size, buffer = fitting, self._borrowed[first + fitting :].view(-1)
        size = min(size, left)
        stride = -(-size // self._block_v) * self._block_v  # rows stay aligned
        if buffer is None:
            if self._own is None:
                self._own = self._e.new_empty(self._tokens * stride)
            buffer = self._own
        return size, buffer[: self._tokens * stride].view(self._tokens, stride)[:, :size]


def exact_gradients(
    problem: Problem, tokens: BackwardTokens, wanted: Wanted, *, accumulate: bool = False
) -> Tensor | None:
    """Compute gradients of some tokens from all strips.

    The scale of the tokens is read from the device if one product writes rows of dC.

    Args:
        problem: with c and bias contiguous, c of the compute dtype.
        tokens: the tokens; the result has their rows.
        wanted: receives dC and dbias.
        accumulate: add to dC and dbias instead of overwriting them.

    Returns:
        dE in float32, (N, D), if wanted.
    """
    e, c, grad_c = tokens.e, problem.c, wanted.c
    (num_tokens, dim), num_classes = e.shape, c.shape[0]
    total = e.new_zeros((num_tokens, dim), dtype=torch.float32) if wanted.e else None
    low_c, low_total = low_columns(problem), None
    if low_c is not None and wanted.low_e is not None:
        low_total = e.new_zeros((num_tokens, low_c.shape[1]), dtype=torch.float32)
    if num_tokens == 0:
        return total
    scratch = min(problem.memory_budget, MAX_SCRATCH_BYTES)
    sums = num_tokens * dim * 4 if wanted.e else 0
    num_bytes = max(MIN_CHUNK_BYTES, scratch - sums)
    if num_tokens > MAX_TOKENS:
        num_bytes = max(num_bytes, min(problem.memory_budget, sums // 2))
    # A single product writes the rows of dC, in place. Not in float16: the library may keep parts
    # of a sum in the dtype of the result, and these are still times the scale.
    in_place = (
        grad_c is not None
        and not accumulate
        and grad_c.dtype == e.dtype != torch.float16
        and grad_c.is_contiguous()
        and num_tokens <= MAX_TOKENS
    )
    inverse, scale_copy = 1.0, None
    if in_place and e.dtype != torch.float32:
        if e.is_meta or is_captured(e):  # the product can take no scale out that the host lacks
            tokens = replace(tokens, scale=torch.ones_like(tokens.scale))
        else:
            scale_copy = HostCopy(tokens.scale)
    scale = tokens.scale
    row_bytes = 0 if grad_c is None or in_place else 4 * dim
    chunks = ChunkBuffer(e, num_bytes, row_bytes, grad_c if in_place else None)
    starts = range(0, num_tokens, MAX_TOKENS)
    parts = [slice(start, min(num_tokens, start + MAX_TOKENS)) for start in starts]
    tokens_of_part = [tokens.at(part) for part in parts]
    first = 0
    while first < num_classes:
        size, buffer = chunks.next(first, num_classes)
        classes = (first, first + size)
        rows, rows_bias = None, None
        if grad_c is not None and not in_place:
            rows = e.new_zeros((size, grad_c.shape[1]), dtype=torch.float32)
        if wanted.bias is not None:
            rows_bias = e.new_zeros(size, dtype=torch.float32)
        for part, some in zip(parts, tokens_of_part, strict=True):
            grads = buffer[: part.stop - part.start]
            chunk_gradients(problem, some, classes, grads)
            if total is not None:
                add_product(total[part], grads, c[slice(*classes)])
            if low_c is not None and low_total is not None:
                add_product(low_total[part], grads, low_c[slice(*classes)])
            if rows is not None:
                add_product(rows, grads.T, wanted.features(some))
            elif grad_c is not None:
                # The scale is taken out of its sums before they are rounded. The host waits for it
                # here, behind the launches above, which keep the device busy.
                if scale_copy is not None:
                    inverse, scale_copy = 1 / scale_copy.wait().item(), None
                here = grad_c[slice(*classes)]
                here.addmm_(grads.T, wanted.features(tokens), beta=0, alpha=inverse)
            if rows_bias is not None:
                rows_bias += grads.sum(0, dtype=torch.float32)
        for out, sums_of_rows in ((grad_c, rows), (wanted.bias, rows_bias)):
            if out is not None and sums_of_rows is not None:
                here = out[slice(*classes)]
                sums_of_rows.div_(scale)
                here.copy_(sums_of_rows.add_(here) if accumulate else sums_of_rows)
        first += size
    if low_total is not None and wanted.low_e is not None:
        scatter_rows(low_total.div_(scale), tokens.origin, wanted.low_e)
    return None if total is None else total.div_(scale)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute ``total += left @ right`` with float32 sums of half precision factors."""
    if left.is_meta:  # a plan records kernels only
        return
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif has_wide_products(left.device):
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
    else:
        _add_copied_product(total, left, right)


def store_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute ``total = left @ right`` in the same way."""
    if left.is_meta:
        return
    if left.dtype == torch.float32:
        torch.mm(left, right, out=total)
    elif has_wide_products(left.device):
        torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=total)
    else:
        _add_copied_product(total.zero_(), left, right)


def _add_copied_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Do the same with factors copied to float32, where the library has no mixed product.

    That is in older releases of PyTorch, and on a CPU.
    """
    step = COPIED_BYTES // (4 * (left.shape[0] + right.shape[1]))
    step = max(64, step // 64 * 64)  # rows of the copies stay aligned
    with _tf32() if left.is_cuda else contextlib.nullcontext():
        for start in range(0, right.shape[0], step):
            part = slice(start, start + step)
            total.addmm_(left[:, part].float(), right[part].float())


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """Compute float32 products in TF32, which represents half precision factors exactly.

    The setting belongs to the process, so one thread at a time.
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
