"""The sum of all losses with its gradients in one pass: ``impl="chunked"`` where losses are summed.

The gradient of a sum is known up to one factor, that of the sum itself, so it can be computed while
the logits are at hand. Tokens are taken in chunks whose logits of all classes fit the budget; three
products are enough, as for full logits. The gradients wait for their factor in float32 (float64
for float64 inputs), so that they are rounded to the dtype of the inputs once. Processes that hold
the classes together agree on the size of a chunk, and exchange the sums of its tokens.

Shape legend: ``cut_cross_entropy.implementations``.
"""

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cut_cross_entropy.distributed.collectives import gather_shards, maximum_over_group
from cut_cross_entropy.implementations import chunked
from cut_cross_entropy.implementations.blocks import Blocks, slices, uses_half_products
from cut_cross_entropy.problem import Needed, PerToken, Problem, SumGradients, gradient_scale

# The sums of dC are read and written once per chunk: with fewer tokens in a chunk that takes longer
# than to compute the logits again.
MIN_TOKENS = 128
MIN_TOKENS_HALF = 512  # tensor cores multiply faster
ROWS_OF_TILES = 64  # tokens
ALIGNED = 256  # classes; the library's products are far slower with factors that are not aligned


def tokens_per_chunk(problem: Problem, needed: Needed) -> int:
    """Return how many tokens' logits fit the budget; 0 if they are too few to be worth it.

    Outside of a CPU, where larger chunks are faster, they also take as many bytes as the gradient
    of c: beside the sums, the backward allocates those, and the forward does not.
    """
    (num_classes, dim), wide = problem.c.shape, problem.wide.itemsize
    half = uses_half_products(problem)
    # Logits and, of a softcap, its hyperbolic tangent.
    per_class: float = wide if problem.softcap is None else 2 * wide
    if half:  # and what the products take of them
        per_class = per_class / _num_parts(problem) + problem.compute_dtype.itemsize
    per_token = per_class * _width(problem) + 4 * dim * wide  # rows of e, also scaled, and of dE
    num_bytes = problem.memory_budget - _classes_per_product(problem, needed) * dim * wide
    if needed.c and problem.e.device.type != "cpu":
        copied = problem.compute_dtype.itemsize if _copies_classifier(problem, needed) else 0
        num_bytes += num_classes * dim * (problem.c.dtype.itemsize - copied)
    tokens = int(num_bytes // per_token)
    if half:
        whole = ROWS_OF_TILES * _num_parts(problem)
        tokens = tokens // whole * whole
    return tokens if tokens >= (MIN_TOKENS_HALF if half else MIN_TOKENS) else 0


def _num_parts(problem: Problem) -> int:
    """Return the number of parts of a chunk; the logits, in full precision, exist for one of them.

    Of few classes a part holds more tokens, or the host would not launch its work fast enough.
    """
    if not uses_half_products(problem):
        return 1
    return 4 if problem.c.shape[0] >= 2**16 else 2


def _width(problem: Problem) -> int:
    """Return the number of columns of the stored logits: rows are aligned where it counts."""
    num_classes = problem.c.shape[0]
    if num_classes % 8 == 0 or not uses_half_products(problem):
        return num_classes
    return -(-num_classes // ALIGNED) * ALIGNED


def _copies_classifier(problem: Problem, needed: Needed) -> bool:
    """Return whether all of c is converted at once, in memory that waits for its gradient."""
    return needed.c and uses_half_products(problem) and problem.c.dtype != problem.compute_dtype


def _classes_per_product(problem: Problem, needed: Needed) -> int:
    """Return how many rows of c are copied in the dtype of the factors at a time; 0 for none."""
    num_classes, dim = problem.c.shape
    dtype = problem.compute_dtype if uses_half_products(problem) else problem.wide
    if problem.c.dtype == dtype or _copies_classifier(problem, needed):
        return 0
    classes = max(1, problem.memory_budget // (4 * dim * problem.wide.itemsize))
    return min(num_classes, classes // ALIGNED * ALIGNED or classes)


def _class_slices(problem: Problem, needed: Needed) -> list[slice]:
    """Return slices of the classes for one product each."""
    num_classes = problem.c.shape[0]
    at_a_time = _classes_per_product(problem, needed) or num_classes
    # The last few of an odd number apart, which would make all of the product slow.
    aligned = num_classes // ALIGNED * ALIGNED if _width(problem) != num_classes else num_classes
    rest = [slice(aligned, num_classes)] if aligned < num_classes else []
    return [*slices(aligned, at_a_time), *rest]


def loss_and_gradients(
    problem: Problem, needed: Needed, weights: Tensor | None = None
) -> SumGradients:
    """Compute the sum of all losses, and its gradients in :attr:`Problem.wide`.

    Args:
        problem: :func:`tokens_per_chunk` is not 0, unless it has a group; the gradient of e is then
            the part of this process's classes.
        needed: the gradients to compute.
        weights: (N,) of dtype :attr:`Problem.wide`, factors of the losses; None for 1.
    """
    most, num_parts = tokens_per_chunk(problem, needed), _num_parts(problem)
    if problem.group is not None:
        most, num_parts = _agree(most, num_parts, problem)
        if most == 0:
            return _in_two_passes(problem, needed, weights)
    class_slices = _class_slices(problem, needed)
    if _copies_classifier(problem, needed):
        problem = replace(problem, c=problem.c.to(problem.compute_dtype))
    blocks, width = Blocks(problem), _width(problem)
    (num_classes, dim), num_kept = problem.c.shape, blocks.num_kept
    if weights is not None:
        weights = blocks.gather(weights)
    row_factors, scale = _row_factors(blocks, weights)
    num_chunks = -(-num_kept // max(1, most))
    rows = -(-num_kept // max(1, num_chunks))  # chunks of about equal size
    if blocks.half_products:
        whole = ROWS_OF_TILES * num_parts
        rows = -(-rows // whole) * whole
    make = functools.partial(torch.empty, dtype=problem.wide, device=problem.e.device)
    others, logit = make(num_kept), make(num_kept)  # of the targets, relative to a bound
    residual = make(num_kept if blocks.half_products else 0)  # gradient of the target's logit
    column, of_shard = blocks.targets.clamp(0, num_classes - 1)[:, None], None
    if problem.group is not None:
        of_shard = (blocks.targets >= 0) & (blocks.targets < num_classes)
    grad_e = make((num_kept, dim) if needed.e else 0)
    grad_c = make((num_classes, dim) if needed.c else 0)
    grad_bias = make(num_classes if needed.bias else 0)
    if num_kept == 0:  # otherwise the first chunk overwrites them
        grad_c.zero_()
        grad_bias.zero_()
    if num_classes == 0:
        grad_e.zero_()
    part_rows = -(-rows // num_parts)
    factors = None
    if blocks.half_products:
        factors = make((rows, width), dtype=problem.compute_dtype)
    buffer = make((part_rows, width))
    tangents = None if problem.softcap is None else make((part_rows, width))

    for tokens in slices(num_kept, rows):
        first = tokens.start == 0
        e_block = blocks.embeddings(tokens)
        for part in slices(len(e_block), part_rows):
            some = slice(tokens.start + part.start, tokens.start + part.stop)
            here = slice(0, part.stop - part.start)
            all_columns = buffer[here]
            values = all_columns[:, :num_classes]
            tangent = None if tangents is None else tangents[here, :num_classes]
            for classes in class_slices:
                blocks.store_product(
                    e_block[part],
                    blocks.classifier(classes).T,
                    out=values[:, classes],
                    alpha=1.0 if problem.softcap is None else 1 / problem.softcap,
                )
            _transform(values, tangent, blocks, some)
            if width > num_classes:
                all_columns[:, num_classes:].fill_(-torch.inf)
            is_here = None if of_shard is None else of_shard[some]
            if is_here is None:
                _subtract_targets(all_columns, column[some], logit[some], others[some], blocks)
            else:
                logit[some], others[some] = _subtract_targets_of_shard(
                    all_columns, column[some], is_here, blocks
                )
            if num_classes == 0:
                continue
            if tangent is not None:
                torch.ops.aten.tanh_backward.grad_input(values, tangent, grad_input=values)
            if needed.bias:
                inverse = _inverse_sums(others[some], logit[some], blocks.in_range[some])
                if row_factors is not None:
                    inverse.mul_(row_factors[some])
                sums = torch.mv(values.T, inverse)
                grad_bias = sums if some.start == 0 else grad_bias.add_(sums)
            if factors is not None:
                if row_factors is not None:
                    all_columns.mul_(row_factors[some, None])
                # The largest gradient of most tokens, which is not rounded to half precision.
                at_target = values.gather(1, column[some])
                rest = torch.zeros_like(at_target)
                if is_here is not None:
                    rest = at_target.masked_fill(is_here[:, None], 0)
                    at_target -= rest
                residual[some] = at_target[:, 0]
                values.scatter_(1, column[some], rest)
                factors[part].copy_(all_columns)

        if num_classes == 0:
            continue
        # Probabilities are these values over their sum, which in full precision goes into the
        # smaller factors. In half precision these would be rounded a second time; the sums are 1
        # there but for rounding.
        inverse = _inverse_sums(others[tokens], logit[tokens], blocks.in_range[tokens])
        if row_factors is not None and factors is None:
            inverse.mul_(row_factors[tokens])
        factor = (buffer if factors is None else factors)[: len(e_block), :num_classes]
        if needed.e:
            rows_of_e = grad_e[tokens]
            for classes in class_slices:
                multiply = blocks.add_product if classes.start else blocks.store_product
                multiply(factor[:, classes], blocks.classifier(classes), out=rows_of_e)
            if factors is not None:
                own = problem.c[column[tokens, 0]].to(problem.compute_dtype)
                rows_of_e += residual[tokens, None] * own
            rows_of_e.mul_(inverse[:, None])
        if needed.c:
            multiply = blocks.store_product if first else blocks.add_product
            if factors is None:
                e_factor = e_block * inverse[:, None]
            else:  # of a target out of range: nothing plausible
                e_factor = torch.where(inverse.isnan()[:, None], torch.nan, e_block)
            for classes in class_slices if factors is not None else [slice(0, num_classes)]:
                multiply(factor[:, classes].T, e_factor, out=grad_c[classes])
            if factors is not None:
                rows_of_c = residual[tokens, None] * e_block
                grad_c.index_put_((column[tokens, 0],), rows_of_c, accumulate=True)
    nll = torch.logaddexp(others.log() - logit, logit.new_zeros(()))
    nll = torch.where(blocks.in_range, nll, torch.nan)  # out of range: nothing plausible
    if weights is not None:
        nll = nll.mul_(weights)
    if scale is not None:
        for sums in (grad_e, grad_c, grad_bias):
            sums.div_(scale)
    return SumGradients(
        nll.sum(), blocks.scatter(grad_e) if needed.e else grad_e, grad_c, grad_bias
    )


def _transform(
    values: Tensor,  # (n, V) e @ c.T over the softcap, in; logits, out
    tangent: Tensor | None,  # (n, V) out: the hyperbolic tangent of a softcap
    blocks: Blocks,
    tokens: slice,
) -> None:
    """Apply bias, softcap and multiplier."""
    problem = blocks.problem
    if problem.bias is not None:
        bias = problem.bias.to(problem.wide)
        values += bias if problem.softcap is None else bias / problem.softcap
    if tangent is not None and problem.softcap is not None:
        torch.tanh(values, out=tangent)
        torch.mul(tangent, problem.softcap, out=values)
    if blocks.multiplier is not None:
        values.mul_(blocks.multiplier[tokens, None])


def _subtract_targets(
    logits: Tensor,  # (n, at least V) in; out: p - onehot times the sum of each token
    column: Tensor,  # (n, 1) of the target
    logit: Tensor,  # (n,) out: that of the target over a bound of the log-sum-exp
    others: Tensor,  # (n,) out: sum of the powers of all other logits over it
    blocks: Blocks,
) -> None:
    """Turn logits into gradients but for a factor of each token."""
    logit.copy_(_subtract_bound(logits, column, blocks))
    logits.exp_().scatter_(1, column, 0)
    # The target apart: 1 - p of a sure token is a sum of small numbers, not a difference.
    torch.sum(logits, 1, out=others)
    logits.scatter_(1, column, -others[:, None])  # p - 1, in units of the others


def _subtract_targets_of_shard(
    logits: Tensor,  # (n, at least V) in; out: p - onehot
    column: Tensor,  # (n, 1) of the target, or any
    is_here: Tensor,  # (n,) whether the target is a class of this process
    blocks: Blocks,
) -> tuple[Tensor, Tensor]:
    """Turn the logits of a shard into gradients, by an exchange of two numbers per token.

    Returns:
        log p of the target and 1 - p, (n,) each, the same on every process; NaN if no process
        holds the target.
    """
    problem = blocks.problem
    others, logit, bound = logits.new_full((3, len(column)), -torch.inf).unbind()
    if logits.shape[1] > 0:
        bound = logits.amax(1)
        # All classes may be impossible; the bound is then finite, and their powers are 0.
        bound.masked_fill_(bound == -torch.inf, torch.finfo(logits.dtype).min)
        logits.sub_(bound[:, None])
        logit = bound + logits.gather(1, column)[:, 0]
        if not logits.is_cuda:  # see _subtract_bound
            F.threshold(logits, blocks.floor, -torch.inf, inplace=True)
        logits.exp_()
        at_target = logits.gather(1, column)
        logits.scatter_(1, column, at_target.masked_fill(is_here[:, None], 0))
        others = logits.sum(1).log_().add_(bound)
    logit = torch.where(is_here, logit, torch.inf)
    gathered = gather_shards(torch.stack([others, logit]), str(problem.group))
    others, logit = torch.logsumexp(gathered[:, 0], 0), gathered[:, 1].amin(0)
    logit.masked_fill_(logit == torch.inf, torch.nan)
    lse = torch.logaddexp(others, logit)
    others.sub_(lse).exp_()
    if logits.shape[1] > 0:
        logits.mul_(bound.sub_(lse).exp_()[:, None])
        rest = logits.gather(1, column)[:, 0]
        logits.scatter_(1, column, torch.where(is_here, -others, rest)[:, None])
    return logit.sub_(lse), others


def _agree(most: int, num_parts: int, problem: Problem) -> tuple[int, int]:
    """Return how many tokens a chunk has at most, and how many parts, on every process.

    Args:
        most: tokens that fit the memory of this process; 0 if too few to be worth it.
        num_parts: parts in which it would take them.
        problem: with a group.
    """
    numbers = torch.tensor([-most, num_parts], device=problem.e.device)
    maximum_over_group(numbers, str(problem.group))
    negative, num_parts = (int(x) for x in numbers.tolist())
    whole = ROWS_OF_TILES * num_parts if uses_half_products(problem) else 1
    return -negative // whole * whole, num_parts


def _in_two_passes(problem: Problem, needed: Needed, weights: Tensor | None) -> SumGradients:
    """Do the same by computing the logits twice: four products, and less memory."""
    found = chunked.forward(problem)
    factors = torch.ones_like(found.nll) if weights is None else weights
    upstream = PerToken(factors, torch.zeros_like(factors))
    grads = chunked.backward(upstream, found, problem, needed, problem.wide)
    return SumGradients((found.nll * factors).sum(), *grads)


def _inverse_sums(others: Tensor, logit: Tensor, in_range: Tensor) -> Tensor:
    """Return the factors (n,) that make probabilities of powers; NaN for a target out of range."""
    return torch.where(in_range, others + logit.exp(), torch.nan).reciprocal_()


def _subtract_bound(logits: Tensor, column: Tensor, blocks: Blocks) -> Tensor:
    """Subtract from a token's logits a bound of their log-sum-exp; return the target's logit (n,).

    Args:
        logits: (n, classes), in and out.
        column: (n, 1) of the target.
        blocks: of the problem.
    """
    if blocks.half_products or logits.is_cuda:  # the log-sum-exp itself: one kernel
        torch.log_softmax(logits, 1, out=logits)
        return logits.gather(1, column)[:, 0]
    logits.sub_(logits.amax(1, keepdim=True))
    logit = logits.gather(1, column)[:, 0]
    # Subnormal numbers would make the products an order of magnitude slower on a CPU.
    F.threshold(logits, blocks.floor, -torch.inf, inplace=True)
    return logit


def _row_factors(blocks: Blocks, weights: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
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
