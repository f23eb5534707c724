"""Compatibility: names that Apple's releases keep here. They live in ``distributed``."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cut_cross_entropy.distributed.collectives import group_name, maximum_over_group, sum_over_group
from cut_cross_entropy.distributed.options import VocabParallelOptions, partition_n_into_range

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "VocabParallelOptions",
    "partition_n_into_range",
    "vp_reduce_correct_logit",
    "vp_reduce_e_grad",
    "vp_reduce_e_grad_hook",
    "vp_reduce_lse",
]


def vp_reduce_lse(vp_lse: Tensor, pg: "ProcessGroup | None") -> Tensor:
    """Log-sum-exp over all classes from that of the classes of each process, any shape."""
    largest = vp_lse.clone()
    maximum_over_group(largest, group_name(pg))
    total = (vp_lse - largest).exp()
    sum_over_group(total, group_name(pg))
    return largest + total.log()


def vp_reduce_correct_logit(
    vp_correct_logit: Tensor, pg: "ProcessGroup | None", dtype: torch.dtype | None = None
) -> Tensor:
    """Sum over the processes, of which one has the logit and the others 0; in ``dtype``."""
    total = vp_correct_logit.to(dtype=dtype or vp_correct_logit.dtype, copy=True)
    sum_over_group(total, group_name(pg))
    return total


def vp_reduce_e_grad(e_grad: Tensor, pg: "ProcessGroup | None") -> Tensor:
    """Sum over the processes in float32 or wider, returned in the dtype of ``e_grad``."""
    total = e_grad.to(dtype=torch.promote_types(e_grad.dtype, torch.float32), copy=True)
    sum_over_group(total, group_name(pg))
    return total.to(e_grad.dtype)


def vp_reduce_e_grad_hook(e: Tensor, vocab_parallel_options: VocabParallelOptions) -> Tensor:
    """``e`` (..., D), whose gradient is summed over the processes if the options say so."""
    if not (vocab_parallel_options.reduce_e_grad and e.requires_grad):
        return e
    linked = e.view_as(e)
    linked.register_hook(lambda grad: vp_reduce_e_grad(grad, vocab_parallel_options.group))
    return linked
