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
from cut_cross_entropy.kernels.divergence import state_of
from cut_cross_entropy.kernels.divergence_columns import FilteredSums
from cut_cross_entropy.kernels.divergence_logits import (
    StoredLogits,
    TokenValues,
    finish,
    finish_mixture,
    from_student,
    kind_of_divergence,
    log_sum_exps,
    room_for_sums,
    scale_of,
)
from cut_cross_entropy.kernels.step import in_compute_dtype
from cut_cross_entropy.kernels.triton.divergence_logits import FROM_STUDENT, MIXTURE, RELATIVE
from cut_cross_entropy.problem import Gradients, Needed, gradient_scale

MANY_TOKENS, EVEN_TOKENS = 512, (128, 64)
"""A chunk has a multiple of 128 tokens, whole tiles; of 64 where fewer than 512 fit."""


def divergence_and_gradients(
    problem: DivergenceProblem, weights: Tensor | None, needed: Needed, tolerance: float = 0.0
) -> DivergenceSum:
    """Compute the sum of the divergences times their weights, and its gradients.

    As ``chunked_divergence.divergence_and_gradients``, for inputs other than float64 of which
    :func:`divergence_tokens_per_chunk` is not 0; and gradients of e and c may come from the classes
    that matter, see ``kernels.divergence_columns``, unless ``tolerance`` is 0.
    """
    student, teacher, beta, has_targets = problem
    most = 0
    if is_filtered := filters_divergence(student, tolerance):
        most = divergence_tokens_per_chunk(student, teacher, needed, is_filtered)
    if not most:  # the budget holds chunks, but not what the filter stores too
        is_filtered = False
        most = divergence_tokens_per_chunk(student, teacher, needed)
    student, teacher = in_compute_dtype(student), in_compute_dtype(teacher)
    blocks, others = Blocks(student), Blocks(teacher)
    num_classes, count = student.c.shape[0], blocks.num_kept
    make = student.e.new_zeros
    kind, every = kind_of_divergence(beta), slice(0, num_classes)
    results = make((6, count), dtype=torch.float32)
    sums = make((8, count), dtype=torch.float32)
    of_mixture = torch.zeros_like(sums[:2])
    if weights is None:
        weights = make(blocks.num_tokens, dtype=torch.float32) + 1
    rows = even_chunk(count, most, EVEN_TOKENS[most < MANY_TOKENS])
    blocks.shape = others.shape = (rows, num_classes)
    logits = StoredLogits.allocate(blocks, others, rows, num_classes)
    scale = scale_of(DivergenceGrads(weights, None, None), blocks, logits.factor_type)
    weights = blocks.gather(weights.float())
    scaled = weights * scale
    parts = slices_of_factors(rows, blocks, others)
    gradients = GradientSums(blocks, parts, needed)
    filtered = None
    if is_filtered and FilteredSums.is_worth_it(blocks, needed):
        largest = scaled.abs()
        unit = gradient_scale(largest, largest)
        filtered = FilteredSums(gradients, tolerance, logits.memory[1], unit)

    for tokens, e, e_teacher in logits.token_blocks():
        for classes in parts:
            logits.multiply(e, e_teacher, tokens, classes, 0)
        of_tokens = room_for_sums(num_classes, len(e), sums)
        logits.add_sums(tokens, every, of_tokens, kind, has_targets)
        sums[:, tokens] = of_tokens[0]
        lses = log_sum_exps(of_tokens[0])
        relative = lses[0]  # unused, like the entropy
        if kind == MIXTURE.value:
            of_mixture[:, tokens] = logits.mixture_sums(tokens, every, lses, beta)
            relative = of_mixture[RELATIVE, tokens]
        elif kind == FROM_STUDENT.value:
            relative = from_student(of_tokens[0])
        values = TokenValues(
            scaled[tokens],
            None,
            None,
            None,
            lse=lses[0],
            teacher_lse=lses[1],
            relative=relative,
            entropy=lses[0],
        )
        factor = logits.write_gradients(tokens, every, values, kind, beta)
        (filtered or gradients).add(tokens, e, factor)
    finish(sums, results, kind, has_targets)
    if kind == MIXTURE.value:
        finish_mixture(of_mixture, results, beta)
    if filtered is not None:
        filtered.finish()
    if logits.factor_type == torch.float16:
        for total in gradients.flat():
            total.div_(scale)
    state = state_of(results, blocks, has_targets)
    total = (state.divergence * blocks.scatter(weights)).sum()
    return DivergenceSum(total, state, Gradients(*gradients.flat()))
