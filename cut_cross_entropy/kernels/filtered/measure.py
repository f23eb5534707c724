"""Measures the error of a filtered backward on a sample of tokens and classes.

A row of dE or dC costs little to compute exactly, so a few rows tell the error of all, provided
that the rows that carry the error are among them. They are drawn with a probability in proportion
to their risk, and their squared errors are divided by it: the estimate of the squared error is
unbiased, whatever the risk. Used only while ``record_filter`` is active. Shape legend:
``cut_cross_entropy.kernels``.
"""

from dataclasses import replace

import torch
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T, SUPERBLOCK
from cut_cross_entropy.kernels.block_sizes import tiles_on
from cut_cross_entropy.kernels.exact import MAX_TOKENS, add_product, chunk_gradients
from cut_cross_entropy.kernels.filtered.selection import Kept
from cut_cross_entropy.kernels.tokens import BackwardTokens
from cut_cross_entropy.kernels.triton.primitives import BYTE_STEPS
from cut_cross_entropy.problem import Problem

ROUNDING = 0.00166  # relative error of rounding a gradient to bfloat16
TOKENS = 128  # sampled rows of dE: a block of the kernel
CLASSES = 256  # sampled rows of dC, by risk and as many evenly spaced
PERCENTILES = (1, 10, 50)  # of the cosines of rows of dC
CHUNK_BYTES = 16 * 2**20  # of logit gradients in float32 at a time
LOW = 2.0**11  # scale of the rounding errors of logit gradients, which float16 would flush to 0
SHARE_STEPS = 2**40
BLOCKS_AT_ONCE = 8


def measure(
    problem: Problem,
    tokens: BackwardTokens,
    kept: Kept,
    grad_e: Tensor | None,  # (N, D) in the caller's order
    grad_c: Tensor | None,  # (V, D)
    mass: Tensor,  # (N,) dropped probability of each token
) -> Tensor:
    """Estimate the errors of gradients, as they are returned; nothing here waits for the device.

    With a group all of it is about the classes of this shard.

    Returns:
        (5,) float64: errors of dE and dC in multiples of the rounding error of bfloat16; and
        percentiles 1, 10 and 50 of the cosines between rows of dC and the exact ones, over evenly
        spaced classes. NaN for a gradient that is None.
    """
    results = tokens.a.new_full((2 + len(PERCENTILES),), torch.nan, dtype=torch.float64)
    if grad_e is not None:
        results[0] = _error_of_e(problem, tokens, grad_e, mass)
    if grad_c is not None:
        results[1] = _error_of_c(problem, tokens, kept, grad_c)
        results[2:] = _cosines(problem, tokens, grad_c)
    return results


def sample_by_risk(risk: Tensor, count: int, offset: float = 0.5) -> tuple[Tensor, Tensor]:
    """Draw a systematic sample with probabilities in proportion to the risk.

    Args:
        risk: (n,), not negative.
        count: number of draws; a row may be drawn more than once.
        offset: position of the draws in their intervals, in [0, 1).

    Returns:
        The drawn rows (count,) in ascending order, and the factors (count,) by which their values
        are to be multiplied for the sum over all rows: unbiased over the offset.
    """
    # Sums of integers do not depend on their order.
    steps = (_shares(risk) * SHARE_STEPS).long()
    ends = steps.cumsum(0)
    places = (torch.arange(count, device=risk.device, dtype=torch.float64) + offset) / count
    rows = torch.searchsorted(ends, (places * ends[-1]).long(), right=True)
    rows = rows.clamp_max(risk.shape[0] - 1)
    chosen = steps[rows].double()
    return rows, torch.where(chosen > 0, ends[-1] / (count * chosen), 0.0)


def _shares(values: Tensor) -> Tensor:
    """Divide by the sum, in float64; 0 for all if that is 0 or not finite."""
    values = values.double()
    return (values / values.sum()).nan_to_num(0.0, 0.0, 0.0)


