"""Gradients of e and c from the classes of a chunk that matter, whose logit gradients are stored.

The energy of a class is the sum of the squares of its logit gradients over the tokens of the chunk.
The classes of least energy are dropped while the root of their energies' sum stays under a
tolerance, relative to that of all. The others become columns next to each other, so that the
products for dE and dC are those of the library over a fraction of the classes.

A tail of low rank stands for the dropped ones. In dE, what a token loses of the sum of its logit
gradients is multiplied by a mean row of the dropped classes: rows of a trained classifier have a
direction in common, which makes most of the error. In dC, the sum of a dropped class over some
tokens is multiplied by their mean embedding, so that no row is 0 for lack of energy.

Shape legend: ``cut_cross_entropy.kernels``; T is the number of tokens of a chunk, K that of the
kept classes, G that of groups of tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.budget import FILTER_GROUPS
from cut_cross_entropy.implementations.blocks import Blocks
from cut_cross_entropy.implementations.token_chunks import GradientSums
from cut_cross_entropy.kernels.launch import cdiv, launch, next_power_of_2
from cut_cross_entropy.problem import Needed

MOST_KEPT = 0.6
"""Share of the classes up to which it takes less time to multiply only those that are kept."""
MULTIPLE = 64  # kept classes are a multiple of it: the library's products need aligned rows
LEAST_PRODUCTS = 1e12
"""Products (T V D) of a chunk that the filter can make fewer, at least.

