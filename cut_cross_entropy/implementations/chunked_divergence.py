"""Divergence of a student from a teacher in bounded memory: blocks of tokens and classes of both.

The forward walks over the classes twice: for the two log-sum-exps, and for the sums of the
normalised log-probabilities, whose terms need no offset that cancels later. Processes that share
the classes exchange both. The backward makes the logits of both models again. The gradients of a
sum are computed in the forward, from chunks of tokens with all classes: one product for the logits
of each model.

With the student's ``p`` and the teacher's ``q``, the mixture ``m = (1 - beta) p + beta q`` and
upstream gradients ``g``, the gradient by a student's logit is the sum of

- divergence: ``g (p - q)`` for beta 0, ``g p (log p - log q - KL(p || q))`` for beta 1, and
  ``g (1 - beta) p (log p - log m - KL(p || m))`` between;
- entropy H: ``-g p (log p + H)``;
- log-probability of the target: ``g (onehot - p)``.

Shape legend: ``cut_cross_entropy.implementations``.
"""

import math

import torch
from torch import Tensor

from cut_cross_entropy.distributed.collectives import gather_shards
from cut_cross_entropy.divergence_problem import (
    DivergenceGrads,
    DivergenceProblem,
    DivergenceState,
    DivergenceSum,
)
from cut_cross_entropy.implementations.blocks import (
    Blocks,
    choose_blocks,
    targets_within,
    uses_half_products,
)
from cut_cross_entropy.implementations.reference_divergence import log_mixture
from cut_cross_entropy.implementations.token_chunks import (
    WIDENED_SHARE,
    GradientSums,
    even_chunk,
    slices_of_factors,
)
from cut_cross_entropy.problem import Gradients, Needed, Problem, gradient_scale

MIN_TOKENS, MIN_TOKENS_OF_GPU = 32, 384
"""Tokens of a chunk of all classes, at least: with fewer, the sums of dC take longer."""
TEMPORARIES = 8
"""Logits of both, and what the elementwise operations between the products allocate."""

BUDGET_SHARE = 2
"""A block has the size for this part of the budget: two models, and more temporaries."""


def forward(problem: DivergenceProblem) -> DivergenceState:
    """Compute divergence, entropy, log-probabilities and what the backward needs."""
    student, teacher, beta, has_targets = problem
    blocks, others = _blocks(student, teacher, with_gradients=False)
    group = student.group
    zero = blocks.targets.new_zeros(blocks.num_kept, dtype=blocks.wide)
    log_sums = torch.full_like(zero, -torch.inf).repeat(2, 1)
    for tokens in blocks.token_blocks():
        for side, total in zip((blocks, others), log_sums, strict=True):
            rows = side.embeddings(tokens)
            for classes in blocks.class_blocks():
                logits, _ = side.logits(rows, tokens, classes)
                part = logits.logsumexp(1).to(blocks.wide)
                total[tokens] = torch.logaddexp(total[tokens], part)
    if group is not None:
        log_sums = gather_shards(log_sums, group).logsumexp(0)
    lse, teacher_lse = log_sums
    sums = zero.repeat(5 if has_targets else 3, 1)
    for tokens in blocks.token_blocks():
        e, e_teacher = blocks.embeddings(tokens), others.embeddings(tokens)
        for classes in blocks.class_blocks():
            log_p, _ = blocks.logits(e, tokens, classes)
            log_p -= lse[tokens, None]
            log_q, _ = others.logits(e_teacher, tokens, classes)
            log_q = log_q.to(blocks.wide).sub_(teacher_lse[tokens, None])
            _add_sums(
                sums[:, tokens], blocks.targets[tokens], classes, log_p, log_q=log_q, beta=beta
            )
    if group is not None:
        sums = gather_shards(sums, group).sum(0)
    return _state(sums, log_sums, blocks)


