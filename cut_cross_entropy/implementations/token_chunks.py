"""Sums of gradients from chunks of tokens, of which the logits of all classes are at hand.

Shape legend: ``cut_cross_entropy.implementations``; T is the number of tokens of a chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cut_cross_entropy.constants import MAX_ELEMENTS
from cut_cross_entropy.implementations.blocks import Blocks, part_of
from cut_cross_entropy.problem import Needed

ALIGNED = 256  # classes of a library product, but for the last few
WIDENED_SHARE = 4
"""Part of the budget for rows of a classifier that are copied in another dtype."""


def class_slices(num_classes: int, row: int) -> Iterator[slice]:
    """Yield slices of the classes for products with ``row`` elements per class.

    For a number of classes that is not a multiple of 8 the library takes far slower kernels, so the
    last few are a slice of their own.
    """
    step = max(ALIGNED, MAX_ELEMENTS // row // ALIGNED * ALIGNED)
    aligned = num_classes if num_classes % 8 == 0 else num_classes // ALIGNED * ALIGNED
    for start in range(0, aligned, step):
        yield slice(start, min(start + step, aligned))
    if aligned < num_classes:
        yield slice(aligned, num_classes)


def slices_of_factors(rows: int, *sides: Blocks) -> list[slice]:
    """Slices of the classes such that copies of their rows, where needed, have a bounded size.

    Args:
        rows: tokens of a chunk.
        sides: the problems whose classifiers are factors.
    """
    row = rows
    for side in sides:
        num_classes, dim = side.problem.c.shape
        row = max(row, dim)
        if side.problem.most_classes < num_classes:
            row = max(row, -(-MAX_ELEMENTS // side.problem.most_classes))
        if copies_rows(side):
            share = max(1, side.problem.memory_budget // WIDENED_SHARE)
            row = max(row, MAX_ELEMENTS * side.wide.itemsize * dim // share)
    return list(class_slices(num_classes, row))


def copies_rows(side: Blocks) -> bool:
    """Return whether rows of the classifier are factors in another dtype than their own."""
    dtype = side.problem.compute_dtype if side.half_products else side.wide
    return side.problem.c.dtype != dtype


def even_chunk(count: int, most: int, multiple: int = 1) -> int:
    """Return the tokens of a chunk: of all but the last the same, at most ``most``.

    They are a multiple of ``multiple``, if ``most`` is not less.
    """
    multiple = multiple if most >= multiple else 1
    most = most // multiple * multiple
    rows = -(-count // max(1, -(-count // most)))
    return min(-(-rows // multiple) * multiple, max(count, 1))


class GradientSums:
    """Sums of the gradients of e, c and bias in :attr:`Problem.wide`; empty if not needed.

    Args:
        blocks: of the model that trains; its shape has all classes.
        classes: slices for one product each.
        needed: the gradients to compute.
    """

    def __init__(self, blocks: Blocks, classes: list[slice], needed: Needed) -> None:
        problem = blocks.problem
        num_classes, dim = problem.c.shape
        make = lambda *shape: torch.zeros(shape, dtype=blocks.wide, device=problem.e.device)
        self.blocks, self.classes, self.needed = blocks, classes, needed
        self.grad_e = make(blocks.num_tokens, dim) if needed.e else make(0)
        self.grad_c = make(0)
        self.has_c = blocks.num_kept == 0  # the first chunk overwrites the sums of dC
        if needed.c:
            self.grad_c = (
                make(num_classes, dim)
                if self.has_c
                else torch.empty_like(
                    problem.c, dtype=blocks.wide, memory_format=torch.contiguous_format
                )
            )
        self.grad_bias = make(num_classes) if needed.bias else make(0)
        self._product = None
        if needed.e and blocks.rows is not None:
            self._product = make(min(blocks.shape[0], blocks.num_kept), dim)

    def add(self, tokens: slice, e: Tensor, factor: Tensor) -> None:
        """Add the gradients of a chunk.

        Args:
            tokens: of the chunk.
            e: (T, D) their embeddings, as a factor.
            factor: (T, V) gradients by ``e @ c.T + bias``, as a factor.
        """
        blocks = self.blocks
        if self.needed.e:
            out = self.rows_of_e(tokens)
            for part in self.classes:
                multiply = blocks.add_product if part.start else blocks.store_product
                multiply(part_of(factor, part, 1), blocks.classifier(part), out)
            self.store_rows_of_e(tokens, out)
        if self.needed.c:
            multiply = blocks.add_product if self.has_c else blocks.store_product
            for part in self.classes:
                multiply(part_of(factor, part, 1).T, e, part_of(self.grad_c, part, 0))
            self.has_c = True
        self.add_bias(factor)

    def rows_of_e(self, tokens: slice) -> Tensor:
        """Return where to write the rows of dE of a chunk."""
        return (
            self.grad_e[tokens]
            if self._product is None
            else self._product[: tokens.stop - tokens.start]
        )

    def store_rows_of_e(self, tokens: slice, rows: Tensor) -> None:
        """Move the rows of a chunk, of which none is ignored, to their places."""
        if self.blocks.rows is not None:
            self.grad_e[self.blocks.rows[tokens]] = rows

    def add_bias(self, factor: Tensor) -> None:
        """Add the sums of the classes of a chunk, if needed."""
        if self.needed.bias:
            self.grad_bias += factor.sum(0, dtype=self.blocks.wide)

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums in the order of the gradients."""
        return self.grad_e, self.grad_c, self.grad_bias
