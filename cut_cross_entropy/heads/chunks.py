"""Results of the public functions for a head, by chunks of its classes.

Each chunk of classes is a problem of its own, which the implementations for matrices solve: a
target in another chunk is replaced by one that is here, and its loss left out. Log-sum-exps of the
chunks are merged by ordinary PyTorch, so that the backward pass of each chunk gets its share
``exp(lse of the chunk - lse)`` of the gradient.

Shapes: N tokens, K features of all products together, V classes, n chunks.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cut_cross_entropy.constants import IGNORE_INDEX
from cut_cross_entropy.heads.head import Product
from cut_cross_entropy.heads.rows import ClassRows
from cut_cross_entropy.implementations.blocks import MIN_CLASSES, Blocks
from cut_cross_entropy.outputs import Asked, TokenOutputs
from cut_cross_entropy.problem import PerToken, Problem
from cut_cross_entropy.validation import check_target_range

LOWEST = -1e30
"""Log-sum-exp that stands for -inf where it has a gradient."""

T = TypeVar("T")
P = TypeVar("P", bound=Problem)


@dataclass(frozen=True)
class HeadProblem(Problem):
    """The problem of a head: ``c`` has the shape, dtype and device of its rows, and no values.

    ``e`` are the features of the first product.

    Args:
        rows: makes the rows of a chunk.
        products: the terms of the logits, in the order of the columns of ``rows``.
        anchor: see :meth:`ClassRows.anchor`.
    """

    rows: ClassRows = field(kw_only=True)
    products: tuple[Product, ...] = field(kw_only=True)
    anchor: Tensor | None = field(default=None, kw_only=True)

    def features(self) -> Tensor:
        """Return the features of all products side by side, (N, K)."""
        features = [p.features.reshape(-1, p.features.shape[-1]) for p in self.products]
        if len(features) == 1:
            return features[0]
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in features))
        return torch.cat([x.to(dtype) for x in features], dim=1)

    def as_problem(self, kind: type[P] = Problem, **changes: Any) -> P:  # type: ignore[assignment]
        """Return the problem without what belongs to the head, with some fields changed.

        Args:
            kind: its class.
            **changes: fields of that class.
        """
        return kind(**{f.name: getattr(self, f.name) for f in fields(Problem)} | changes)

    def without_graph(self) -> "HeadProblem":
        """Return the problem without features of its own, for an autograd function to keep."""
        frozen = self.rows.frozen_columns
        return replace(self, products=(), anchor=None, frozen_columns=frozen)

    @property
    def has_rows(self) -> bool:
        """Return False: they are made."""
        return False

    @property
    def most_classes(self) -> int:
        """Number of classes that :meth:`class_rows` may be asked for: those of a chunk."""
        return min(self.rows.num_classes, self.chunk_size())

    def class_rows(self, classes: slice) -> Tensor:
        """Make the rows of some classes."""
        return self.rows.make(classes)

    def empty_grad_c(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return nothing: the gradient goes to the parts of the rows."""
        return self.e.new_empty(0, dtype=dtype)

    def put_grad_c(self, out: Tensor, classes: slice, rows: Tensor) -> None:
        """Add the gradient of some rows, less the frozen columns, to those of their parts."""
        self.rows.add_gradient_of_all(classes, rows)

    def chunk_size(self) -> int:
        """Classes of a chunk, so that its rows and what is made of them take half the budget."""
        itemsize = self.rows.dtype.itemsize
        # The rows, the parts that they are made of, and their gradient.
        copies = 2 if self.rows.frozen_columns == self.rows.width else 3
        most = self.memory_budget // 2 // (copies * itemsize * self.rows.width)
        most = max(MIN_CLASSES, most // MIN_CLASSES * MIN_CLASSES)
        num_chunks = -(-self.rows.num_classes // most)
        size = -(-self.rows.num_classes // num_chunks)
        return -(-size // MIN_CLASSES) * MIN_CLASSES

    def chunks(self) -> list[slice]:
        """Return the chunks of classes."""
        size, stop = self.chunk_size(), self.rows.num_classes
        return [slice(start, min(start + size, stop)) for start in range(0, stop, size)]

    def is_here(self, classes: slice) -> Tensor:
        """Whether the target of each token, (N,), is among some classes."""
        kept = self.targets != self.ignore_index
        here: Tensor = kept & (self.targets >= classes.start) & (self.targets < classes.stop)
        return here

    @contextmanager
    def part(self, e: Tensor, classes: slice) -> Iterator[Problem]:
        """Yield the problem of a chunk, in which targets that are elsewhere are class 0."""
        kept = self.targets != self.ignore_index
        local = torch.where(self.is_here(classes), self.targets - classes.start, 0)
        with self.rows.chunk(self.anchor, classes) as rows:
            yield Problem(
                e,
                rows,
                torch.where(kept, local, IGNORE_INDEX),
                None if self.bias is None else self.bias[classes],
                ignore_index=IGNORE_INDEX,
                softcap=self.softcap,
                compute_dtype=self.compute_dtype,
                memory_budget=max(1, self.memory_budget // 2),
                frozen_columns=self.rows.frozen_columns if rows.requires_grad else 0,
                multiplier=self.multiplier,
            )

    def over_chunks(self, compute: Callable[[Problem, slice], T]) -> list[T]:
        """Return ``compute`` of the problem and the classes of each chunk."""
        check_target_range(self.targets, self.rows.num_classes, self.ignore_index)
        results, e = [], self.features()
        if e.requires_grad and torch.is_grad_enabled():
            # The gradients of the chunks are added up in this dtype.
            e = e.to(torch.promote_types(e.dtype, torch.float32))
        for classes in self.chunks():
            with self.part(e, classes) as part:
                results.append(compute(part, classes))
        return results


def token_losses(problem: HeadProblem, compute: Callable[[Problem], PerToken]) -> PerToken:
    """Loss and log-sum-exp of every token, (N,) each, 0 for ignored tokens.

    Args:
        problem: the inputs.
        compute: returns them for the problem of a chunk.
    """
    found = problem.over_chunks(lambda part, classes: compute(part))
    merged = _merge(problem, [x.nll for x in found], [x.lse for x in found])
    return PerToken(merged.nll, merged.lse)


@dataclass(frozen=True)
class _Merged:
    """Results of all chunks together.

    Args:
        nll, lse: (N,), 0 for ignored tokens.
        lses: (n, N), log-sum-exp of each chunk, never -inf.
    """

    nll: Tensor
    lse: Tensor
    lses: Tensor


def _merge(problem: HeadProblem, nlls: list[Tensor], lses: list[Tensor]) -> _Merged:
    kept = problem.targets != problem.ignore_index
    here = torch.stack([problem.is_here(classes) for classes in problem.chunks()])
    each = torch.stack(lses)
    each = torch.where(each == -torch.inf, LOWEST, each)
    own = torch.where(here, each, 0).sum(0)
    # The loss is never below 0, and precise where its chunk has nearly all of the probability.
    more = F.softplus(torch.where(here, LOWEST, each).logsumexp(0) - own)
    nll = torch.where(here, torch.stack(nlls), 0).sum(0) + more
    is_class = here.any(0)  # on a GPU, where a target out of range is not refused: NaN
    nll, lse = (torch.where(is_class, x, torch.nan) for x in (nll, own + more))
    return _Merged(torch.where(kept, nll, 0), torch.where(kept, lse, 0), each)


def token_outputs(
    problem: HeadProblem,
    asked: Asked,
    weights: Tensor | None,
    compute: Callable[[Problem, Asked, Tensor | None], TokenOutputs],
    logits_of: Callable[[HeadProblem, Tensor], Tensor],
) -> TokenOutputs:
    """Loss, log-sum-exp and the sums that are asked for, of every token.

    Args:
        problem: the inputs.
        asked: the sums to compute.
        weights: (V,) of the classes in the mean logit.
        compute: returns the results of a chunk, of its problem, the sums and its weights.
        logits_of: returns the logits (N, K) of class ids (N, K).
    """

    def of_chunk(part: Problem, classes: slice) -> TokenOutputs:
        # The last chunk may have fewer classes than are asked for.
        most = min(asked.top_k, classes.stop - classes.start)
        own = None if weights is None else weights[classes]
        return compute(part, replace(asked, rank=False, top_k=most), own)

    found = problem.over_chunks(of_chunk)
    merged = _merge(problem, [x.nll for x in found], [x.lse for x in found])
    results = {name: getattr(found[0], name) for name in TokenOutputs._fields}
    results |= {"nll": merged.nll, "lse": merged.lse}
    kept = problem.targets != problem.ignore_index
    # The log of each chunk's share of the probability, at most 0.
    shares = merged.lses - torch.where(kept, merged.lse, merged.lses.logsumexp(0))

    def of_chunks(name: str) -> Tensor:
        return torch.stack([getattr(x, name) for x in found])

    if asked.entropy:  # of the chunk, and of the choice among chunks: no term is below 0
        entropy = (shares.exp() * (of_chunks("entropy") - shares)).sum(0)
        results["entropy"] = torch.where(kept, entropy, 0)
    if asked.log_sum_sq:
        log_sum_sq = (of_chunks("log_sum_sq") + 2 * shares).logsumexp(0)
        results["log_sum_sq"] = torch.where(kept, log_sum_sq, 0)
    if asked.mean_logit:
        results["mean_logit"] = of_chunks("mean_logit").sum(0)
    if asked.max_logit:
        results["max_logit"] = of_chunks("max_logit").amax(0)
    if asked.top_k:
        starts = [classes.start for classes in problem.chunks()]
        ids = torch.cat([x.top_ids + s for x, s in zip(found, starts, strict=True)], 1)
        values = torch.cat([x.top_logits for x in found], 1)
        values, places = values.sort(dim=1, descending=True, stable=True)
        results["top_logits"] = values[:, : asked.top_k]
        top_ids = ids.gather(1, places[:, : asked.top_k])
        results["top_ids"] = torch.where(kept[:, None], top_ids, 0)
    if asked.rank:
        results["rank"] = _ranks(problem, logits_of)
    return TokenOutputs(**results)


@torch.no_grad()
def _ranks(problem: HeadProblem, logits_of: Callable[[HeadProblem, Tensor], Tensor]) -> Tensor:
    """Number of classes ahead of the target of each token, (N,) int32; see ``TokenOutputs``."""
    kept = problem.targets != problem.ignore_index
    targets = torch.where(kept, problem.targets, -1).long()[:, None]
    limit = logits_of(problem, targets)
    rank = torch.zeros_like(targets[:, 0], dtype=torch.int32)

    def count(part: Problem, classes: slice) -> None:
        blocks = Blocks(part)
        rows = torch.arange(rank.shape[0], device=rank.device)
        rows = rows if blocks.rows is None else blocks.rows
        for tokens in blocks.token_blocks():
            here, e_block = rows[tokens], blocks.embeddings(tokens)
            for block in blocks.class_blocks():
                logits, _ = blocks.logits(e_block, tokens, block)
                ids = torch.arange(block.start, block.stop, device=rank.device) + classes.start
                ahead = logits > limit[here]
                ahead |= (logits == limit[here]) & (ids < targets[here])
                ahead &= ids != targets[here]  # its own logit may be rounded otherwise here
                rank[here] += ahead.sum(1, dtype=torch.int32)

    with torch.autocast(problem.e.device.type, enabled=False):
        problem.over_chunks(count)
    return torch.where(limit[:, 0].isnan(), -1, torch.where(kept, rank, 0))


def class_logits(
    problem: HeadProblem, ids: Tensor, compute: Callable[[Problem, Tensor], Tensor]
) -> Tensor:
    """Logits of the classes ``ids`` (N, K) of each token, 0 for ignored tokens and negative ids.

    Args:
        problem: the inputs.
        ids: class ids; those that are no class get NaN.
        compute: returns the logits for the problem of a chunk.
    """

    def logits(part: Problem, classes: slice) -> Tensor:
        inside = (ids >= classes.start) & (ids < classes.stop)
        return compute(part, torch.where(inside, ids - classes.start, -1))

    total: Any = sum(problem.over_chunks(logits))
    kept = (problem.targets != problem.ignore_index)[:, None]
    return torch.where(kept & (ids >= problem.rows.num_classes), torch.nan, total)


def mean_logits(
    problem: HeadProblem, weights: Tensor, compute: Callable[[Problem, Tensor], Tensor]
) -> Tensor:
    """Weighted sum of the logits of each token, (N,), 0 for ignored tokens.

    Args:
        problem: the inputs.
        weights: (V,).
        compute: returns the sum for the problem and the weights of a chunk.
    """
    sums: Any = sum(problem.over_chunks(lambda part, classes: compute(part, weights[classes])))
    return sums  # type: ignore[no-any-return]
