"""Losses and exact gradients of classes whose rows are made chunk by chunk.

Of a sum of losses whose only gradient is that of e, the rows of a chunk serve for both products
while they are there: powers of its logits are stored (``powers``), and their product with the rows
is added to dE. The powers are relative to a bound of each token that holds for all chunks; where a
chunk raises it, the sum so far is scaled. What the target adds is left out of the products, as in
``exact_sum``: its row waits in the memory of the result. Otherwise the rows are made twice, for the
log-sum-exps and for the gradients. Shape legend: ``cut_cross_entropy.kernels``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cut_cross_entropy.constants import MAX_ELEMENTS
from cut_cross_entropy.filter_report import FilterRecord, recording, report
from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.exact import (
    MAX_TOKENS,
    add_product,
    chunk_gradients,
)
from cut_cross_entropy.kernels.launch import (
    HostCopy,
    aligned_rows,
    cdiv,
    is_captured,
    launch,
    next_power_of_2,
)
from cut_cross_entropy.kernels.lse import (
    LN2,
    PassInputs,
    Segments,
    finish,
    raise_bound,
    vocabulary_pass,
)
from cut_cross_entropy.kernels.made_rows_kernels import (
    finish_rows_kernel,
    scale_sums_kernel,
    score_chunk_kernel,
)
from cut_cross_entropy.kernels.powers import (
    Chunk,
    choose_segment_tiles,
    finish_sums,
    sum_powers,
)
from cut_cross_entropy.kernels.tokens import (
    Tokens,
    compact_for_backward,
    list_valid,
    scatter_rows,
)
from cut_cross_entropy.problem import Gradients, KernelState, Needed, PerToken, Problem
from cut_cross_entropy.validation import check_target_range

ALIGNED = 256  # classes of a library product, but for the last few
FEWEST = 1024  # classes of a chunk, if fewer tokens at a time allow it
LOWEST = -1e30  # bound of a token of which nothing is known
COPIES = 2  # of the rows: themselves, and what they are made of


class LossAndGradient(NamedTuple):
    """The sum of all losses, (), and its gradient by e, (N, D) float32."""

    loss: Tensor
    grad_e: Tensor


class _Sizes(NamedTuple):
    """Numbers of classes of a chunk, and of tokens whose logits of it are stored at a time."""

    classes: int
    tokens: int

    def chunks(self, num_classes: int) -> list[slice]:
        """Return the chunks of all classes."""
        starts = range(0, num_classes, self.classes)
        return [slice(start, min(start + self.classes, num_classes)) for start in starts]


def loss_and_gradient(
    problem: Problem, make_rows: Callable[[slice], Tensor], weights: Tensor | None = None
) -> LossAndGradient:
    """Compute the sum of all losses and its exact gradient by e.

    The number of valid tokens is read from the device while it computes bounds.

    Args:
        problem: without a group; ``c`` has the shape and the device of all rows and no values.
        make_rows: returns the rows of some classes, contiguous and of the compute dtype.
        weights: (N,), factors of the losses; None for 1.
    """
    e, (num_tokens, dim), num_classes = problem.e, problem.e.shape, problem.c.shape[0]
    check_target_range(problem.targets, num_classes, problem.ignore_index)
    grad_e = e.new_zeros((num_tokens, dim), dtype=torch.float32)
    if num_tokens == 0:
        return LossAndGradient(grad_e.new_zeros(()), grad_e)
    walk, sizes = _Walk.of(problem, make_rows, grad_e), _choose_sizes(problem, num_tokens)
    sums: _Sums | None = None
    for classes in sizes.chunks(num_classes):
        inputs = walk.inputs(classes)
        if sums is None:
            sums = _Sums.zeros(problem, walk.num_rows(), sizes)
        sums.add(inputs, walk.tokens.targets)
        del inputs  # frees the rows before the next ones are made
    assert sums is not None
    end = slice(0, sums.products.shape[0])
    tokens, multiplier = walk.tokens, walk.multiplier
    nll, factor, of_target = aligned_rows(3, num_tokens, torch.float32, e.device, zeros=True)
    chunk = Chunk(
        Tokens(tokens.e[end], tokens.targets[end], tokens.origin[end]),
        PassInputs(
            tokens.e[end],
            problem.c,
            bias=None,
            softcap=problem.softcap,
            bound=walk.bound[end],
            flags=walk.flags,
            multiplier=None if multiplier is None else multiplier[end],
        ),
        logits=walk.logits[end],
        weights=None if weights is None else tokens.gather(weights, 0.0)[end],
        nll=nll[end],
        factor=factor[end],
        target=of_target[end],
        segment_tiles=1,
    )
    of_others = _sum_of_powers(sums.others)
    finish_sums(chunk, Segments(of_others, of_others[:0]))
    launch(
        finish_rows_kernel,
        (end.stop,),
        sums_ptr=sums.products,
        factor_ptr=factor,
        target_ptr=of_target,
        origin_ptr=tokens.origin,
        out_ptr=grad_e,
        num_tokens=num_tokens,
        D=dim,
        BLOCK_D=min(1024, next_power_of_2(dim)),
    )
    return LossAndGradient(nll.sum(), grad_e)


def token_losses(problem: Problem, make_rows: Callable[[slice], Tensor]) -> PerToken:
    """Compute loss and log-sum-exp of every token, (N,) each.

    Args:
        problem, make_rows: see :func:`loss_and_gradient`.
    """
    e, num_tokens, num_classes = problem.e, problem.e.shape[0], problem.c.shape[0]
    check_target_range(problem.targets, num_classes, problem.ignore_index)
    if num_tokens == 0:
        return PerToken(*(e.new_zeros(0, dtype=torch.float32) for _ in range(2)))
    walk, parts = _Walk.of(problem, make_rows, None), []
    for classes in _choose_sizes(problem, 0).chunks(num_classes):
        inputs = walk.inputs(classes)
        num_here = inputs.c.shape[0]
        inputs.flags.zero_()
        segments = vocabulary_pass(inputs, num_here, None)
        vocabulary_pass(inputs, num_here, None, online=True, repair=segments)
        parts.append(segments.lse)
        del inputs  # frees the rows before the next ones are made
    lse = _sum_of_powers(parts)
    segments = Segments(lse, lse.new_empty((0, num_tokens)))
    state = finish(segments, walk.logits, walk.tokens, None, walk.bound)
    return PerToken(state.nll, state.lse)


def gradients(
    upstream: PerToken,
    saved: PerToken,
    problem: Problem,
    make_rows: Callable[[slice], Tensor],
    needed: Needed,
    take_rows: Callable[[slice, Tensor], None],
) -> Gradients:
    """Compute the exact gradients of e and bias in their dtypes; that of the rows is handed over.

    Args:
        upstream: gradients of the results of :func:`token_losses`.
        saved: these results.
        problem, make_rows: see :func:`loss_and_gradient`.
        needed: the gradients to compute.
        take_rows: gets some classes and the gradient of their rows, float32, without the frozen
            columns.
    """
    e, bias, (num_tokens, dim) = problem.e, problem.bias, problem.e.shape
    num_classes, first = problem.c.shape[0], problem.frozen_columns
    grad_e = torch.zeros_like(e, memory_format=torch.contiguous_format) if needed.e else None
    grad_bias = torch.zeros_like(bias) if needed.bias and bias is not None else None
    absent = e.new_empty(0)
    results = Gradients(
        absent if grad_e is None else grad_e, absent, absent if grad_bias is None else grad_bias
    )
    if num_tokens == 0:
        return results
    multiplier = None
    if problem.multiplier is not None:
        multiplier = problem.multiplier.float()
        upstream = PerToken(*(grad * multiplier for grad in upstream))
    state = KernelState(*saved, *(saved.nll.new_empty(0) for _ in range(4)))
    tokens = compact_for_backward(upstream, state, problem, 0.0, count_valid=True)
    tokens = replace(
        tokens, multiplier=None if multiplier is None else tokens.gather(multiplier, 1.0)
    )
    valid = num_tokens if tokens.num_valid is None else int(tokens.num_valid.wait())
    if recording():
        report(FilterRecord("exact", 1.0, 0.0, 0, valid))
    tokens = tokens.at(slice(0, min(-(-max(valid, 1) // BLOCK_T) * BLOCK_T, num_tokens)))
    num_rows = tokens.e.shape[0]
    sizes = _choose_sizes(problem, num_rows, dim - first if needed.c else 0)
    parts = [
        slice(start, min(start + sizes.tokens, num_rows))
        for start in range(0, num_rows, sizes.tokens)
    ]
    width = cdiv(sizes.classes, ALIGNED) * ALIGNED  # rows stay aligned
    buffer = tokens.e.new_empty((min(num_rows, sizes.tokens), width))
    sums_e = e.new_zeros((num_rows if needed.e else 0, dim), dtype=torch.float32)
    for classes in sizes.chunks(num_classes):
        here = replace(
            problem,
            c=make_rows(classes),
            bias=None if bias is None else bias[classes].contiguous(),
        )
        local, count = tokens.targets - classes.start, classes.stop - classes.start
        local = torch.where((local >= 0) & (local < count), local, -1)
        some = replace(tokens, targets=local)
        sums_c = e.new_zeros((count if needed.c else 0, dim - first), dtype=torch.float32)
        sums_bias = e.new_zeros(count if needed.bias else 0, dtype=torch.float32)
        for part in parts:
            grads = buffer[: part.stop - part.start, :count]
            part_of_tokens = some.at(part)
            chunk_gradients(here, part_of_tokens, (0, count), grads)
            if needed.e:
                for columns in _aligned(count):
                    add_product(sums_e[part], grads[:, columns], here.c[columns])
            if needed.c:
                for columns in _aligned(count):
                    right = part_of_tokens.e[:, first:]
                    add_product(sums_c[columns], grads[:, columns].T, right)
            if needed.bias:
                sums_bias += grads.sum(0, dtype=torch.float32)
        del here  # frees the rows before the next ones are made
        if needed.c:
            take_rows(classes, sums_c.div_(tokens.scale))
        if grad_bias is not None:
            grad_bias[classes] = sums_bias.div_(tokens.scale)
    if grad_e is not None:
        scatter_rows(sums_e.div_(tokens.scale), tokens.origin, grad_e)
    return results


def _aligned(num_classes: int) -> Iterator[slice]:
    """Slices for library products: the last few classes of an odd number slow down all of it."""
    aligned = num_classes if num_classes % 8 == 0 else num_classes // ALIGNED * ALIGNED
    for classes in (slice(0, aligned), slice(aligned, num_classes)):
        if classes.start < classes.stop:
            yield classes


@dataclass(frozen=True)
class _Walk:
    """The tokens, and what is known of them after some chunks of classes.

    Args:
        problem, make_rows: see :func:`loss_and_gradient`.
        tokens: compacted; their targets are rows of the last chunk.
        num_valid: number of valid tokens on its way to the host; None if it cannot wait.
        logits: (N,) of the targets in the chunks so far, log2; NaN for the others.
        bound: (N,), for the kernels that store powers to raise.
        multiplier: (N,) in the order of the tokens; None for 1.
        flags: (blocks,) int32, memory.
        target_rows: (N, D) float32 in the caller's order, of the targets so far; None if they are
            not to be kept.
    """

    problem: Problem
    make_rows: Callable[[slice], Tensor]
    tokens: Tokens
    num_valid: HostCopy | None
    logits: Tensor
    bound: Tensor
    multiplier: Tensor | None
    flags: Tensor
    target_rows: Tensor | None

    @classmethod
    def of(
        cls, problem: Problem, make_rows: Callable[[slice], Tensor], target_rows: Tensor | None
    ) -> "_Walk":
        e, num_tokens = problem.e, problem.e.shape[0]
        origin, count = list_valid(problem.targets, problem.ignore_index)
        tokens = Tokens(
            torch.empty(e.shape, dtype=problem.compute_dtype, device=e.device),
            torch.empty(num_tokens, dtype=torch.int64, device=e.device),
            origin,
        )
        logits, bound = aligned_rows(2, num_tokens, torch.float32, e.device)
        logits.fill_(torch.nan)  # of a target out of range: nothing plausible
        bound.copy_(torch.where(origin < num_tokens, LOWEST, torch.inf))
        return cls(
            problem,
            make_rows,
            tokens,
            num_valid=None if e.is_meta or is_captured(e) else HostCopy(count),
            logits=logits,
            bound=bound,
            multiplier=None
            if problem.multiplier is None
            else tokens.gather(problem.multiplier, 1.0),
            flags=torch.zeros(-(-num_tokens // BLOCK_T), dtype=torch.int32, device=e.device),
            target_rows=target_rows,
        )

    def inputs(self, classes: slice) -> PassInputs:
        """Make the rows of the next chunk, and score the targets that are in it."""
        problem = self.problem
        inputs = PassInputs(
            self.tokens.e,
            self.make_rows(classes),
            bias=None if problem.bias is None else problem.bias[classes].contiguous(),
            softcap=problem.softcap,
            bound=self.bound,
            flags=self.flags,
            multiplier=self.multiplier,
        )
        _score(
            problem,
            self.tokens,
            inputs,
            self.logits,
            rows=self.target_rows,
            first_class=classes.start,
        )
        if classes.start == 0:
            _raise_bound(inputs, problem.c.shape[0])
        return inputs

    def num_rows(self) -> int:
        """Return how many rows have tokens, in whole blocks; waits for the device."""
        num_tokens = self.tokens.e.shape[0]
        if self.num_valid is None:
            return num_tokens
        valid = int(self.num_valid.wait())
        if recording():
            report(FilterRecord("exact", 1.0, 0.0, 0, valid))
        return min(-(-max(valid, 1) // BLOCK_T) * BLOCK_T, num_tokens)


def _choose_sizes(problem: Problem, num_tokens: int, columns: int = 0) -> _Sizes:
    """Choose chunks that fit the budget: their rows, and a value for each class and token.

    ``columns`` are those of a gradient of the rows, which is float32.
    """
    (num_classes, dim), itemsize = problem.c.shape, problem.compute_dtype.itemsize
    row_bytes = COPIES * itemsize * dim + 4 * columns
    tokens = min(num_tokens, MAX_TOKENS)
    while True:
        classes = problem.memory_budget // (itemsize * tokens + row_bytes)
        if classes >= FEWEST or tokens <= BLOCK_T:
            break
        tokens = -(-tokens // (2 * BLOCK_T)) * BLOCK_T
    most = max(1, min(classes, MAX_ELEMENTS // max(tokens, dim)) // ALIGNED) * ALIGNED
    at_once = cdiv(num_classes, cdiv(num_classes, most))  # of about equal size
    return _Sizes(min(num_classes, cdiv(at_once, ALIGNED) * ALIGNED), tokens)


def _score(
    problem: Problem,
    tokens: Tokens,  # filled with the first chunk
    inputs: PassInputs,
    logits: Tensor,  # (N,) of the targets, log2, in, out
    rows: Tensor | None,  # (N, D) of the targets in the caller's order, in, out
    first_class: int,
) -> None:
    """Compute what belongs to the targets that are in a chunk, and their rows of its c."""
    e, (num_tokens, dim) = problem.e, problem.e.shape
    launch(
        score_chunk_kernel,
        (num_tokens,),
        source_ptr=e,
        c_ptr=inputs.c,
        bias_ptr=inputs.bias,
        all_targets_ptr=problem.targets.contiguous(),
        origin_ptr=tokens.origin,
        multiplier_ptr=inputs.multiplier,
        e_ptr=tokens.e,
        targets_ptr=tokens.targets,
        logits_ptr=logits,
        rows_ptr=rows,
        N=num_tokens,
        V=inputs.c.shape[0],
        D=dim,
        stride_n=e.stride(0),
        stride_d=e.stride(1),
        softcap=problem.softcap,
        first_class=first_class,
        COMPACT=first_class == 0,
        BLOCK_D=min(1024, next_power_of_2(dim)),
    )


def _raise_bound(inputs: PassInputs, num_classes: int) -> None:
    """Raise the bounds to the log-sum-exp of the frequent classes, which are the first."""
    block_v = inputs.tiles.block_v
    frequent = min(max(1024, num_classes // 64), 8192) // block_v * block_v
    frequent = min(frequent, inputs.c.shape[0])
    raise_bound(inputs.bound, vocabulary_pass(inputs, frequent, None, online=True))


@dataclass(frozen=True)
class _Sums:
    """Sums over the chunks so far, of the first tokens.

    Args:
        products: (N, D) float32, powers times rows of c.
        others: of each chunk, (segments, N) log-sum-exps of its classes but for the target, log2.
        powers: (tokens at a time, classes of a chunk), memory.
        before: (N,), memory.
    """

    products: Tensor
    others: list[Tensor]
    powers: Tensor
    before: Tensor

    @classmethod
    def zeros(cls, problem: Problem, num_tokens: int, sizes: _Sizes) -> "_Sums":
        e, rows = problem.e, min(num_tokens, sizes.tokens)
        width = cdiv(sizes.classes, ALIGNED) * ALIGNED  # rows stay aligned
        return cls(
            e.new_zeros((num_tokens, e.shape[1]), dtype=torch.float32),
            [],
            e.new_empty((rows, width), dtype=problem.compute_dtype),
            e.new_empty(num_tokens, dtype=torch.float32),
        )

    def add(self, inputs: PassInputs, targets: Tensor) -> None:
        """Add a chunk of classes.

        Args:
            inputs: of all tokens; its bounds may be raised.
            targets: (N,) row of c; -1 for none.
        """
        c, (num_tokens, dim) = inputs.c, self.products.shape
        num_tiles = cdiv(c.shape[0], inputs.tiles.block_v)
        rows_at_once = self.powers.shape[0]
        segment_tiles = choose_segment_tiles(cdiv(rows_at_once, BLOCK_T), num_tiles)
        others = []
        self.before.copy_(inputs.bound[:num_tokens])
        for start in range(0, num_tokens, rows_at_once):
            part = slice(start, min(start + rows_at_once, num_tokens))
            num_rows = part.stop - part.start
            some = replace(
                inputs,
                e=inputs.e[part],
                bound=inputs.bound[part],
                multiplier=None if inputs.multiplier is None else inputs.multiplier[part],
            )
            powers = self.powers[:num_rows, : c.shape[0]]
            others.append(sum_powers(some, targets[part], powers, segment_tiles).lse)
            if self.others:
                block_d = min(128, next_power_of_2(dim))
                launch(
                    scale_sums_kernel,
                    (cdiv(num_rows, BLOCK_T), cdiv(dim, block_d)),
                    flag_ptr=inputs.flags,
                    before_ptr=self.before[part],
                    bound_ptr=some.bound,
                    sums_ptr=self.products[part],
                    N=num_rows,
                    D=dim,
                    BLOCK_T=BLOCK_T,
                    BLOCK_D=block_d,
                )
            for columns in _aligned(c.shape[0]):
                add_product(self.products[part], powers[:, columns], c[columns])
        self.others.append(others[0] if len(others) == 1 else torch.cat(others, 1))


def _sum_of_powers(parts: list[Tensor]) -> Tensor:
    """Return log2 of the sum of 2^x over the first axes of all parts (segments, N): (1, N)."""
    ln2: float = LN2.value
    return torch.logsumexp(torch.cat(parts) * ln2, 0, keepdim=True) / ln2
