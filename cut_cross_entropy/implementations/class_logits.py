"""Logits of a few classes of each token: K gathered rows of c a token, and no walk.

Shape legend: ``cut_cross_entropy.implementations``. Further: K classes of each token.
"""

import torch
from torch import Tensor

from cut_cross_entropy.device_support import kernels_unavailable
from cut_cross_entropy.distributed.collectives import sum_over_group
from cut_cross_entropy.implementations.blocks import slices
from cut_cross_entropy.problem import Gradients, Needed, Problem


def forward(problem: Problem, ids: Tensor) -> Tensor:
    """Compute the logits of the classes ``ids`` (N, K): (N, K) in :attr:`Problem.wide`.

    Those of ignored tokens and of negative ids are 0, those of other ids that are not a class NaN.
    With a ``group`` each process contributes its own classes.
    """
    rows = _Rows(problem, ids)
    logits = torch.zeros(ids.shape, dtype=problem.wide, device=ids.device)
    for tokens in rows.blocks():
        found, _ = rows.logits(tokens)
        logits[tokens] = torch.where(rows.inside[tokens], found, 0)
    if problem.group is not None:
        sum_over_group(logits, problem.group)
        return logits  # a shard cannot know which ids no other has
    return logits.masked_fill_(rows.unknown, torch.nan)


def backward(grad: Tensor, problem: Problem, ids: Tensor, needed: Needed) -> Gradients:
    """Compute the gradients of e, c and bias from that of the logits (N, K), which is sparse.

    With a ``group`` the gradient of e is the part of the classes that are here.
    """
    rows = _Rows(problem, ids)
    if rows.in_place:
        return _backward_in_place(grad, rows, needed)
    e, c, bias, wide = problem.e, problem.c, problem.bias, problem.wide
    grad_e = torch.zeros(e.shape if needed.e else 0, dtype=wide, device=e.device)
    grad_c = torch.zeros(c.shape if needed.c else 0, dtype=wide, device=e.device)
    grad_bias = torch.zeros(c.shape[0] if needed.bias else 0, dtype=wide, device=e.device)
    for tokens in rows.blocks():
        some = rows.product_gradient(grad, tokens)
        places = rows.safe[tokens]
        if needed.e:
            grad_e[tokens] = torch.bmm(some[:, None], rows.classifier(tokens))[:, 0]
        if needed.c:
            outer = some[:, :, None] * rows.embeddings(tokens)[:, None]
            grad_c.index_add_(0, places.flatten(), outer.flatten(0, 1))
        if needed.bias:
            grad_bias.index_add_(0, places.flatten(), some.flatten())
    bias_dtype = e.dtype if bias is None else bias.dtype
    return Gradients(grad_e.to(e.dtype), grad_c.to(c.dtype), grad_bias.to(bias_dtype))


def _backward_in_place(grad: Tensor, rows: "_Rows", needed: Needed) -> Gradients:
    """Compute the gradients with kernels that gather no rows."""
    from cut_cross_entropy.kernels import class_logits
    from cut_cross_entropy.kernels.launch import current_device

    e, c, bias = rows.problem.e, rows.problem.c, rows.problem.bias
    weights = rows.product_gradient(grad, slice(None))
    ids = torch.where(rows.inside | rows.unknown, rows.safe, -1)
    grad_e, grad_c = (
        x.new_empty(x.shape if need else 0) for x, need in ((e, needed.e), (c, needed.c))
    )
    bias_sums = weights.new_empty(c.shape[0] if needed.bias else 0)
    with current_device(e.device):
        if needed.e:
            class_logits.class_grad_e(rows.c, ids, weights, grad_e)
        if needed.c or needed.bias:
            sums = bias_sums if needed.bias else None
            out = grad_c if needed.c else None
            class_logits.class_grad_c(rows.e, ids, weights, c.shape[0], out=out, bias_out=sums)
    return Gradients(grad_e, grad_c, bias_sums.to(e.dtype if bias is None else bias.dtype))


