"""Passes of the filtered backward over the kept strips: what they store, add up and write.

``index`` lists the strips, ``schedule`` decides which are stored together, ``strips`` computes
their logit gradients, ``tail``, ``grad_e`` and ``grad_c`` the results. Shape legend:
``cut_cross_entropy.kernels``.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T, made_rows
from cut_cross_entropy.kernels.exact import Wanted
from cut_cross_entropy.kernels.filtered.class_weights import ClassWeights, has_class_weights
from cut_cross_entropy.kernels.filtered.flat import FlatTokens, flat_bytes
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
from cut_cross_entropy.kernels.filtered.partial_sums import PartialSums, bytes_per_row
from cut_cross_entropy.kernels.filtered.schedule import (
    MAX_BUDGET,
    STRIP_BYTES,
    ClassPass,
    make_schedule,
    rectangles,
    store_all,
)
from cut_cross_entropy.kernels.filtered.selection import CHUNK, Kept
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
from cut_cross_entropy.kernels.tokens import BackwardTokens
from cut_cross_entropy.problem import MadeProblem, Problem, low_columns


@dataclass(frozen=True)
class Selection:
    """The kept strips, and what follows from them without knowing how many they are.

    Args:
        kept: the kept strips.
        index: index of all of them.
        tail: what replaces the others; without centres while rows are still to be made, and where
            dE is not wanted.
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
        share: float,
    ) -> "Selection":
        """List as many strips as ``budget`` bytes hold, at most a ``share`` of all."""
        c, low_c = problem.c, low_columns(problem)
        index = index_strips(kept)
        order = ClassOrder.of(kept, (0, c.shape[0]))
        low_centers = None if low_c is None else Tail.of(kept, low_c).centers
        # The lists of the dense path, or of strips that are not stored together, are not read.
        most_strips = min(
            min(budget, MAX_BUDGET) // STRIP_BYTES,
            int(min(max(0.0, share), 1.0) * kept.strips.numel()),
        )
        is_made = isinstance(problem, MadeProblem)
        most_strips = 0 if is_made else most_strips
        if wanted.e and not is_made:
            tail = Tail.of(kept, c)
        else:
            tail = Tail.without_centers(kept, c.shape[1])
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


class Results(NamedTuple):
    """Zeros for what a backward sums up, allocated while the host waits for the counts.

    Args:
        tails, grad_e, bias_sums: see :class:`Work`.
    """

    tails: TokenTails
    grad_e: Tensor | None
    bias_sums: Tensor | None

    @classmethod
    def zeros(cls, problem: Problem, wanted: Wanted) -> "Results":
        """Allocate those of the wanted gradients."""
        e, bias = problem.e, wanted.bias
        return cls(
            tails=TokenTails.zeros(e.shape[0], e.device),
            grad_e=e.new_zeros(e.shape, dtype=wanted.dtype_e or e.dtype) if wanted.e else None,
            bias_sums=None if bias is None else bias.new_zeros(bias.shape, dtype=torch.float32),
        )


@dataclass(frozen=True)
class Work:
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
    selection: Selection
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


def run_passes(work: Work) -> None:
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


def run_made(work: Work) -> None:
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


def _store(work: Work, rectangle: Rectangle, first_borrowed: int | None = None) -> StoredStrips:
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


def _finish_tokens(work: Work, stored: StoredStrips) -> None:
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


def _write_classes(work: Work, class_pass: ClassPass, stored_once: StoredStrips | None) -> None:
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
    work: Work,
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


def _finish_classes(work: Work, classes: Range, rows: ClassRows | None) -> None:
    """Write the rows of dC that are sums, and dbias, of a range of classes, with their tails."""
    kept, bias = work.selection.kept, work.wanted.bias
    if rows is not None and rows.sums is not None:
        every = kept.by_group(*classes)
        write_tail_rows(work.tokens, kept, work.block_sums, rows, every)
    if work.bias_sums is not None and bias is not None:
        write_bias(kept, work.block_sums, work.bias_sums, classes, bias)


def _add_superblock(
    work: Work, stored: StoredStrips, part: Part, order: ClassOrder | None, rows: ClassRows
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
