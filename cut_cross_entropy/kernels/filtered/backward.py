"""The filtered backward: gradients of the kept strips, and of the tail for all others.

``selection`` chooses the strips by a threshold that ``calibrate`` sets, ``tail_sample`` estimates
what they leave out, ``passes`` computes them. If they are too many, all strips are to be computed
instead; so are those of flat tokens. ``measure`` finds the errors of the gradients if they are
recorded. Shape legend: ``cut_cross_entropy.kernels``.
"""

import functools
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
from cut_cross_entropy.kernels.filtered.flat import FlatTokens, most_flat, whole_steps
from cut_cross_entropy.kernels.filtered.index import Counts
from cut_cross_entropy.kernels.filtered.measure import measure
from cut_cross_entropy.kernels.filtered.passes import Results, Selection, Work, run_made, run_passes
from cut_cross_entropy.kernels.filtered.selection import Kept, find_threshold, keep_strips
from cut_cross_entropy.kernels.filtered.tail_sample import TailSample
from cut_cross_entropy.kernels.launch import HostCopy, is_captured
from cut_cross_entropy.kernels.tokens import BackwardTokens, scatter_rows
from cut_cross_entropy.problem import AdaptedProblem, Filter, KernelState, MadeProblem, Problem

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
    """Compute gradients from the kept strips and the tail, unless all strips are to be taken.

    ``problem`` has c and bias contiguous, c of the compute dtype. The number of kept strips is read
    from the device: the one synchronisation of a filtered step. While a CUDA graph is captured, it
    stays there.
    """
    strips, captured = saved.strips, is_captured(saved.strips)
    if captured and not is_supported(problem, tokens, wanted):
        return Outcome(None, None, too_flat=True)
    threshold = find_threshold(strips, tokens, filter_)
    tilts = None
    is_calibrated = calibrates(problem, filter_) and tokens.eta is None  # whose tail is another
    is_limited = filter_.most_dropped < 1
    if (wanted.e or is_calibrated or is_limited) and not isinstance(problem, MadeProblem):
        sample = TailSample.of(problem, tokens, threshold)
        tilts = sample.tilts
        if is_calibrated:
            calibrate(problem, tokens, sample.mass, threshold, filter_.max_error)
        elif is_limited:
            sample.write_dropped(tokens, threshold)
    kept = keep_strips(threshold)
    if captured:
        grad_e = _captured_gradients(
            problem, tokens, wanted, kept=kept, tilts=tilts, most_dropped=filter_.most_dropped
        )
        return Outcome(grad_e, None, too_flat=False)
    counts = Counts(kept)
    # Half as many strips again as the budget holds may be stored in dC.
    budget = problem.memory_budget * 3 // 2
    share = dense_fraction(problem.c.shape[1])
    selection = Selection.of(kept, problem, tokens, wanted, tilts, budget=budget, share=share)
    results = Results.zeros(problem, wanted)
    num_strips = sum(counts.by_block)  # waits for the device, which is computing the selection

    is_dense = too_flat(num_strips, counts.flat_tokens, counts.tokens, problem.c.shape)
    is_dense |= counts.dropped_mass > filter_.most_dropped
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
    *,
    kept: Kept,
    tilts: Tensor | None,  # (blocks,)
    most_dropped: float,
) -> Tensor | None:
    """Write the gradients by the path that the device chooses; return dE, if wanted."""
    num_flat = min(most_flat(problem), BLOCK_T, tokens.a.shape[0])
    budget = BUDGETS * problem.memory_budget
    share = dense_fraction(problem.c.shape[1])
    selection = Selection.of(kept, problem, tokens, wanted, tilts, budget=budget, share=share)
    choice = Choice.of(
        kept,
        selection.listed[0],
        num_flat,
        share=share,
        flat_share=FLAT_FRACTION,
        most_dropped=most_dropped,
    )
    make_flat = None
    if num_flat:

        def make_flat() -> FlatTokens:
            some = first_flat(tokens, num_flat)
            return FlatTokens.of(problem, some, wanted, choice.num_flat)

    peaked = tokens.without_flat()
    results = Results.zeros(problem, wanted)
    work = Work(problem, peaked, wanted, selection, None, make_flat=make_flat, **results._asdict())
    run_passes(work)
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


def _kept_and_flat(
    problem: Problem,
    tokens: BackwardTokens,
    wanted: Wanted,
    selection: Selection,
    counts: Counts,
    results: Results,
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

    work = Work(
        problem, peaked, wanted, selection, counts, make_flat=make_flat, **results._asdict()
    )
    if is_made:
        run_made(work)
    else:
        run_passes(work)
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
