"""Divergence of a student from a teacher at each token: walks over blocks of tokens and classes.

A block has all tokens, if they fit, and some classes. The library stores its logits of student and
teacher in float32; a kernel then reads both once for all sums, another for the gradient, which it
writes as a factor of the products for dE and dC. A divergence from the teacher or from the student
needs one walk over the classes, since its terms can be summed before the log-sum-exps are known. A
mixture of both takes a second one, unless the budget holds all classes of some tokens: their logits
are still there then. Formulas: ``implementations.chunked_divergence``. Shape legend:
``cut_cross_entropy.kernels``; T is the number of tokens of a block.
"""

import torch

from cut_cross_entropy.constants import MAX_ELEMENTS
from cut_cross_entropy.distributed.collectives import gather_shards
from cut_cross_entropy.divergence_problem import DivergenceGrads, DivergenceProblem, DivergenceState
from cut_cross_entropy.implementations.blocks import MAX_TOKENS, MIN_CLASSES, Blocks
from cut_cross_entropy.kernels.divergence_logits import (
    StoredLogits,
    TokenSums,
    TokenValues,
    combine,
    finish,
    kind_of_divergence,
    room_for_parts,
    scale_of,
)
from cut_cross_entropy.kernels.triton.divergence_logits import MIXTURE, RELATIVE
from cut_cross_entropy.problem import Gradients, Needed, Problem

MANY_TOKENS = 192
"""Tokens of a block of all classes, at least: with fewer, products wait for the memory."""
EVEN_TOKENS, EVEN_CLASSES = (256, 64), 1024
"""Multiples of these fill the multiprocessors with whole tiles of the library's products."""
ELEMENT = 8
"""Bytes of a class of a token: products of both models, of which one becomes the gradient."""


