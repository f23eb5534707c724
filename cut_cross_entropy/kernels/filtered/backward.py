"""The filtered backward: gradients of the kept strips, and of the tail for all others.

``selection`` chooses the strips by a threshold that ``calibrate`` sets, ``tail_sample`` estimates
what they leave out, ``index`` lists them, ``schedule`` decides which are stored together,
``strips`` computes their logit gradients, ``tail``, ``grad_e`` and ``grad_c`` the results,
``measure`` their errors if they are recorded. Shape legend: ``cut_cross_entropy.kernels``.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cut_cross_entropy.filter_report import FilterRecord, recording, report
from cut_cross_entropy.kernels import BLOCK_T, made_rows
from cut_cross_entropy.kernels.exact import Wanted, exact_gradients
from cut_cross_entropy.kernels.filtered.calibrate import calibrate, calibrates
from cut_cross_entropy.kernels.filtered.captured import (
    BUDGETS,
    Choice,
    exact_if,
    first_flat,
    is_supported,
)
from cut_cross_entropy.kernels.filtered.class_weights import ClassWeights, has_class_weights
from cut_cross_entropy.kernels.filtered.flat import (
    FlatTokens,
    flat_bytes,
    most_flat,
    whole_steps,
)
from cut_cross_entropy.kernels.filtered.grad_c import (
    ClassOrder,
    ClassRows,
    write_grad_c,
    write_tail_rows,
)
from cut_cross_entropy.kernels.filtered.grad_e import add_grad_e, finish_grad_e, write_grad_e
from cut_cross_entropy.kernels.filtered.index import (
    Counts,
    Range,
    Rectangle,
    StripIndex,
    StripList,
    index_strips,
    list_ahead,
    list_strips,
)
from cut_cross_entropy.kernels.filtered.measure import measure
from cut_cross_entropy.kernels.filtered.partial_sums import PartialSums, bytes_per_row
from cut_cross_entropy.kernels.filtered.schedule import (
    MAX_BUDGET,
    STRIP_BYTES,
    ClassPass,
    make_schedule,
    rectangles,
    store_all,
)
from cut_cross_entropy.kernels.filtered.selection import CHUNK, Kept, find_threshold, keep_strips
from cut_cross_entropy.kernels.filtered.strips import (
    Part,
    StoredStrips,
    add_bias_grads,
    strip_gradients,
)
from cut_cross_entropy.kernels.filtered.tail import (
    BlockSums,
    Tail,
    TokenTails,
    sum_rows,
    update_tails,
    write_bias,
)
from cut_cross_entropy.kernels.filtered.tail_sample import TailSample
from cut_cross_entropy.kernels.launch import HostCopy, is_captured
from cut_cross_entropy.kernels.tokens import BackwardTokens, scatter_rows
from cut_cross_entropy.problem import (
    AdaptedProblem,
    Filter,
    KernelState,
    MadeProblem,
    Problem,
    low_columns,
)

# Share of the strips from which on the exact path is faster, of many features: a kept strip costs
# more than one of all, and the more so the fewer the features. Measured on an H200 for 8,192
# tokens: 0.21, 0.27, 0.32 and 0.33 with 640, 1,024, 2,048 and 4,096 (docs/engineering_log.md).
DENSE_FRACTION = 0.4
NARROW = 580  # features for which that share is half of it
FEWEST = 512  # features below which it is not lowered further: nothing was measured there
FLAT_FRACTION = 0.5  # of tokens that are flat: above it all take the exact path
FLAT_SUPPORT = 400  # effective number of groups of classes from which a token counts as flat


class Outcome(NamedTuple):
    """Result of a filtered backward.

    Args:
        grad_e: (N, D) dE in the caller's order and dtype, if wanted.
        num_valid: number of valid tokens; None while a CUDA graph is captured.
        too_flat: whether all strips are to be taken; nothing was computed then.
    """

    grad_e: Tensor | None
    num_valid: int | None
    too_flat: bool


def filtered_gradients(
    problem: Problem,
    tokens: BackwardTokens,
    wanted: Wanted,
    saved: KernelState,
    filter_: Filter,
) -> Outcome:
    """Compute gradients from the kept strips and the tail, unless the data is too flat for that.

    ``problem`` has c and bias contiguous, c of the compute dtype. The number of kept strips is read
    from the device: the one synchronisation of a step. While a CUDA graph is captured, it stays
    there.
    """
    strips, captured = saved.strips, is_captured(saved.strips)
    if captured and not is_supported(problem, tokens, wanted):
        return Outcome(None, None, too_flat=True)
    threshold = find_threshold(strips, tokens, filter_)
    tilts = None
    is_calibrated = calibrates(problem, filter_) and tokens.eta is None  # whose tail is another
    if is_calibrated or (wanted.e and not isinstance(problem, MadeProblem)):
        sample = TailSample.of(problem, tokens, threshold)
        tilts = sample.tilts
        if is_calibrated:
            calibrate(problem, tokens, sample.mass, threshold, filter_.max_error)
    kept = keep_strips(threshold)
    if captured:
        grad_e = _captured_gradients(problem, tokens, wanted, kept, tilts)
        return Outcome(grad_e, None, too_flat=False)
    counts = Counts(kept)
    # Half as many strips again as the budget holds may be stored in dC.
    budget = problem.memory_budget * 3 // 2
    selection = _Selection.of(kept, problem, tokens, wanted, tilts, budget=budget)
    results = _Results.zeros(problem, wanted)
    num_strips = sum(counts.by_block)  # waits for the device, which is computing the selection

    is_dense = too_flat(num_strips, counts.flat_tokens, counts.tokens, problem.c.shape)
    grad_e = mass = None
    if not is_dense:
        grad_e, mass = _kept_and_flat(
            problem, tokens, wanted, selection=selection, counts=counts, results=results
        )
    if recording():
        if mass is None:
            report(FilterRecord("dense", 1.0, 0.0, counts.flat_tokens, counts.tokens))
        else:
            is_part = wanted.first_column or isinstance(problem, AdaptedProblem)
            whole_c = None if is_part else wanted.c
            # Of rows that are made, those of the sampled classes are not at hand.
            whole_e = None if isinstance(problem, MadeProblem) else grad_e
            measured = measure(problem, tokens, kept, grad_e=whole_e, grad_c=whole_c, mass=mass)
            dropped = mass.double().sum()[None] / max(1, counts.tokens)
            report(
                FilterRecord.pending(
                    functools.partial(
                        _read,
                        HostCopy(torch.cat([dropped, measured])),
                        has_e=whole_e is not None,
                        has_c=whole_c is not None,
                    ),
                    path="filtered",
                    strips_kept=num_strips / max(1, _possible(counts.tokens, strips.shape[1])),
                    flat_tokens=counts.flat_tokens,
                    tokens=counts.tokens,
                )
            )
    return Outcome(grad_e, counts.tokens, is_dense)


def _captured_gradients(
    problem: Problem,
    tokens: BackwardTokens,
    wanted: Wanted,
    kept: Kept,
    tilts: Tensor | None,  # (blocks,)
) -> Tensor | None:
    """Write the gradients by the path that the device chooses; return dE, if wanted."""
    num_flat = min(most_flat(problem), BLOCK_T, tokens.a.shape[0])
    budget = BUDGETS * problem.memory_budget
    selection = _Selection.of(kept, problem, tokens, wanted, tilts, budget=budget)
    choice = Choice.of(
        kept,
        selection.listed[0],
        num_flat,
        share=dense_fraction(problem.c.shape[1]),
        flat_share=FLAT_FRACTION,
    )
    make_flat = None
    if num_flat:

        def make_flat() -> FlatTokens:
            some = first_flat(tokens, num_flat)
            return FlatTokens.of(problem, some, wanted, choice.num_flat)

    peaked = tokens.without_flat()
    results = _Results.zeros(problem, wanted)
    work = _Work(problem, peaked, wanted, selection, None, make_flat=make_flat, **results._asdict())
    _run(work)
    if work.flat is not None:
        work.flat.write_grad_e(problem, work.grad_e, wanted.low_e)
    grad_e = work.grad_e
    del work, selection  # frees the strips before the chunks of the exact path
    exact_if(choice.num_exact, problem, tokens, wanted, grad_e)
    return grad_e


def too_flat(num_strips: int, flat_tokens: int, num_tokens: int, shape: tuple[int, ...]) -> bool:
    """Return whether the exact path is faster for some tokens than the filter.

    Args:
        num_strips: kept strips.
        flat_tokens, num_tokens: tokens whose distribution is flat, and all of them.
        shape: (V, D) of the classifier.
    """
    num_classes, dim = shape
    share = dense_fraction(dim)
    return flat_tokens > FLAT_FRACTION * num_tokens or num_strips > share * _possible(
        num_tokens, num_classes
    )


def _possible(num_tokens: int, num_classes: int) -> int:
    """Return the number of all strips."""
    return -(-num_tokens // BLOCK_T) * num_classes


def dense_fraction(dim: int) -> float:
    """Return the share of kept strips from which on the exact path is faster, for D features."""
    return DENSE_FRACTION / (1 + NARROW / max(dim, FEWEST))


def _read(values: HostCopy, has_e: bool, has_c: bool) -> dict[str, Any]:
    """Return the fields of a record that were on the device."""
    dropped_mass, error_e, error_c, *cosines = values.wait().tolist()
    return {
        "dropped_mass": dropped_mass,
        "error_e": error_e if has_e else None,
        "error_c": error_c if has_c else None,
        "cosines_c": tuple(cosines) if has_c else None,
    }


@dataclass(frozen=True)
class _Selection:
    """The kept strips, and what follows from them without knowing how many they are.

    Args:
        kept: the kept strips.
        index: index of all of them.
        tail: what replaces the others; without centres while rows are still to be made.
        order: order of all classes.
        tilts: (blocks,) of the tail in dE, see ``tail_sample``; None while rows are still to be
            made, and where nothing asks for them.
        low_centers: :attr:`Tail.centers` of the columns of ``AdaptedProblem.low_c``.
        weights: of the tokens in rows of dC; None if all classes have those of the tail.
        listed: the list of all kept strips, if it may be complete; emptied where it is not read.
    """

    kept: Kept
    index: StripIndex
    tail: Tail
    order: ClassOrder
    tilts: Tensor | None
    low_centers: Tensor | None
    weights: ClassWeights | None
    listed: list[StripList]

    @classmethod
    def of(
        cls,
        kept: Kept,
        problem: Problem,
        tokens: BackwardTokens,
        wanted: Wanted,
        tilts: Tensor | None,
        *,
        budget: int,
    ) -> "_Selection":
        """List as many strips as ``budget`` bytes hold."""
        c, low_c = problem.c, low_columns(problem)
        index = index_strips(kept)
        order = ClassOrder.of(kept, (0, c.shape[0]))
        low_centers = None if low_c is None else Tail.of(kept, low_c).centers
        # The lists of the dense path, or of strips that are not stored together, are not read.
        share = min(max(0.0, dense_fraction(c.shape[1])), 1.0)
        most_strips = min(min(budget, MAX_BUDGET) // STRIP_BYTES, int(share * kept.strips.numel()))
        if isinstance(problem, MadeProblem):
            tail, most_strips = Tail.without_centers(kept, c.shape[1]), 0
        else:
            tail = Tail.of(kept, c)
        weights = None
        if wanted.c is not None and has_class_weights(problem):
            weights = ClassWeights.of(problem, tokens, kept)
        listed = list_ahead(kept, index, most_strips)
        return cls(
            kept,
            index,
            tail,
            order,
            tilts=tilts,
            low_centers=low_centers,
            weights=weights,
            listed=[listed],
        )


class _Results(NamedTuple):
    """Zeros for what a backward sums up, allocated while the host waits for the counts.

    Args:
        tails, grad_e, bias_sums: see :class:`_Work`.
    """

    tails: TokenTails
    grad_e: Tensor | None
    bias_sums: Tensor | None

    @classmethod
    def zeros(cls, problem: Problem, wanted: Wanted) -> "_Results":
        e, bias = problem.e, wanted.bias
        return cls(
            tails=TokenTails.zeros(e.shape[0], e.device),
            grad_e=e.new_zeros(e.shape, dtype=wanted.dtype_e or e.dtype) if wanted.e else None,
            bias_sums=None if bias is None else bias.new_zeros(bias.shape, dtype=torch.float32),
        )


def _kept_and_flat(
    problem: Problem,
    tokens: BackwardTokens,
    wanted: Wanted,
    selection: _Selection,
    counts: Counts,
    results: _Results,
) -> tuple[Tensor | None, Tensor]:
    """Write the gradients; return dE, if wanted, and the dropped mass of each token (N,)."""
    peaked, make_flat, is_made = tokens, None, isinstance(problem, MadeProblem)

    def flat_first(count: int) -> BackwardTokens:
        order = torch.sort(tokens.is_flat.float(), stable=True, descending=True).indices
        return tokens.at(order[:count])

    num_flat = counts.flat_tokens
    if num_flat:
        peaked = tokens.without_flat()
        if not is_made and num_flat <= most_flat(problem):

            def make_flat() -> FlatTokens:
                # Whole steps: a kernel is compiled for such numbers.
                some, count = flat_first(whole_steps(num_flat)), selection.kept.statistics[-2]
                return FlatTokens.of(problem, some, wanted, count, num_flat)

    work = _Work(
        problem, peaked, wanted, selection, counts, make_flat=make_flat, **results._asdict()
    )
    if is_made:
        _run_made(work)
    else:
        _run(work)
    if work.flat is not None:
        work.flat.write_grad_e(problem, work.grad_e, wanted.low_e)
    elif num_flat:
        flat = flat_first(num_flat)
        if isinstance(problem, MadeProblem):
            grad_e = made_rows.exact_gradients(problem, flat, wanted, accumulate=True)
        else:
            grad_e = exact_gradients(problem, flat, wanted, accumulate=True)
        if grad_e is not None and work.grad_e is not None:
            scatter_rows(grad_e, flat.origin, work.grad_e)
    return work.grad_e, work.tails.mass


@dataclass(frozen=True)
class _Work:
    """Inputs and outputs that the passes of a filtered backward share.

    Args:
        problem, tokens, wanted: of the backward.
        selection, counts: the kept strips, on the device and on the host; the host does not know
            them while a CUDA graph is captured.
        make_flat: makes :attr:`flat`; None if there are no such tokens.
        tails: tails of the tokens; final after the token passes.
        grad_e: (N, D) dE, if wanted.
        bias_sums: (V,) float32, if dbias is wanted.
    """

    problem: Problem
    tokens: BackwardTokens
    wanted: Wanted
    selection: _Selection
    counts: Counts | None
    make_flat: Callable[[], FlatTokens] | None
    tails: TokenTails
    grad_e: Tensor | None
    bias_sums: Tensor | None

    @functools.cached_property
    def flat(self) -> FlatTokens | None:
        """A few flat tokens that are not among the strips, if any.

        Made when first asked for, behind the strips, which keep the device busy meanwhile.
        """
        if self.make_flat is None:
            return None
        flat = self.make_flat()
        if self.bias_sums is not None:
            flat.add_bias_grads(self.bias_sums)
        return flat

    @functools.cached_property
    def block_sums(self) -> BlockSums:
        """Tokens of each block weighted by their tails; to be read once the tails are final."""
        selection = self.selection
        return BlockSums.of(self.class_tokens, selection.tail, self.tails, selection.weights)

    @functools.cached_property
    def class_tokens(self) -> BackwardTokens:
        """The tokens with those features that the wanted columns of dC are sums of."""
        return replace(self.tokens, e=self.wanted.features(self.tokens).contiguous())

    def classes(self, chunks: Range) -> Range:
        """Return the range of class ids of a range of chunks."""
        return chunks[0] * CHUNK, min(self.problem.c.shape[0], chunks[1] * CHUNK)


def _run(work: _Work) -> None:
    """Compute the kept strips pass by pass: those of the token passes first."""
    wanted, num_superblocks = work.wanted, work.selection.kept.num_superblocks
    row_bytes = free_bytes = 0
    if wanted.c is not None and num_superblocks > 1:
        row_bytes = bytes_per_row(wanted.c, num_superblocks)
    elif wanted.c is not None:  # as many elements as a row holds, of two bytes each
        free_bytes = wanted.c[0].nbytes // work.tokens.e.element_size() * 2
    budget = work.problem.memory_budget
    if work.counts is None:
        schedule = store_all(work.selection.kept.shape, budget, row_bytes, wanted.classes)
    else:
        if work.make_flat is not None:  # their gradients exist until the last pass
            budget = max(1, budget - flat_bytes(work.problem, work.counts.flat_tokens))
        schedule = make_schedule(work.counts, budget, row_bytes, wanted.classes, free_bytes)
    if not schedule.store_once:
        work.selection.listed.clear()  # frees it
    stored = None
    for rectangle in schedule.token_passes:
        stored = _store(work, rectangle, schedule.first_borrowed)
        _finish_tokens(work, stored)
        if not schedule.store_once:
            stored = None  # frees the strips before the next ones are computed
    for class_pass in schedule.class_passes:
        if stored is not None and class_pass.chunks[0] == schedule.first_borrowed:
            _write_classes(work, class_pass, stored.of_last_classes())
        else:
            _write_classes(work, class_pass, stored)


def _run_made(work: _Work) -> None:
    """Compute the kept strips while the rows of their classes are there, chunk by chunk.

    Sums of dE, and of the gradients of an adapter's columns, are in float32 until all classes are
    added; then come the tails, whose centres are sums over the chunks as well.
    """
    problem, wanted, selection = work.problem, work.wanted, work.selection
    assert isinstance(problem, MadeProblem)
    assert work.counts is not None
    kept, counts = selection.kept, work.counts
    num_rows = kept.shape[0] * BLOCK_T
    low_c, rows = low_columns(problem), None
    zeros = functools.partial(problem.e.new_zeros, dtype=torch.float32)
    sums_e = zeros((num_rows, problem.e.shape[1])) if work.grad_e is not None else None
    sums_low = None
    if low_c is not None and wanted.low_e is not None:
        sums_low = zeros((num_rows, low_c.shape[1]))
    centers = zeros((1, *selection.tail.centers.shape))
    if wanted.c is not None:
        everything = (0, problem.c.shape[0])
        sums_c = PartialSums.zeros(wanted.c, kept.num_superblocks, everything)
        rows = ClassRows(wanted.c, sums_c, None)
    for classes in made_rows.chunks_of_rows(problem, CHUNK):
        part = problem.of_classes(classes)
        first = classes.start
        if sums_e is not None:
            centers += sum_rows(kept, part.c, first).sum(0)
        some = replace(work.tokens, targets=work.tokens.targets - first)
        chunks = (first // CHUNK, -(-classes.stop // CHUNK))
        capacity = problem.memory_budget // made_rows.SHARE // STRIP_BYTES
        for rectangle in rectangles(counts, chunks, capacity):
            strips = list_strips(kept, counts, selection.index, rectangle)
            local = replace(strips, classes=strips.classes - first)
            stored = strip_gradients(part, some, local, work.bias_sums is not None)
            update_tails(problem, work.tokens, stored, selection.tail, work.tails)
            if sums_e is not None:
                add_grad_e(part.c, work.tokens, stored, sums_e)
            if sums_low is not None:
                add_grad_e(part.low_c, work.tokens, stored, sums_low)
            if wanted.classes:
                _add_classes(work, stored, rectangle, rectangle.chunks, rows)
            del strips, local, stored  # frees the strips before the next ones are computed
        del part  # and the rows
    for sums, means, out in (
        (sums_e, Tail.of_sums(kept, centers).centers, work.grad_e),
        (sums_low, selection.low_centers, wanted.low_e),
    ):
        if sums is not None and means is not None and out is not None:
            finish_grad_e(sums, work.tokens, work.tails, means, out)
    _finish_classes(work, (0, problem.c.shape[0]), rows)


def _store(work: _Work, rectangle: Rectangle, first_borrowed: int | None = None) -> StoredStrips:
    """Compute the strips of a rectangle.

    Those of the chunks from ``first_borrowed`` on are stored in the first rows of dC.
    """
    selection, counts, grad_c = work.selection, work.counts, work.wanted.c
    borrowed, strips = None, selection.listed[0] if selection.listed else None
    if counts is not None:
        strips = list_strips(selection.kept, counts, selection.index, rectangle, strips)
    assert strips is not None
    if first_borrowed is not None:
        assert counts is not None
        assert grad_c is not None
        size, dtype = sum(counts.by_chunk[0][first_borrowed:]) * BLOCK_T, work.tokens.e.dtype
        memory = grad_c.view(-1).view(torch.uint8)[: size * dtype.itemsize]
        borrowed = memory.view(dtype).view(-1, BLOCK_T)
    return strip_gradients(
        work.problem,
        work.tokens,
        strips,
        work.bias_sums is not None,
        is_counted=counts is not None,
        borrowed=borrowed,
    )


def _finish_tokens(work: _Work, stored: StoredStrips) -> None:
    """Finish tails and rows of dE of blocks all of whose strips are stored."""
    update_tails(work.problem, work.tokens, stored, work.selection.tail, work.tails)
    if work.grad_e is not None:
        write_grad_e(
            work.problem.c,
            work.tokens,
            stored,
            work.tails,
            centers=work.selection.tail.centers,
            tilts=work.selection.tilts,
            out=work.grad_e,
        )
    low_c, centers, low_e = (
        low_columns(work.problem),
        work.selection.low_centers,
        work.wanted.low_e,
    )
    if low_c is not None and centers is not None and low_e is not None:
        write_grad_e(low_c, work.tokens, stored, work.tails, centers=centers, tilts=None, out=low_e)


def _write_classes(work: _Work, class_pass: ClassPass, stored_once: StoredStrips | None) -> None:
    """Write the rows of dC and dbias of a range of classes.

    ``stored_once`` holds all strips if they need not be computed again.
    """
    kept, wanted, flat = work.selection.kept, work.wanted, work.flat
    classes = work.classes(class_pass.chunks)
    order, rows = None, None
    if wanted.c is not None:
        order = work.selection.order
        if classes != (0, work.problem.c.shape[0]):
            order = ClassOrder.of(kept, classes)
        sums = None
        if kept.num_superblocks > 1:
            sums = PartialSums.zeros(wanted.c, kept.num_superblocks, classes)
        rows = ClassRows(wanted.c, sums, flat)

    for rectangle in class_pass.rectangles:
        stored = _store(work, rectangle) if stored_once is None else stored_once
        if class_pass.finishes_tokens:
            _finish_tokens(work, stored)
        first, stop = class_pass.chunks
        chunks = (max(first, rectangle.chunks[0]), min(stop, rectangle.chunks[1]))
        _add_classes(work, stored, rectangle, chunks, rows, order=order)
        del stored  # frees the strips before the next ones are computed
    _finish_classes(work, classes, rows)


def _add_classes(
    work: _Work,
    stored: StoredStrips,
    rectangle: Rectangle,
    chunks: Range,
    rows: ClassRows | None,
    *,
    order: ClassOrder | None = None,
) -> None:
    """Add stored strips of a range of chunks of classes to the rows of dC and dbias.

    Args:
        work: the backward.
        stored: strips of ``rectangle``.
        rectangle, chunks: see above.
        rows: of dC, if wanted.
        order: of these classes or more; None: not known yet.
    """
    for superblock in range(*rectangle.superblocks):
        # All strips are stored if the host does not know them.
        first_slot = 0 if work.counts is None else work.counts.first_slot(superblock, rectangle)
        part = Part(superblock, first_slot, chunks, work.classes(chunks))
        if work.bias_sums is not None:
            add_bias_grads(stored, work.selection.kept, part, work.bias_sums)
        if rows is not None:
            _add_superblock(work, stored, part, order, rows)


def _finish_classes(work: _Work, classes: Range, rows: ClassRows | None) -> None:
    """Write the rows of dC that are sums, and dbias, of a range of classes, with their tails."""
    kept, bias = work.selection.kept, work.wanted.bias
    if rows is not None and rows.sums is not None:
        every = kept.by_group(*classes)
        write_tail_rows(work.tokens, kept, work.block_sums, rows, every)
    if work.bias_sums is not None and bias is not None:
        write_bias(kept, work.block_sums, work.bias_sums, classes, bias)


def _add_superblock(
    work: _Work, stored: StoredStrips, part: Part, order: ClassOrder | None, rows: ClassRows
) -> None:
    """Write, or add to the partial sums, the strips of one superblock for some classes."""
    kept = work.selection.kept
    if order is None or order.classes.shape[1] != part.classes[1] - part.classes[0]:
        order = ClassOrder.of(kept, part.classes, part.superblock)
    num_active = order.classes.shape[1]
    if work.counts is not None:
        num_active = work.counts.active(part.superblock, part.chunks)
    final = rows.sums is None
    write_grad_c(
        work.class_tokens,
        stored,
        kept,
        part,
        order=order,
        num_active=num_active,
        block_sums=work.block_sums if final else None,
        rows=rows,
    )
    if final:
        listed = order.classes[part.superblock - order.first]
        first = 0 if work.counts is None else num_active
        write_tail_rows(work.tokens, kept, work.block_sums, rows, listed, first=first)
