"""Weights of the tokens in the rows of dC of rare classes.

Tokens that leave much of their probability to frequent classes, which the tail is mostly made of,
are not those that leave much to rare ones. The weights of these are the gradients at the dropped
strips of some evenly spaced classes, divided by the masses of these strips, which is what the rows
multiply them by: the masses in the bytes are overstated, more in one block than in another, and so
are the divisors. Shape legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T, SUPERBLOCK
from cut_cross_entropy.kernels.exact import MAX_TOKENS, chunk_gradients
from cut_cross_entropy.kernels.filtered.selection import Kept, sampled_classes
from cut_cross_entropy.kernels.launch import cdiv, launch, pointers
from cut_cross_entropy.kernels.tokens import BackwardTokens
from cut_cross_entropy.kernels.triton.filtered.class_weights import class_weights_kernel
from cut_cross_entropy.kernels.triton.filtered.selection import GROUPS
from cut_cross_entropy.problem import AdaptedProblem, MadeProblem, Problem

RARE = GROUPS.value - 1  # groups; the last is that of frequent classes
MIN_WORK = 4e11  # multiplications in a matmul below which the launches cost more than they mend


def has_class_weights(problem: Problem) -> bool:
    """Whether rare classes have weights of their own."""
    work = problem.e.shape[0] * problem.e.shape[1] * problem.c.shape[0]
    return work >= MIN_WORK and not isinstance(problem, MadeProblem)


@dataclass(frozen=True)
class ClassWeights:
    """What samples of all groups of classes but the last show of the weights of the tokens.

    Args:
        weights: (GROUPS - 1, N) float32 sums of the gradients at dropped strips of sampled classes.
        masses: (GROUPS, blocks) float32 sums of their masses; blocks are padded to whole
            superblocks. Where they are 0, as of the last group, the weights are those of the tail.
    """

    weights: Tensor
    masses: Tensor

    @classmethod
    def of(cls, problem: Problem, tokens: BackwardTokens, kept: Kept) -> "ClassWeights":
        """Compute the gradients of a sample of the classes; nothing here waits for the device."""
        (num_tokens, _), num_classes = tokens.e.shape, problem.c.shape[0]
        classes = sampled_classes(num_classes)
        sample = _of_classes(problem, classes)
        num_samples, dtype = sample.c.shape[0], tokens.e.dtype
        padded = kept.num_superblocks * SUPERBLOCK
        weights = tokens.a.new_empty((RARE, num_tokens))
        masses = tokens.a.new_zeros((GROUPS.value, padded))
        # Without targets, whose strips are kept.
        tokens = replace(tokens, targets=torch.full_like(tokens.targets, -1))
        # Small probabilities would be 0 in float16.
        shape = (min(num_tokens, MAX_TOKENS), cdiv(num_samples, 16) * 16)
        buffer = tokens.e.new_empty(
            shape, dtype=dtype if dtype == torch.bfloat16 else torch.float32
        )
        for start in range(0, num_tokens, MAX_TOKENS):
            some = tokens.at(slice(start, min(num_tokens, start + MAX_TOKENS)))
            grads = buffer[: some.e.shape[0], :num_samples]
            chunk_gradients(sample, some, (0, num_samples), grads)
            launch(
                class_weights_kernel,
                (cdiv(some.e.shape[0], BLOCK_T), RARE),
                grads_ptr=grads,
                **pointers(tokens, "scale target_grad"),
                **pointers(kept, "strips masks class_mass mean_mass mass_deviation"),
                weights_ptr=weights,
                own_mass_ptr=masses,
                first_block=start // BLOCK_T,
                num_blocks=padded,
                num_samples=num_samples,
                first=classes.start,
                step=classes.step,
                N=num_tokens,
                V=num_classes,
                stride=grads.stride(0),
                SUPERBLOCK=SUPERBLOCK,
                BLOCK_T=BLOCK_T,
                BLOCK=64,
            )
        return cls(weights, masses)


def _of_classes(problem: Problem, classes: slice) -> Problem:
    """Return the problem of some classes, without values of its targets."""
    bias = None if problem.bias is None else problem.bias[classes].contiguous()
    c = problem.c[classes].contiguous()
    if isinstance(problem, AdaptedProblem):
        low_c = problem.low_c[classes].contiguous()
        return replace(problem, c=c, bias=bias, low_c=low_c)
    return replace(problem, c=c, bias=bias)
