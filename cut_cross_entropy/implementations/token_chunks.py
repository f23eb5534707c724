"""Sums of gradients from chunks of tokens, of which the logits of all classes are at hand.

Shape legend: ``cut_cross_entropy.implementations``; T is the number of tokens of a chunk.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cut_cross_entropy.constants import MAX_ELEMENTS
from cut_cross_entropy.implementations.blocks import Blocks
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


def sum_gradients(
    blocks: Blocks,
    embeddings: Iterator[tuple[slice, Tensor, Tensor]],
    logit_gradients: Callable[[slice, Tensor, Tensor], Tensor],
    classes: list[slice],
    needed: Needed,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums of the gradients of e, c and bias in :attr:`Problem.wide`; empty if not needed.

    Args:
        blocks: of the model that trains; its shape has all classes.
        embeddings: of each chunk the tokens and the embeddings, its own and those of another model.
        logit_gradients: takes these, and returns the gradients (T, V) by ``e @ c.T + bias`` as a
            factor, in memory of its own.
        classes: slices for one product each.
        needed: the gradients to compute.
    """
    problem = blocks.problem
    num_classes, dim = problem.c.shape
    make = lambda *shape: torch.zeros(shape, dtype=blocks.wide, device=problem.e.device)
    grad_e = make(blocks.num_tokens, dim) if needed.e else make(0)
    grad_c = make(0)
    if needed.c:  # the first chunk overwrites them
        grad_c = (
            make(num_classes, dim)
            if blocks.num_kept == 0
            else torch.empty_like(
                problem.c, dtype=blocks.wide, memory_format=torch.contiguous_format
            )
        )
    grad_bias = make(num_classes) if needed.bias else make(0)
    product = None
    if needed.e and blocks.rows is not None:
        product = make(min(blocks.shape[0], blocks.num_kept), dim)
    for tokens, e, others in embeddings:
        factor = logit_gradients(tokens, e, others)
        if needed.e:
            out = grad_e[tokens] if product is None else product[: len(factor)]
            for part in classes:
                multiply = blocks.add_product if part.start else blocks.store_product
                multiply(factor[:, part], blocks.classifier(part), out)
            if product is not None and blocks.rows is not None:
                grad_e[blocks.rows[tokens]] = out
        if needed.c:
            multiply = blocks.add_product if tokens.start else blocks.store_product
            for part in classes:
                multiply(factor[:, part].T, e, grad_c[part])
        if needed.bias:
            grad_bias += factor.sum(0, dtype=blocks.wide)
    return grad_e, grad_c, grad_bias