class _Rows:
    """The gathered rows of c, a block of tokens at a time."""

    def __init__(self, problem: Problem, ids: Tensor) -> None:
        self.problem = problem
        local, num_classes = ids.long() - problem.first_class, problem.c.shape[0]
        kept = (problem.targets != problem.ignore_index)[:, None] & (ids >= 0)
        self.inside = kept & (local >= 0) & (local < num_classes)
        self.unknown = kept & ~self.inside
        if problem.group is not None:
            self.unknown = torch.zeros_like(self.unknown)
        self.safe = torch.where(self.inside, local, 0)
        self.in_place = (
            problem.wide == torch.float32
            and 0 not in (ids.numel(), problem.c.numel())
            and kernels_unavailable(problem.e.device) is None
        )
        if self.in_place:
            dtype = problem.compute_dtype
            self.e = problem.e.to(dtype).contiguous()
            self.c = problem.c.to(dtype).contiguous()

    def blocks(self) -> list[slice]:
        """Return blocks of tokens whose rows fit the memory budget."""
        num_tokens, count = self.safe.shape
        if self.problem.c.shape[0] == 0 or count == 0:
            return []
        if self.in_place:
            return [slice(None)]
        # Rows in their dtype, in a wider one, and a product with them.
        per_token = 3 * max(1, count) * self.problem.c.shape[1] * self.problem.wide.itemsize
        return list(slices(num_tokens, max(1, self.problem.memory_budget // per_token)))

    def classifier(self, tokens: slice) -> Tensor:
        """(n, K, D)."""
        rows = self.problem.c[self.safe[tokens]]
        return rows.to(self.problem.compute_dtype).to(self.problem.wide)

    def embeddings(self, tokens: slice) -> Tensor:
        """(n, D), 0 for ignored tokens."""
        rows = self.problem.e[tokens].to(self.problem.compute_dtype).to(self.problem.wide)
        return torch.where(
            (self.problem.targets[tokens] != self.problem.ignore_index)[:, None], rows, 0
        )

    def products(self, tokens: slice) -> Tensor:
        """``e @ c.T`` (n, K)."""
        if self.in_place:
            from cut_cross_entropy.kernels.class_logits import class_products
            from cut_cross_entropy.kernels.launch import current_device

            with current_device(self.problem.e.device):
                return class_products(self.e, self.c, torch.where(self.inside, self.safe, -1))
        # The sum over the features of a token does not depend on the other tokens.
        return (self.classifier(tokens) * self.embeddings(tokens)[:, None]).sum(2)

    def product_gradient(self, grad: Tensor, tokens: slice) -> Tensor:
        """Gradient of :meth:`products` (n, K) from that of the logits (N, K)."""
        some = grad[tokens].to(self.problem.wide)
        if self.problem.softcap is not None:
            some = some * self.logits(tokens)[1]
        elif self.problem.multiplier is not None:
            some = some * self.problem.multiplier[tokens, None]
        some = some.masked_fill(self.unknown[tokens], torch.nan)
        # Products with 0 would keep the NaN of an ignored token's embedding.
        return torch.where(self.inside[tokens] | self.unknown[tokens], some, 0)

    def logits(self, tokens: slice) -> tuple[Tensor, Tensor]:
        """Logits (n, K), and the factor of their derivative by ``e @ c.T + bias``."""
        problem = self.problem
        logits = self.products(tokens)
        if problem.bias is not None:
            logits += problem.bias[self.safe[tokens]].to(problem.wide)
        slope = torch.ones_like(logits)
        if problem.softcap is not None:
            logits = logits.div_(problem.softcap).tanh_()
            slope = 1 - logits.square()
            logits = logits.mul_(problem.softcap)
        if problem.multiplier is not None:
            rows = problem.multiplier[tokens, None]
            logits, slope = logits.mul_(rows), slope.mul_(rows)
        return logits, slope
