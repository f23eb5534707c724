"""Blocks of tokens and classes: their logits, and the walk over them that makes gradients.

Shape legend: ``cut_cross_entropy.implementations``.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.device_support import has_wide_products
from cut_cross_entropy.problem import Gradients, Needed, Problem
from cut_cross_entropy.validation import check_target_range

MAX_TOKENS = 8192
MIN_CLASSES = 128
BLOCK_TEMPORARIES = 4  # logits, their derivative, and what the elementwise operations allocate


def targets_within(targets: Tensor, classes: slice) -> tuple[Tensor, Tensor]:
    """Whether the target of each row lies in ``classes``, and its column there, or any column.

    A list of those rows would be shorter, but the host would wait for its length at every block.
    """
    here = (targets >= classes.start) & (targets < classes.stop)
    return here, (targets - classes.start).clamp(0, classes.stop - classes.start - 1)


def choose_blocks(
    num_tokens: int, num_classes: int, dim: int, *, itemsize: int, budget: int
) -> tuple[int, int]:
    """Tokens and classes a block, so that a block and its operands fit ``budget`` bytes.

    ``itemsize`` is that of the accumulators. At least one token and ``MIN_CLASSES`` classes are
    used, however small the budget.
    """
    tokens = max(1, min(num_tokens, MAX_TOKENS))
    while True:
        # Operands: a widened block of e, a widened block of c, the sum of dC and one addend.
        fixed = 2 * tokens * dim * itemsize
        per_class = (BLOCK_TEMPORARIES * tokens + 3 * dim) * itemsize
        classes = (budget - fixed) // per_class
        if classes >= MIN_CLASSES or tokens == 1:
            break
        tokens = max(1, tokens // 2)
    classes = max(MIN_CLASSES, classes // MIN_CLASSES * MIN_CLASSES)
    return tokens, min(num_classes, classes)


@functools.cache  # older versions do not have it; looking it up takes as long as a view
def _addmm_wide() -> Any:
    return torch.ops.aten.addmm.dtype_out


def part_of(tensor: Tensor, classes: slice, dim: int) -> Tensor:
    """Return the part of some classes, (V, ...) or (T, V, ...); not a view if those are all."""
    if classes.start == 0 and classes.stop == tensor.shape[dim]:
        return tensor
    return tensor[:, classes] if dim else tensor[classes]


def uses_half_products(problem: Problem) -> bool:
    """Whether the products take half precision factors as they are.

    PyTorch has such products with a float32 result on CUDA only; elsewhere the factors are widened,
    which changes none of their values.
    """
    return problem.compute_dtype.itemsize == 2 and has_wide_products(problem.e.device)


class Blocks:
    """The inputs without ignored tokens, block by block, in the precision of the products.

    Args:
        problem: the inputs.
        like: blocks of a problem with the same targets and the same number of classes; None: none.
    """

    num_tokens: int
    num_kept: int
    rows: Tensor | None  # the tokens that are not ignored; None if all are
    targets: Tensor
    in_range: Tensor

    def __init__(self, problem: Problem, like: "Blocks | None" = None) -> None:
        self.problem, self.wide = problem, problem.wide
        self.floor = -600.0 if self.wide == torch.float64 else -60.0
        self.half_products = uses_half_products(problem)
        is_wide = problem.compute_dtype == self.wide
        self._factor_type = problem.compute_dtype if self.half_products or is_wide else None
        if like is None:
            self._find_tokens()
        else:
            self.num_tokens, self.num_kept, self.rows = like.num_tokens, like.num_kept, like.rows
            self.targets, self.in_range = like.targets, like.in_range
        self.multiplier = None if problem.multiplier is None else self.gather(problem.multiplier)
        self.shape = choose_blocks(
            self.num_kept,
            *problem.c.shape,
            itemsize=self.wide.itemsize,
            budget=problem.memory_budget,
        )

    def _find_tokens(self) -> None:
        """Find the tokens that are not ignored."""
        problem = self.problem
        targets, num_classes = problem.targets, problem.c.shape[0]
        if problem.group is None:
            check_target_range(targets, num_classes, problem.ignore_index)
        kept = targets != problem.ignore_index
        self.num_tokens = targets.shape[0]
        rows = kept.nonzero().squeeze(1)  # on a GPU the host waits here, once a pass
        self.num_kept = rows.shape[0]
        self.rows = None if self.num_kept == self.num_tokens else rows
        self.targets = self.gather(targets).long() - problem.first_class
        in_range = (self.targets >= 0) & (self.targets < num_classes)
        self.in_range = in_range if problem.group is None else torch.ones_like(in_range)

    def token_blocks(self) -> Iterator[slice]:
        """Blocks of the tokens that are not ignored."""
        return slices(self.num_kept, self.shape[0])

    def class_blocks(self) -> Iterator[slice]:
        """Blocks of the classes."""
        return slices(self.problem.c.shape[0], self.shape[1])

    def gather(self, per_token: Tensor) -> Tensor:
        """Rows of the tokens that are not ignored."""
        return per_token if self.rows is None else per_token[self.rows]

    def scatter(self, per_kept_token: Tensor) -> Tensor:
        """Rows of all tokens, 0 where ignored."""
        if self.rows is None:
            return per_kept_token
        result = per_kept_token.new_zeros((self.num_tokens, *per_kept_token.shape[1:]))
        return result.index_copy_(0, self.rows, per_kept_token)

    def embeddings(self, tokens: slice) -> Tensor:
        """Rows of e of a block of tokens, as a factor."""
        e = self.problem.e[tokens if self.rows is None else self.rows[tokens]]
        return self._operand(e)

    def classifier(self, classes: slice) -> Tensor:
        """Rows of c of a block of classes, as a factor."""
        return self._operand(self.problem.class_rows(classes))

    def gather_classes(self, ids: Tensor, out: Tensor) -> None:
        """Write rows of c of some classes, as a factor; ``out`` has its dtype."""
        c = self.problem.c
        if c.dtype == out.dtype:
            torch.index_select(c, 0, ids, out=out)
        else:
            out.copy_(self._operand(c.index_select(0, ids)))

    def _operand(self, tensor: Tensor) -> Tensor:
        if tensor.dtype == self._factor_type:  # no time of the host for conversions to the same
            return tensor
        tensor = tensor.to(self.problem.compute_dtype)  # the rounding that autocast asks for
        return tensor if self.half_products else tensor.to(self.wide)

    def logits(
        self, e_block: Tensor, tokens: slice, classes: slice, with_slope: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of a block, and the factor of their derivative by ``e @ c.T + bias``, if any."""
        logits = self.product(e_block, self.classifier(classes).T)
        if self.problem.bias is not None:
            logits += self.problem.bias[classes].to(self.wide)
        return self.transform(logits, tokens, with_slope)

    def transform(
        self, logits: Tensor, tokens: slice, with_slope: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply softcap and multiplier to a block of ``e @ c.T + bias``, in place; as logits."""
        softcap, slope = self.problem.softcap, None
        if softcap is not None:
            logits = logits.div_(softcap).tanh_()
            slope = 1 - logits.square() if with_slope else None
            logits = logits.mul_(softcap)
        if self.multiplier is not None:
            rows = self.multiplier[tokens, None]
            logits = logits.mul_(rows)
            if with_slope:
                slope = rows if slope is None else slope.mul_(rows)
        return logits, slope

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Product of two factors, in float32 (float64 for float64 inputs)."""
        if self.half_products:
            return torch.mm(left, right, out_dtype=self.wide)
        return left @ right

    def store_product(self, left: Tensor, right: Tensor, out: Tensor, alpha: float = 1.0) -> None:
        """Overwrite ``out`` with the product of two factors, times ``alpha``."""
        if self.half_products:
            _addmm_wide()(out, left, right, self.wide, beta=0, alpha=alpha, out=out)
        else:
            torch.addmm(out, left, right, beta=0, alpha=alpha, out=out)

    def add_product(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Add the product of two factors to ``out``."""
        if self.half_products:
            _addmm_wide()(out, left, right, self.wide, out=out)
        else:
            out.addmm_(left, right)

    def as_factor(self, grad: Tensor, scale: Tensor) -> Tensor:
        """A block of logit gradients as a factor of the products that follow."""
        return grad.mul_(scale).to(self.problem.compute_dtype) if self.half_products else grad

    def gradients(
        self,
        by_logits: Callable[[Tensor, slice, slice], Tensor],
        scale: Tensor,
        needed: Needed,
        dtype: torch.dtype | None = None,
    ) -> Gradients:
        """Compute the gradients of e, c and bias; an empty tensor for each not needed.

        Args:
            by_logits: takes logits, which it may overwrite, of a block of tokens and a block of
                classes, and returns the gradient by them.
            scale: scalar, power of two that brings these gradients near 1 where they are factors
                in half precision; 1 elsewhere.
            needed: the gradients to compute.
            dtype: of the gradients; None for those of the inputs.
        """
        e, c, bias = self.problem.e, self.problem.c, self.problem.bias
        shape = (self.num_kept if needed.e else 0, e.shape[1])
        grad_e_sum = e.new_zeros(shape, dtype=self.wide)
        # Contiguous whatever the layout of the input, as the operator's fake promises.
        grad_c, grad_bias = (e.new_empty(0, dtype=dtype) for _ in range(2))
        first = self.problem.frozen_columns
        if needed.c:
            grad_c = self.problem.empty_grad_c(dtype)
        if needed.bias and bias is not None:
            grad_bias = bias.new_empty(bias.shape, dtype=dtype)
        for classes in self.class_blocks():
            rows_of_c = classes.stop - classes.start
            shape = (rows_of_c if needed.c else 0, c.shape[1] - first)
            grad_c_sum = e.new_zeros(shape, dtype=self.wide)
            grad_bias_sum = e.new_zeros(rows_of_c, dtype=self.wide)
            for tokens in self.token_blocks():
                e_block = self.embeddings(tokens)
                logits, slope = self.logits(e_block, tokens, classes, with_slope=True)
                grad = by_logits(logits, tokens, classes)
                if slope is not None:
                    grad.mul_(slope)
                if needed.bias:
                    grad_bias_sum += grad.sum(0)
                if not (needed.e or needed.c):
                    continue
                factor = self.as_factor(grad, scale)
                if needed.e:
                    grad_e_sum[tokens] += self.product(factor, self.classifier(classes))
                if needed.c:
                    grad_c_sum += self.product(factor.T, e_block[:, first:])
            if needed.bias:
                grad_bias[classes] = grad_bias_sum
            if needed.c:
                self.problem.put_grad_c(grad_c, classes, grad_c_sum / scale)
        grad_e = e.new_empty(0, dtype=dtype)
        if needed.e:
            grad_e = self.scatter(grad_e_sum.div_(scale)).to(dtype or e.dtype)
        return Gradients(grad_e, grad_c, grad_bias)


def slices(length: int, block: int) -> Iterator[slice]:
    """Slices of at most ``block`` that cover ``length``."""
    for start in range(0, length, max(1, block)):
        yield slice(start, min(start + block, length))