Measured on an H200, 12 and 13 % of the classes kept: a chunk of 1.3e12 takes 2.4 ms less, one of
3.4e11 1.9 ms more, of launches that wait for the host (docs/engineering_log.md)."""
LEAST_ROWS = 256  # kept classes that are multiplied at a time, at least
SAMPLED = 16384  # classes of which the mean row of the dropped ones is computed
UNIT = 2.0**50  # energies become integers, whose sums do not depend on their order
GROUP, ROWS = 128, 32  # tokens of a group of the tail of dC, and those that are read at a time
BLOCK = 128  # classes of a program


@triton.jit(do_not_specialize=["sums_ptr", "num_tokens", "num_classes"])
def column_energies_kernel(
    grad_ptr,  # (T, stride) logit gradients
    unit_ptr,  # () what they are multiplied by before they are squared
    energies_ptr,  # (V,) out: sums of their squares
    sums_ptr,  # (G, V) out: sums over groups of tokens
    num_tokens,
    num_classes,
    stride,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the logit gradients of a block of classes, and their squares."""
    classes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = classes < num_classes
    unit = tl.load(unit_ptr)
    energy = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, num_tokens, GROUP):
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(first, min(first + GROUP, num_tokens), ROWS):
            tokens = start + tl.arange(0, ROWS)
            grad = tl.load(
                grad_ptr + tokens.to(tl.int64)[:, None] * stride + classes[None, :],
                mask=(tokens < num_tokens)[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            energy += (grad * unit) * (grad * unit)
            total += grad
        out = sums_ptr + tl.cast(first // GROUP, tl.int64) * num_classes + classes
        tl.store(out, tl.sum(total, 0).to(sums_ptr.dtype.element_ty), mask=inside)
    tl.store(energies_ptr + classes, tl.sum(energy, 0), mask=inside)


@triton.jit(do_not_specialize=["num_kept"])
def gather_columns_kernel(
    grad_ptr,  # (T, stride) logit gradients
    ids_ptr,  # (K,) int64 kept classes, ascending
    columns_ptr,  # (T, K) out
    row_sums_ptr,  # (T,) in, out: sums of all logit gradients, and of the dropped ones
    num_kept,
    stride,
    BLOCK: tl.constexpr,
):
    """Copy the kept classes of one token; subtract them from its sum."""
    row = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_kept, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < num_kept
        ids = tl.load(ids_ptr + places, mask=inside, other=0)
        grad = tl.load(grad_ptr + row.to(tl.int64) * stride + ids, mask=inside, other=0.0)
        tl.store(columns_ptr + row.to(tl.int64) * num_kept + places, grad, mask=inside)
        total += grad.to(tl.float32)
    tl.store(row_sums_ptr + row, tl.load(row_sums_ptr + row) - tl.sum(total, 0))


@triton.jit
def add_rows_kernel(
    rows_ptr,  # (K, D)
    ids_ptr,  # (K,) int64, each once
    out_ptr,  # (V, D) in, out
    D,
    BLOCK: tl.constexpr,
):
    """Add a part of one row to that of its class."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    out = out_ptr + tl.load(ids_ptr + row) * D + columns
    rows = tl.load(rows_ptr + row.to(tl.int64) * D + columns, mask=inside, other=0.0)
    tl.store(out, tl.load(out, mask=inside, other=0.0) + rows, mask=inside)


def choose_classes(energies: Tensor, tolerance: float) -> Tensor | None:
    """Return the ids (K,) of the classes to keep, ascending; None for all of them.

    The host waits for their number.

    Args:
        energies: (V,) float32.
        tolerance: root of the dropped energy relative to that of all.
    """
    num_classes = energies.shape[0]
    total = energies.sum()
    values, order = energies.sort(stable=True)
    shares = (values.double() / total.clamp(min=torch.finfo(torch.float32).tiny) * UNIT).ceil()
    dropped = (shares.long().cumsum(0) <= tolerance**2 * UNIT) & total.isfinite()
    num_kept = num_classes - int(dropped.sum())
    num_kept = min(num_classes, -(-num_kept // MULTIPLE) * MULTIPLE)
    if num_kept > MOST_KEPT * num_classes:
        return None
    return order[num_classes - num_kept :].sort().values


class FilteredSums:
    """Sums of gradients to which chunks add the classes that matter, where that takes less time.

    Args:
        sums: of all chunks, without one so far.
        tolerance: see :func:`choose_classes`, of each chunk.
        memory: float32, contiguous, for the kept columns of a chunk and some rows of c and of dC.
        unit: () power of two that brings logit gradients near 1, whose squares could underflow.
    """

    def __init__(self, sums: GradientSums, tolerance: float, memory: Tensor, unit: Tensor) -> None:
        self.sums, self.tolerance, self._unit = sums, tolerance, unit
        self._memory = memory.view(-1).view(torch.uint8)
        blocks = sums.blocks
        num_groups = cdiv(blocks.shape[0], GROUP)
        if sums.needed.c:  # of as many chunks as fit
            of_all = cdiv(blocks.num_kept, blocks.shape[0]) * num_groups
            num_groups = max(num_groups, min(of_all, FILTER_GROUPS))
        num_classes, dim = blocks.problem.c.shape
        make, dtype = blocks.problem.c.new_empty, blocks.problem.compute_dtype
        self._class_sums = make((num_groups, num_classes), dtype=dtype)
        self._means = make((num_groups, dim), dtype=dtype)
        self._first = 0  # group of the next chunk
        self._keeps_all = False

    @classmethod
    def is_worth_it(cls, blocks: Blocks, needed: Needed) -> bool:
        """Whether the products of a chunk take longer than what chooses among its classes."""
        products = int(needed.e) + int(needed.c)
        return products * blocks.shape[0] * blocks.problem.c.numel() >= LEAST_PRODUCTS

    @property
    def needs_row_sums(self) -> bool:
        """Whether the next chunk is filtered: no longer after one that keeps all classes."""
        return not self._keeps_all

    def add(self, tokens: slice, e: Tensor, factor: Tensor, row_sums: Tensor | None) -> None:
        """Add the gradients of a chunk.

        Args:
            tokens, e, factor: see :meth:`GradientSums.add`.
            row_sums: (T,) float32 sums of the logit gradients of each token; overwritten. None if
                not needed.
        """
        if row_sums is None:
            self.sums.add(tokens, e, factor)
            return
        (num_tokens, num_classes), (_, dim) = factor.shape, e.shape
        energies = torch.empty(num_classes, dtype=torch.float32, device=e.device)
        num_groups = cdiv(num_tokens, GROUP)
        if self._first + num_groups > len(self._means):
            self.finish()
        class_sums = self._class_sums[self._first : self._first + num_groups]
        launch(
            column_energies_kernel,
            (cdiv(num_classes, BLOCK),),
            grad_ptr=factor,
            unit_ptr=self._unit,
            energies_ptr=energies,
            sums_ptr=class_sums,
            num_tokens=num_tokens,
            num_classes=num_classes,
            stride=factor.stride(0),
            GROUP=GROUP,
            ROWS=ROWS,
            BLOCK=BLOCK,
        )
        ids = choose_classes(energies, self.tolerance)
        at_once = 0
        if ids is not None:
            size = num_tokens * ids.shape[0] * factor.dtype.itemsize
            per_row = dim * (factor.dtype.itemsize + 4)
            at_once = (self._memory.shape[0] - size) // per_row // MULTIPLE * MULTIPLE
        if ids is None or at_once < min(max(ids.shape[0], 1), LEAST_ROWS):
            self._keeps_all = True
            self.sums.add(tokens, e, factor)
            return
        columns, free = self._memory[:size].view(factor.dtype), self._memory[size:]
        columns = columns.view(num_tokens, ids.shape[0])
        launch(
            gather_columns_kernel,
            (num_tokens,),
            grad_ptr=factor,
            ids_ptr=ids,
            columns_ptr=columns,
            row_sums_ptr=row_sums,
            num_kept=ids.shape[0],
            stride=factor.stride(0),
            BLOCK=1024,
        )
        parts = [slice(k, min(k + at_once, len(ids))) for k in range(0, len(ids), at_once)]
        if self.sums.needed.e:
            self._add_e(
                tokens, columns, ids, parts, free, dropped=row_sums[:, None], energies=energies
            )
        if self.sums.needed.c:
            self._add_c(e, columns, ids, parts, free)
            class_sums.index_fill_(1, ids, 0)
            group = torch.arange(num_tokens, device=e.device) // GROUP
            share = group == torch.arange(num_groups, device=e.device)[:, None]
            share = share / share.sum(1, keepdim=True)
            means = self.sums.blocks.product(share.to(e.dtype), e)
            self._means[self._first : self._first + num_groups] = means
            self._first += num_groups
        self.sums.add_bias(factor)

    def _add_e(
        self,
        tokens: slice,
        columns: Tensor,
        ids: Tensor,
        parts: list[slice],
        free: Tensor,
        dropped: Tensor,
        energies: Tensor,
    ) -> None:
        """Add the product of the kept columns (T, K), and of the dropped sums (T, 1) of tokens."""
        blocks, dim = self.sums.blocks, self.sums.grad_e.shape[1]
        out = self.sums.rows_of_e(tokens)
        torch.mul(dropped, mean_dropped(blocks, energies, ids), out=out)
        for part in parts:
            rows = free[: (part.stop - part.start) * dim * columns.dtype.itemsize]
            rows = rows.view(columns.dtype).view(-1, dim)
            blocks.gather_classes(ids[part], rows)
            blocks.add_product(columns[:, part], rows, out)
        self.sums.store_rows_of_e(tokens, out)

    def _add_c(
        self, e: Tensor, columns: Tensor, ids: Tensor, parts: list[slice], free: Tensor
    ) -> None:
        """Add the product of the kept columns (T, K)."""
        dim, sums = e.shape[1], self.sums
        if not sums.has_c:
            sums.grad_c.zero_()
            sums.has_c = True
        for part in parts:
            rows = free[: (part.stop - part.start) * dim * 4].view(torch.float32).view(-1, dim)
            sums.blocks.store_product(columns[:, part].T, e, rows)
            block = min(1024, next_power_of_2(dim))
            launch(
                add_rows_kernel,
                (part.stop - part.start, cdiv(dim, block)),
                rows_ptr=rows,
                ids_ptr=ids[part],
                out_ptr=sums.grad_c,
                D=dim,
                BLOCK=block,
            )

    def finish(self) -> None:
        """Add the tail of dC of the chunks since the last call."""
        if self._first:
            blocks = self.sums.blocks
            class_sums, means = self._class_sums[: self._first], self._means[: self._first]
            if not blocks.half_products:
                class_sums, means = class_sums.to(blocks.wide), means.to(blocks.wide)
            for part in self.sums.classes:
                blocks.add_product(class_sums[:, part].T, means, self.sums.grad_c[part])
            self._first = 0


def mean_dropped(blocks: Blocks, energies: Tensor, kept: Tensor) -> Tensor:
    """Return the mean row (1, D) of c over dropped classes, weighted by the roots of energies (V,).

    It is that of every n-th class where there are many.
    """
    step = max(1, energies.shape[0] // SAMPLED)
    weights = energies.sqrt().index_fill_(0, kept, 0.0)[None, ::step]
    largest = weights.amax().clamp(min=torch.finfo(torch.float32).tiny)
    rows = blocks.classifier(slice(None, None, step))
    weights = (weights / largest).to(rows.dtype)
    total = weights.sum(dtype=torch.float32)
    return blocks.product(weights, rows) / total.clamp(min=1e-6)
