"""Passes of the filtered backward for many budgets: every strip serves where it belongs, once."""

import itertools

import pytest
import torch

from cut_cross_entropy.kernels.filtered import backward, index, schedule
from cut_cross_entropy.kernels.filtered.index import Counts
from cut_cross_entropy.kernels.filtered.schedule import (
    GRADIENT_BYTES,
    STRIP_BYTES,
    make_schedule,
)
from cut_cross_entropy.kernels.filtered.selection import CHUNK, Kept

pytestmark = pytest.mark.interpret

BLOCKS, CHUNKS = 7, 5
BUDGETS = [1, 3000, 30_000, 100_000, 250_000, 2**28]
ROW_BYTES = [0, 1, 40]  # of partial sums


@pytest.fixture(params=[1, 2, 64], ids="{}-blocks".format)
def counts(request, monkeypatch):
    """Random numbers of kept strips, with superblocks of so many blocks."""
    monkeypatch.setattr(index, "SUPERBLOCK", request.param)
    generator = torch.Generator().manual_seed(request.param)
    strips = torch.randint(0, 40, (BLOCKS, CHUNKS), generator=generator, dtype=torch.int32)
    strips[2], strips[:, 1] = 0, 0  # a block and a chunk that keep nothing
    num_superblocks = -(-BLOCKS // request.param)
    rest = torch.zeros(num_superblocks * CHUNKS + 3, dtype=torch.int32)
    nothing = torch.empty(0)
    return Counts(
        Kept(
            strips=nothing,
            masks=nothing,
            keys=nothing,
            offsets=nothing,
            class_mass=nothing,
            mean_mass=nothing,
            mass_deviation=nothing,
            sums=nothing,
            statistics=torch.cat([strips.flatten(), rest]),
            shape=(BLOCKS, CHUNKS),
        )
    )


def cells(rectangle):
    return set(itertools.product(range(*rectangle.blocks), range(*rectangle.chunks)))


def covered_once(rectangles, wanted):
    """Return whether the rectangles cover the wanted blocks and chunks, each once."""
    found = [cell for rectangle in rectangles for cell in cells(rectangle) if cell in wanted]
    return len(found) == len(set(found)) and set(found) == wanted


@pytest.mark.parametrize("need_classes", [False, True])
@pytest.mark.parametrize("row_bytes", ROW_BYTES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_strip_serves_its_tokens_and_its_classes_once(
    counts, budget, row_bytes, need_classes
):
    if len(counts.by_chunk) == 1:
        row_bytes = 0
    made = make_schedule(counts, budget, row_bytes, need_classes)
    everything = set(itertools.product(range(BLOCKS), range(CHUNKS)))
    finishing = [some for some in made.class_passes if some.finishes_tokens]
    for_tokens = [*made.token_passes, *(x for some in finishing for x in some.rectangles)]
    assert covered_once(for_tokens, everything)
    assert all(rectangle.chunks == (0, CHUNKS) for rectangle in for_tokens)
    assert bool(made.class_passes) == need_classes
    if need_classes:
        ends = [bound for some in made.class_passes for bound in some.chunks]
        assert ends == sorted(ends)
        assert (ends[0], ends[-1]) == (0, CHUNKS)
        assert ends[1:-1:2] == ends[2::2], "ranges follow each other"
    for some in made.class_passes:
        assert covered_once(
            some.rectangles, set(itertools.product(range(BLOCKS), range(*some.chunks)))
        )
        starts = [rectangle.blocks[0] for rectangle in some.rectangles]
        assert starts == sorted(starts), "partial sums begin with the first superblock"
    if made.store_once:
        assert len(made.token_passes) == 1
        assert all(some.rectangles == made.token_passes for some in made.class_passes)


@pytest.mark.parametrize("row_bytes", ROW_BYTES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_budget_is_kept_unless_a_single_element_exceeds_it(counts, budget, row_bytes):
    if len(counts.by_chunk) == 1:
        row_bytes = 0
    made = make_schedule(counts, budget, row_bytes, need_classes=True)
    for rectangle in made.token_passes:
        size = sum(counts.within(rectangle)) * STRIP_BYTES
        assert size <= budget or rectangle.blocks[1] - rectangle.blocks[0] == 1
    for some in made.class_passes:
        first, stop = some.chunks
        sums = (stop - first) * row_bytes * CHUNK
        for rectangle in some.rectangles:
            width = rectangle.chunks[1] - rectangle.chunks[0]
            size = sum(counts.within(rectangle)) * STRIP_BYTES
            assert sums + size <= budget or min(width, stop - first) == 1
    assert made.store_once == (
        sum(counts.by_block) * STRIP_BYTES <= (budget // 2 if row_bytes else budget)
    )


@pytest.mark.parametrize("free_bytes", [1, 10, 64, 10**6])
@pytest.mark.parametrize("budget", BUDGETS)
def test_rows_of_grad_c_hold_the_strips_of_the_classes_behind_them(counts, budget, free_bytes):
    made = make_schedule(counts, budget, 0, True, free_bytes)
    strips, num_strips = counts.by_chunk[0], sum(counts.by_block)
    first = made.first_borrowed
    fits = num_strips * STRIP_BYTES <= budget
    assert fits <= made.store_once
    if first is None:
        return
    assert len(counts.by_chunk) == 1, "rows of several superblocks are summed in dC"
    assert not fits
    assert made.store_once
    assert [some.chunks for some in made.class_passes] == [(first, CHUNKS), (0, first)]
    assert all(some.rectangles == made.token_passes for some in made.class_passes)
    borrowed = sum(strips[first:]) * GRADIENT_BYTES
    assert borrowed <= first * CHUNK * free_bytes
    assert num_strips * STRIP_BYTES - borrowed <= budget


def test_rows_of_grad_c_are_borrowed_where_the_budget_is_too_small(counts):
    if len(counts.by_chunk) == 1:
        budget = sum(counts.by_block) * STRIP_BYTES - 1
        assert make_schedule(counts, budget, 0, True, 10**6).first_borrowed == 1
        assert make_schedule(counts, budget, 0, False).first_borrowed is None


def test_ranges_of_one_length():
    assert schedule._even_ranges(10, 0, 0) == [(0, 10)]
    assert schedule._even_ranges(10, 4, 12) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert schedule._even_ranges(10, 4, 16) == [(0, 4), (4, 8), (8, 10)]
    assert schedule._even_ranges(3, 4, 1) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize(
    ("dim", "measured"), [(640, 0.21), (1024, 0.265), (2048, 0.324), (4096, 0.328)]
)
def test_the_exact_path_is_taken_where_it_was_measured_to_be_faster(dim, measured):
    """Of 8,192 tokens on an H200 (docs/engineering_log.md); 45 % for all, before."""
    assert abs(backward.dense_fraction(dim) - measured) < 0.03


def test_few_features_have_a_share_too():
    assert backward.dense_fraction(8) == backward.dense_fraction(512) > 0.15
