"""Sums over the classes of each token, in bounded memory: the walk of ``token_logprobs``.

As ``chunked`` for the loss: logits exist for one block of tokens and classes at a time, and the
backward pass computes them again. With the logits z of a token, ``L = lse(z)``, ``p = exp(z - L)``
and upstream gradients g of the outputs, the gradient by the logits is::

    p * (alpha + eta * (z - L)) + q * p^2 - g_nll * onehot + g_mean * w / V
    alpha = g_lse + g_nll - g_entropy * entropy - 2 * g_log_sum_sq
    eta = -g_entropy,  q = 2 * g_log_sum_sq / sum p^2

so that five scalars a token are all that the block needs, whatever the loss was. Exponentials and
first moments are relative to a running maximum: the entropy of logits around 30 has the rounding of
small numbers.

Shape legend: ``cut_cross_entropy.implementations``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cut_cross_entropy.distributed.collectives import gather_shards
from cut_cross_entropy.implementations.blocks import Blocks, targets_within
from cut_cross_entropy.outputs import Asked, OutputGrads, SavedOutputs, TokenOutputs
from cut_cross_entropy.problem import Gradients, Needed, Problem, gradient_scale

LOWEST = -1e4
"""Exponent that stands for -inf where it is a factor: its exponential is 0 too."""


def forward(problem: Problem, asked: Asked, weights: Tensor | None) -> TokenOutputs:
    """Compute loss, log-sum-exp and what is asked for, in :attr:`Problem.wide`.

    With a ``group`` its other processes hold the other classes, and the results are those of all.

    Args:
        problem: the inputs.
        asked: the sums to compute.
        weights: (V,) in :attr:`Problem.wide`, of the logits in their mean, if it is asked for.
    """
    blocks = Blocks(problem)
    target_logits = _target_logits(blocks)
    sums = _Sums.nothing(target_logits, asked)
    for tokens in blocks.token_blocks():
        e_block, target_block = blocks.embeddings(tokens), blocks.targets[tokens]
        part = sums.at(tokens)
        for classes in blocks.class_blocks():
            logits, _ = blocks.logits(e_block, tokens, classes)
            here, columns = targets_within(target_block, classes)
            part.count(logits, classes, target_block, target_logits[tokens], problem.first_class)
            if asked.mean_logit and weights is not None:
                part.mean += logits @ weights[classes]
            part.add(logits, here, columns)
    if problem.group is not None:
        # All N tokens, as above.
        sums = sums.with_rows(blocks.scatter, asked).of_all_shards(problem.group)
        sums = sums.with_rows(blocks.gather, asked)
    results = sums.results(target_logits, asked)._asdict()
    for name, x in results.items():
        if getattr(asked, name, True):
            results[name] = blocks.scatter(x)
    return TokenOutputs(**results)


def _target_logits(blocks: Blocks) -> Tensor:
    """Logits of the targets, +inf where a target is not a class; each by a product of its own."""
    problem = blocks.problem
    found = [blocks.targets.new_empty(0, dtype=problem.wide)]
    for tokens in blocks.token_blocks():
        found.append(logits_of(blocks, tokens, blocks.targets[tokens, None])[:, 0])
    logits = torch.cat(found)
    if problem.group is not None:
        # All N tokens, so that the processes exchange the same number whatever they ignore.
        logits = gather_shards(blocks.scatter(logits), problem.group).amin(0)
        logits = blocks.gather(logits)
    return logits


def logits_of(blocks: Blocks, tokens: slice, ids: Tensor) -> Tensor:
    """Logits of some classes of each token of a block, (n, K); +inf where an id is not a class.

    ``ids`` (n, K) count from the first row of c. The sum over the features is that of the token
    alone, whatever the block.
    """
    num_classes = blocks.problem.c.shape[0]
    inside = (ids >= 0) & (ids < num_classes)
    if num_classes == 0:
        return torch.full(ids.shape, torch.inf, dtype=blocks.wide, device=ids.device)
    safe = torch.where(inside, ids, 0)
    rows = blocks.problem.c[safe].to(blocks.problem.compute_dtype).to(blocks.wide)  # (n, K, D)
    logits = (rows * blocks.embeddings(tokens).to(blocks.wide)[:, None]).sum(2)
    if blocks.problem.bias is not None:
        logits += blocks.problem.bias[safe].to(blocks.wide)
    logits, _ = blocks.transform(logits, tokens)
    return torch.where(inside, logits, torch.inf)


@dataclass
class _Sums:
    """Running sums of some tokens over the classes other than the target; empty if not asked for.

    Args:
        highest: (n,) highest logit so far, to which the sums that follow are relative.
        others: (n,) sum of exponentials.
        first: (n,) sum of exponentials times their exponents.
        squares: (n,) sum of squared exponentials.
        mean: (n,) weighted sum of the logits of all classes.
        rank: (n,) number of classes ahead of the target.
        top_logits, top_ids: (n, k) the highest logits and their classes.
    """

    highest: Tensor
    others: Tensor
    first: Tensor
    squares: Tensor
    mean: Tensor
    rank: Tensor
    top_logits: Tensor
    top_ids: Tensor

    @classmethod
    def nothing(cls, like: Tensor, asked: Asked) -> "_Sums":
        """Return the sums over no class of as many tokens as ``like`` (n,) has."""

        def zeros(wanted: bool, dtype: torch.dtype = like.dtype) -> Tensor:
            return like.new_zeros(like.shape[0] if wanted else 0, dtype=dtype)

        shape = (like.shape[0], asked.top_k)
        return cls(
            torch.full_like(like, -torch.inf),
            zeros(True),
            zeros(asked.entropy),
            zeros(asked.log_sum_sq),
            zeros(asked.mean_logit),
            zeros(asked.rank, torch.int32),
            like.new_full(shape, -torch.inf),
            like.new_zeros(shape, dtype=torch.int64),
        )

    def with_rows(self, change: Callable[[Tensor], Tensor], asked: Asked) -> "_Sums":
        """Return the sums after a change to the rows of each that is asked for."""
        wanted = {"first": asked.entropy, "squares": asked.log_sum_sq}
        wanted |= {"mean": asked.mean_logit, "rank": asked.rank}
        return _Sums(
            **{name: change(x) if wanted.get(name, True) else x for name, x in vars(self).items()}
        )

    def at(self, tokens: slice) -> "_Sums":
        """Return views of some tokens."""
        return _Sums(*(x[tokens] for x in vars(self).values()))

    def count(
        self, logits: Tensor, classes: slice, targets: Tensor, target_logits: Tensor, first: int
    ) -> None:
        """Update rank and highest classes by a block of logits; ``first`` is the shard's class."""
        if self.rank.numel():
            ids = torch.arange(classes.start, classes.stop, device=logits.device)
            limit = target_logits[:, None]
            ahead = logits > limit
            ahead |= (logits == limit) & (ids < targets[:, None])
            ahead &= ids != targets[:, None]  # its own logit may be rounded otherwise here
            self.rank += ahead.sum(1, dtype=torch.int32)
        if self.top_ids.numel():
            values, ids = logits.topk(min(self.top_ids.shape[1], logits.shape[1]), dim=1)
            self._keep_highest(values, ids + (classes.start + first))

    def _keep_highest(self, values: Tensor, ids: Tensor) -> None:
        values = torch.cat([self.top_logits, values], 1)
        ids = torch.cat([self.top_ids, ids], 1)
        values, places = values.sort(dim=1, descending=True, stable=True)
        k = self.top_logits.shape[1]
        self.top_logits.copy_(values[:, :k])
        self.top_ids.copy_(ids.gather(1, places[:, :k]))

    def add(self, logits: Tensor, here: Tensor, columns: Tensor) -> None:
        """Add a block of logits, which is overwritten; the target's column, if here, is not."""
        self._rescale(torch.maximum(self.highest, logits.amax(1)))
        # Relative to 0 as long as all logits are -inf.
        base = torch.where(self.highest == -torch.inf, 0, self.highest)
        exponent = logits.sub_(base[:, None])
        p = exponent.exp()
        at_target = p.gather(1, columns[:, None])
        p.scatter_(1, columns[:, None], torch.where(here[:, None], 0, at_target))
        self.others += p.sum(1)
        if self.squares.numel():
            self.squares += torch.linalg.vecdot(p, p)
        if self.first.numel():
            self.first += torch.linalg.vecdot(exponent.clamp_min_(LOWEST), p)

    def _rescale(self, highest: Tensor) -> None:
        """Make the sums relative to a higher logit, in place."""
        down = torch.where(highest == self.highest, 0, self.highest - highest).clamp_min(LOWEST)
        factor = down.exp()
        if self.first.numel():
            self.first.add_(down * self.others).mul_(factor)
        if self.squares.numel():
            self.squares.mul_(factor.square())
        self.others.mul_(factor)
        self.highest.copy_(highest)

    def of_all_shards(self, group: str) -> "_Sums":
        """Return the sums over the classes of all processes, from N tokens' of each."""
        shards = [
            _Sums(*parts)
            for parts in zip(*(gather_shards(x, group) for x in vars(self).values()), strict=True)
        ]
        total = shards[0]
        highest = torch.stack([shard.highest for shard in shards]).amax(0)
        for shard in shards:
            shard._rescale(highest)
        for shard in shards[1:]:  # in the order of the processes: the same bits on all of them
            for name in ("others", "first", "squares", "mean", "rank"):
                getattr(total, name).add_(getattr(shard, name))
            if total.top_ids.numel():
                total._keep_highest(shard.top_logits, shard.top_ids)
        return total

    def results(self, target_logits: Tensor, asked: Asked) -> TokenOutputs:
        """Add the targets, whose logits are +inf where they are not a class."""
        is_class = target_logits != torch.inf
        base = torch.where(self.highest == -torch.inf, 0, self.highest)
        exponent = torch.where(is_class, target_logits - base, -torch.inf).clamp_min(LOWEST)
        p = exponent.exp()
        total = self.others + p
        log_total = total.log()
        lse = base + log_total
        # softplus: never below 0, and precise where the target has nearly all of the probability.
        ahead = self.others.log() - (target_logits - base)
        nll = ahead.clamp_min(0) + torch.log1p(torch.exp(-ahead.abs()))
        nll = torch.where(is_class, nll, torch.nan)
        entropy, log_sum_sq = self.first, self.squares
        if asked.entropy:
            entropy = (log_total - (self.first + p * exponent) / total).clamp_min(0)
        if asked.log_sum_sq:
            log_sum_sq = (self.squares + p * p).log() - 2 * log_total
        rank = self.rank
        if asked.rank:
            rank = torch.where(is_class & ~target_logits.isnan(), rank, -1)
        highest = self.highest if asked.max_logit else self.highest.new_empty(0)
        return TokenOutputs(
            nll,
            lse,
            entropy,
            log_sum_sq,
            mean_logit=self.mean,
            rank=rank,
            max_logit=highest,
            top_ids=self.top_ids,
            top_logits=self.top_logits,
        )


