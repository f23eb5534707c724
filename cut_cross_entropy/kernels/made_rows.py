"""Losses and exact gradients of classes whose rows are made chunk by chunk.

Of a sum of losses whose only gradient is that of e, the rows of a chunk serve for both products
while they are there: powers of its logits are stored (``powers``), and their product with the rows
is added to dE. The powers are relative to a bound of each token that holds for all chunks; where a
chunk raises it, the sum so far is scaled. What the target adds is left out of the products, as in
``exact_sum``: its row waits in the memory of the result. Otherwise the rows are made twice, for the
log-sum-exps and for the gradients. Shape legend: ``cut_cross_entropy.kernels``.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cut_cross_entropy.constants import MAX_ELEMENTS
from cut_cross_entropy.filter_report import FilterRecord, recording, report
from cut_cross_entropy.kernels import BLOCK_T, exact
from cut_cross_entropy.kernels.exact import (
    MAX_TOKENS,
    Wanted,
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
    pointers,
)
from cut_cross_entropy.kernels.likely_classes import list_likely, list_size, raise_by_classes
from cut_cross_entropy.kernels.lse import (
    LN2,
    PassInputs,
    Segments,
    coarser_support,
    finish,
    raise_bound,
    vocabulary_pass,
)
from cut_cross_entropy.kernels.made_rows_kernels import (
    finish_rows_kernel,
    scale_sums_kernel,
)
from cut_cross_entropy.kernels.order import order_by_content
from cut_cross_entropy.kernels.powers import (
    Chunk,
    choose_segment_tiles,
    finish_sums,
    sum_powers,
)
from cut_cross_entropy.kernels.tokens import (
    BackwardTokens,
    Tokens,
    compact_for_backward,
    list_valid,
    low_rows,
    scatter_rows,
    score,
)
from cut_cross_entropy.outputs import Asked
from cut_cross_entropy.problem import (
    AdaptedProblem,
    Gradients,
    KernelState,
    MadeProblem,
    Needed,
    PerToken,
    Problem,
    low_columns,
)
from cut_cross_entropy.validation import check_target_range

ALIGNED = 256  # classes of a library product, but for the last few
FEWEST = 1024  # classes of a chunk, if fewer tokens at a time allow it
LOWEST = -1e30  # bound of a token of which nothing is known
COPIES = 2  # of the rows: themselves, and what they are made of
SHARE = 4  # of the budget, a fourth is for strips where these are stored, and the rest for rows


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
        walk.score(inputs, classes.start)
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
        **pointers(chunk, "factor target"),
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
    state = forward(problem, make_rows, with_strips=False)
    return PerToken(state.nll, state.lse)


def forward(
    problem: Problem, make_rows: Callable[[slice], Tensor], with_strips: bool
) -> KernelState:
    """Compute loss and log-sum-exp of every token, and what a filtered backward needs again.

    With strips the rows are made twice: the logits of the targets have to be known before the
    energies of the strips, which are relative to one bound in all chunks.

    Args:
        problem, make_rows: see :func:`loss_and_gradient`; an adapted problem has columns of its
            own, which ``make_rows`` leaves out.
        with_strips: order the tokens by content, and compute energy and mass of every strip.
    """
    e, num_tokens, num_classes = problem.e, problem.e.shape[0], problem.c.shape[0]
    check_target_range(problem.targets, num_classes, problem.ignore_index)
    num_blocks = cdiv(num_tokens, BLOCK_T)
    strips = e.new_zeros((num_blocks, num_classes) if with_strips else 0, dtype=torch.int16)
    if num_tokens == 0:
        nothing = [e.new_zeros(0, dtype=torch.float32) for _ in range(4)]
        origin = e.new_zeros(0, dtype=torch.int64)
        nll, lse, support, mass = nothing
        return KernelState(nll, lse, strips, origin=origin, support=support, shard_mass=mass)
    walk = _Walk.of(problem, make_rows, None, by_content=with_strips)
    chunks = _choose_sizes(problem, 0).chunks(num_classes)
    targets = energy_bound = None
    if with_strips:
        targets = F.pad(problem.targets, (0, 1), value=-1)[walk.tokens.origin]
        targets = torch.where((targets >= 0) & (targets < num_classes), targets, -1).long()
        energy_bound = walk.score_all(chunks, targets)
    parts, squares = [], []
    for classes in chunks:
        inputs = replace(walk.inputs(classes), energy_bound=energy_bound)
        if not with_strips:
            walk.score(inputs, classes.start)
        count = inputs.c.shape[0]
        inputs.flags.zero_()
        own = None
        if with_strips:  # blocks without a token are skipped
            own = strips.new_zeros((num_blocks, count))
        segments = vocabulary_pass(inputs, count, own)
        vocabulary_pass(inputs, count, own, online=True, repair=segments)
        parts.append(segments.lse)
        squares.append(segments.squares)
        if own is not None:
            strips[:, classes] = own
        del inputs  # frees the rows before the next ones are made
    whole = Segments(torch.cat(parts), torch.cat(squares))
    if targets is None or energy_bound is None:
        lse = _sum_of_powers([whole.lse])
        return finish(Segments(lse, whole.squares), walk.logits, walk.tokens, None, walk.bound)
    tokens = replace(walk.tokens, targets=targets)
    state = finish(whole, walk.logits, tokens, strips, energy_bound)
    return state._replace(support=coarser_support(state.support, whole.lse.shape[0]))


def chunks_of_rows(problem: Problem, multiple: int) -> list[slice]:
    """Return chunks of classes for a filtered backward, which stores strips besides the rows.

    Args:
        problem: see :func:`loss_and_gradient`.
        multiple: number of classes that starts of chunks are multiples of.
    """
    num_classes, dim = problem.c.shape
    row_bytes = COPIES * problem.compute_dtype.itemsize * dim
    most = problem.memory_budget // SHARE * (SHARE - 1) // row_bytes
    most = max(1, most // multiple) * multiple
    at_once = cdiv(num_classes, cdiv(num_classes, most))
    return _Sizes(cdiv(at_once, multiple) * multiple, 0).chunks(num_classes)


def exact_gradients(
    problem: MadeProblem, tokens: BackwardTokens, wanted: Wanted, *, accumulate: bool = False
) -> Tensor | None:
    """Compute gradients of some tokens from all classes, chunk by chunk.

    Args:
        problem, tokens, wanted, accumulate: as in ``exact.exact_gradients``.

    Returns:
        dE in float32, (N, D), if wanted.
    """
    total = total_low = None
    zeros = functools.partial(problem.e.new_zeros, dtype=torch.float32)
    if wanted.e:
        total = zeros(tokens.e.shape)
    if wanted.low_e is not None:
        total_low = zeros(wanted.low_e.shape)
    problem = replace(problem, memory_budget=max(1, problem.memory_budget // 2))
    for classes in _choose_sizes(problem, 0).chunks(problem.c.shape[0]):
        low_e = None if total_low is None else torch.zeros_like(total_low)
        of_chunk = replace(
            wanted,
            c=None if wanted.c is None else wanted.c[classes],
            bias=None if wanted.bias is None else wanted.bias[classes],
            low_e=low_e,
        )
        part = problem.of_classes(classes)
        local = replace(tokens, targets=tokens.targets - classes.start)
        own = exact.exact_gradients(part, local, of_chunk, accumulate=accumulate)
        if total is not None and own is not None:
            total += own
        if total_low is not None and low_e is not None:
            total_low += low_e
        del part  # frees the rows before the next ones are made
    if total_low is not None and wanted.low_e is not None:
        wanted.low_e.add_(total_low)
    return total


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
        cls,
        problem: Problem,
        make_rows: Callable[[slice], Tensor],
        target_rows: Tensor | None,
        by_content: bool = False,
    ) -> "_Walk":
        e, num_tokens = problem.e, problem.e.shape[0]
        origin, count = list_valid(problem.targets, problem.ignore_index)
        if by_content:
            origin = order_by_content(e, origin, count)
        tokens = Tokens(
            torch.empty(e.shape, dtype=problem.compute_dtype, device=e.device),
            torch.empty(num_tokens, dtype=torch.int64, device=e.device),
            origin,
            low_e=low_rows(problem, origin),
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
        """Make the rows of a chunk."""
        problem, low_c = self.problem, low_columns(self.problem)
        return PassInputs(
            self.tokens.e,
            self.make_rows(classes),
            bias=None if problem.bias is None else problem.bias[classes].contiguous(),
            softcap=problem.softcap,
            bound=self.bound,
            flags=self.flags,
            multiplier=self.multiplier,
            low_e=self.tokens.low_e,
            low_c=None if low_c is None else low_c[classes],
        )

    def score_all(self, chunks: list[slice], targets: Tensor) -> Tensor:
        """Score all targets, and raise the bounds to their logits.

        Args:
            chunks: of all classes.
            targets: (N,) class of each token, -1 for none.

        Returns:
            (N,) the bounds of energies, which the likely classes of the batch raise further.
        """
        problem, num_classes = self.problem, self.problem.c.shape[0]
        size = list_size(problem)
        likely = list_likely(targets, num_classes, size)
        rows = self.tokens.e.new_empty((size, problem.c.shape[1]))
        for classes in chunks:
            inputs = self.inputs(classes)
            self.score(inputs, classes.start, extrapolate=True)
            count = inputs.c.shape[0]
            here = ((likely >= classes.start) & (likely < classes.stop))[:, None]
            own = inputs.c[(likely - classes.start).clamp(0, count - 1)]
            torch.where(here, own, rows, out=rows)
            del inputs, own  # frees the rows before the next ones are made
        known = self.logits < torch.inf  # the pass finds NaN and +inf again
        raised = torch.maximum(self.bound, self.logits)
        self.bound.copy_(torch.where(known, raised, self.bound))
        energy_bound = self.bound.clone()
        if size > 0:
            inputs = PassInputs(
                self.tokens.e,
                rows,
                bias=problem.bias,
                softcap=problem.softcap,
                bound=energy_bound,
                flags=self.flags,
                multiplier=self.multiplier,
                low_e=self.tokens.low_e,
                low_c=low_columns(problem),
            )
            raise_by_classes(inputs, likely)
        return energy_bound

    def score(self, inputs: PassInputs, first_class: int, extrapolate: bool = False) -> None:
        """Score the targets that are in the next chunk; the first one raises the bounds."""
        part: dict[str, Any] = {"c": inputs.c, "bias": inputs.bias, "first_class": first_class}
        if isinstance(self.problem, AdaptedProblem):
            part["low_c"] = self.problem.low_c[first_class : first_class + inputs.c.shape[0]]
        score(
            replace(self.problem, **part),
            self.tokens,
            self.logits,
            compact=first_class == 0,
            multiplier=inputs.multiplier,
            rows=self.target_rows,
        )
        if first_class == 0:
            _raise_bound(inputs, self.problem.c.shape[0], extrapolate)

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


def _raise_bound(inputs: PassInputs, num_classes: int, extrapolate: bool) -> None:
    """Raise the bounds to the log-sum-exp of the frequent classes, which are the first.

    With ``extrapolate``, those of tokens that are spread over many classes by an estimate of all.
    """
    block_v = inputs.tiles.block_v
    frequent = min(max(1024, num_classes // 64), 8192) // block_v * block_v
    frequent = min(frequent, inputs.c.shape[0])
    if frequent == 0:
        return
    asked = Asked(log_sum_sq=extrapolate)
    segments = vocabulary_pass(inputs, frequent, None, asked=asked, online=True)
    raise_bound(inputs.bound, segments, frequent, num_classes)


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
