"""Divergence of a student from a teacher in bounded memory: blocks of tokens and classes of both.

The forward walks over the classes twice: for the two log-sum-exps, and for the sums of the
normalised log-probabilities, whose terms need no offset that cancels later. Processes that share
the classes exchange both. The backward makes the
logits of both models again. With the student's ``p`` and the teacher's ``q``, the mixture
``m = (1 - beta) p + beta q`` and upstream gradients ``g``, the gradient by a student's logit is the
sum of

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
from cut_cross_entropy.divergence_results import DivergenceGrads, DivergenceState
from cut_cross_entropy.implementations.blocks import Blocks, choose_blocks, targets_within
from cut_cross_entropy.problem import Gradients, Needed, Problem, gradient_scale

LOWEST = -1e4
"""Log-probability that stands for -inf in a mixture: its exponential is 0 too."""

BUDGET_SHARE = 2
"""A block has the size for this part of the budget: two models, and more temporaries."""


def forward(student: Problem, teacher: Problem, beta: float, has_targets: bool) -> DivergenceState:
    """Compute divergence, entropy, log-probabilities and what the backward needs.

    Args:
        student: the inputs; its targets name the tokens that both models have.
        teacher: the same tokens and classes, of another number of features.
        beta: from 0 to 1.
        has_targets: whether to compute the log-probabilities of the targets.
    """
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
    divergence, entropy, relative = sums[:3]
    for tokens in blocks.token_blocks():
        e, e_teacher = blocks.embeddings(tokens), others.embeddings(tokens)
        for classes in blocks.class_blocks():
            log_p, _ = blocks.logits(e, tokens, classes)
            log_p -= lse[tokens, None]
            log_q, _ = others.logits(e_teacher, tokens, classes)
            log_q = log_q.to(blocks.wide).sub_(teacher_lse[tokens, None])
            p = log_p.exp()
            entropy[tokens] -= _expected(p, log_p)
            if has_targets:
                here, columns = targets_within(blocks.targets[tokens], classes)
                at_target = log_p.gather(1, columns[:, None])[:, 0]
                sums[3, tokens] += torch.where(here, at_target, 0)
                column = torch.where(here, columns, -1)[:, None]
                ids = torch.arange(p.shape[1], device=p.device)
                sums[4, tokens] += torch.where(ids == column, 0, p).sum(1)
            _add_divergence(divergence[tokens], relative[tokens], p, log_p, log_q, beta)
    if group is not None:
        sums = gather_shards(sums, group).sum(0)
    divergence, entropy, relative = sums[:3]
    divergence.clamp_(min=0)
    entropy.clamp_(min=0)
    target_logprobs = zero[:0]
    if has_targets:
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
        blocks.scatter(teacher_lse.clone()),
        blocks.scatter(relative.clone()),
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
    blocks, others = Blocks(student), Blocks(teacher)
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
    blocks.shape = others.shape = max(shapes, key=math.prod)
    return blocks, others


def _expected(p: Tensor, x: Tensor) -> Tensor:
    """Sum of ``p * x`` over the classes, to which a probability of 0 contributes nothing."""
    return (p * torch.where(p == 0, 0, x)).sum(1)


def log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Logarithm of ``(1 - beta) p + beta q``."""
    return torch.logaddexp(
        log_p.clamp(min=LOWEST) + math.log1p(-beta), log_q.clamp(min=LOWEST) + math.log(beta)
    )


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


def backward(
    grads: DivergenceGrads,
    state: DivergenceState,
    student: Problem,
    teacher: Problem,
    beta: float,
    needed: Needed,
) -> Gradients:
    """Compute the gradients of the student's e, c and bias; an empty tensor for each not needed.

    Args:
        grads: gradients of divergence, entropy and log-probabilities, (N,) or None each.
        state: results of the forward.
        student, teacher, beta: as in the forward.
        needed: the gradients to compute.
    """
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
            g = g_divergence[tokens, None]
            if beta == 0:
                grad = (p - log_q.exp_()) * g
            else:
                reference = log_q if beta == 1 else log_mixture(log_p, log_q, beta)
                ahead = torch.where(p == 0, 0, log_p - reference)
                grad = (ahead - relative[tokens, None]).mul_(p).mul_(g)
                if beta != 1:
                    grad *= 1 - beta
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