def _allocate(student: Problem, teacher: Problem, needed: Needed | None, kind: int) -> StoredLogits:
    """Choose blocks that fit the budget, and allocate memory for the logits of one."""
    blocks = Blocks(student)
    others = Blocks(teacher, like=blocks)
    num_classes = student.c.shape[0]
    tokens = max(1, min(blocks.num_kept, MAX_TOKENS))
    widened = sum(  # bytes of a row of e or c that is copied in float32
        4 * side.problem.c.shape[1]
        for side in (blocks, others)
        if side.problem.c.dtype != torch.float32 and not side.half_products
    )
    budget = student.memory_budget
    left = budget - num_classes * widened
    of_all_classes = left // (num_classes * ELEMENT + widened) if num_classes else 0
    of_all_classes = min(of_all_classes, MAX_ELEMENTS // max(1, num_classes))
    most_classes = min(student.most_classes, teacher.most_classes)
    is_enough = of_all_classes >= min(tokens, MANY_TOKENS) and most_classes >= num_classes
    if kind == MIXTURE.value and needed is None and student.group is None and is_enough:
        classes = num_classes
        if of_all_classes < tokens:
            multiple = next(n for n in (*EVEN_TOKENS, 1) if n <= of_all_classes)
            tokens = of_all_classes // multiple * multiple
    else:
        per_class = widened + (4 * student.c.shape[1] if needed and needed.c else 0)
        classes = 0
        while True:
            classes = (budget - tokens * widened) // (ELEMENT * tokens + per_class)
            classes = min(classes, MAX_ELEMENTS // tokens)
            if classes >= MIN_CLASSES or tokens == 1:
                break
            tokens = max(1, tokens // 2)
        multiple = EVEN_CLASSES if classes >= EVEN_CLASSES else MIN_CLASSES
        classes = min(most_classes, max(MIN_CLASSES, classes // multiple * multiple))
    blocks.shape = others.shape = (tokens, classes)
    return StoredLogits.allocate(blocks, others, tokens, classes)


def forward(problem: DivergenceProblem) -> DivergenceState:
    """Compute divergence, entropy, log-probabilities and what the backward needs.

    As ``chunked_divergence.forward``, for inputs other than float64.
    """
    student, teacher, beta, has_targets = problem
    kind, group = kind_of_divergence(beta), student.group
    logits = _allocate(student, teacher, None, kind)
    blocks = logits.student
    num_classes = student.c.shape[0]
    found = TokenSums.allocate(blocks.num_kept, student.e)
    if num_classes == 0:
        found.clear()
    is_whole = group is None and blocks.shape[1] == num_classes
    for tokens, e, e_teacher in logits.token_blocks():
        most = min(blocks.shape[1], num_classes)
        parts = room_for_parts(most, tokens.stop - tokens.start, student.e)
        for classes in blocks.class_blocks():
            logits.multiply(e, e_teacher, tokens, classes, classes.start)
            logits.add_sums(tokens, classes, parts, found, kind, has_targets=has_targets)
        if is_whole and kind == MIXTURE.value:  # the logits are still there
            logits.sum_mixture(tokens, found.logs, beta)
    if group is not None:
        shards = gather_shards(found.sums, group)
        combine(shards, found, kind, part=range(len(shards)))
    if kind == MIXTURE.value and not is_whole:
        of_mixture = found.logs[RELATIVE:].zero_()
        for tokens, e, e_teacher in logits.token_blocks():
            for classes in blocks.class_blocks():
                logits.multiply(e, e_teacher, tokens, classes, classes.start)
                parts = logits.mixture_parts(tokens, classes, found.logs, beta)
                of_mixture[:, tokens] += parts.sum(0)
        if group is not None:
            torch.sum(gather_shards(of_mixture, group), 0, out=of_mixture)
    return finish(found, kind, beta, blocks, has_targets)


def backward(
    grads: DivergenceGrads, state: DivergenceState, problem: DivergenceProblem, needed: Needed
) -> Gradients:
    """Compute the gradients of the student's e, c and bias; an empty tensor for each not needed.

    As ``chunked_divergence.backward``, for inputs other than float64.
    """
    student, teacher, beta, _ = problem
    kind = kind_of_divergence(beta)
    logits = _allocate(student, teacher, needed, kind)
    blocks, e, c, bias = logits.student, student.e, student.c, student.bias
    first = student.frozen_columns
    scale = scale_of(grads, blocks, logits.factor_type)
    per_token = TokenValues.of(grads, state, blocks, scale)
    grad_e_sum = e.new_zeros((blocks.num_kept if needed.e else 0, e.shape[1]), dtype=torch.float32)
    grad_c = student.empty_grad_c() if needed.c else None
    grad_bias = None
    if needed.bias and bias is not None:
        grad_bias = bias.new_empty(bias.shape)
    # A single product writes the rows of dC, in place; not those of scaled gradients.
    is_single = blocks.num_kept <= blocks.shape[0] and blocks.num_kept > 0
    in_place = (
        is_single
        and grad_c is not None
        and grad_c.shape == c.shape
        and grad_c.dtype == logits.factor_type
        and grad_c.dtype != torch.float16
    )
    for classes in blocks.class_blocks():
        num_rows = classes.stop - classes.start
        rows = e.new_zeros(
            (num_rows if needed.c and not in_place else 0, c.shape[1] - first),
            dtype=torch.float32,
        )
        rows_of_bias = e.new_zeros(num_rows, dtype=torch.float32)
        for tokens, e_block, e_teacher in logits.token_blocks():
            logits.multiply(e_block, e_teacher, tokens, classes, classes.start)
            factor = logits.write_gradients(tokens, classes, per_token, kind, beta)
            if needed.e:
                blocks.add_product(factor, blocks.classifier(classes), grad_e_sum[tokens])
            if grad_c is not None:
                if in_place:
                    torch.mm(factor.T, e_block, out=grad_c[classes])
                else:
                    blocks.add_product(factor.T, e_block[:, first:], rows)
            if grad_bias is not None:
                rows_of_bias += factor.sum(0, dtype=torch.float32)
        if grad_c is not None and not in_place:
            student.put_grad_c(grad_c, classes, rows.div_(scale))
        if grad_bias is not None:
            grad_bias[classes] = rows_of_bias.div_(scale)
    nothing = e.new_empty(0)
    grad_e = None
    if needed.e:
        grad_e = blocks.scatter(grad_e_sum.div_(scale)).to(e.dtype)
    found = (grad_e, grad_c, grad_bias)
    return Gradients(*(nothing.clone() if grad is None else grad for grad in found))