def _error_of_e(problem: Problem, tokens: BackwardTokens, grad_e: Tensor, mass: Tensor) -> Tensor:
    """Return the error of dE in multiples of the rounding error."""
    energy = tokens.gather(_norms(grad_e), 0.0).double().square()
    weight = _weight(tokens)
    # The first carries the error of rounding, the second that of the tail. With the third no token
    # that has a gradient is left out, should the first two be wrong.
    risk = _shares(energy) + _shares(weight * mass) + 0.2 * _shares(weight)
    rows, factors = sample_by_risk(risk, TOKENS)
    origin = tokens.origin[rows]
    got = grad_e[origin.clamp_max(grad_e.shape[0] - 1)].double()
    got = torch.where((origin < grad_e.shape[0])[:, None], got, 0.0)
    exact = _exact_rows_of_e(problem, tokens.at(rows))
    return _relative(got, exact, factors, energy.sum())


def _error_of_c(problem: Problem, tokens: BackwardTokens, kept: Kept, grad_c: Tensor) -> Tensor:
    """Return the error of dC in multiples of the rounding error."""
    energy = _norms(grad_c).double().square()
    dropped = _dropped_energy(kept, _weight(tokens))
    # Likewise. The dropped energy is too high where weights vary inside a block: its root, which is
    # more even, halves the scatter there.
    risk = 0.5 * _shares(energy) + _shares(dropped) + _shares(dropped.sqrt())
    risk += 0.2 * _shares(torch.ones_like(energy))
    classes, factors = sample_by_risk(risk, CLASSES)
    exact = _exact_rows_of_c(problem, tokens, classes)
    return _relative(grad_c[classes].double(), exact, factors, energy.sum())


