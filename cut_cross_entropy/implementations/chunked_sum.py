"""The sum of all losses with its gradients in one pass: ``impl="chunked"`` where losses are summed.

The gradient of a sum is known up to one factor, that of the sum itself, so it can be computed while
the logits are at hand. Tokens are taken in chunks whose logits of all classes fit the budget; three
products are enough, as for full logits. The gradients wait for their factor in float32 (float64
for float64 inputs), so that they are rounded to the dtype of the inputs once.

Shape legend: ``cut_cross_entropy.implementations``.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from cut_cross_entropy.implementations.blocks import Blocks, slices
from cut_cross_entropy.problem import Needed, Problem, SumGradients, gradient_scale

# The sums of dC are read and written once per chunk: with fewer tokens in a chunk that takes longer
# than to compute the logits again.
MIN_TOKENS = 128
MIN_TOKENS_HALF = 512  # tensor cores multiply faster


def tokens_per_chunk(problem: Problem, needed: Needed) -> int:
    """Return how many tokens' logits fit the budget; 0 if they are too few to be worth it.

    Outside of a CPU, where larger chunks are faster, they also take as many bytes as the gradient
    of c: beside the sums, the backward allocates those, and the forward does not.
    """
    (num_classes, dim), wide = problem.c.shape, problem.wide.itemsize
    half = problem.compute_dtype.itemsize == 2 and problem.e.device.type == "cuda"
    # Logits, the slope of a softcap, and what the products take of them in half precision.
    per_class = wide if problem.softcap is None else 2 * wide
    if half:
        per_class += problem.compute_dtype.itemsize
    per_token = per_class * num_classes + 4 * dim * wide  # rows of e, also scaled, and of dE
    num_bytes = problem.memory_budget - _classes_per_product(problem) * dim * wide
    if needed.c and problem.e.device.type != "cpu":
        num_bytes += num_classes * dim * problem.c.dtype.itemsize
    tokens = num_bytes // per_token
    return tokens if tokens >= (MIN_TOKENS_HALF if half else MIN_TOKENS) else 0


def _classes_per_product(problem: Problem) -> int:
    """Return how many rows of c are copied in the dtype of the factors at a time; 0 for none."""
    num_classes, dim = problem.c.shape
    if problem.c.dtype == problem.wide:
        return 0
    return min(num_classes, max(1, problem.memory_budget // (4 * dim * problem.wide.itemsize)))


def loss_and_gradients(
    problem: Problem, needed: Needed, weights: Tensor | None = None
) -> SumGradients:
    """Compute the sum of all losses, and its gradients in :attr:`Problem.wide`.

    Args:
        problem: without a group; :func:`tokens_per_chunk` is not 0.
        needed: the gradients to compute.
        weights: (N,) of dtype :attr:`Problem.wide`, factors of the losses; None for 1.
    """
    blocks, bias, softcap, wide = Blocks(problem), problem.bias, problem.softcap, problem.wide
    if weights is not None:
        weights = blocks.gather(weights)
    factors_of_rows, scale = _factors_of_rows(blocks, weights)
    (num_classes, dim), num_kept = problem.c.shape, blocks.num_kept
    num_chunks = -(-num_kept // max(1, tokens_per_chunk(problem, needed)))
    rows = -(-num_kept // max(1, num_chunks))  # chunks of about equal size
    classes_at_a_time = _classes_per_product(problem) or num_classes
    make = functools.partial(torch.empty, dtype=wide, device=problem.e.device)
    nll = make(num_kept)
    grad_e = make((num_kept, dim) if needed.e else 0)
    grad_c = make((num_classes, dim) if needed.c else 0)
    grad_bias = make(num_classes if needed.bias else 0)
    if num_kept == 0:  # otherwise the first chunk overwrites them
        grad_c.zero_()
        grad_bias.zero_()
    buffer = make((rows, num_classes))
    slopes = None if softcap is None else make((rows, num_classes))
    factors = None
    if blocks.half_products:
        factors = make((rows, num_classes), dtype=problem.compute_dtype)

    for tokens in slices(num_kept, rows):
        first, here = tokens.start == 0, slice(0, tokens.stop - tokens.start)
        e_block, values = blocks.embeddings(tokens), buffer[here]
        for classes in slices(num_classes, classes_at_a_time):
            blocks.store_product(e_block, blocks.classifier(classes).T, out=values[:, classes])
        if bias is not None:
            values += bias.to(wide)
        slope = None
        if softcap is not None and slopes is not None:
            values.div_(softcap).tanh_()
            slope = torch.mul(values, values, out=slopes[here]).neg_().add_(1)
            values.mul_(softcap)
        if blocks.multiplier is not None:
            values.mul_(blocks.multiplier[tokens, None])

        in_range = blocks.in_range[tokens]
        column = blocks.targets[tokens].clamp(0, num_classes - 1)[:, None]
        target_logit, highest = values.gather(1, column)[:, 0], values.amax(1)
        # Subnormal numbers would make the products an order of magnitude slower on a CPU.
        values.sub_(highest[:, None])
        F.threshold(values, blocks.floor, -torch.inf, inplace=True)
        values.exp_().scatter_(1, column, 0)
        # The target apart: 1 - p of a sure token is a sum of small numbers, not a difference.
        others, logit = values.sum(1), target_logit - highest
        loss = torch.logaddexp(others.log() - logit, logit.new_zeros(()))
        nll[tokens] = torch.where(in_range, loss, torch.nan)  # out of range: nothing plausible
        total = torch.where(in_range, others + logit.exp(), torch.nan)
        values.scatter_(1, column, -others[:, None])  # p - 1, in units of the others
        if slope is not None:
            values.mul_(slope)

        # Probabilities are these values over their sum, which in full precision goes into the
        # smaller factors. In half precision these would be rounded a second time.
        inverse = total.reciprocal()[:, None]
        if factors_of_rows is not None:
            inverse.mul_(factors_of_rows[tokens, None])
        if needed.bias:
            sums = torch.mv(values.T, inverse[:, 0])
            grad_bias = sums if first else grad_bias.add_(sums)
        factor, e_factor = values, e_block
        if factors is not None:
            factor = torch.mul(values, inverse, out=factors[here])
        elif needed.c:
            e_factor = e_block * inverse
        if needed.e:
            rows_of_e = grad_e[tokens]
            for classes in slices(num_classes, classes_at_a_time):
                multiply = blocks.add_product if classes.start else blocks.store_product
                multiply(factor[:, classes], blocks.classifier(classes), out=rows_of_e)
            if factors is None:
                rows_of_e.mul_(inverse)
        if needed.c:
            multiply = blocks.store_product if first else blocks.add_product
            multiply(factor.T, e_factor, out=grad_c)
    if weights is not None:
        nll.mul_(weights)
    if scale is not None:
        for sums in (grad_e, grad_c, grad_bias):
            sums.div_(scale)
    return SumGradients(
        nll.sum(), blocks.scatter(grad_e) if needed.e else grad_e, grad_c, grad_bias
    )


def _factors_of_rows(blocks: Blocks, weights: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Factor of each token's logit gradients, (n,), None for 1, and the scale that it contains.

    The scale, a power of two, brings them into the range of float16; None for 1.
    """
    factors = blocks.multiplier
    if weights is not None:
        factors = weights if factors is None else weights * factors
    if factors is None or not blocks.half_products or blocks.problem.compute_dtype != torch.float16:
        return factors, None
    scale = gradient_scale(factors, factors)
    return factors * scale, scale
