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
from cut_cross_entropy.kernels.launch import HostCopy, cdiv, launch, next_power_of_2
from cut_cross_entropy.kernels.triton.divergence_columns import (
    add_rows_kernel,
    column_energies_kernel,
    move_columns_kernel,
)
from cut_cross_entropy.problem import Needed, Problem

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


def rank_classes(energies: Tensor, tolerance: float) -> tuple[Tensor, HostCopy]:
    """Return the ids (V,) of the classes, those of least energy first, and how many to drop.

    Args:
        energies: (V,) float32.
        tolerance: root of the dropped energy relative to that of all.
    """
    total = energies.sum()
    values, order = energies.sort(stable=True)
    shares = (values.double() / total.clamp(min=torch.finfo(torch.float32).tiny) * UNIT).ceil()
    dropped = (shares.long().cumsum(0) <= tolerance**2 * UNIT) & total.isfinite()
    return order, HostCopy(dropped.sum())


def number_to_keep(num_dropped: HostCopy, num_classes: int) -> int | None:
    """Wait for the number of classes to drop, and return that of the others; None for all."""
    least = num_classes - int(num_dropped.wait())
    return rounded_number(least, num_classes)


def rounded_number(least: int, num_classes: int) -> int | None:
    """Return how many classes to keep if at least so many are to be; None for all."""
    number = min(num_classes, cdiv(least, MULTIPLE) * MULTIPLE)
    return number if number <= MOST_KEPT * num_classes else None


class Remainder(NamedTuple):
    """What is left of the logit gradients of a chunk.

    Args:
        tokens: of the chunk.
        e: (T, D) their embeddings, as a factor.
        factor: (T, V) the logit gradients, 0 in place of classes whose products are computed.
        rows_of_e: (T, D) where the products for dE are added up.
    """

    tokens: slice
    e: Tensor
    factor: Tensor
    rows_of_e: Tensor


