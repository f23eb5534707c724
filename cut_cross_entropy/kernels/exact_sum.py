"""Sum of all losses with its exact gradients, in one pass over the logits.

Tokens are taken in chunks, of which powers of the logits are stored (``powers``) and multiplied
(``exact_products``): three products in all, where gradients that wait for the backward take four.

If the filter is for one gradient only, its product is left out: the pass leaves what the filter
needs of the strips as well, and the filtered stage follows.

Processes that hold the classes together agree on the size of a chunk, and exchange the sums of each
chunk before its powers are multiplied. Shape legend: ``cut_cross_entropy.kernels``.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cut_cross_entropy.budget import powers_per_chunk
from cut_cross_entropy.distributed.collectives import maximum_over_group
from cut_cross_entropy.filter_report import FilterRecord, recording, report
from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.exact import Wanted
from cut_cross_entropy.kernels.exact_products import Products
from cut_cross_entropy.kernels.filtered.backward import FLAT_SUPPORT, too_flat
from cut_cross_entropy.kernels.filtered.selection import find_threshold
from cut_cross_entropy.kernels.launch import (
    HostCopy,
    aligned_rows,
    cdiv,
    is_captured,
)
from cut_cross_entropy.kernels.lse import PassInputs
from cut_cross_entropy.kernels.powers import Chunk, StripSums, choose_segment_tiles, store_powers
from cut_cross_entropy.kernels.step import (
    backward,
    forward,
    gradients_of_tokens,
    in_compute_dtype,
    raise_bound_by_frequent,
)
from cut_cross_entropy.kernels.tokens import (
    BackwardTokens,
    Tokens,
    multiplied_logits,
    score_targets,
    write_scale,
)
from cut_cross_entropy.kernels.triton.primitives import ABSENT
from cut_cross_entropy.problem import (
    NO_FILTER,
    Filter,
    Gradients,
    KernelState,
    Needed,
    PerToken,
    Problem,
    SumGradients,
)
from cut_cross_entropy.validation import check_target_range


@dataclass(frozen=True)
class _Pass:
    """Values of the tokens that the filtered stage takes from the pass over the logits.

    Args:
        tokens: compacted, in order of content.
        sums: of the strips.
        weights, multiplier: (N,) in the order of the tokens; None for 1.
    """

    tokens: Tokens
    sums: StripSums
    weights: Tensor | None
    multiplier: Tensor | None

    def backward_tokens(self) -> BackwardTokens:
        """Return the tokens with the gradients of their losses, and a scale of 1."""
        sums, tokens = self.sums, self.tokens
        a = (sums.lse != torch.inf).float()
        for factor in (self.weights, self.multiplier):
            if factor is not None:
                a = a * factor
        a = torch.where(sums.lse.isnan(), torch.nan, a)
        return BackwardTokens(
            tokens.e,
            tokens.targets,
            tokens.origin,
            lse=sums.lse,
            a=a,
            b=a,
            target_grad=sums.target_grad,
            scale=a.new_ones(()),
            shard_mass=None,
            num_valid=None,
            multiplier=self.multiplier,
        )

    def shares(self, part: slice, filter_: Filter) -> HostCopy:
        """Return (3,) numbers of kept strips, flat and all tokens of a chunk, for the host."""
        tokens, strips = self.backward_tokens().at(part), self.sums.at(part).strips
        threshold = find_threshold(strips, tokens, filter_)
        return HostCopy(torch.cat([threshold.num_kept[None], threshold.statistics[-2:]]))


def loss_and_gradients(
    problem: Problem,
    needed: Needed,
    weights: Tensor | None = None,
    filter_: Filter = NO_FILTER,
) -> SumGradients:
    """Compute the sum of all losses, and its gradients in float32.

    The number of valid tokens is read from the device while it computes the first powers: these
    end early in blocks without a token, and products are computed of rows with one.

    Processes that hold the classes together agree on that number as well, and on the size of a
    chunk. Where one of them has too little memory for it, and while a CUDA graph is captured, they
    compute the logits again.

    Args:
        problem: :func:`powers_per_chunk` is not 0, unless it has a group; the gradient of e is then
            the part of this process's classes.
        needed: the gradients to compute.
        weights: (N,), factors of the losses; None for 1.
        filter_: for one of the gradients; off with a group. Both are exact where the filter has no
            tail (a multiplied softcap), and while a CUDA graph is captured, since the filter reads
            its counts.
    """
    if problem.group is not None and is_captured(problem.e):
        return _in_two_passes(problem, needed, weights)
    is_capped = problem.softcap is not None and problem.multiplier is not None
    if not filter_.is_on or is_capped or is_captured(problem.e):
        filter_ = NO_FILTER
    results, found = _one_pass(problem, needed, weights, filter_)
    if found is None:
        return results
    filtered = filter_.split(needed)[1]
    (num_classes, dim), make = problem.c.shape, results.loss.new_empty
    wanted = Wanted(
        filtered.e,
        make((num_classes, dim)) if filtered.c else None,
        make(num_classes) if filtered.bias else None,
        dtype_e=torch.float32,
    )
    nothing = make(0)
    state = KernelState(
        nothing,
        nothing,
        strips=found.sums.strips,
        origin=found.tokens.origin,
        support=found.sums.support,
        shard_mass=nothing,
    )
    tokens = found.backward_tokens()
    write_scale(tokens)
    grad_e = gradients_of_tokens(in_compute_dtype(problem), tokens, state, filter_, wanted)
    grads = (grad_e, wanted.c, wanted.bias)
    kept = (x if grad is None else grad for x, grad in zip(results[1:], grads, strict=True))
    return SumGradients(results.loss, *kept)


def _in_two_passes(problem: Problem, needed: Needed, weights: Tensor | None) -> SumGradients:
    """Do the same by computing the logits twice: four products, and less memory."""
    state = forward(problem, NO_FILTER, training=True)
    factors = torch.ones_like(state.nll) if weights is None else weights.float()
    upstream = PerToken(factors, torch.zeros_like(factors))
    grads = backward(upstream, state, problem, NO_FILTER, needed, dtype=torch.float32)
    return SumGradients((state.nll * factors).sum(), *grads)


def _one_pass(
    problem: Problem, needed: Needed, weights: Tensor | None, filter_: Filter
) -> tuple[SumGradients, _Pass | None]:
    """Compute the sum of all losses with its exact gradients, and what the filter of others needs.

    If the first chunk shows that the data are too flat for a filter, all gradients are exact.
    """
    num_tokens, num_classes, group = problem.e.shape[0], problem.c.shape[0], problem.group
    if group is None:
        check_target_range(problem.targets, num_classes, problem.ignore_index)
    exact, filtered = filter_.split(needed)
    grads = _allocate(problem, exact)
    if num_tokens == 0:
        grads.c.zero_()
        return SumGradients(grads.e.new_zeros(()), *grads), None

    most, given = powers_per_chunk(problem, needed), problem
    problem = in_compute_dtype(problem)
    with_strips = any(filtered.flat())
    tokens, logits, bound = score_targets(problem, compact=True, by_content=with_strips)
    numbers = _send_numbers(tokens, most, group)
    inputs, logits = _bounded_inputs(problem, tokens, logits, bound)
    count, rows = num_tokens, most
    if group is not None and numbers is not None:
        count, rows = (abs(int(x)) for x in numbers.wait())
        if rows == 0:
            return _in_two_passes(given, needed, weights), None
    end = _whole_blocks(count, num_tokens)
    rows = _chunk_size(end or num_tokens, rows)
    walk = _Walk.of(problem, tokens, inputs, logits, weights, with_strips=with_strips)
    products = Products.of(inputs, walk.weights, rows, needed, zeros=numbers is None)

    # Keeps the device busy until the host has read the count.
    first = walk.store_powers(slice(0, rows), products.powers)
    found = shares = None
    if walk.sums is not None:
        found = _Pass(tokens, walk.sums, walk.weights, inputs.multiplier)
        shares = None if problem.e.is_meta else found.shares(slice(0, rows), filter_)
    if group is None and numbers is not None:
        count = int(numbers.wait())
        end = _whole_blocks(count, num_tokens)
    has_any = end > 0 and num_classes > 0
    if has_any:
        products.add(first, min(rows, end), exact, grads, is_first=True)
    else:
        grads.c.zero_()
    path, flat_tokens = "exact", 0
    if shares is not None:
        num_strips, flat_tokens, num_tokens_there = (int(x) for x in shares.wait())
        if too_flat(num_strips, flat_tokens, num_tokens_there, problem.c.shape):
            others = _allocate(given, filtered)
            products.add(first, min(rows, end), filtered, others, is_first=True)
            kept = (x if x.numel() else y for x, y in zip(grads, others, strict=True))
            grads, exact = Gradients(*kept), needed
            walk, found, path = replace(walk, sums=None), None, "dense"
    if recording() and numbers is not None and found is None:
        report(FilterRecord(path, 1.0, 0.0, flat_tokens, count))
    step = _chunk_size(end - rows, rows) if end > rows else 1
    for start in range(rows, end, step):
        part = slice(start, min(start + step, end))
        chunk = walk.store_powers(part, products.powers)
        if has_any:
            products.add(chunk, part.stop - part.start, exact, grads)
    products.finish(tokens, walk.target, exact, grads)
    return SumGradients(walk.nll.sum(), *grads), found


def _allocate(problem: Problem, needed: Needed) -> Gradients:
    """Allocate float32 gradients, empty if not needed; that of c is to be overwritten."""
    e, c = problem.e, problem.c
    return Gradients(
        e.new_zeros(e.shape if needed.e else 0, dtype=torch.float32),
        e.new_empty(c.shape if needed.c else 0, dtype=torch.float32),
        e.new_zeros(c.shape[0] if needed.bias else 0, dtype=torch.float32),
    )


def _send_numbers(tokens: Tokens, most: int, group: str | None) -> HostCopy | None:
    """Send the number of valid tokens to the host, unless it cannot wait for it.

    With a group also ``-most``, the tokens of a chunk: both agreed on by all processes.
    """
    if tokens.e.is_meta or is_captured(tokens.e):
        return None
    num_valid = (tokens.origin < len(tokens.origin)).sum()
    if group is not None:
        num_valid = torch.stack([num_valid, torch.full_like(num_valid, -most)])
        maximum_over_group(num_valid, group)
    return HostCopy(num_valid)


def _bounded_inputs(
    problem: Problem, tokens: Tokens, logits: Tensor, bound: Tensor
) -> tuple[PassInputs, Tensor]:
    """Return the inputs of the passes with close bounds, and the logits of the targets."""
    flags = torch.zeros(cdiv(len(bound), BLOCK_T), dtype=torch.int32, device=bound.device)
    multiplier = None
    if problem.multiplier is not None:
        multiplier, logits, bound = multiplied_logits(tokens, problem.multiplier, logits, bound)
    inputs = PassInputs(
        tokens.e,
        problem.c,
        bias=problem.bias,
        softcap=problem.softcap,
        bound=bound,
        flags=flags,
        multiplier=multiplier,
    )
    raise_bound_by_frequent(inputs, problem)  # keeps the device busy while the host waits
    return inputs, logits


@dataclass(frozen=True)
class _Walk:
    """All tokens, and what the passes over the logits of their chunks leave.

    Args:
        problem: as :func:`in_compute_dtype` returns it.
        tokens: compacted, in order of content if there are strips.
        inputs: of the passes, of all tokens.
        logits, weights, nll, factor, target: (N,) see :class:`Chunk`.
        sums: of the strips; None if nothing is filtered.
    """

    problem: Problem
    tokens: Tokens
    inputs: PassInputs
    logits: Tensor
    weights: Tensor | None
    nll: Tensor
    factor: Tensor
    target: Tensor
    sums: StripSums | None

    @classmethod
    def of(
        cls,
        problem: Problem,
        tokens: Tokens,
        inputs: PassInputs,
        logits: Tensor,
        weights: Tensor | None,  # (N,) in the caller's order
        *,
        with_strips: bool,
    ) -> "_Walk":
        """Return the state before the first pass."""
        num_tokens, device = len(logits), logits.device
        if weights is not None:
            weights = tokens.gather(weights, 0.0)
        nll, factor, target = aligned_rows(3, num_tokens, torch.float32, device, zeros=True)
        sums = None
        if with_strips:
            # Blocks without a token are skipped, so their strips are never written.
            shape = (cdiv(num_tokens, BLOCK_T), problem.c.shape[0])
            strips = torch.zeros(shape, dtype=torch.int16, device=device)
            support, lse, target_grad = aligned_rows(
                3, num_tokens, torch.float32, device, zeros=True
            )
            lse.fill_(torch.inf)
            target_grad.fill_(ABSENT.value)
            sums = StripSums(strips, support, lse, target_grad, math.log2(FLAT_SUPPORT))
        return cls(problem, tokens, inputs, logits, weights, nll, factor, target, sums)

    def store_powers(self, part: slice, powers: Tensor) -> Chunk:
        """Store the powers of the tokens of a chunk in the first rows; return what is known."""
        tokens, inputs, num_rows = self.tokens, self.inputs, part.stop - part.start
        num_tiles = max(1, cdiv(self.problem.c.shape[0], inputs.tiles.block_v))
        multiplier = inputs.multiplier
        chunk = Chunk(
            Tokens(tokens.e[part], tokens.targets[part], tokens.origin[part]),
            replace(
                inputs,
                e=tokens.e[part],
                bound=inputs.bound[part],
                multiplier=None if multiplier is None else multiplier[part],
            ),
            logits=self.logits[part],
            weights=None if self.weights is None else self.weights[part],
            nll=self.nll[part],
            factor=self.factor[part],
            target=self.target[part],
            segment_tiles=choose_segment_tiles(cdiv(num_rows, BLOCK_T), num_tiles),
            of_strips=None if self.sums is None else self.sums.at(part),
            group=self.problem.group,
        )
        store_powers(chunk, powers[:num_rows])
        return chunk


def _whole_blocks(count: int, num_tokens: int) -> int:
    """Return how many tokens the blocks of the first ``count`` have."""
    return int(min(cdiv(count, BLOCK_T) * BLOCK_T, num_tokens))


def _chunk_size(num_tokens: int, most: int) -> int:
    """Return the rows of chunks of about equal size: whole blocks, or all tokens."""
    rows = cdiv(num_tokens, cdiv(num_tokens, most))
    return int(min(cdiv(rows, BLOCK_T) * BLOCK_T, num_tokens))
