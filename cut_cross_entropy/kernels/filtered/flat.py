"""A few tokens whose distribution is flat: all of their strips, as rows of their own.

Their logit gradients are one small matrix over all classes. Where the rows of dC are written, its
product with the tokens is added to what the strips and the tail give, so that dC is neither read
again nor rounded twice. Shape legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cut_cross_entropy.implementations.token_chunks import class_slices
from cut_cross_entropy.kernels.counted_products import counted_product
from cut_cross_entropy.kernels.exact import Wanted, add_product, chunk_gradients
from cut_cross_entropy.kernels.launch import cdiv
from cut_cross_entropy.kernels.tokens import BackwardTokens, scatter_rows
from cut_cross_entropy.kernels.triton.filtered.flat import STEP
from cut_cross_entropy.problem import Problem, low_columns

MOST = 512  # tokens: as many cost as much as to read and write dC once more
SPLITS = 32  # of the classes, whose sums fill a GPU
BUDGET_SHARE = 4  # of the memory budget, at most a fourth for their logit gradients


@dataclass(frozen=True)
class FlatTokens:
    """Flat tokens with their logit gradients.

    Args:
        tokens: F tokens, the flat ones first; the others do not count.
        grads: (V, stride) gradients of the compute dtype times ``tokens.scale``, those of a class
            together, since they are read so.
        rows: (F, D) features of the tokens that the rows of dC are sums of.
        count: () int32, how many of them are flat.
        num_flat: the same on the host; None if it does not know: the others are absent then.
    """

    tokens: BackwardTokens
    grads: Tensor
    rows: Tensor
    count: Tensor
    num_flat: int | None = None

    @classmethod
    def of(
        cls,
        problem: Problem,
        tokens: BackwardTokens,
        wanted: Wanted,
        count: Tensor,
        num_flat: int | None = None,
    ) -> "FlatTokens":
        """Compute the logit gradients of all strips of some tokens."""
        num_tokens, num_classes = tokens.e.shape[0], problem.c.shape[0]
        grads = tokens.e.new_empty((num_classes, whole_steps(num_tokens)))
        by_token = grads.T[:num_tokens]
        num_rows = count if num_flat is None else None
        chunk_gradients(problem, tokens, (0, num_classes), by_token, num_rows)
        return cls(tokens, grads, wanted.features(tokens).contiguous(), count, num_flat)

    def write_grad_e(self, problem: Problem, grad_e: Tensor | None, low_e: Tensor | None) -> None:
        """Write the tokens' rows of dE, and of the gradient of an adapter's ``low_e``."""
        grads = self.grads.T[: self.tokens.e.shape[0]]
        if self.num_flat is None and grad_e is not None:
            parts = self._counted_parts(problem, grads)
            scatter_rows(parts.sum(0), self.tokens.origin, grad_e)
            return
        origin = self.tokens.origin[: self.num_flat]
        for columns, out in ((problem.c, grad_e), (low_columns(problem), low_e)):
            if columns is not None and out is not None:
                shape = (grads.shape[0], columns.shape[1])
                total = torch.zeros(shape, dtype=torch.float32, device=grads.device)
                for part in class_slices(columns.shape[0], max(shape)):
                    add_product(total, grads[:, part], columns[part])
                scatter_rows(total.div_(self.tokens.scale)[: self.num_flat], origin, out)

    def _counted_parts(self, problem: Problem, grads: Tensor) -> Tensor:
        """Return rows of dE as (S, F, D) float32 sums over parts of the classes."""
        shape = (SPLITS, grads.shape[0], problem.c.shape[1])
        parts = torch.empty(shape, dtype=torch.float32, device=grads.device)
        scale = self.tokens.scale
        counted_product(grads, problem.c, parts, count=self.count, scale=scale, of_rows=True)
        return parts

    def add_bias_grads(self, sums: Tensor) -> None:
        """Add the tokens to the sums of dbias, (V,) float32."""
        own = self.grads[:, : self.num_flat].sum(1, dtype=torch.float32)
        sums += own.div_(self.tokens.scale)


def whole_steps(num_tokens: int) -> int:
    """Return for how many tokens the gradients of a class are stored."""
    step: int = STEP.value
    return cdiv(num_tokens, step) * step


def flat_bytes(problem: Problem, num_tokens: int) -> int:
    """Return the bytes of the logit gradients of some flat tokens."""
    return problem.c.shape[0] * whole_steps(num_tokens) * problem.compute_dtype.itemsize


def most_flat(problem: Problem) -> int:
    """Return how many flat tokens are added where dC is written, at most: by count and memory."""
    steps: int = problem.memory_budget // BUDGET_SHARE // flat_bytes(problem, 1)
    return min(MOST, steps * whole_steps(1))


def flat_arguments(flat: FlatTokens | None) -> dict[str, object]:
    """Return the arguments of a kernel that calls :func:`add_flat`."""
    return {
        "flat_grads_ptr": None if flat is None else flat.grads,
        "flat_rows_ptr": None if flat is None else flat.rows,
        "num_flat_ptr": None if flat is None else flat.count,
        "flat_stride": 16 if flat is None else flat.grads.stride(0),
    }