class FilteredSums:
    """Sums of gradients to which chunks add the classes that matter, where that takes less time.

    The host need not wait for the number of classes that a chunk keeps: it takes a few more than
    the chunk before needed, and reads the number while their products are computed. Those of
    classes that were missing follow.

    Args:
        sums: of all chunks, without one so far.
        tolerance: see :func:`rank_classes`, of each chunk.
        memory: (T, at least V) float32, contiguous, for kept columns and some rows of c and of dC.
        unit: () power of two that brings logit gradients near 1, whose squares could underflow.
    """

    def __init__(self, sums: GradientSums, tolerance: float, memory: Tensor, unit: Tensor) -> None:
        self.sums, self.tolerance, self._unit = sums, tolerance, unit
        self._memory = memory.view(-1)
        self._is_prepared = self._keeps_all = self._has_rest = False
        self._expected: int | None = None  # kept classes of the next chunk

    @classmethod
    def is_worth_it(cls, student: Problem, num_tokens: int, needed: Needed) -> bool:
        """Whether the products of a chunk take longer than what chooses among its classes."""
        products = int(needed.e) + int(needed.c)
        enough = products * num_tokens * student.c.numel() >= LEAST_PRODUCTS
        return enough and num_tokens >= FILTER_DIRECTIONS

    def add(self, tokens: slice, e: Tensor, factor: Tensor) -> None:
        """Add the gradients of a chunk, as :meth:`GradientSums.add`; overwrite them."""
        if not self._is_prepared:
            self._prepare()
        if self._keeps_all:
            self.sums.add(tokens, e, factor)
            return
        num_classes, sums = factor.shape[1], self.sums
        order, num_dropped = rank_classes(self._energies(factor), self.tolerance)
        is_first = self._expected is None
        number = number_to_keep(num_dropped, num_classes) if is_first else self._expected
        if number is None or not self._at_once(factor, e, number):
            self._keeps_all = True  # the next chunk will too
            sums.add(tokens, e, factor)
            return
        sums.add_bias(factor)
        if sums.needed.c and not sums.has_c:
            sums.grad_c.zero_()
            sums.has_c = True
        chunk = Remainder(tokens, e, factor, sums.rows_of_e(tokens).zero_())
        self._add_kept(chunk, order[num_classes - number :])
        needed = number if is_first else number_to_keep(num_dropped, num_classes)
        missing = 0 if needed is None else max(0, needed - number)
        if needed is None or not self._at_once(factor, e, missing):
            self._keeps_all = True
            self._add_all(chunk)
        else:
            if missing:
                self._add_kept(chunk, order[num_classes - needed : num_classes - number])
            self._add_dropped(chunk)
            self._expected = rounded_number(needed + needed // 16, num_classes) or needed
        if sums.needed.e:
            sums.store_rows_of_e(tokens, chunk.rows_of_e)

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

    def _energies(self, factor: Tensor) -> Tensor:
        """Return the energies (V,) of the classes of a chunk."""
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
        return energies

    def _columns_size(self, factor: Tensor, number: int) -> int:
        """Return how many floats of the memory the columns of some classes take."""
        return cdiv(len(factor) * number * factor.dtype.itemsize, 16) * 4

    def _at_once(self, factor: Tensor, e: Tensor, number: int) -> int:
        """Return of how many kept classes there is room for rows of c and dC; 0 if of too few."""
        left = (len(self._memory) - self._columns_size(factor, number)) * 4
        at_once = left // (e.shape[1] * (factor.dtype.itemsize + 4)) // MULTIPLE * MULTIPLE
        return at_once if at_once >= min(max(number, 1), LEAST_ROWS) else 0

    def _add_kept(self, chunk: Remainder, ids: Tensor) -> None:
        """Move the columns of some classes (K,) out of the chunk, and add their products."""
        _, e, factor, rows_of_e = chunk
        sums, ids = self.sums, ids.sort().values
        shape, dim = (len(factor), len(ids)), e.shape[1]
        columns = self._memory.view(factor.dtype)[: len(factor) * len(ids)].view(shape)
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
        size, at_once = self._columns_size(factor, len(ids)), self._at_once(factor, e, len(ids))
        memory = self._memory[size : size + at_once * dim]
        for start in range(0, len(ids), at_once):
            part = slice(start, min(start + at_once, len(ids)))
            num_elements = (part.stop - part.start) * dim
            if sums.needed.e:
                rows_of_c = memory.view(factor.dtype)[:num_elements].view(-1, dim)
                sums.blocks.gather_classes(ids[part], rows_of_c)
                sums.blocks.add_product(columns[:, part], rows_of_c, rows_of_e)
            if sums.needed.c:
                rows = memory[:num_elements].view(-1, dim)
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

    def _add_all(self, chunk: Remainder) -> None:
        """Add the products of all classes that are left."""
        _, e, factor, rows_of_e = chunk
        sums, blocks = self.sums, self.sums.blocks
        for part in sums.classes:
            if sums.needed.e:
                blocks.add_product(factor[:, part], blocks.classifier(part), rows_of_e)
            if sums.needed.c:
                blocks.add_product(factor[:, part].T, e, sums.grad_c[part])

    def _add_dropped(self, chunk: Remainder) -> None:
        """Add the products of the classes that are left with directions."""
        _, e, rest, rows_of_e = chunk
        sums, blocks = self.sums, self.sums.blocks
        if sums.needed.e:
            dropped = rows_of_e.new_zeros((len(rest), FILTER_DIRECTIONS))
            for part in sums.classes:
                blocks.add_product(rest[:, part], self._parts_of_c[part], dropped)
            blocks.add_product(dropped.to(rest.dtype), self._of_c, rows_of_e)
        if sums.needed.c:  # those of dC wait for :meth:`finish`
            parts_of_e = blocks.product(e, self._of_e.T).div_(self._largest).to(rest.dtype)
            for part in sums.classes:
                blocks.add_product(rest[:, part].T, parts_of_e, self._class_sums[part])
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
