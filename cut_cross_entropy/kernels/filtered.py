"""The filtered backward: gradients of the strips that are kept, and of the tail for all others.

Shape legend: ``cut_cross_entropy.kernels``.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from cut_cross_entropy.filter_report import FilterRecord, recording, report
from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.buffers import aligned_rows
from cut_cross_entropy.kernels.grad_c import find_unions, write_rest
from cut_cross_entropy.kernels.grad_c import grad_c as compute_grad_c
from cut_cross_entropy.kernels.grad_e import grad_e as compute_grad_e
from cut_cross_entropy.kernels.launch import is_captured
from cut_cross_entropy.kernels.listing import Counts, Places, StripList, find_places, list_strips
from cut_cross_entropy.kernels.problem import Gradients, Problem, write_dense
from cut_cross_entropy.kernels.selection import CHUNK, GROUP, Kept, keep_strips
from cut_cross_entropy.kernels.strips import add_by_class, strip_gradients
from cut_cross_entropy.kernels.sums import Sums, bytes_of_sums
from cut_cross_entropy.kernels.tail import weighted_row_sum, write_tails

STRIP_BYTES = 2 * BLOCK_T + 16  # a strip's logit gradient, its sums, its place in the lists
MAX_BUDGET = 2**32  # bytes: 32 bits reach the elements of the strips that are stored
DENSE_FRACTION = 0.45  # of strips kept: beyond it the dense path is faster
FLAT_FRACTION = 0.5  # of tokens that are flat: beyond it all are treated so
FLAT_GROUPS = 400  # effective number of class groups from which a token counts as flat


def write_filtered(
    problem: Problem, grads: Gradients, energy: Tensor, tolerance: float, filter_mass: float
) -> tuple[bool, int]:
    """Gradients of the kept strips plus the tail, or False if the data is too flat for that; and
    how many tokens count.
    """
    if is_captured(energy):
        raise RuntimeError(
            "the filtered gradient reads the number of kept strips from the device, which a CUDA "
            "graph cannot capture; use impl='cce_exact' or filter_eps=None"
        )
    kept = keep_strips(energy, problem.sharp, tolerance, filter_mass)
    counts = Counts(kept)
    selected = _Selected.of(kept, problem)
    num_strips = sum(counts.by_block)  # the one wait for the device, while it makes ``selected``

    possible = -(-counts.tokens // BLOCK_T) * energy.shape[1]
    too_flat = (
        counts.flat_tokens > FLAT_FRACTION * counts.tokens or num_strips > DENSE_FRACTION * possible
    )
    mass = None
    if not too_flat:
        sharp = problem.without(problem.sharp == -1) if counts.flat_tokens else problem
        mass = _strips_and_tail(sharp, grads, kept, selected, counts)
        if counts.flat_tokens:
            flat_first = torch.sort(problem.sharp.sub(-1).abs(), stable=True).indices
            write_dense(problem.of(flat_first[: counts.flat_tokens]), grads, accumulate=True)
    if recording():
        report(
            FilterRecord(
                path="dense" if too_flat else "filtered",
                strips_kept=1.0 if too_flat else num_strips / max(1, possible),
                dropped_mass=0.0 if mass is None else float(mass.sum()) / max(1, counts.tokens),
                flat_tokens=counts.flat_tokens,
                tokens=counts.tokens,
            )
        )
    return not too_flat, counts.tokens


@dataclass(frozen=True)
class _Selected:
    """What follows from the selection without knowing how much it kept.

    Args:
        places: of all strips.
        center: (D,) mean row of c over the tail.
        order: (groups, V) see :meth:`Kept.order`.
        unions: see find_unions.
    """

    places: Places
    center: Tensor
    order: Tensor
    unions: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, kept: Kept, problem: Problem) -> "_Selected":
        places = find_places(kept)
        order = kept.order(0, kept.keys.shape[1])
        unions = find_unions(order, kept.masks)
        return cls(places, weighted_row_sum(kept.weights, problem.c, places.tail), order, unions)


def _strips_and_tail(
    problem: Problem, grads: Gradients, kept: Kept, selected: _Selected, counts: Counts
) -> Tensor:
    """Writes the gradients; returns the dropped mass of each token, (N,)."""
    work = _Work.of(problem, grads, kept, selected, counts)
    num_blocks, num_chunks = kept.shape
    all_blocks, all_chunks = (0, num_blocks), (0, num_chunks)
    num_groups = kept.masks.shape[0]
    num_strips = sum(counts.by_block)
    # Where dC has sums that wait between groups, they and the strips share what may be stored.
    row_bytes = 0
    if grads.c is not None and num_groups > 1:
        row_bytes = bytes_of_sums(grads.c, num_groups)
    budget = min(problem.memory_budget, MAX_BUDGET)
    need_classes = grads.c is not None or grads.bias is not None

    if num_strips * STRIP_BYTES <= (budget if row_bytes == 0 else budget // 2):
        stored = work.make(all_blocks, all_chunks, by_class=True)
        work.finish_tokens(stored)
        if need_classes:
            ranges = _even_ranges(num_chunks, row_bytes * CHUNK, budget // 2)
            for chunks in ranges:
                work.begin_classes(chunks)
                for group in range(num_groups):
                    work.add_group(stored, group, chunks)
                work.finish_classes(chunks)
        return work.mass

    if num_groups > 1:
        ranges = _even_ranges(num_chunks, row_bytes * CHUNK, budget * 3 // 4)
    else:
        ranges = _ranges(counts.by_chunk[0], budget // STRIP_BYTES)
    left = budget - max(stop - first for first, stop in ranges) * row_bytes * CHUNK
    # Strips that are there for all classes serve their tokens as well: those of the first range are
    # made for all, if so many fit.
    whole = _rectangles(counts.by_chunk, all_chunks, left // STRIP_BYTES)
    shared = need_classes and num_groups > 1 and all(part == all_chunks for _, part in whole)
    if not shared:
        for blocks in _ranges(counts.by_block, budget // STRIP_BYTES):
            work.finish_tokens(work.make(blocks, all_chunks, by_class=False))
    if need_classes:
        for chunks in ranges:
            work.begin_classes(chunks)
            first = shared and chunks == ranges[0]
            parts = whole if first else _rectangles(counts.by_chunk, chunks, left // STRIP_BYTES)
            for groups, part in parts:
                blocks = (groups[0] * GROUP, min(num_blocks, groups[1] * GROUP))
                stored = work.make(blocks, part, by_class=True)
                if first:
                    work.finish_tokens(stored)
                for group in range(*groups):
                    work.add_group(stored, group, chunks if first else part)
                del stored  # before the next ones are made
            work.finish_classes(chunks)
    return work.mass


@dataclass(frozen=True)
class _Stored:
    """Strips of a rectangle with their logit gradients.

    Args:
        strips: their list.
        grads: (K, 128), see strip_gradients; like the two that follow.
        bias_grads: (K,).
        held: (tiles, 128).
        blocks, chunks: the rectangle.
    """

    strips: StripList
    grads: Tensor
    bias_grads: Tensor
    held: Tensor
    blocks: tuple[int, int]
    chunks: tuple[int, int]


@dataclass
class _Work:
    """The pieces of a filtered backward, which :func:`_strips_and_tail` puts in order.

    Args:
        problem, grads, kept, selected, counts: of the backward.
        held: (N,) what the kept strips of each token hold so far.
        tails: (N,) what each token's tail weighs, once all its strips were seen.
        mass: (N,) its dropped mass, likewise.
        sums: of the range of classes at hand, between groups of blocks.
        order, unions: of that range, for each group; see Kept.order and find_unions.
        bias_sums: (V,) float32.
    """

    problem: Problem
    grads: Gradients
    kept: Kept
    selected: _Selected
    counts: Counts
    held: Tensor
    tails: Tensor
    mass: Tensor
    bias_sums: Tensor | None
    sums: Sums | None = None
    order: Tensor | None = None
    unions: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls,
        problem: Problem,
        grads: Gradients,
        kept: Kept,
        selected: _Selected,
        counts: Counts,
    ) -> "_Work":
        device = problem.c.device
        held, tails, mass = aligned_rows(3, problem.a.shape[0], torch.float32, device, zeros=True)
        bias_sums = None
        if grads.bias is not None:
            bias_sums = torch.zeros(grads.bias.shape, dtype=torch.float32, device=device)
        return cls(problem, grads, kept, selected, counts, held, tails, mass, bias_sums)

    @functools.cached_property
    def mean(self) -> Tensor:
        """(D,) tail-weighted sum of the embeddings; for when the tails of all tokens are known."""
        return weighted_row_sum(self.tails, self.problem.tokens.e)

    def make(self, blocks: tuple[int, int], chunks: tuple[int, int], by_class: bool) -> _Stored:
        """Strips of a rectangle; of whole groups of blocks if ``by_class``."""
        problem, counts = self.problem, self.counts
        places, sizes = self.selected.places, counts.by_block
        if (blocks, chunks) != ((0, self.kept.shape[0]), (0, self.kept.shape[1])):
            places = find_places(self.kept, blocks, chunks, self.selected.places)
            sizes = counts.in_rectangle(blocks, chunks)
        strips = list_strips(self.kept, sizes, blocks, chunks, places, by_class)
        return _Stored(
            strips,
            *strip_gradients(
                problem.tokens.e,
                problem.c,
                problem.bias,
                problem.lse,
                problem.a,
                problem.b,
                problem.tokens.targets,
                problem.scale,
                strips,
                problem.softcap,
                problem.tiles,
                bias_grad=self.bias_sums is not None,
            ),
            blocks,
            chunks,
        )

    def finish_tokens(self, stored: _Stored) -> None:
        """Tails, and rows of dE, of blocks whose strips are all here."""
        problem = self.problem
        write_tails(
            stored.held,
            stored.strips,
            problem.a,
            problem.lse,
            problem.sharp,
            problem.softcap,
            problem.shard,
            self.held,
            self.tails,
            self.mass,
        )
        if self.grads.e is not None:
            compute_grad_e(
                stored.grads,
                problem.c,
                stored.strips,
                problem.scale,
                self.tails,
                self.selected.center,
                problem.tokens.origin,
                self.grads.e,
                problem.tiles,
            )

    def begin_classes(self, chunks: tuple[int, int]) -> None:
        """Order of a range of classes, and their sums if they have to wait between groups."""
        self.sums = self.order = self.unions = None  # frees those of the last range first
        if self.grads.c is None:
            return
        self.order, self.unions = self.selected.order, self.selected.unions
        if chunks != (0, self.kept.shape[1]):
            self.order = self.kept.order(*self._classes(chunks))
            self.unions = find_unions(self.order, self.kept.masks)
        num_groups = self.kept.masks.shape[0]
        if num_groups > 1:
            self.sums = Sums.of(self.grads.c, num_groups, self._classes(chunks))

    def add_group(self, stored: _Stored, group: int, chunks: tuple[int, int]) -> None:
        """What one group of blocks adds to a range of classes, or to a part of it."""
        selected, classes = self.selected, self._classes(chunks)
        first = self.counts.first_number(group, stored.blocks[0] // GROUP, stored.chunks)
        if self.bias_sums is not None:
            add_by_class(
                stored.bias_grads, self.kept, selected.places, group, first, classes, self.bias_sums
            )
        if self.grads.c is None or self.order is None or self.unions is None:
            return
        order, unions = self.order[group], (self.unions[0][group], self.unions[1][group])
        if order.shape[0] != classes[1] - classes[0]:
            here = slice(group, group + 1)
            own = self.kept.order(*classes, here)
            found = find_unions(own, self.kept.masks[here])
            order, unions = own[0], (found[0][0], found[1][0])
        num_active = self.counts.active(group, chunks)
        compute_grad_c(
            stored.grads,
            self.problem.tokens.e,
            self.kept,
            selected.places,
            group,
            num_active,
            first,
            order,
            unions,
            self.problem.scale,
            self.mean if self.sums is None else None,
            self.grads.c,
            self.sums,
            self.problem.tiles,
        )
        if self.sums is None:
            self._write_rest(order[num_active:])

    def finish_classes(self, chunks: tuple[int, int]) -> None:
        """Rows of dC and of dbias of a range of classes, when all groups were added."""
        if self.sums is not None:
            self._write_rest(None)
        if self.bias_sums is not None and self.grads.bias is not None:
            here = slice(*self._classes(chunks))
            rest = self.kept.weights[here] * (self.selected.places.tail[0] * self.tails.sum())
            self.grads.bias[here] = (self.bias_sums[here] + rest).to(self.grads.bias.dtype)

    def _write_rest(self, idle: Tensor | None) -> None:
        assert self.grads.c is not None
        write_rest(
            self.kept,
            self.selected.places,
            idle,
            self.problem.scale,
            self.mean,
            self.grads.c,
            self.sums,
        )

    def _classes(self, chunks: tuple[int, int]) -> tuple[int, int]:
        return chunks[0] * CHUNK, min(self.problem.c.shape[0], chunks[1] * CHUNK)


def _ranges(
    counts: list[int], capacity: int, within: tuple[int, int] | None = None
) -> list[tuple[int, int]]:
    """Consecutive ranges whose counts sum to at most ``capacity`` (or hold a single element)."""
    first, stop = within or (0, len(counts))
    ranges, start, total = [], first, 0
    for i in range(first, stop):
        if i > start and total + counts[i] > capacity:
            ranges.append((start, i))
            start, total = i, 0
        total += counts[i]
    ranges.append((start, stop))
    return ranges


def _rectangles(
    counts: list[list[int]], chunks: tuple[int, int], capacity: int
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges of groups and of chunks that hold at most ``capacity`` strips (or a single chunk).

    As many groups as fit, with all the chunks; of a group that does not fit, as many chunks.
    """
    result: list[tuple[tuple[int, int], tuple[int, int]]] = []
    start = total = 0
    for group, row in enumerate(counts):
        size = sum(row[slice(*chunks)])
        if group > start and total + size > capacity:
            result.append(((start, group), chunks))
            start, total = group, 0
        total += size
        if size > capacity:
            result += [((group, group + 1), part) for part in _ranges(row, capacity, chunks)]
            start, total = group + 1, 0
    if start < len(counts):
        result.append(((start, len(counts)), chunks))
    return result


def _even_ranges(count: int, size: int, capacity: int) -> list[tuple[int, int]]:
    """As few consecutive ranges as fit, of about the same length (at least 1)."""
    most = count if size == 0 else min(count, max(1, capacity // size))
    length = -(-count // -(-count // most))
    return [(start, min(count, start + length)) for start in range(0, count, length)]
