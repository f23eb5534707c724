"""Weighted sum of the divergences with its gradients, from one product for each model's logits.

Tokens are taken in chunks, of which the logits of all classes are stored in float32, student and
teacher: where they nearly agree, the gradient is a small difference of both probabilities. The
chunk's sums, its logit gradients and its products for dE and dC follow while they are there. That
is four products in all with both heads of one size, where gradients that wait for the backward take
six, or eight for a mixture. Formulas: ``implementations.chunked_divergence``. Shape legend:
``cut_cross_entropy.kernels``; T is the number of tokens of a chunk.
"""

import torch
from torch import Tensor

from cut_cross_entropy.budget import divergence_tokens_per_chunk, filters_divergence
from cut_cross_entropy.divergence_problem import DivergenceGrads, DivergenceProblem, DivergenceSum
from cut_cross_entropy.implementations.blocks import Blocks
from cut_cross_entropy.implementations.token_chunks import (
    GradientSums,
    even_chunk,
    slices_of_factors,
)
from cut_cross_entropy.kernels.divergence_columns import FilteredSums
from cut_cross_entropy.kernels.divergence_logits import (
    StoredLogits,
    TokenSums,
    TokenValues,
    finish,
    kind_of_divergence,
    room_for_parts,
    scale_of,
)
from cut_cross_entropy.kernels.step import in_compute_dtype
from cut_cross_entropy.kernels.triton.divergence_logits import MIXTURE
from cut_cross_entropy.problem import Gradients, Needed, gradient_scale

MANY_TOKENS, EVEN_TOKENS = 512, (256, 64)
"""A chunk has a multiple of 256 tokens, whole tiles; of 64 where fewer than 512 fit."""


def divergence_and_gradients(
    problem: DivergenceProblem, weights: Tensor | None, needed: Needed, tolerance: float = 0.0
) -> DivergenceSum:
    """Compute the sum of the divergences times their weights, and its gradients.

    As ``chunked_divergence.divergence_and_gradients``, for inputs other than float64 of which
    :func:`divergence_tokens_per_chunk` is not 0; and gradients of e and c may come from the classes
    that matter, see ``kernels.divergence_columns``, unless ``tolerance`` is 0.
    """
    student, teacher, beta, has_targets = problem
    student, teacher = in_compute_dtype(student), in_compute_dtype(teacher)
    blocks = Blocks(student)
    others = Blocks(teacher, like=blocks)
    num_classes, kind = student.c.shape[0], kind_of_divergence(beta)
    every = slice(0, num_classes)
    rows, is_filtered = _chunk(problem, needed, blocks.num_kept, tolerance)
    blocks.shape = others.shape = (rows, num_classes)
    logits = StoredLogits.allocate(blocks, others, rows, num_classes)
    found = TokenSums.allocate(blocks.num_kept, student.e)
    if weights is None:
        weights = student.e.new_ones(blocks.num_tokens, dtype=torch.float32)
    scale = scale_of(DivergenceGrads(weights, None, None), blocks, logits.factor_type)
    weights = blocks.gather(weights.float())
    scaled = weights * scale
    values = TokenValues(scaled, None, None, None, logs=found.logs, entropy=None)
    parts = slices_of_factors(rows, blocks, others)
    gradients = GradientSums(blocks, parts, needed)
    filtered = of_parts = None
    if is_filtered:
        largest = scaled.abs()
        unit = gradient_scale(largest, largest)
        filtered = FilteredSums(gradients, tolerance, logits.memory[1], unit)

    for tokens, e, e_teacher in logits.token_blocks():
        for classes in parts:
            logits.multiply(e, e_teacher, tokens, classes, 0)
        if of_parts is None or of_parts.shape[2] != len(e):
            of_parts = room_for_parts(num_classes, len(e), e)
        logits.add_sums(tokens, every, of_parts, found, kind, has_targets=has_targets)
        if kind == MIXTURE.value:
            logits.sum_mixture(tokens, found.logs, beta)
        factor = logits.write_gradients(tokens, every, values, kind, beta)
        (filtered or gradients).add(tokens, e, factor)
    if filtered is not None:
        filtered.finish()
    if logits.factor_type == torch.float16:
        for total in gradients.flat():
            total.div_(scale)
    state = finish(found, kind, beta, blocks, has_targets)
    total = (state.divergence * blocks.scatter(weights)).sum()
    return DivergenceSum(total, state, Gradients(*gradients.flat()))


def _chunk(
    problem: DivergenceProblem, needed: Needed, num_tokens: int, tolerance: float
) -> tuple[int, bool]:
    """Return the tokens of a chunk, and whether its products are worth filtering.

    Without a filter the budget holds more; and it may hold chunks, but not what a filter stores.
    """
    student, teacher, *_ = problem
    for is_filtered in (True, False):
        if is_filtered and not filters_divergence(student, tolerance):
            continue
        most = divergence_tokens_per_chunk(student, teacher, needed, is_filtered)
        rows = even_chunk(num_tokens, most, EVEN_TOKENS[most < MANY_TOKENS]) if most else 0
        if rows and (not is_filtered or FilteredSums.is_worth_it(student, rows, needed)):
            break
    return rows, is_filtered
