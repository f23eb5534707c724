"""Bounded memory in eager PyTorch: ``impl="chunked"``.

Logits exist for one block of tokens and classes at a time. The forward keeps a running log-sum-exp
(section 4.1 of "Cut Your Losses in Large-Vocabulary Language Models"); the backward makes every
block again and accumulates exact gradients in float32 (float64 for float64 inputs), with no filter.
Four products instead of the three that full logits need, on any device, deterministic.

Shape legend: ``cut_cross_entropy.implementations``.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cut_cross_entropy.distributed.collectives import combine
from cut_cross_entropy.implementations.blocks import Blocks, targets_within
from cut_cross_entropy.problem import (
    Directions,
    Gradients,
    Needed,
    PerToken,
    Problem,
    gradient_scale,
)


def forward(problem: Problem) -> PerToken:
    """Loss and log-sum-exp of every token, float32 (float64 for float64 inputs).

    With a ``group`` its other processes hold the other classes, and the results are those of all.
    """
    blocks = Blocks(problem)
    lse = torch.full((blocks.num_kept,), -torch.inf, dtype=problem.wide, device=problem.e.device)
    target_logit = torch.full_like(lse, torch.inf)  # stays where the target is not here

    for tokens in blocks.token_blocks():
        e_block, target_block = blocks.embeddings(tokens), blocks.targets[tokens]
        for classes in blocks.class_blocks():
            logits, _ = blocks.logits(e_block, tokens, classes)
            lse[tokens] = torch.logaddexp(lse[tokens], torch.logsumexp(logits, dim=1))
            here, columns = targets_within(target_block, classes)
            found = logits.gather(1, columns[:, None])[:, 0]
            target_logit[tokens] = torch.where(here, found, target_logit[tokens])

    if problem.group is not None:
        # All N tokens, so that shards whose implementations differ exchange the same.
        whole = combine(blocks.scatter(target_logit), blocks.scatter(lse), problem.group)
        target_logit, lse = (blocks.gather(x) for x in whole)
    target_logit.masked_fill_(target_logit == torch.inf, torch.nan)  # out of range

    # lse is a rounded sum; it must not fall below one of its terms, or a probability exceeds 1.
    nll = (lse - target_logit).clamp_min(0)
    return PerToken(blocks.scatter(nll), blocks.scatter(lse))


def backward(
    grads: PerToken,
    saved: PerToken,
    problem: Problem,
    needed: Needed,
    dtype: torch.dtype | None = None,
) -> Gradients:
    """Gradients of e, c and bias; an empty tensor for each not needed.

    The gradient of the logits is ``a * p - b * onehot`` with ``a`` the gradient of loss plus lse
    and ``b`` that of the loss. With a ``group`` the gradient of e is the part of the classes that
    are here; nothing is exchanged.

    Args:
        grads: gradients of the two results.
        saved: results of the forward.
        problem: the inputs.
        needed: the gradients to compute.
        dtype: of the gradients; None for those of the inputs.
    """
    blocks = Blocks(problem)
    wide, grad_nll = problem.wide, grads.nll
    if problem.group is not None:  # a shard alone cannot know that no other holds the target
        grad_nll = torch.where(saved.nll.isnan(), saved.nll, grad_nll)
    b = blocks.gather(grad_nll.to(wide))
    a = b + blocks.gather(grads.lse.to(wide))
    a = torch.where(blocks.in_range, a, torch.nan)  # see forward: never a plausible number
    lse = blocks.gather(saved.lse)
    scale = gradient_scale(a, b) if blocks.half_products else a.new_ones(())

    def by_logits(logits: Tensor, tokens: slice, classes: slice) -> Tensor:
        # Probabilities that no sum can notice are zero: as subnormal numbers they would make
        # the products an order of magnitude slower on a CPU.
        exponent = logits.sub_(lse[tokens, None])
        F.threshold(exponent, blocks.floor, -torch.inf, inplace=True)
        grad = exponent.exp_().mul_(a[tokens, None])
        here, columns = targets_within(blocks.targets[tokens], classes)
        at_target = grad.gather(1, columns[:, None])
        at_target -= torch.where(here, b[tokens], 0)[:, None]
        return grad.scatter_(1, columns[:, None], at_target)

    return blocks.gradients(by_logits, scale, needed, dtype)


def tangents(directions: Directions, saved: PerToken, problem: Problem) -> PerToken:
    """Derivatives of loss and log-sum-exp along a direction in the inputs, (N,) each.

    That of the log-sum-exp is the mean of the logits' derivatives under the softmax. All products
    are computed in float32 (float64 for float64 inputs).

    Args:
        directions: derivatives of the inputs; None for those that are constant.
        saved: results of the forward, whichever implementation computed them.
        problem: the inputs.
    """
    # The direction of e doubles a block of tokens, that of c a block of classes.
    blocks = Blocks(replace(problem, memory_budget=max(1, problem.memory_budget // 2)))
    wide, lse = problem.wide, blocks.gather(saved.lse)
    of_lse, of_logit = torch.zeros_like(lse), torch.zeros_like(lse)
    for tokens in blocks.token_blocks():
        e_block, target_block = blocks.embeddings(tokens), blocks.targets[tokens]
        for classes in blocks.class_blocks():
            c_block = blocks.classifier(classes)
            logits, slope = blocks.logits(e_block, tokens, classes, with_slope=True)
            change = torch.zeros_like(logits)
            if directions.e is not None:
                rows = tokens if blocks.rows is None else blocks.rows[tokens]
                change += directions.e[rows].to(wide) @ c_block.to(wide).T
            if directions.c is not None:
                change += e_block.to(wide) @ directions.c[classes].to(wide).T
            if directions.bias is not None:
                change += directions.bias[classes].to(wide)
            if slope is not None:
                change *= slope
            here, columns = targets_within(target_block, classes)
            found = change.gather(1, columns[:, None])[:, 0]
            of_logit[tokens] = torch.where(here, found, of_logit[tokens])
            of_lse[tokens] += change.mul_(logits.sub_(lse[tokens, None]).exp_()).sum(1)
    of_nll = torch.where(blocks.in_range, of_lse - of_logit, torch.nan)
    return PerToken(blocks.scatter(of_nll), blocks.scatter(of_lse))
