"""Products of each token with a few classes of its own, and their gradients.

The rows of c are read where they lie, K for each token. The gradient of c reads the pairs of token
and class in order of class, so its sums have a fixed order and are rounded once.
"""

import torch
from torch import Tensor

from cut_cross_entropy.kernels.launch import cdiv, launch, next_power_of_2
from cut_cross_entropy.kernels.triton.class_logits import (
    class_grad_c_kernel,
    class_grad_e_kernel,
    class_products_kernel,
)

BLOCK_K = 16
ROWS = 8  # pairs that the gradient of c reads at a time


def class_products(e: Tensor, c: Tensor, ids: Tensor) -> Tensor:
    """Compute ``e[i] @ c[ids[i, k]]``, (N, K) float32; 0 where the id is negative.

    ``e`` (N, D) and ``c`` (V, D) are contiguous, of one dtype; ``ids`` (N, K) are int64.
    """
    num_tokens, count = ids.shape
    out = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    launch(
        class_products_kernel,
        (num_tokens, cdiv(count, BLOCK_K)),
        e_ptr=e,
        c_ptr=c,
        ids_ptr=ids.contiguous(),
        out_ptr=out,
        K=count,
        D=e.shape[1],
        BLOCK_K=BLOCK_K,
        BLOCK_D=min(256, next_power_of_2(e.shape[1])),
    )
    return out


def class_grad_e(c: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
    """Write the sums of ``weights[i, k] * c[ids[i, k]]`` to ``out`` (N, D), rounded once."""
    dim = c.shape[1]
    block_d = min(256, next_power_of_2(dim))
    launch(
        class_grad_e_kernel,
        (ids.shape[0], cdiv(dim, block_d)),
        c_ptr=c,
        ids_ptr=ids.contiguous(),
        weights_ptr=weights.contiguous(),
        grad_e_ptr=out,
        K=ids.shape[1],
        D=dim,
        BLOCK_K=BLOCK_K,
        BLOCK_D=block_d,
    )


def class_grad_c(
    e: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_classes: int,
    out: Tensor | None,
    bias_out: Tensor | None,
) -> None:
    """Write the sums of ``weights[i, k] * e[i]`` by class to ``out`` (V, D), rounded once.

    Those of the weights alone go to ``bias_out`` (V,) float32. Negative ids count for no class.
    """
    dim = e.shape[1]
    in_order, pairs = torch.sort(ids.flatten(), stable=True)
    bounds = torch.arange(num_classes + 1, device=ids.device)
    starts = torch.searchsorted(in_order, bounds)
    block_d = min(512, next_power_of_2(dim))
    launch(
        class_grad_c_kernel,
        (num_classes, 1 if out is None else cdiv(dim, block_d)),
        e_ptr=e,
        pairs_ptr=pairs,
        starts_ptr=starts,
        weights_ptr=weights.contiguous(),
        grad_c_ptr=out,
        grad_bias_ptr=bias_out,
        K=ids.shape[1],
        D=dim,
        NEED_C=out is not None,
        NEED_BIAS=bias_out is not None,
        ROWS=ROWS,
        BLOCK_D=block_d,
    )
