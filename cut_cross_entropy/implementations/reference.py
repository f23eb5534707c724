"""Full logits in high precision: slow, large, and what defines correct.

Half precision inputs are widened to float32 before the product, float64 stays float64, and PyTorch
differentiates it (twice, if asked). Shape legend: ``cut_cross_entropy.implementations``.
"""

import torch
from torch import Tensor

from cut_cross_entropy.outputs import Asked, TokenOutputs
from cut_cross_entropy.problem import Problem


def target_logits_and_lse(problem: Problem) -> tuple[Tensor, Tensor]:
    """Logit of the target and log-sum-exp of every token, (N,) each.

    The logit is +inf where the target is not a row of ``c``. Values of tokens that are not kept
    are undefined.
    """
    logits, targets = all_logits(problem), problem.local_targets
    here = (targets >= 0) & (targets < problem.c.shape[0])
    safe = torch.where(here, targets, 0).long()
    logit = logits.gather(1, safe[:, None]).squeeze(1)
    return torch.where(here, logit, torch.inf), torch.logsumexp(logits, dim=1)


def all_logits(problem: Problem) -> Tensor:
    """Logits (N, V) of every token, 0 for ignored ones, in :attr:`Problem.wide`; differentiable."""
    wide = problem.wide
    kept = (problem.targets != problem.ignore_index)[:, None]
    # An ignored token contributes nothing, whatever its embedding holds: a NaN there would reach
    # the classifier's gradient as 0 * NaN.
    e = torch.where(kept, problem.e, 0)
    e, c = (x.to(problem.compute_dtype).to(wide) for x in (e, problem.c))
    logits = e @ c.T
    if problem.bias is not None:
        logits = logits + problem.bias.to(wide)
    if problem.softcap is not None:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    if problem.multiplier is not None:
        logits = logits * problem.multiplier[:, None]
    return torch.where(kept, logits, 0)


def token_outputs(
    problem: Problem, logits: Tensor, asked: Asked, weights: Tensor | None
) -> TokenOutputs:
    """Sums over the classes of each token from :func:`all_logits`, as PyTorch has them.

    ``weights`` (V,) are those of the mean logit, if it is asked for.
    """
    kept = problem.targets != problem.ignore_index
    here = (problem.targets >= 0) & (problem.targets < logits.shape[1])
    targets = torch.where(here, problem.targets, 0).long()[:, None]
    log_p = logits.log_softmax(1)
    nothing = logits.new_empty(0)
    entropy = log_sum_sq = mean = highest = nothing
    rank = nothing.int()
    nll = torch.where(here, -log_p.gather(1, targets)[:, 0], torch.nan)
    if asked.entropy:
        entropy = -(log_p.exp() * log_p.clamp_min(-1e4)).sum(1)  # 0 * log 0 is 0
    if asked.log_sum_sq:
        log_sum_sq = (2 * log_p).logsumexp(1)
    if asked.mean_logit and weights is not None:
        mean = logits @ weights
    if asked.rank:
        limit = logits.gather(1, targets)
        before = torch.arange(logits.shape[1], device=logits.device) < targets
        rank = ((logits > limit) | ((logits == limit) & before)).sum(1, dtype=torch.int32)
        rank = torch.where(here & ~limit[:, 0].isnan(), rank, -1)
    if asked.max_logit:
        highest = logits.detach().amax(1)
    values, ids = logits.detach().topk(asked.top_k, dim=1)

    def only_kept(x: Tensor) -> Tensor:
        if not x.numel():
            return x
        return torch.where(kept.reshape(-1, *[1] * (x.ndim - 1)), x, 0)

    results = (nll, logits.logsumexp(1), entropy, log_sum_sq, mean, rank, highest, ids, values)
    return TokenOutputs(*(only_kept(x) for x in results))