def _add_sums(
    sums: Tensor, targets: Tensor, classes: slice, log_p: Tensor, log_q: Tensor, beta: float
) -> Tensor:
    """Add a block of classes to the sums of its tokens; return the student's probabilities.

    Args:
        sums: (3, T) of divergence, entropy and what the student is from the teacher or the mixture;
            with targets also (5, T) of their log-probabilities and of all other probabilities.
        targets: (T,) class ids.
        classes: of the block.
        log_p, log_q: (T, classes).
        beta: from 0 to 1.
    """
    p = log_p.exp()
    divergence, entropy, relative = sums[:3]
    entropy -= _expected(p, log_p)
    if len(sums) > 3:
        here, columns = targets_within(targets, classes)
        at_target = log_p.gather(1, columns[:, None])[:, 0]
        sums[3] += torch.where(here, at_target, 0)
        column = torch.where(here, columns, -1)[:, None]
        ids = torch.arange(p.shape[1], device=p.device)
        sums[4] += torch.where(ids == column, 0, p).sum(1)
    _add_divergence(divergence, relative, p, log_p, log_q=log_q, beta=beta)
    return p


def _state(sums: Tensor, log_sums: Tensor, blocks: Blocks) -> DivergenceState:
    """Return the results of all tokens from their sums (3 or 5, N) and both log-sum-exps (2, N)."""
    divergence, entropy, relative = sums[:3]
    lse, teacher_lse = log_sums
    divergence.clamp_(min=0)
    entropy.clamp_(min=0)
    target_logprobs = lse[:0]
    if len(sums) > 3:
        # Precise where the target has most of the probability, and never above 0.
        target_logprobs, misses = sums[3:]
        likely = torch.log1p(-misses.clamp(max=0.5))
        target_logprobs = torch.where(misses < 0.5, likely, target_logprobs).clamp(max=0)
        target_logprobs = torch.where(in_any_shard(blocks), target_logprobs, torch.nan)
        target_logprobs = blocks.scatter(target_logprobs)
    return DivergenceState(
        blocks.scatter(divergence.clone()),
        blocks.scatter(entropy.clone()),
        target_logprobs,
        blocks.scatter(lse.clone()),
        teacher_lse=blocks.scatter(teacher_lse.clone()),
        relative=blocks.scatter(relative.clone()),
    )


def in_any_shard(blocks: Blocks) -> Tensor:
    """Whether the target of each token is a class, of this process or of another of the group."""
    group = blocks.problem.group
    if group is None:
        return blocks.in_range
    targets = blocks.targets
    here = (targets >= 0) & (targets < blocks.problem.c.shape[0])
    return gather_shards(here.int(), group).sum(0) > 0


def _blocks(student: Problem, teacher: Problem, with_gradients: bool) -> tuple[Blocks, Blocks]:
    """Return the blocks of both, which are those of the same tokens and classes."""
    blocks = Blocks(student)
    others = Blocks(teacher, like=blocks)
    dim = max(student.c.shape[1], teacher.c.shape[1])
    if blocks.half_products and others.half_products:
        # Factors are not widened; a block's parts of dE and dC are all that has features.
        dim = dim // 2 if with_gradients else 0
    shapes = (
        choose_blocks(
            min(blocks.num_kept, most_tokens),
            student.c.shape[0],
            dim,
            itemsize=max(blocks.wide.itemsize, others.wide.itemsize),
            budget=student.memory_budget // BUDGET_SHARE,
        )
        for most_tokens in (8192, 4096, 2048, 1024, 512)
    )
    # Of many tokens and few classes or the reverse: elementwise operations are most of the time,
    # and each block starts all of them.
    tokens, classes = max(shapes, key=math.prod)
    classes = min(classes, student.most_classes, teacher.most_classes)
    blocks.shape = others.shape = (tokens, classes)
    return blocks, others


def _expected(p: Tensor, x: Tensor) -> Tensor:
    """Sum of ``p * x`` over the classes, to which a probability of 0 contributes nothing."""
    return (p * torch.where(p == 0, 0, x)).sum(1)


