"""The filtered backward: gradients of the strips that are kept, and of the tail for all others.

Shape legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cut_cross_entropy.filter_report import FilterRecord, recording, report
from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.grad_c import classes_at_once, find_unions
from cut_cross_entropy.kernels.grad_c import grad_c as compute_grad_c
from cut_cross_entropy.kernels.grad_e import grad_e as compute_grad_e
from cut_cross_entropy.kernels.listing import Counts, Places, StripList, find_places, list_strips
from cut_cross_entropy.kernels.problem import Gradients, Problem, write_dense
from cut_cross_entropy.kernels.selection import CHUNK, Kept, keep_strips
from cut_cross_entropy.kernels.strips import strip_gradients, sum_by_class
from cut_cross_entropy.kernels.tail import weighted_row_sum, write_tails

STRIP_BYTES = 2 * BLOCK_T + 8  # a strip's logit gradient and its place in the lists
DENSE_FRACTION = 0.45  # of strips kept: beyond it the dense path is faster
FLAT_FRACTION = 0.5  # of tokens that are flat: beyond it all are treated so
FLAT_GROUPS = 400  # effective number of class groups from which a token counts as flat


def write_filtered(
    problem: Problem, grads: Gradients, energy: Tensor, tolerance: float, filter_mass: float
) -> bool:
    """Gradients of the kept strips plus the tail; False if the data is too flat for that."""
    if energy.is_cuda and torch.cuda.is_current_stream_capturing():
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
    return not too_flat


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
    tokens, c, tiles = problem.tokens, problem.c, problem.tiles
    num_classes = c.shape[0]
    num_blocks, num_chunks = kept.shape
    all_blocks, all_chunks = (0, num_blocks), (0, num_chunks)
    # What is stored at once is bounded. The sums of dC take their half of it, if there are any.
    budget, most_chunks = problem.memory_budget, num_chunks
    if kept.masks.shape[0] > 1 and grads.c is not None:
        budget //= 2
        most_chunks = classes_at_once(c.shape[1], budget) // CHUNK
    capacity = max(1, budget // STRIP_BYTES)
    num_strips = sum(counts.by_block)
    whole = num_strips <= capacity
    held, tails, mass = torch.zeros(
        (3, problem.a.shape[0]), dtype=torch.float32, device=c.device
    ).unbind()

    def compute(
        blocks: tuple[int, int], chunks: tuple[int, int], by_class: bool
    ) -> tuple[StripList, Tensor, Tensor, Tensor]:
        """Strips of a rectangle: their list, gradients, sums, and what each token's hold."""
        first, places, sizes = 0, selected.places, counts.by_block
        if not whole:
            first = sum(counts.by_chunk[: chunks[0]])
            places = find_places(kept, blocks, chunks, selected.places)
            sizes = counts.strips[slice(*blocks), slice(*chunks)].sum(1).tolist()
        strips = list_strips(kept, sizes, blocks, chunks, places, by_class, first)
        return strips, *strip_gradients(
            tokens.e,
            c,
            problem.bias,
            problem.lse,
            problem.a,
            problem.b,
            tokens.targets,
            problem.scale,
            strips,
            problem.softcap,
            tiles,
            bias_grad=grads.bias is not None,
        )

    def add_tails(strips: StripList, held_by_tile: Tensor) -> None:
        write_tails(
            held_by_tile,
            strips,
            problem.a,
            problem.lse,
            problem.sharp,
            problem.softcap,
            problem.shard,
            held,
            tails,
            mass,
        )

    # In rounds over blocks for dE, over classes for dC.
    need_classes = grads.c is not None or grads.bias is not None
    if whole or grads.e is not None:
        for blocks in [all_blocks] if whole else _ranges(counts.by_block, capacity):
            strips, stored, sums, held_by_tile = compute(blocks, all_chunks, by_class=whole)
            add_tails(strips, held_by_tile)
            if grads.e is not None:
                compute_grad_e(
                    stored,
                    c,
                    strips,
                    problem.scale,
                    tails,
                    selected.center,
                    tokens.origin,
                    grads.e,
                    tiles,
                )
    elif need_classes:  # the mass has to be known before the first round
        for chunks in _ranges(counts.by_chunk, capacity):
            strips, _, _, held_by_tile = compute(all_blocks, chunks, by_class=True)
            add_tails(strips, held_by_tile)
    if not need_classes:
        return mass

    mean = weighted_row_sum(tails, tokens.e)
    for chunks in _ranges(counts.by_chunk, num_strips if whole else capacity, most_chunks):
        classes = (chunks[0] * CHUNK, min(num_classes, chunks[1] * CHUNK))
        first = 0
        if not whole:
            first = sum(counts.by_chunk[: chunks[0]])
            _, stored, sums, _ = compute(all_blocks, chunks, by_class=True)
        order, unions = selected.order, selected.unions
        if chunks != all_chunks:
            order = kept.order(*classes)
            unions = find_unions(order, kept.masks)
        if grads.c is not None:
            compute_grad_c(
                stored,
                tokens.e,
                kept,
                selected.places,
                classes,
                first,
                order,
                unions,
                counts.active(chunks),
                problem.scale,
                mean,
                grads.c,
                tiles,
            )
        if grads.bias is not None:
            here = slice(*classes)
            by_class = sum_by_class(sums, kept, selected.places, first, classes)
            rest = kept.weights[here] * (selected.places.tail[0] * tails.sum())
            grads.bias[here] = (by_class + rest).to(grads.bias.dtype)
    return mass


def _ranges(counts: list[int], capacity: int, most: int | None = None) -> list[tuple[int, int]]:
    """Consecutive ranges whose counts sum to at most ``capacity`` (or hold a single element).

    None has more than ``most`` elements.
    """
    ranges, start, total = [], 0, 0
    for i, count in enumerate(counts):
        if i > start and (total + count > capacity or i - start == most):
            ranges.append((start, i))
            start, total = i, 0
        total += count
    ranges.append((start, len(counts)))
    return ranges