def _cosines(problem: Problem, tokens: BackwardTokens, grad_c: Tensor) -> Tensor:
    """Return the percentiles of the cosines of rows of dC."""
    num_classes = grad_c.shape[0]
    places = torch.arange(CLASSES, device=grad_c.device)
    classes = (2 * places + 1) * num_classes // (2 * CLASSES)
    got, exact = grad_c[classes].double(), _exact_rows_of_c(problem, tokens, classes)
    sizes = got.norm(dim=1) * exact.norm(dim=1)
    both_zero = (got == 0).all(1) & (exact == 0).all(1)
    # Not a clamp of the sizes: those of rare classes are small.
    cosines = (got * exact).sum(1) / torch.where(sizes == 0, 1.0, sizes)
    cosines = torch.where(both_zero, 1.0, cosines).sort().values
    # Not an index of three numbers, for whose copy to the device the host would wait.
    return torch.stack([cosines[CLASSES * percentile // 100] for percentile in PERCENTILES])


def _weight(tokens: BackwardTokens) -> Tensor:
    """Return the upstream gradient of each token, (N,); 0 only if its gradient is."""
    weight = tokens.a.abs() + tokens.b.abs()
    return weight if tokens.eta is None else weight + tokens.eta.abs()


def _dropped_energy(kept: Kept, weight: Tensor) -> Tensor:
    """Return the energy of each class in the blocks that dropped it, (V,) up to a factor."""
    num_blocks, num_classes = kept.strips.shape
    padded = torch.nn.functional.pad(weight, (0, num_blocks * BLOCK_T - weight.shape[0]))
    of_block = padded.view(num_blocks, BLOCK_T).amax(1)
    of_block = (of_block / of_block.max()).nan_to_num(1.0).square()
    total = weight.new_zeros(num_classes)
    for first in range(0, num_blocks, BLOCKS_AT_ONCE):
        blocks = torch.arange(first, min(num_blocks, first + BLOCKS_AT_ONCE), device=total.device)
        masks = kept.masks[blocks // SUPERBLOCK] >> (blocks % SUPERBLOCK)[:, None]
        energy = kept.strips[blocks] & 255
        is_dropped = (masks & 1 == 0) & (energy > 0)
        value = torch.exp2(energy.float() / BYTE_STEPS.value)
        total += of_block[blocks] @ torch.where(is_dropped, value / 2**40, 0.0)
    return total


def _norms(grad: Tensor) -> Tensor:
    """Return the norms of the rows, float32."""
    norms: Tensor = torch.linalg.vector_norm(grad, dim=1, dtype=torch.float32)
    return norms


def _relative(got: Tensor, exact: Tensor, factors: Tensor, energy: Tensor) -> Tensor:
    """Estimate the relative error from sampled rows, in multiples of the rounding error.

    ``energy`` is the sum of squares of the whole gradient as it was computed; the sample corrects
    it to that of the exact gradient.
    """
    squares = (got - exact).square().sum(1)
    correction = exact.square().sum(1) - got.square().sum(1)
    whole = energy + (factors * correction).sum()
    sampled = (factors * exact.square().sum(1)).sum()
    whole = torch.where(whole <= 0.5 * sampled, sampled, whole)  # far off: no small correction
    error = (factors * squares).sum()
    return torch.where(error == 0, 0.0, error / whole).sqrt() / ROUNDING


def _exact_rows_of_e(problem: Problem, tokens: BackwardTokens) -> Tensor:
    """Return the rows of dE of a few tokens from all classes, float64."""
    num_tokens, c = tokens.e.shape[0], problem.c
    step = _whole_tiles(problem, num_tokens)
    total = _Total(num_tokens, tokens.e)
    buffer = tokens.a.new_empty((num_tokens, step))
    for first in range(0, c.shape[0], step):
        stop = min(c.shape[0], first + step)
        grads = buffer[:, : stop - first]
        chunk_gradients(problem, tokens, (first, stop), grads)
        total.add(grads, c[first:stop])
    return total.result(tokens.scale)


def _exact_rows_of_c(problem: Problem, tokens: BackwardTokens, classes: Tensor) -> Tensor:
    """Return the rows of dC of a few classes from all tokens, float64.

    ``classes`` is in ascending order, and may repeat a class.
    """
    first = torch.searchsorted(classes, classes)  # where a class is repeated, the first counts
    place = torch.searchsorted(classes, tokens.targets).clamp_max(classes.shape[0] - 1)
    targets = torch.where(classes[place] == tokens.targets, place, -1)
    bias = None if problem.bias is None else problem.bias[classes]
    sample = replace(problem, c=problem.c[classes], bias=bias)
    tokens = replace(tokens, targets=targets)
    num_tokens, num_classes = tokens.e.shape[0], classes.shape[0]
    step = min(MAX_TOKENS, CHUNK_BYTES // (4 * num_classes))
    total = _Total(num_classes, tokens.e)
    for start in range(0, num_tokens, step):
        some = tokens.at(slice(start, min(num_tokens, start + step)))
        grads = some.a.new_empty((some.e.shape[0], num_classes))
        chunk_gradients(sample, some, (0, num_classes), grads)
        total.add(grads.T, some.e)
    return total.result(tokens.scale)[first]


def _whole_tiles(problem: Problem, num_tokens: int) -> int:
    """Return for how many classes to store logit gradients at a time."""
    num_bytes, block_v = min(CHUNK_BYTES, problem.memory_budget), tiles_on(problem.c.device).block_v
    most = max(1, num_bytes // (4 * num_tokens * block_v)) * block_v
    return min(most, -(-problem.c.shape[0] // block_v) * block_v)


class _Total:
    """Sum of products of logit gradients in float32 with rows of the compute dtype.

    Half precision gradients are split into two factors, so that nothing of them is lost.
    """

    def __init__(self, rows: int, like: Tensor) -> None:
        self._sums = like.new_zeros((2, rows, like.shape[1]), dtype=torch.float32)

    def add(self, grads: Tensor, right: Tensor) -> None:
        """Add ``grads @ right``."""
        if right.dtype == torch.float32:
            add_product(self._sums[0], grads, right)
            return
        high = grads.to(right.dtype)
        low = ((grads - high) * LOW).to(right.dtype)
        add_product(self._sums.flatten(0, 1), torch.cat([high, low]), right)

    def result(self, scale: Tensor) -> Tensor:
        """Return the sum divided by the scale of the logit gradients, float64."""
        high, low = self._sums.double().unbind()
        return (high + low / LOW) / scale.double()