def _add_divergence(
    divergence: Tensor, relative: Tensor, p: Tensor, log_p: Tensor, log_q: Tensor, beta: float
) -> None:
    """Add the terms of a block of classes: of the divergence, and of p relative to q or m."""
    q = log_q.exp()
    if beta == 0:
        # Terms that are never negative: the log-sum-exps' errors are squared in their sum.
        divergence += _expected(q, log_q - log_p) + (p - q).sum(1)
    elif beta == 1:
        term = _expected(p, log_p - log_q)
        relative += term
        divergence += term + (q - p).sum(1)
    else:
        log_m = log_mixture(log_p, log_q, beta)
        term = _expected(p, log_p - log_m)
        relative += term
        divergence += (1 - beta) * term + beta * _expected(q, log_q - log_m)


def _by_logits(
    p: Tensor, log_p: Tensor, log_q: Tensor, relative: Tensor, g: Tensor, beta: float
) -> Tensor:
    """Gradient (T, classes) of the divergence by the student's logits.

    Args:
        p, log_p, log_q: (T, classes); the last is overwritten.
        relative: (T,) what the student is from the teacher or the mixture.
        g: (T,) gradient of the divergence.
        beta: from 0 to 1.
    """
    if beta == 0:
        return (p - log_q.exp_()).mul_(g[:, None])
    reference = log_q if beta == 1 else log_mixture(log_p, log_q, beta)
    ahead = torch.where(p == 0, 0, log_p - reference)
    grad = ahead.sub_(relative[:, None]).mul_(p).mul_(g[:, None])
    return grad if beta == 1 else grad.mul_(1 - beta)


def backward(
    grads: DivergenceGrads, state: DivergenceState, problem: DivergenceProblem, needed: Needed
) -> Gradients:
    """Compute the gradients of the student's e, c and bias; an empty tensor for each not needed.

    Args:
        grads: gradients of divergence, entropy and log-probabilities, (N,) or None each.
        state: results of the forward.
        problem: that of the forward.
        needed: the gradients to compute.
    """
    student, teacher, beta, _ = problem
    blocks, others = _blocks(student, teacher, with_gradients=True)
    g_divergence, g_entropy, g_logprobs = (
        None if x is None else blocks.gather(x.to(blocks.wide)) for x in grads
    )
    lse, teacher_lse = blocks.gather(state.lse), blocks.gather(state.teacher_lse)
    relative, entropy = blocks.gather(state.relative), blocks.gather(state.entropy)
    miss = None
    if g_logprobs is not None:
        # A target out of range: never a plausible number.
        g_logprobs = torch.where(blocks.in_range, g_logprobs, torch.nan)
        miss = -g_logprobs * torch.expm1(blocks.gather(state.logprobs))

    def by_logits(logits: Tensor, tokens: slice, classes: slice) -> Tensor:
        log_p = logits.sub_(lse[tokens, None])
        p = log_p.exp()
        grad = torch.zeros_like(p)
        if g_divergence is not None:
            log_q, _ = others.logits(others.embeddings(tokens), tokens, classes)
            log_q = log_q.to(blocks.wide).sub_(teacher_lse[tokens, None])
            grad = _by_logits(p, log_p, log_q, relative[tokens], g=g_divergence[tokens], beta=beta)
        if g_entropy is not None:
            surplus = torch.where(p == 0, 0, log_p) + entropy[tokens, None]
            grad -= surplus.mul_(p).mul_(g_entropy[tokens, None])
        if g_logprobs is not None and miss is not None:
            here, columns = targets_within(blocks.targets[tokens], classes)
            part = p.mul_(-g_logprobs[tokens, None])
            at_target = part.gather(1, columns[:, None])
            # The sum of the gradient over the classes is 0 to the precision of 1 - p.
            at_target = torch.where(here[:, None], miss[tokens, None], at_target)
            grad += part.scatter_(1, columns[:, None], at_target)
        return grad

    scale = lse.new_ones(())
    upstream = [x.abs() for x in (g_divergence, g_entropy, g_logprobs) if x is not None]
    if blocks.half_products and upstream:
        largest = torch.stack(upstream).amax(0)
        scale = gradient_scale(largest, largest)
    return blocks.gradients(by_logits, scale, needed)


