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

from cut_cross_entropy.budget import (
    MAX_ELEMENTS,
    WIDENED_SHARE,
    divergence_tokens_per_chunk,
)
from cut_cross_entropy.divergence_results import DivergenceGrads, DivergenceSum
from cut_cross_entropy.implementations.blocks import Blocks
from cut_cross_entropy.kernels.divergence import state_of
from cut_cross_entropy.kernels.divergence_kernels import MIXTURE
from cut_cross_entropy.kernels.divergence_logits import (
    StoredLogits,
    TokenValues,
    finish,
    finish_mixture,
    kind_of_divergence,
    no_sums,
    scale_of,
)
from cut_cross_entropy.kernels.exact_sum import class_slices
from cut_cross_entropy.kernels.primitives import LN2
from cut_cross_entropy.kernels.step import in_compute_dtype
from cut_cross_entropy.problem import Needed, Problem

EVEN_TOKENS = 128
"""Multiples of these are whole tiles of the library's products."""


def divergence_and_gradients(
    student: Problem,
    teacher: Problem,
    beta: float,
    has_targets: bool,
    weights: Tensor | None,
    needed: Needed,
) -> DivergenceSum:
    """Compute the sum of the divergences times their weights, and its gradients.

    Args:
        student, teacher, beta, has_targets: as in ``chunked_divergence.forward``; without a group,
            not of float64, and :func:`divergence_tokens_per_chunk` is not 0.
        weights: (N,), factors of the divergences; None for 1.
        needed: the gradients to compute.
    """
    most = divergence_tokens_per_chunk(student, teacher, needed)
    student, teacher = in_compute_dtype(student), in_compute_dtype(teacher)
    blocks, others = Blocks(student), Blocks(teacher)
    (num_tokens, dim), num_classes, count = student.e.shape, student.c.shape[0], blocks.num_kept
    make = student.e.new_zeros
    grad_e = make((num_tokens, dim) if needed.e else 0, dtype=torch.float32)
    grad_c = make((num_classes, dim) if needed.c and not count else 0, dtype=torch.float32)
    grad_bias = make(num_classes if needed.bias else 0, dtype=torch.float32)
    if needed.c and count:
        grad_c = torch.empty((num_classes, dim), dtype=torch.float32, device=grad_e.device)
    kind, every = kind_of_divergence(beta), slice(0, num_classes)
    results = make((6, count), dtype=torch.float32)
    if weights is None:
        weights = make(num_tokens, dtype=torch.float32) + 1
    rows = _even_chunk(count, most)
    blocks.shape = others.shape = (rows, num_classes)
    logits = StoredLogits.allocate(blocks, others, rows, num_classes)
    scale = scale_of(DivergenceGrads(weights, None, None), blocks, logits.factor_type)
    weights = blocks.gather(weights.float())
    product = make((rows, dim) if needed.e and blocks.rows is not None else 0, dtype=torch.float32)
    parts = list(class_slices(num_classes, _row_elements(blocks, others, rows)))
    for tokens, e, e_teacher in logits.token_blocks():
        length = tokens.stop - tokens.start
        for classes in parts:
            logits.multiply(e, e_teacher, tokens, classes, 0)
        sums, of_tokens = no_sums(length, weights), results[:, tokens]
        logits.add_sums(tokens, every, sums, kind, has_targets)
        finish(sums, of_tokens, kind, has_targets)
        if kind == MIXTURE.value:
            of_mixture = torch.zeros_like(sums[:2])
            logits.add_mixture_sums(tokens, every, of_mixture, of_tokens, beta)
            finish_mixture(of_mixture, of_tokens, beta)
        _, entropy, _, lse, teacher_lse, relative = of_tokens / LN2.value
        values = TokenValues(
            weights[tokens] * scale,
            None,
            None,
            None,
            lse=lse,
            teacher_lse=teacher_lse,
            relative=relative,
            entropy=entropy,
        )
        factor = logits.write_gradients(tokens, every, values, kind, beta)
        if needed.e:
            out = grad_e[tokens] if blocks.rows is None else product[:length]
            for classes in parts:
                multiply = blocks.add_product if classes.start else blocks.store_product
                multiply(factor[:, classes], blocks.classifier(classes), out)
            if blocks.rows is not None:
                grad_e[blocks.rows[tokens]] = out
        if needed.c:
            multiply = blocks.add_product if tokens.start else blocks.store_product
            for classes in parts:
                multiply(factor[:, classes].T, e, grad_c[classes])
        if needed.bias:
            grad_bias += factor.sum(0, dtype=torch.float32)
    if logits.factor_type == torch.float16:
        for total in (grad_e, grad_c, grad_bias):
            total.div_(scale)
    state = state_of(results, blocks, has_targets)
    total = (state.divergence * blocks.scatter(weights)).sum()
    return DivergenceSum(total, *state, grad_e, grad_c, grad_bias)


def _even_chunk(count: int, most: int) -> int:
    """Return the tokens of a chunk, of which all but the last are the same, at most ``most``."""
    even = EVEN_TOKENS if most >= EVEN_TOKENS else 1
    most = most // even * even
    rows = -(-count // max(1, -(-count // most)))
    return min(-(-rows // even) * even, max(count, 1))


def _row_elements(student: Blocks, teacher: Blocks, rows: int) -> int:
    """Return how many elements a class has in the largest operand of a product."""
    most = max(rows, *(side.problem.c.shape[1] for side in (student, teacher)))
    for side in (student, teacher):
        if side.problem.compute_dtype.itemsize == 2 and not side.half_products:
            share = side.problem.memory_budget // WIDENED_SHARE
            most = max(most, MAX_ELEMENTS * 4 * side.problem.c.shape[1] // max(share, 1))
    return most
