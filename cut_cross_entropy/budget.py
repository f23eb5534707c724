"""How much the kernels store at a time, which decides how a loss is computed."""

from cut_cross_entropy.constants import BLOCK_TOKENS
from cut_cross_entropy.problem import Needed, Problem

# The sums of dC are read and written once per chunk: with fewer tokens in it, that takes longer
# than to compute the logits again. Without dC, c is read for each chunk, and that takes as long.
MIN_TOKENS = 1024
MIN_TOKENS_WITHOUT_C = 256
MAX_ELEMENTS = 2**30  # 32 bits reach them


def powers_per_chunk(problem: Problem, needed: Needed) -> int:
    """Return for how many tokens to store powers of all classes; 0 if too few to be worth it.

    See ``cut_cross_entropy.kernels.exact_sum``. They take the budget, and as much memory as the
    gradient of c in its dtype: beside the sums in float32, the backward allocates that, and the
    forward does not.
    """
    (num_classes, dim), itemsize = problem.c.shape, problem.compute_dtype.itemsize
    num_bytes = problem.memory_budget
    if needed.c:
        result, copy = problem.c.dtype.itemsize, itemsize * (problem.c.dtype.itemsize != itemsize)
        num_bytes += num_classes * dim * max(0, result - copy)
    per_token = itemsize * num_classes + dim * (itemsize + 4)  # e scaled, and a row of dE
    tokens = min(num_bytes // per_token, MAX_ELEMENTS // num_classes)
    least = MIN_TOKENS if needed.c else MIN_TOKENS_WITHOUT_C
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS if tokens >= least else 0
