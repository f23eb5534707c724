"""Compiles the kernels of a step concurrently, before the first step of its kind.

Forward and backward run once on tensors of the meta device, which have shapes and no values, and
launch nothing (``launch.planning``). The launches that they would have made are then compiled.
"""

import threading
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cut_cross_entropy.budget import powers_per_chunk
from cut_cross_entropy.device_support import triton_is_interpreted
from cut_cross_entropy.filter_report import unrecorded
from cut_cross_entropy.kernels import BLOCK_T, SUPERBLOCK, exact_sum, made_rows, scale, step
from cut_cross_entropy.kernels.filtered.calibrate import calibrates
from cut_cross_entropy.kernels.filtered.class_weights import has_class_weights
from cut_cross_entropy.kernels.filtered.partial_sums import FEW_SUPERBLOCKS
from cut_cross_entropy.kernels.launch import (
    Plan,
    as_captured,
    compile_concurrently,
    is_captured,
    kind_of,
    planning,
)
from cut_cross_entropy.problem import (
    AdaptedProblem,
    Filter,
    MadeProblem,
    Needed,
    PerToken,
    Problem,
    low_columns,
)

_compiled: set[tuple[object, ...]] = set()
_compiling = threading.Lock()


def kind_of_step(problem: Problem, filter_: Filter, training: bool) -> tuple[object, ...]:
    """Return a key that two steps share if they launch the same variants of the kernels."""
    tensors, low_c = (problem.e, problem.c, problem.targets, problem.bias), low_columns(problem)
    num_superblocks = -(-problem.e.shape[0] // (BLOCK_T * SUPERBLOCK))
    return (
        problem.e.device,
        tuple(None if x is None else (x.dtype, x.is_contiguous()) for x in tensors),
        problem.c.shape,
        None if low_c is None else low_c.shape[1],
        problem.compute_dtype,
        problem.softcap is None,
        problem.multiplier is None,
        problem.memory_budget if isinstance(problem, MadeProblem) else None,  # sizes of chunks
        training and filter_.is_on and calibrates(problem, filter_) + 1,
        training and filter_.is_on and filter_.most_dropped < 1,
        training and has_class_weights(problem),
        training,
        # Sums of dC end in registers, or are stored between superblocks, in fewer bits or in more.
        (num_superblocks > 1) + (num_superblocks > FEW_SUPERBLOCKS),
        problem.e.shape[0] > BLOCK_T,  # the tokens are ordered
        kind_of(problem.e.shape[0], specialised=True),  # two kernels specialise on it
    )


def plan_step(problem: Problem, filter_: Filter, training: bool) -> Plan:
    """Record the launches of a step, with all gradients if ``training``."""
    device, problem = problem.e.device, _without_values(problem)
    everything = Needed(e=True, c=True, bias=problem.bias is not None)
    with planning(device) as plan, unrecorded():
        saved = step.forward(problem, filter_, training)
        upstream = PerToken(saved.nll, saved.lse)
        # The data may be too flat for the filter.
        for tolerance in {filter_.tolerance, 0.0} if training else ():
            chosen = replace(filter_, tolerance=tolerance, e=True, c=True)
            low_e = problem.low_e if isinstance(problem, AdaptedProblem) else None
            for plan.flat_tokens in (1, 0) if tolerance else (0,):
                step.backward(upstream, saved, problem, chosen, everything, grad_low_e=low_e)
        if training and filter_.is_on:
            with as_captured():
                step.backward(upstream, saved, problem, filter_, replace(everything, bias=False))
    return plan


def compile_ahead(problem: Problem, filter_: Filter, training: bool) -> None:
    """Compile the kernels that steps of this kind launch, unless that has been done.

    Some kernels are compiled when they are first launched instead: three small ones of large
    batches that take several passes within the budget, the gradients of shards of the vocabulary,
    and those of a frozen bias with inputs that are trained.
    """
    kind = kind_of_step(problem, filter_, training)
    _compile_once(problem, kind, lambda: plan_step(problem, filter_, training))


def plan_sum(problem: Problem, needed: Needed, weights: Tensor | None, filter_: Filter) -> Plan:
    """Record the launches of a sum of losses, weighted if ``weights``, with its gradients."""
    filtered = filter_.split(needed)[1]
    inputs = (problem.e, problem.c, problem.bias)
    if weights is not None:
        weights = _meta(weights)
    with planning(problem.e.device) as plan, unrecorded():
        # A tail may stand for too much, which the first tokens do not show.
        for plan.drops_much in (False, True) if any(filtered.flat()) else (False,):
            loss, *sums = exact_sum.loss_and_gradients(
                _without_values(problem), needed, weights, filter_
            )
        plan.drops_much = False
        for total, x, need in zip(sums, inputs, needed.flat(), strict=True):
            if x is not None and need:
                scale.scale(total, loss, torch.empty_like(total, dtype=x.dtype))
        if any(filtered.flat()):  # the data may be too flat for the filter
            for exact in (filtered, needed):
                exact_sum.loss_and_gradients(_without_values(problem), exact, weights)
    return plan


def compile_sum_ahead(
    problem: Problem, needed: Needed, weights: Tensor | None, filter_: Filter
) -> None:
    """Compile the kernels of a sum of losses with its gradients, unless that has been done."""
    if powers_per_chunk(problem, needed) == 0:  # a shard of the vocabulary
        return
    step_kind = kind_of_step(problem, filter_, training=True)
    filtered = filter_.split(needed)[1]
    kind = ("sum", needed.flat(), filtered.flat(), weights is None, *step_kind)
    _compile_once(problem, kind, lambda: plan_sum(problem, needed, weights, filter_))


def plan_made_rows(problem: Problem, weights: Tensor | None, needed: Needed | None) -> Plan:
    """Record the launches of a walk over rows that are made.

    Args:
        problem: the call; of c only shape and device count.
        weights: (N,), factors of the losses.
        needed: gradients of the losses of all tokens; None for their sum, with its gradient by e.
    """
    device, dim, problem = problem.e.device, problem.c.shape[1], _without_values(problem)

    def make_rows(classes: slice) -> Tensor:
        return problem.e.new_empty((classes.stop - classes.start, dim), dtype=problem.compute_dtype)

    with planning(device) as plan, unrecorded():
        if needed is None:
            weights = None if weights is None else _meta(weights)
            loss, grad_e = made_rows.loss_and_gradient(problem, make_rows, weights)
            scale.scale(grad_e, loss, torch.empty_like(grad_e, dtype=problem.e.dtype))
            return plan
        found = made_rows.token_losses(problem, make_rows)
        if any(needed.flat()):
            made_rows.gradients(
                found, found, problem, make_rows, needed, take_rows=lambda classes, rows: None
            )
    return plan


def compile_made_rows_ahead(
    problem: Problem, weights: Tensor | None, needed: Needed | None
) -> None:
    """Compile the kernels of :func:`plan_made_rows`, unless that has been done."""
    step_kind = kind_of_step(problem, Filter(0.0), training=True)
    gradients = None if needed is None else needed.flat()
    sizes = (problem.memory_budget, problem.frozen_columns)
    kind = ("made rows", gradients, weights is None, *sizes, *step_kind)
    _compile_once(problem, kind, lambda: plan_made_rows(problem, weights, needed))


def _compile_once(
    problem: Problem, kind: tuple[object, ...], make_plan: Callable[[], Plan]
) -> None:
    if triton_is_interpreted() or problem.e.shape[0] == 0 or problem.c.shape[0] == 0:
        return
    if kind in _compiled:
        return
    if is_captured(problem.e):
        return  # no thread may load machine code meanwhile
    with _compiling:  # another thread waits, or it would launch kernels that are half loaded
        if kind in _compiled:
            return
        # This saves time and nothing else: without it kernels are compiled when they are launched.
        try:
            compile_concurrently(make_plan())
        except Exception as error:
            warnings.warn(f"the kernels were not compiled ahead: {error!r}", stacklevel=2)
        finally:
            _compiled.add(kind)


def _without_values(problem: Problem) -> Problem:
    """Return the problem of one process on the meta device."""
    if isinstance(problem, MadeProblem):
        rows = torch.empty(problem.c.shape, dtype=problem.compute_dtype, device="meta")
        problem = replace(problem, make_rows=lambda classes: rows[classes])
    if isinstance(problem, AdaptedProblem):
        problem = replace(problem, low_e=_meta(problem.low_e), low_c=_meta(problem.low_c))
    return replace(
        problem,
        e=_meta(problem.e),
        c=_meta(problem.c),
        targets=_meta(problem.targets),
        bias=None if problem.bias is None else _meta(problem.bias),
        multiplier=None if problem.multiplier is None else _meta(problem.multiplier),
        first_class=0,
        group=None,
    )


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=torch.device("meta")
    )
