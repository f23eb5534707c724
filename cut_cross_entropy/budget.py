"""Memory that the kernels store at a time, which decides how a loss is computed."""

from cut_cross_entropy.constants import BLOCK_TOKENS, MAX_ELEMENTS
from cut_cross_entropy.implementations.blocks import uses_half_products
from cut_cross_entropy.implementations.token_chunks import WIDENED_SHARE
from cut_cross_entropy.problem import Needed, Problem

# The sums of dC are read and written once per chunk: with fewer tokens in it, that takes longer
# than to compute the logits again. Without dC, c is read for each chunk, and that takes as long.
MIN_TOKENS = 1024
MIN_TOKENS_WITHOUT_C = 256
# A divergence saves two or four products, so fewer tokens are enough.
MIN_PAIRS = 384
MIN_PAIRS_WITHOUT_C = 192

FILTER_DIRECTIONS = 64
"""Directions of embeddings and of classes that stand for what the filter of a divergence drops."""
FILTER_BYTES = 48  # of a class, for its energy and for the order of all


def powers_per_chunk(problem: Problem, needed: Needed) -> int:
    """Return for how many tokens to store powers of all classes; 0 if too few to be worth it.

    See ``cut_cross_entropy.kernels.exact_sum``. They take the budget, and as much memory as the
    gradient of c in its dtype: beyond the sums in float32, the backward allocates that, and the
    forward does not.
    """
    (num_classes, dim), itemsize = problem.c.shape, problem.compute_dtype.itemsize
    num_bytes = _with_that_of_the_backward(problem, needed)
    per_token = itemsize * num_classes + dim * (itemsize + 4)  # e scaled, and a row of dE
    tokens = min(num_bytes // per_token, MAX_ELEMENTS // max(num_classes, 1))
    least = MIN_TOKENS if needed.c else MIN_TOKENS_WITHOUT_C
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS if tokens >= least else 0


def filters_divergence(student: Problem, tolerance: float) -> bool:
    """Return whether the kernels may filter a divergence: rows of factors are there, not copies."""
    is_copied = student.compute_dtype.itemsize == 2 and not uses_half_products(student)
    return tolerance > 0 and student.has_rows and not is_copied


def divergence_tokens_per_chunk(
    student: Problem, teacher: Problem, needed: Needed, is_filtered: bool = False
) -> int:
    """Return for how many tokens to store the logits of both models; 0 if too few to be worth it.

    See ``cut_cross_entropy.kernels.divergence_sum``. They may take what :func:`powers_per_chunk`
    may, less what the filter stores if ``is_filtered``.
    """
    num_classes, dim = student.c.shape
    sides, num_bytes = (student, teacher), _with_that_of_the_backward(student, needed)
    if teacher.c.dtype != teacher.compute_dtype:
        num_bytes -= teacher.c.numel() * teacher.compute_dtype.itemsize
    for side in sides:
        if side.compute_dtype.itemsize == 2 and not uses_half_products(side):
            num_bytes -= student.memory_budget // WIDENED_SHARE
    if is_filtered:
        itemsize = student.compute_dtype.itemsize
        num_bytes -= num_classes * (FILTER_DIRECTIONS * (itemsize + 4) + FILTER_BYTES)
    per_token = 8 * num_classes + 4 * dim  # float32 logits, and a row of dE
    per_token += sum(side.compute_dtype.itemsize * side.e.shape[1] for side in sides)
    tokens = min(num_bytes // per_token, MAX_ELEMENTS // max(num_classes, 1))
    return tokens if tokens >= (MIN_PAIRS if needed.c else MIN_PAIRS_WITHOUT_C) else 0


def _with_that_of_the_backward(problem: Problem, needed: Needed) -> int:
    """Return the budget, and what the backward allocates for the gradient of c in its dtype."""
    if not needed.c:
        return problem.memory_budget
    result, itemsize = problem.c.dtype.itemsize, problem.compute_dtype.itemsize
    copy = itemsize * (result != itemsize)
    return problem.memory_budget + problem.c.numel() * max(0, result - copy)