def tokens_per_chunk(student: Problem, teacher: Problem, needed: Needed) -> int:
    """Return how many tokens' logits fit the budget, of both models; 0 if not worth it."""
    num_classes, dim = student.c.shape
    half = uses_half_products(student)
    wide = torch.promote_types(student.wide, teacher.wide).itemsize
    per_class = TEMPORARIES * wide + (student.compute_dtype.itemsize if half else 0)
    per_token = per_class * num_classes + (2 * dim + teacher.c.shape[1]) * wide
    num_bytes = student.memory_budget * (WIDENED_SHARE - 1) // WIDENED_SHARE
    tokens = int(num_bytes // per_token)
    least = MIN_TOKENS if student.e.device.type == "cpu" else MIN_TOKENS_OF_GPU
    return tokens if tokens >= least else 0


def divergence_and_gradients(
    problem: DivergenceProblem, weights: Tensor | None, needed: Needed
) -> DivergenceSum:
    """Compute the sum of the divergences times their weights, and its gradients.

    Args:
        problem: without a group, and :func:`tokens_per_chunk` is not 0.
        weights: (N,), factors of the divergences; None for 1.
        needed: the gradients to compute.
    """
    student, teacher, beta, has_targets = problem
    blocks = Blocks(student)
    others = Blocks(teacher, like=blocks)
    count, num_classes = blocks.num_kept, student.c.shape[0]
    rows = even_chunk(count, tokens_per_chunk(student, teacher, needed))
    blocks.shape = others.shape = (rows, num_classes)
    every = slice(0, num_classes)
    zero = blocks.targets.new_zeros(count, dtype=blocks.wide)
    sums, log_sums = zero.repeat(5 if has_targets else 3, 1), zero.repeat(2, 1)
    factors = torch.ones_like(zero) if weights is None else blocks.gather(weights.to(blocks.wide))
    scale = zero.new_ones(())
    if blocks.half_products:
        scale = gradient_scale(factors, factors)
    memory = [
        blocks.targets.new_empty((rows, num_classes), dtype=side.wide) for side in (blocks, others)
    ]
    parts = slices_of_factors(rows, blocks, others)

    def logits_of(
        side: Blocks, e: Tensor, tokens: slice, place: int
    ) -> tuple[Tensor, Tensor | None]:
        out = memory[place][: tokens.stop - tokens.start]
        for classes in parts:
            side.store_product(e, side.classifier(classes).T, out[:, classes])
        if side.problem.bias is not None:
            out += side.problem.bias.to(side.wide)
        logits, slope = side.transform(out, tokens, with_slope=place == 0)
        lse = logits.logsumexp(1)
        log_sums[place, tokens] = lse.to(blocks.wide)
        return logits.sub_(lse[:, None]), slope

    def logit_gradients(tokens: slice, e: Tensor, e_teacher: Tensor) -> Tensor:
        log_p, slope = logits_of(blocks, e, tokens, 0)
        log_q = logits_of(others, e_teacher, tokens, 1)[0].to(blocks.wide)
        of_tokens = sums[:, tokens]
        p = _add_sums(of_tokens, blocks.targets[tokens], every, log_p, log_q=log_q, beta=beta)
        grad = _by_logits(p, log_p, log_q, of_tokens[2], g=factors[tokens], beta=beta)
        if slope is not None:
            grad.mul_(slope)
        return blocks.as_factor(grad, scale)

    gradients = GradientSums(blocks, parts, needed)
    for tokens in blocks.token_blocks():
        e = blocks.embeddings(tokens)
        gradients.add(tokens, e, logit_gradients(tokens, e, others.embeddings(tokens)))
    for total in gradients.flat():
        total.div_(scale)
    state = _state(sums, log_sums, blocks)
    total = (state.divergence * blocks.scatter(factors)).sum()
    return DivergenceSum(total, state, Gradients(*gradients.flat()))
