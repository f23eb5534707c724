"""Decides which strips are stored together, so that a memory budget is kept; pure host code.

Every row of dE is finished from strips that are stored at once, and so is every row of dC, or it is
summed over superblocks. If all strips fit the budget, they are computed once and serve everything.
So they are if those of the last classes fit the rows of dC of the first ones, which are written
last.
Shape legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.filtered.index import Counts, Range, Rectangle
from cut_cross_entropy.kernels.filtered.selection import CHUNK

GRADIENT_BYTES = 2 * BLOCK_T  # a strip's logit gradient
STRIP_BYTES = GRADIENT_BYTES + 16  # and its sums and its place in the lists
MAX_BUDGET = 2**32  # bytes: 32 bits reach the elements of the strips that are stored


@dataclass(frozen=True)
class ClassPass:
    """Computation of the rows of dC and dbias of a range of classes.

    Args:
        chunks: range of chunks of classes.
        rectangles: strips to store one after the other, in the order of their superblocks.
        finishes_tokens: whether each rectangle also serves the tokens of its blocks; it then holds
            all their strips, of classes outside the range as well.
    """

    chunks: Range
    rectangles: tuple[Rectangle, ...]
    finishes_tokens: bool = False


@dataclass(frozen=True)
class Schedule:
    """Order of a filtered backward: token passes, then class passes.

    Args:
        token_passes: rectangles with all strips of their blocks, for tails and dE.
        class_passes: ranges of classes; empty if neither dC nor dbias is wanted.
        store_once: whether the only token pass stores all strips, for the class passes too.
        first_borrowed: the chunk from which on they are stored in the rows of dC of the chunks
            before it; None if none are. The first class pass is that of these chunks then.
    """

    token_passes: tuple[Rectangle, ...]
    class_passes: tuple[ClassPass, ...]
    store_once: bool = False
    first_borrowed: int | None = None


def make_schedule(
    counts: Counts, budget: int, row_bytes: int, need_classes: bool, free_bytes: int = 0
) -> Schedule:
    """Choose the passes of a filtered backward.

    Args:
        counts: kept strips by block and chunk.
        budget: bytes that stored strips and partial sums may take.
        row_bytes: bytes that partial sums take per class; 0 without partial sums.
        need_classes: whether dC or dbias is wanted.
        free_bytes: bytes of a row of dC that may hold strips until it is written.
    """
    budget = min(budget, MAX_BUDGET)
    num_blocks, num_chunks = len(counts.by_block), len(counts.by_chunk[0])
    all_chunks = (0, num_chunks)

    num_strips = sum(counts.by_block)
    if num_strips * STRIP_BYTES <= (budget if row_bytes == 0 else budget // 2):
        return store_all((num_blocks, num_chunks), budget, row_bytes, need_classes)

    several_superblocks = len(counts.by_chunk) > 1
    if free_bytes and not several_superblocks:
        first = _first_borrowed(counts.by_chunk[0], budget, free_bytes * CHUNK)
        if first is not None:
            everything = Rectangle((0, num_blocks), all_chunks, by_class=True)
            last, others = (
                ClassPass(chunks, (everything,)) for chunks in ((first, num_chunks), (0, first))
            )
            return Schedule((everything,), (last, others), store_once=True, first_borrowed=first)

    # Partial sums and strips share the budget.
    if several_superblocks:
        ranges = _even_ranges(num_chunks, row_bytes * CHUNK, budget * 3 // 4)
    else:
        ranges = _ranges(counts.by_chunk[0], budget // STRIP_BYTES)
    left = budget - max(stop - first for first, stop in ranges) * row_bytes * CHUNK
    capacity = left // STRIP_BYTES
    # Strips of all classes serve their tokens as well: those of the first range are computed for
    # all classes, if they fit.
    whole = rectangles(counts, all_chunks, capacity)
    shared = need_classes and several_superblocks and all(x.chunks == all_chunks for x in whole)
    passes: tuple[ClassPass, ...] = ()
    if need_classes:
        passes = tuple(
            ClassPass(chunks, whole, finishes_tokens=True)
            if shared and chunks == ranges[0]
            else ClassPass(chunks, rectangles(counts, chunks, capacity))
            for chunks in ranges
        )
    blocks = [] if shared else _ranges(counts.by_block, budget // STRIP_BYTES)
    tokens = tuple(Rectangle(some, all_chunks, by_class=False) for some in blocks)
    return Schedule(tokens, passes)


def store_all(shape: Range, budget: int, row_bytes: int, need_classes: bool) -> Schedule:
    """Store all strips once, whatever their number; half of the budget is for partial sums.

    Args:
        shape: numbers of blocks and of chunks.
        budget, row_bytes, need_classes: see :func:`make_schedule`.
    """
    num_blocks, num_chunks = shape
    everything = Rectangle((0, num_blocks), (0, num_chunks), by_class=True)
    ranges = _even_ranges(num_chunks, row_bytes * CHUNK, budget // 2) if need_classes else []
    passes = tuple(ClassPass(chunks, (everything,)) for chunks in ranges)
    return Schedule((everything,), passes, store_once=True)


def _first_borrowed(strips: list[int], budget: int, free_bytes: int) -> int | None:
    """Return the first chunk such that the strips from there on fit the rows of those before it.

    Args:
        strips: kept strips of each chunk.
        budget: bytes for the other strips, and for what is stored of all.
        free_bytes: of the rows of a chunk.

    Returns:
        None if there is no such chunk, or the others exceed the budget.
    """
    own, borrowed = 0, sum(strips)
    for chunk, count in enumerate(strips):
        if borrowed * GRADIENT_BYTES <= min(chunk * free_bytes, MAX_BUDGET):
            rest = borrowed * (STRIP_BYTES - GRADIENT_BYTES)
            return chunk if own * STRIP_BYTES + rest <= budget else None
        own, borrowed = own + count, borrowed - count
    return None


def _ranges(counts: list[int], capacity: int, within: Range | None = None) -> list[Range]:
    """Split into consecutive ranges whose counts sum to ``capacity`` at most, or of one element."""
    first, stop = within or (0, len(counts))
    ranges, start, total = [], first, 0
    for i in range(first, stop):
        if i > start and total + counts[i] > capacity:
            ranges.append((start, i))
            start, total = i, 0
        total += counts[i]
    ranges.append((start, stop))
    return ranges


def rectangles(counts: Counts, chunks: Range, capacity: int) -> tuple[Rectangle, ...]:
    """Split a range of chunks into rectangles of ``capacity`` strips at most, or of one chunk.

    A rectangle takes as many superblocks as fit, with all the chunks; of a superblock that does not
    fit, as many chunks as fit.
    """
    found: list[tuple[Range, Range]] = []
    start = total = 0
    for superblock, row in enumerate(counts.by_chunk):
        size = sum(row[slice(*chunks)])
        if superblock > start and total + size > capacity:
            found.append(((start, superblock), chunks))
            start, total = superblock, 0
        total += size
        if size > capacity:
            some = (superblock, superblock + 1)
            found += [(some, part) for part in _ranges(row, capacity, chunks)]
            start, total = superblock + 1, 0
    if start < len(counts.by_chunk):
        found.append(((start, len(counts.by_chunk)), chunks))
    return tuple(counts.rectangle(superblocks, part) for superblocks, part in found)


def _even_ranges(count: int, size: int, capacity: int) -> list[Range]:
    """Split ``count`` elements into as few consecutive ranges as fit, of about the same length."""
    most = count if size == 0 else min(count, max(1, capacity // size))
    length = -(-count // -(-count // most))
    return [(start, min(count, start + length)) for start in range(0, count, length)]
