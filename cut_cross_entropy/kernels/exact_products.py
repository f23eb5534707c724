"""Products of stored powers with c and with the embeddings: gradients of a sum of losses.

Powers of logits (``powers``) differ from the probabilities by one factor per token, which goes into
the rows of dE and of e; the products with c and e are the vendor library's.

What a target adds is left out of these products and added in float32 afterwards: it is the largest
gradient of most tokens, and the only one that is a difference (p - 1, computed as the sum of all
other probabilities). Shape legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cut_cross_entropy.implementations.token_chunks import ALIGNED, class_slices
from cut_cross_entropy.kernels.exact import add_product, store_product
from cut_cross_entropy.kernels.launch import cdiv, launch, next_power_of_2, pointers
from cut_cross_entropy.kernels.lse import PassInputs
from cut_cross_entropy.kernels.powers import Chunk
from cut_cross_entropy.kernels.tokens import Tokens
from cut_cross_entropy.kernels.triton.exact_products import (
    add_targets_kernel,
    scale_rows_kernel,
    sum_windows_kernel,
)
from cut_cross_entropy.problem import Gradients, Needed, gradient_scale

RUN = 4  # tokens of one target that are added together: most targets have few
WINDOW, RUN_OF_WINDOW = 64, 16  # tokens whose sums are added together, and of these at a time


@dataclass(frozen=True)
class Products:
    """Products of the powers of a chunk, and the memory that chunks share.

    Args:
        powers: (tokens of a chunk, V).
        product: (tokens of a chunk, D) float32, memory for that with c.
        scaled: (tokens of a chunk, D) memory for the embeddings times the factors of their tokens.
        unit: of these factors in float16; None for 1.
    """

    powers: Tensor
    product: Tensor
    scaled: Tensor
    unit: "_Units | None"

    @classmethod
    def of(
        cls,
        inputs: PassInputs,  # of all tokens
        weights: Tensor | None,  # (N,) in their order
        rows: int,
        needed: Needed,
        *,
        zeros: bool,
    ) -> "Products":
        """Allocate memory for chunks of ``rows`` tokens; with ``zeros`` all may be multiplied."""
        c, unit = inputs.c, None
        num_classes, dim = c.shape
        if c.dtype == torch.float16:
            unit = _units(inputs.e, weights, inputs.multiplier)
        stride = cdiv(num_classes, ALIGNED) * ALIGNED  # rows stay aligned
        powers = c.new_empty((rows, stride))[:, :num_classes]
        if zeros:  # of rows without a token too
            powers.zero_()
        product = powers.new_empty((rows, dim) if needed.e else 0, dtype=torch.float32)
        scaled = powers.new_empty((rows, dim) if needed.c else 0)
        return cls(powers, product, scaled, unit)

    def add(
        self,
        chunk: Chunk,
        num_rows: int,
        needed: Needed,
        grads: Gradients,
        *,
        is_first: bool = False,
    ) -> None:
        """Add the gradients of the first tokens of a chunk, but for what targets add to dC."""
        unit, c = self.unit, chunk.inputs.c
        powers = self.powers[:num_rows]
        if needed.e:
            _multiply(powers, c, self.product[:num_rows])
        if needed.e or needed.c:
            _scale_rows(
                chunk,
                needed,
                num_rows,
                c=c,
                unit=None if unit is None else unit.e,
                product=self.product,
                grad_e=grads.e,
                scaled=self.scaled,
            )
        if needed.c:
            add = store_product if is_first else add_product
            for classes in class_slices(len(c), max(c.shape[1], len(self.powers))):
                add(grads.c[classes], powers[:, classes].T, self.scaled[:num_rows])
        if needed.bias:
            grads.bias.add_(
                _weighted_sum(powers, chunk.factor[:num_rows], None if unit is None else unit.bias)
            )

    def finish(self, tokens: Tokens, target: Tensor, needed: Needed, grads: Gradients) -> None:
        """Turn the sums of all chunks into the gradients of c and bias.

        ``target`` (N,) is what :class:`Chunk` calls so, of all tokens.
        """
        if needed.c and self.unit is not None:
            grads.c.div_(self.unit.e)
        if needed.c or needed.bias:
            _add_targets(tokens, target, grads, needed)


def _multiply(powers: Tensor, c: Tensor, out: Tensor) -> None:
    """Store the product of powers (N, V) and c (V, D) in float32."""
    for classes in class_slices(c.shape[0], max(c.shape[1], powers.shape[0])):
        multiply = add_product if classes.start else store_product
        multiply(out, powers[:, classes], c[classes])


def _scale_rows(
    chunk: Chunk,
    needed: Needed,
    num_rows: int,
    *,
    c: Tensor,  # (V, D)
    unit: Tensor | None,  # () of the rows of e; None for 1
    product: Tensor,  # (N, D) of the powers of the chunk with c
    grad_e: Tensor,  # (all tokens, D) out
    scaled: Tensor,  # (N, D) out
) -> None:
    """Write rows of dE, and of e times the factors, of the first tokens of a chunk."""
    dim = chunk.tokens.e.shape[1]
    launch(
        scale_rows_kernel,
        (num_rows,),
        product_ptr=product,
        c_ptr=c,
        unit_ptr=unit,
        **pointers(chunk, "factor target"),
        **pointers(chunk.tokens, "e targets origin"),
        out_ptr=grad_e,
        scaled_ptr=scaled,
        num_tokens=len(grad_e) if needed.e else 0,
        D=dim,
        NEED_E=needed.e,
        NEED_C=needed.c,
        HAS_UNIT=unit is not None,
        BLOCK_D=min(1024, next_power_of_2(dim)),
    )


class _Units(NamedTuple):
    """Powers of two () by which factors in float16 are multiplied, so that few are subnormal.

    Args:
        e: of the embeddings times the factors of their tokens.
        bias: of these factors alone.
    """

    e: Tensor
    bias: Tensor


def _units(e: Tensor, weights: Tensor | None, multiplier: Tensor | None) -> _Units:
    """Return units with which no factor exceeds 2^14; without them a factor is at most 1.

    But for weights and multiplier, which are part of it.
    """
    largest = torch.linalg.vector_norm(e, torch.inf).float()
    unit = torch.full_like(largest, 2.0**12)
    for values in (weights, multiplier):
        if values is not None:
            unit = unit * gradient_scale(values, values)
    return _Units(e=unit * gradient_scale(largest, largest), bias=unit)


def _weighted_sum(powers: Tensor, factor: Tensor, unit: Tensor | None) -> Tensor:
    """Sum powers (N, V) times factor (N,) over the tokens, in float32.

    The terms of the factor are multiplied by ``unit`` () before they are rounded.
    """
    parts, rest = [], factor if unit is None else factor * unit
    if powers.dtype == torch.float32:
        parts.append(rest)
    else:  # three terms of at least 8 bits each; eight columns are aligned
        for _ in range(3):
            parts.append(rest.to(powers.dtype))
            rest = rest - parts[-1].float()
        parts.extend([torch.zeros_like(parts[0])] * 5)
    columns = torch.stack(parts, 1)
    sums = factor.new_empty((powers.shape[1], columns.shape[1]))
    store_product(sums, powers.T, columns)
    return sums.sum(1) if unit is None else sums.sum(1).div_(unit)


def _add_targets(tokens: Tokens, target: Tensor, grads: Gradients, needed: Needed) -> None:
    """Add what the targets contribute to dC and to the gradient of the bias.

    One target may be that of half of the tokens, so windows of the sorted tokens are summed first.
    """
    num_tokens, dim = tokens.e.shape
    ordered, order = torch.sort(tokens.targets, stable=True)
    num_windows = cdiv(num_tokens, WINDOW)
    parts = target.new_empty((num_windows, dim) if needed.c else 0)
    weights = target.new_empty(num_windows)
    sums = {
        "sorted_ptr": ordered,
        "order_ptr": order,
        "e_ptr": tokens.e,
        "target_ptr": target,
        "parts_ptr": parts,
        "weights_ptr": weights,
        "N": num_tokens,
        "D": dim,
        "NEED_C": needed.c,
        "WINDOW": WINDOW,
    }
    most = next_power_of_2(dim)
    if num_windows > 1:
        block_d = min(256, most)
        launch(
            sum_windows_kernel,
            (num_windows - 1, cdiv(dim, block_d) if needed.c else 1),
            RUN=RUN_OF_WINDOW,
            BLOCK_D=block_d,
            **sums,
        )
    block_d = min(1024, most)
    launch(
        add_targets_kernel,
        (num_tokens, cdiv(dim, block_d) if needed.c else 1),
        **pointers(grads, "c bias", "grad_{}_ptr"),
        NEED_BIAS=needed.bias,
        RUN=RUN,
        BLOCK_D=block_d,
        **sums,
    )
