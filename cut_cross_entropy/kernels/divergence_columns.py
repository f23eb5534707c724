"""Gradients of e and c from the classes of a chunk that matter, whose logit gradients are stored.

The energy of a class is the sum of the squares of its logit gradients over the tokens of the chunk.
The classes of least energy are dropped while the root of their energies' sum stays under a
tolerance, relative to that of all. The others become columns next to each other, so that the
products for dE and dC are those of the library over a fraction of the classes.

A product of low rank stands for the dropped ones, whose columns are 0 in what is kept: in dC it
takes of each embedding the part in a few directions that hold most of the squares of all
embeddings, and in dE of each row of c the part in directions of its own. So no row of dC is 0 for
lack of energy, and rows of rare classes keep their direction.

Shape legend: ``cut_cross_entropy.kernels``; T is the number of tokens of a chunk, K that of the
kept classes, R that of directions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cut_cross_entropy.budget import FILTER_DIRECTIONS
from cut_cross_entropy.implementations.blocks import Blocks
from cut_cross_entropy.implementations.token_chunks import GradientSums
from cut_cross_entropy.kernels.launch import cdiv, launch, next_power_of_2
from cut_cross_entropy.kernels.triton.divergence_columns import (
    add_rows_kernel,
    column_energies_kernel,
    move_columns_kernel,
)
from cut_cross_entropy.problem import Needed

MOST_KEPT = 0.6
"""Share of the classes up to which it takes less time to multiply only those that are kept."""
MULTIPLE = 64  # kept classes are a multiple of it: the library's products need aligned rows
LEAST_PRODUCTS = 1e12
"""Products (T V D) of a chunk that the filter can make fewer, at least.

