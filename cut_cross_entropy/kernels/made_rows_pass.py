"""Pass over classes whose rows are made chunk by chunk (``made_rows``): tokens, bounds and sums.

Shape legend: ``cut_cross_entropy.kernels``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cut_cross_entropy.constants import MAX_ELEMENTS
from cut_cross_entropy.filter_report import FilterRecord, recording, report
from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.exact import MAX_TOKENS, add_product
from cut_cross_entropy.kernels.launch import (
    HostCopy,
    aligned_rows,
    cdiv,
    is_captured,
    launch,
    next_power_of_2,
)
from cut_cross_entropy.kernels.likely_classes import list_likely, list_size, raise_by_classes
from cut_cross_entropy.kernels.lse import PassInputs, raise_bound, vocabulary_pass
from cut_cross_entropy.kernels.order import order_by_content
from cut_cross_entropy.kernels.powers import choose_segment_tiles, sum_powers
from cut_cross_entropy.kernels.tokens import Tokens, list_valid, low_rows, score
from cut_cross_entropy.kernels.triton.made_rows_pass import scale_sums_kernel
from cut_cross_entropy.outputs import Asked
from cut_cross_entropy.problem import AdaptedProblem, Problem, low_columns

ALIGNED = 256  # classes of a library product, but for the last few
FEWEST = 1024  # classes of a chunk, if fewer tokens at a time allow it
LOWEST = -1e30  # bound of a token of which nothing is known
COPIES = 2  # of the rows: themselves, and what they are made of


class ChunkSizes(NamedTuple):
    """Numbers of classes of a chunk, and of tokens whose logits of it are stored at a time."""

    classes: int
    tokens: int

    def chunks(self, num_classes: int) -> list[slice]:
        """Return the chunks of all classes."""
        starts = range(0, num_classes, self.classes)
        return [slice(start, min(start + self.classes, num_classes)) for start in starts]


def choose_sizes(problem: Problem, num_tokens: int, columns: int = 0) -> ChunkSizes:
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
    return ChunkSizes(min(num_classes, cdiv(at_once, ALIGNED) * ALIGNED), tokens)


def aligned_slices(num_classes: int) -> Iterator[slice]:
    """Slices for library products: the last few classes of an odd number slow down all of it."""
    aligned = num_classes if num_classes % 8 == 0 else num_classes // ALIGNED * ALIGNED
    for classes in (slice(0, aligned), slice(aligned, num_classes)):
        if classes.start < classes.stop:
            yield classes


@dataclass(frozen=True)
class ChunkPass:
    """The tokens, and what is known of them after some chunks of classes.

    Args:
        problem, make_rows: see :func:`made_rows.loss_and_gradient`.
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
    ) -> "ChunkPass":
        """Return the state before the first chunk, with tokens in order of content if asked."""
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
class PowerSums:
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
    def zeros(cls, problem: Problem, num_tokens: int, sizes: ChunkSizes) -> "PowerSums":
        """Return the sums over no chunk."""
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
            for columns in aligned_slices(c.shape[0]):
                add_product(self.products[part], powers[:, columns], c[columns])
        self.others.append(others[0] if len(others) == 1 else torch.cat(others, 1))