def backward(
    grads: OutputGrads,
    saved: SavedOutputs,
    problem: Problem,
    weights: Tensor | None,
    needed: Needed,
) -> Gradients:
    """Compute the gradients of e, c and bias; an empty tensor for each not needed.

    With a ``group`` the gradient of e is the part of the classes that are here.

    Args:
        grads: gradients of the outputs.
        saved: results of the forward.
        problem, weights: as in the forward.
        needed: the gradients to compute.
    """
    blocks = Blocks(problem)
    factors = _Factors.of(grads, saved, blocks)
    scale = factors.scale() if blocks.half_products else factors.lse.new_ones(())

    def by_logits(logits: Tensor, tokens: slice, classes: slice) -> Tensor:
        here, columns = targets_within(blocks.targets[tokens], classes)
        some = None if weights is None else weights[classes]
        return factors.at(tokens).gradient(logits, here, columns, some, blocks.floor)

    return blocks.gradients(by_logits, scale, needed)


@dataclass
class _Factors:
    """Scalars of the logit gradient, (n,) each; None for 0. See the head of the module.

    Args:
        lse: log-sum-exp.
        alpha, eta, q: factors of p, of ``p * (z - lse)`` and of ``p^2``.
        miss: ``g_nll * (1 - p)`` of the target, and g_nll.
        g_nll: gradient of the loss.
        mean: gradient of the mean logit.
    """

    lse: Tensor
    alpha: Tensor
    eta: Tensor | None
    q: Tensor | None
    miss: Tensor | None
    g_nll: Tensor | None
    mean: Tensor | None

    @classmethod
    def of(cls, grads: OutputGrads, saved: SavedOutputs, blocks: Blocks) -> "_Factors":
        wide = blocks.wide
        g = OutputGrads(*(None if x is None else blocks.gather(x.to(wide)) for x in grads))
        lse, nll = blocks.gather(saved.lse), blocks.gather(saved.nll)
        alpha = torch.zeros_like(lse) if g.lse is None else g.lse.clone()
        eta = q = miss = None
        if g.nll is not None:
            alpha += g.nll
            # The sum of the gradient over the classes is 0 to the precision of 1 - p.
            miss = g.nll * torch.expm1(-nll)
        if g.entropy is not None:
            eta = -g.entropy
            alpha += eta * blocks.gather(saved.entropy)
        if g.log_sum_sq is not None:
            alpha -= 2 * g.log_sum_sq
            q = 2 * g.log_sum_sq * torch.exp(-blocks.gather(saved.log_sum_sq))
        # A target out of range: never a plausible number.
        alpha = torch.where(nll.isnan(), torch.nan, alpha)
        return cls(lse, alpha, eta, q, miss, g.nll, g.mean_logit)

    def at(self, tokens: slice) -> "_Factors":
        """Return the factors of some tokens."""
        some = {name: x[tokens] for name, x in vars(self).items() if x is not None}
        return replace(self, **some)

    def scale(self) -> Tensor:
        """Return a power of two that brings the gradient near 1; see gradient_scale."""
        terms = [x.abs() for x in (self.eta, self.g_nll, self.mean) if x is not None]
        largest = torch.stack(terms).amax(0) if terms else torch.zeros_like(self.alpha)
        return gradient_scale(self.alpha, largest)

    def gradient(
        self,
        logits: Tensor,
        here: Tensor,
        columns: Tensor,
        weights: Tensor | None,
        floor: float,
    ) -> Tensor:
        """Return the gradient by a block of logits, which is overwritten."""
        exponent = logits.sub_(self.lse[:, None])
        # Probabilities that no sum can notice are zero: as subnormal numbers they would make the
        # products an order of magnitude slower on a CPU.
        p = F.threshold(exponent, floor, -torch.inf).exp_()
        if self.eta is None:
            grad = exponent.copy_(self.alpha[:, None])
        else:
            grad = exponent.clamp_min_(floor).mul_(self.eta[:, None]).add_(self.alpha[:, None])
        if self.q is not None:
            grad.addcmul_(p, self.q[:, None])
        if self.g_nll is None or self.miss is None:
            grad.mul_(p)
        else:
            columns = columns[:, None]
            of_p = grad.gather(1, columns) - torch.where(here, self.g_nll, 0)[:, None]
            at_target = of_p * p.gather(1, columns)
            grad.mul_(p)
            at_target += torch.where(here, self.miss, 0)[:, None]
            grad.scatter_(1, columns, at_target)
        if self.mean is not None and weights is not None:
            grad.addcmul_(self.mean[:, None], weights[None, :])
        return grad