Measured on an H200, 12 and 13 % of the classes kept: a chunk of 1.3e12 takes 2.4 ms less, one of
3.4e11 1.9 ms more, of launches that wait for the host (docs/engineering_log.md)."""
LEAST_ROWS = 256  # kept classes that are multiplied at a time, at least
SAMPLED = 8192  # rows of which directions are computed, at most
STEPS = 1  # of the iteration that finds them
RIDGE = 1e-10  # of unit vectors, so that those which depend on others stay bounded
UNIT = 2.0**50  # energies become integers, whose sums do not depend on their order
ROWS = 32  # tokens that are read at a time
BLOCK = 128  # classes of a program


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


class Kept(NamedTuple):
    """The kept classes of a chunk, and what is left of its logit gradients.

    Args:
        columns: (T, K) their logit gradients.
        rest: (T, V) those of all other classes, 0 in place of these.
        ids: (K,) the classes.
        parts: slices of them that are multiplied at a time.
        rows: float32 memory for rows of c or of dC of one part.
    """

    columns: Tensor
    rest: Tensor
    ids: Tensor
    parts: list[slice]
    rows: Tensor


class FilteredSums:
    """Sums of gradients to which chunks add the classes that matter, where that takes less time.

    Args:
        sums: of all chunks, without one so far.
        tolerance: see :func:`choose_classes`, of each chunk.
        memory: (T, at least V) float32, contiguous, for kept columns and some rows of c and of dC.
        unit: () power of two that brings logit gradients near 1, whose squares could underflow.
    """

    def __init__(self, sums: GradientSums, tolerance: float, memory: Tensor, unit: Tensor) -> None:
        self.sums, self.tolerance, self._unit = sums, tolerance, unit
        self._memory = memory.view(-1)
        self._is_prepared = self._keeps_all = self._has_rest = False

    @classmethod
    def is_worth_it(cls, blocks: Blocks, needed: Needed) -> bool:
        """Whether the products of a chunk take longer than what chooses among its classes."""
        products = int(needed.e) + int(needed.c)
        rows = blocks.shape[0]
        enough = products * rows * blocks.problem.c.numel() >= LEAST_PRODUCTS
        return enough and rows >= FILTER_DIRECTIONS

    def add(self, tokens: slice, e: Tensor, factor: Tensor) -> None:
        """Add the gradients of a chunk, as :meth:`GradientSums.add`; overwrite them."""
        if not self._is_prepared:
            self._prepare()
        ids = None if self._keeps_all else self._choose(factor)
        size = at_once = 0
        if ids is not None:
            itemsize, dim = factor.dtype.itemsize, e.shape[1]
            size = cdiv(len(factor) * len(ids) * itemsize, 16) * 4
            at_once = (len(self._memory) - size) * 4 // (dim * (itemsize + 4))
            at_once = at_once // MULTIPLE * MULTIPLE
        if ids is None or at_once < min(max(len(ids), 1), LEAST_ROWS):
            self._keeps_all = True  # the next chunk will too
            self.sums.add(tokens, e, factor)
            return
        self.sums.add_bias(factor)
        columns = self._memory[:size].view(factor.dtype)[: len(factor) * len(ids)]
        columns = columns.view(len(factor), len(ids))
        launch(
            move_columns_kernel,
            (len(factor),),
            grad_ptr=factor,
            ids_ptr=ids,
            columns_ptr=columns,
            num_kept=len(ids),
            stride=factor.stride(0),
            BLOCK=1024,
        )
        parts = [slice(k, min(k + at_once, len(ids))) for k in range(0, len(ids), at_once)]
        rows = self._memory[size : size + at_once * e.shape[1]]
        if self.sums.needed.e:
            self._add_e(tokens, Kept(columns, factor, ids, parts, rows))
        if self.sums.needed.c:
            self._add_c(e, Kept(columns, factor, ids, parts, rows))

    def _prepare(self) -> None:
        """Find the directions, and the parts of c in them.

        Not before the first chunk: its products keep the device busy while the host launches these.
        """
        blocks, sums = self.sums.blocks, self.sums
        num_classes, rank = blocks.problem.c.shape[0], FILTER_DIRECTIONS
        tiny = torch.finfo(torch.float32).tiny
        if sums.needed.e:
            step = cdiv(num_classes, SAMPLED)
            self._of_c = directions(blocks, blocks.classifier(slice(None, None, step)))
            parts = self._memory[: num_classes * rank].view(num_classes, rank)
            for part in sums.classes:
                blocks.store_product(blocks.classifier(part), self._of_c.T, parts[part])
            self._parts_of_c = parts.to(self._of_c.dtype, copy=True)
        if sums.needed.c:
            step = cdiv(blocks.num_kept, min(SAMPLED, blocks.shape[0]))
            sample = blocks.embeddings(slice(0, blocks.num_kept, step))
            self._of_e = directions(blocks, sample)
            # Half precision holds parts of embeddings relative to these.
            self._largest = blocks.product(sample, self._of_e.T).abs().amax().clamp(min=tiny)
            shape = (num_classes, rank)
            self._class_sums = blocks.targets.new_zeros(shape, dtype=torch.float32)
        self._is_prepared = True

    def _choose(self, factor: Tensor) -> Tensor | None:
        """Return the classes to keep of a chunk, see :func:`choose_classes`."""
        num_tokens, num_classes = factor.shape
        energies = torch.empty(num_classes, dtype=torch.float32, device=factor.device)
        launch(
            column_energies_kernel,
            (cdiv(num_classes, BLOCK),),
            grad_ptr=factor,
            unit_ptr=self._unit,
            energies_ptr=energies,
            num_tokens=num_tokens,
            num_classes=num_classes,
            stride=factor.stride(0),
            ROWS=ROWS,
            BLOCK=BLOCK,
        )
        return choose_classes(energies, self.tolerance)

    def _add_e(self, tokens: slice, kept: Kept) -> None:
        """Add the products of the kept classes, and those of the others with directions."""
        columns, rest, ids, parts, rows = kept
        blocks, dim = self.sums.blocks, self.sums.grad_e.shape[1]
        dropped = rows.new_zeros((len(rest), FILTER_DIRECTIONS))
        for part in self.sums.classes:
            blocks.add_product(rest[:, part], self._parts_of_c[part], dropped)
        out = self.sums.rows_of_e(tokens)
        blocks.store_product(dropped.to(rest.dtype), self._of_c, out)
        for part in parts:
            rows_of_c = rows.view(rest.dtype)[: (part.stop - part.start) * dim].view(-1, dim)
            blocks.gather_classes(ids[part], rows_of_c)
            blocks.add_product(columns[:, part], rows_of_c, out)
        self.sums.store_rows_of_e(tokens, out)

    def _add_c(self, e: Tensor, kept: Kept) -> None:
        """As :meth:`_add_e`; the others wait for :meth:`finish`."""
        columns, rest, ids, parts, rows = kept
        dim, sums = e.shape[1], self.sums
        if not sums.has_c:
            sums.grad_c.zero_()
            sums.has_c = True
        for part in parts:
            rows_of_c = rows[: (part.stop - part.start) * dim].view(-1, dim)
            sums.blocks.store_product(columns[:, part].T, e, rows_of_c)
            block = min(1024, next_power_of_2(dim))
            launch(
                add_rows_kernel,
                (part.stop - part.start, cdiv(dim, block)),
                rows_ptr=rows_of_c,
                ids_ptr=ids[part],
                out_ptr=sums.grad_c,
                D=dim,
                BLOCK=block,
            )
        parts_of_e = sums.blocks.product(e, self._of_e.T).div_(self._largest).to(rest.dtype)
        for part in sums.classes:
            sums.blocks.add_product(rest[:, part].T, parts_of_e, self._class_sums[part])
        self._has_rest = True

    def finish(self) -> None:
        """Add to dC what was dropped of all chunks."""
        if not self._has_rest:
            return
        sums, dtype = self.sums, self._of_e.dtype
        class_sums = self._class_sums.mul_(self._largest)
        for part in sums.classes:
            rows = class_sums[part]
            if dtype == torch.float16:  # which may not hold them
                sums.grad_c[part].addmm_(rows, self._of_e.float())
            else:
                sums.blocks.add_product(rows.to(dtype), self._of_e, sums.grad_c[part])


def directions(blocks: Blocks, rows: Tensor) -> Tensor:
    """Return orthonormal directions (R, D) that hold most of the squares of rows (S, D).

    They are factors like the rows. One step of a subspace iteration from sums of neighbouring rows
    holds 84 to 91 % of the squares of real embeddings, the best directions 86 to 92 %.
    """
    places = torch.arange(len(rows), device=rows.device) * FILTER_DIRECTIONS // max(1, len(rows))
    groups = torch.arange(FILTER_DIRECTIONS, device=rows.device)
    found = blocks.product((places == groups[:, None]).to(rows.dtype), rows)
    for _ in range(STEPS):
        parts = blocks.product(_near_one(found).to(rows.dtype), rows.T)
        found = blocks.product(_near_one(parts).to(rows.dtype), rows)
    found = _near_one(found).double()
    found /= found.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    gram = found @ found.T
    gram.diagonal().add_(RIDGE)
    lower = torch.linalg.cholesky_ex(gram).L
    result: Tensor = torch.linalg.solve_triangular(lower, found, upper=False)
    return result.to(rows.dtype)


def _near_one(rows: Tensor) -> Tensor:
    """Return rows divided by their largest elements."""
    return rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
