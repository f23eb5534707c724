"""Bounds the log-sum-exp of every token by the classes that are likely in its batch.

The energies of the strips are relative to a bound that is known before the pass over the
vocabulary, so a loose bound overstates them, and the filter keeps too much. What a token finds
likely, other tokens of the batch have as their targets: with these classes the bound is within 0.1
nats for half of the tokens of two real heads, where the first classes of the vocabulary leave 0.2
to 0.3 nats, and far more where ids do not follow the frequency (docs/engineering_log.md). Shape
legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import replace

import torch
from torch import Tensor

from cut_cross_entropy.kernels.block_sizes import tiles_on
from cut_cross_entropy.kernels.launch import launch
from cut_cross_entropy.kernels.lse import PassInputs, raise_bound, vocabulary_pass
from cut_cross_entropy.kernels.triton.likely_classes import list_likely_kernel
from cut_cross_entropy.outputs import Asked
from cut_cross_entropy.problem import Problem

SCAN = 2048  # tokens or classes per step of the list
SHARE = 32  # the list has one class of so many, within these limits:
FEWEST, MOST = 1024, 2048


def list_likely(targets: Tensor, num_classes: int, size: int) -> Tensor:
    """Return the ids of ``size`` different classes that are likely for some of the tokens.

    Args:
        targets: (N,) int64 rows of c, -1 for none.
        num_classes: V.
        size: at most V. Where there are fewer targets the first ids fill the list; where there are
            more, those that fewer tokens have are left out.

    Returns:
        (size,) int64.
    """
    counts = torch.zeros((2, num_classes), dtype=torch.int32, device=targets.device)
    classes = torch.empty(size, dtype=torch.int64, device=targets.device)
    launch(
        list_likely_kernel,
        (1,),
        targets_ptr=targets,
        counts_ptr=counts,
        classes_ptr=classes,
        N=targets.shape[0],
        V=num_classes,
        SIZE=size,
        BLOCK=SCAN,
        num_warps=8,
    )
    return classes


def list_size(problem: Problem) -> int:
    """Return how many classes to list, in whole tiles; their rows take an eighth of the budget."""
    num_classes, dim = problem.c.shape
    block_v = tiles_on(problem.e.device).block_v
    fitting = problem.memory_budget // 8 // (dim * problem.compute_dtype.itemsize)
    most = min(max(FEWEST, num_classes // SHARE), MOST, num_classes, fitting)
    return most // block_v * block_v


def bound_by_likely(inputs: PassInputs, problem: Problem, targets: Tensor, out: Tensor) -> None:
    """Write a lower bound of each token's log-sum-exp, log2; at least ``inputs.bound``.

    It depends on the targets of all tokens.

    Args:
        inputs: those of the passes over all classes.
        problem: the call.
        targets: (N,) int64 rows of c, -1 for none.
        out: (N,) float32.
    """
    out.copy_(inputs.bound)
    num_classes, size = inputs.c.shape[0], list_size(problem)
    if 0 < size < num_classes:
        classes = list_likely(targets, num_classes, size)
        # A token that is sure of a class of another shard may be flat over the classes of this one.
        some = replace(inputs, c=inputs.c[classes], bound=out)
        raise_by_classes(some, classes, set_apart=problem.group is None)


def raise_by_classes(inputs: PassInputs, classes: Tensor, *, set_apart: bool = True) -> None:
    """Raise ``inputs.bound`` to the log-sum-exp of some classes, in place.

    With ``set_apart``, that of a flat token becomes far higher than its log-sum-exp: all of its
    strips are computed apart, and its masses would hide those of the other tokens of its block from
    the tail.

    Args:
        inputs: ``c`` are the rows of these classes, bias and ``low_c`` those of all.
        classes: (size,) int64, all different; whole tiles of them.
        set_apart: whether these are classes of the whole vocabulary, not of a shard.
    """
    some = replace(
        inputs,
        bias=None if inputs.bias is None else inputs.bias[classes],
        low_c=None if inputs.low_c is None else inputs.low_c[classes],
    )
    asked = Asked(log_sum_sq=set_apart)
    segments = vocabulary_pass(some, len(classes), None, asked=asked, online=True)
    raise_bound(some.bound, segments, len(classes), set_apart=set_apart)
