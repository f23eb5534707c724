"""Sum of all losses with its exact gradients, in one pass over the logits.

Tokens are taken in chunks, of which powers of the logits are stored (``powers``). These differ
from the probabilities by one factor per token, which goes into the rows of dE and of e; the
products with c and e are the vendor library's. They are three in all, where gradients that wait for
the backward take four.

What a target adds is left out of these products and added in float32 afterwards: it is the largest
gradient of most tokens, and the only one that is a difference (p - 1, computed as the sum of all
other probabilities).

If the filter is for one gradient only, its product is left out: the pass leaves what the filter
needs of the strips as well, and the filtered stage follows.

Processes that hold the classes together agree on the size of a chunk, and exchange the sums of each
chunk before its powers are multiplied. Shape legend: ``cut_cross_entropy.kernels``.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cut_cross_entropy.budget import powers_per_chunk
from cut_cross_entropy.distributed.collectives import maximum_over_group
from cut_cross_entropy.filter_report import FilterRecord, recording, report
from cut_cross_entropy.implementations.token_chunks import ALIGNED, class_slices
from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.block_sizes import tiles_on
from cut_cross_entropy.kernels.exact import Wanted, add_product, store_product
from cut_cross_entropy.kernels.filtered.backward import FLAT_SUPPORT, too_flat
from cut_cross_entropy.kernels.filtered.selection import find_threshold
from cut_cross_entropy.kernels.launch import (
    HostCopy,
    aligned_rows,
    cdiv,
    is_captured,
    launch,
    next_power_of_2,
    pointers,
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
)
from cut_cross_entropy.kernels.triton.exact_sum import add_targets_kernel, scale_rows_kernel
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
    gradient_scale,
)
from cut_cross_entropy.validation import check_target_range

RUN = 4  # tokens of one target that are added together


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
        """Return the tokens with the gradients of their losses."""
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
            scale=gradient_scale(a, a) if tokens.e.dtype == torch.float16 else a.new_ones(()),
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
    grad_e = gradients_of_tokens(
        in_compute_dtype(problem), found.backward_tokens(), state, filter_, wanted
    )
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
    e, (num_tokens, dim), num_classes = problem.e, problem.e.shape, problem.c.shape[0]
    group = problem.group
    if group is None:
        check_target_range(problem.targets, num_classes, problem.ignore_index)
    make = e.new_empty
    exact, filtered = filter_.split(needed)
    with_strips = any(filtered.flat()) and num_tokens > 0

    def allocate(needed: Needed) -> Gradients:
        shape_e, shape_c = (num_tokens, dim), (num_classes, dim)
        return Gradients(
            e.new_zeros(shape_e if needed.e else 0, dtype=torch.float32),
            make(shape_c if needed.c else 0, dtype=torch.float32),
            e.new_zeros(num_classes if needed.bias else 0, dtype=torch.float32),
        )

    grads = allocate(exact)
    if num_tokens == 0:
        grads.c.zero_()
        return SumGradients(grads.e.new_zeros(()), *grads), None

    most, given = powers_per_chunk(problem, needed), problem
    problem = in_compute_dtype(problem)
    tokens, logits, bound = score_targets(problem, compact=True, by_content=with_strips)
    numbers = None
    if not (e.is_meta or is_captured(e)):
        num_valid = (tokens.origin < num_tokens).sum()
        if group is not None:
            num_valid = torch.stack([num_valid, torch.full_like(num_valid, -most)])
            maximum_over_group(num_valid, group)
        numbers = HostCopy(num_valid)
    num_blocks = -(-num_tokens // BLOCK_T)
    flags = torch.zeros(num_blocks, dtype=torch.int32, device=e.device)
    shared = (problem.c, problem.bias, problem.softcap)
    multiplier = None
    if problem.multiplier is not None:
        multiplier, logits, bound = multiplied_logits(tokens, problem.multiplier, logits, bound)
    inputs = PassInputs(tokens.e, *shared, bound, flags, multiplier)
    raise_bound_by_frequent(inputs, problem)  # keeps the device busy while the host waits
    count, rows = num_tokens, 0
    if group is not None and numbers is not None:
        count, rows = (abs(int(x)) for x in numbers.wait())
        if rows == 0:
            return _in_two_passes(given, needed, weights), None
    end = min(cdiv(count, BLOCK_T) * BLOCK_T, num_tokens)
    rows = _chunk_size(end or num_tokens, rows or most)
    if weights is not None:
        weights = tokens.gather(weights, 0.0)
    unit = None if problem.c.dtype != torch.float16 else _units(tokens, weights, multiplier)
    nll, factor, target = aligned_rows(3, num_tokens, torch.float32, e.device, zeros=True)

    sums = None
    if with_strips:
        # Blocks without a token are skipped, so their strips are never written.
        strips = torch.zeros((num_blocks, num_classes), dtype=torch.int16, device=e.device)
        support, lse, target_grad = aligned_rows(3, num_tokens, torch.float32, e.device, zeros=True)
        lse.fill_(torch.inf)
        target_grad.fill_(ABSENT.value)
        sums = StripSums(strips, support, lse, target_grad, math.log2(FLAT_SUPPORT))

    num_tiles = max(1, cdiv(num_classes, tiles_on(e.device).block_v))
    stride = -(-num_classes // ALIGNED) * ALIGNED  # rows stay aligned
    buffer = make((rows, stride), dtype=problem.c.dtype)
    if numbers is None:  # all rows are multiplied, those without a token by 0
        buffer.zero_()
    product = make((rows, dim) if needed.e else 0, dtype=torch.float32)
    scaled = make((rows, dim) if needed.c else 0, dtype=problem.c.dtype)

    def store(part: slice) -> Chunk:
        some = Tokens(tokens.e[part], tokens.targets[part], tokens.origin[part])
        inputs = PassInputs(
            some.e,
            *shared,
            bound=bound[part],
            flags=flags,
            multiplier=None if multiplier is None else multiplier[part],
        )
        num_rows = part.stop - part.start
        chunk = Chunk(
            some,
            inputs,
            logits=logits[part],
            weights=None if weights is None else weights[part],
            nll=nll[part],
            factor=factor[part],
            target=target[part],
            segment_tiles=choose_segment_tiles(cdiv(num_rows, BLOCK_T), num_tiles),
            of_strips=None if sums is None else sums.at(part),
            group=group,
        )
        store_powers(chunk, buffer[:num_rows, :num_classes])
        return chunk

    def multiply(
        chunk: Chunk, num_rows: int, is_first: bool, needed: Needed, grads: Gradients
    ) -> None:
        powers = buffer[:num_rows, :num_classes]
        if needed.e:
            _multiply(powers, problem.c, product[:num_rows])
        if needed.e or needed.c:
            _scale_rows(
                chunk,
                needed,
                num_rows,
                c=problem.c,
                unit=None if unit is None else unit.e,
                product=product,
                grad_e=grads.e,
                scaled=scaled,
            )
        if needed.c:
            add = store_product if is_first else add_product
            for classes in class_slices(num_classes, max(dim, rows)):
                add(grads.c[classes], powers[:, classes].T, scaled[:num_rows])
        if needed.bias:
            grads.bias.add_(
                _weighted_sum(powers, chunk.factor[:num_rows], None if unit is None else unit.bias)
            )

    first = store(slice(0, rows))  # keeps the device busy until the host has read the count
    found = shares = None
    if sums is not None:
        found = _Pass(tokens, sums, weights, multiplier)
        shares = None if e.is_meta else found.shares(slice(0, rows), filter_)
    if group is None and numbers is not None:
        count = int(numbers.wait())
        end = min(cdiv(count, BLOCK_T) * BLOCK_T, num_tokens)
    if end > 0 and num_classes > 0:
        multiply(first, min(rows, end), True, exact, grads)
    else:
        grads.c.zero_()
    path, flat_tokens = "exact", 0
    if shares is not None:
        num_strips, flat_tokens, num_tokens_there = (int(x) for x in shares.wait())
        if too_flat(num_strips, flat_tokens, num_tokens_there, problem.c.shape):
            others = allocate(filtered)
            multiply(first, min(rows, end), True, filtered, others)
            kept = (x if x.numel() else y for x, y in zip(grads, others, strict=True))
            grads, exact = Gradients(*kept), needed
            sums = found = None
            path = "dense"
    if recording() and numbers is not None and found is None:
        report(FilterRecord(path, 1.0, 0.0, flat_tokens, count))
    step = _chunk_size(end - rows, rows) if end > rows else 1
    for start in range(rows, end, step):
        part = slice(start, min(start + step, end))
        chunk = store(part)
        if num_classes > 0:
            multiply(chunk, part.stop - part.start, False, exact, grads)
    if exact.c and unit is not None:
        grads.c.div_(unit.e)
    if exact.c or exact.bias:
        _add_targets(tokens, target, grads, exact)
    return SumGradients(nll.sum(), *grads), found


def _chunk_size(num_tokens: int, most: int) -> int:
    """Return the rows of chunks of about equal size: whole blocks, or all tokens."""
    rows = cdiv(num_tokens, cdiv(num_tokens, most))
    return int(min(cdiv(rows, BLOCK_T) * BLOCK_T, num_tokens))


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


def _units(tokens: Tokens, weights: Tensor | None, multiplier: Tensor | None) -> _Units:
    """Return units with which no factor exceeds 2^14; without them a factor is at most 1.

    But for weights and multiplier, which are part of it.
    """
    largest = torch.linalg.vector_norm(tokens.e, torch.inf).float()
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
    """Add what the targets contribute to dC and to the gradient of the bias."""
    num_tokens, dim = tokens.e.shape
    ordered, order = torch.sort(tokens.targets, stable=True)
    block_d = min(1024, next_power_of_2(dim))
    launch(
        add_targets_kernel,
        (num_tokens, cdiv(dim, block_d) if needed.c else 1),
        sorted_ptr=ordered,
        order_ptr=order,
        e_ptr=tokens.e,
        target_ptr=target,
        **pointers(grads, "c bias", "grad_{}_ptr"),
        N=num_tokens,
        D=dim,
        NEED_C=needed.c,
        NEED_BIAS=needed.bias,
        RUN=RUN,
        BLOCK_D=block_d,
    )
