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
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cut_cross_entropy.budget import powers_per_chunk
from cut_cross_entropy.distributed.collectives import maximum_over_group
from cut_cross_entropy.filter_report import FilterRecord, recording, report
from cut_cross_entropy.implementations.token_chunks import ALIGNED, class_slices
from cut_cross_entropy.kernels import BLOCK_T
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
from cut_cross_entropy.kernels.triton.exact_sum import (
    add_targets_kernel,
    scale_rows_kernel,
    sum_windows_kernel,
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
    gradient_scale,
)
from cut_cross_entropy.validation import check_target_range

RUN = 4  # tokens of one target that are added together: most targets have few
WINDOW, RUN_OF_WINDOW = 64, 16  # tokens whose sums are added together, and of these at a time


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
    products = _Products.of(walk, rows, needed, zeros=numbers is None)

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
    products.finish(walk, exact, grads)
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


@dataclass(frozen=True)
class _Products:
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
    def of(cls, walk: _Walk, rows: int, needed: Needed, *, zeros: bool) -> "_Products":
        """Allocate memory for chunks of ``rows`` tokens; with ``zeros`` all may be multiplied."""
        (num_classes, dim), dtype = walk.problem.c.shape, walk.problem.c.dtype
        unit = None
        if dtype == torch.float16:
            unit = _units(walk.tokens, walk.weights, walk.inputs.multiplier)
        stride = cdiv(num_classes, ALIGNED) * ALIGNED  # rows stay aligned
        powers = walk.problem.c.new_empty((rows, stride))[:, :num_classes]
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

    def finish(self, walk: _Walk, needed: Needed, grads: Gradients) -> None:
        """Turn the sums of all chunks into the gradients of c and bias."""
        if needed.c and self.unit is not None:
            grads.c.div_(self.unit.e)
        if needed.c or needed.bias:
            _add_targets(walk.tokens, walk.target, grads, needed)


def _whole_blocks(count: int, num_tokens: int) -> int:
    """Return how many tokens the blocks of the first ``count`` have."""
    return int(min(cdiv(count, BLOCK_T) * BLOCK_T, num_tokens))


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
