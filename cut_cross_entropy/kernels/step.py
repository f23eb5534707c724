"""Forward and backward of a step by kernels: what ``impl="cce"`` and its presets run.

Shape legend: ``cut_cross_entropy.kernels``.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cut_cross_entropy.distributed.collectives import world_size
from cut_cross_entropy.filter_report import FilterRecord, recording, report
from cut_cross_entropy.kernels import BLOCK_T, made_rows
from cut_cross_entropy.kernels.block_sizes import tiles_on
from cut_cross_entropy.kernels.entropy_and_rank import FurtherSums, further_sums
from cut_cross_entropy.kernels.exact import Wanted, exact_gradients
from cut_cross_entropy.kernels.filtered import backward as filtered
from cut_cross_entropy.kernels.likely_classes import bound_by_likely
from cut_cross_entropy.kernels.lse import (
    NOTHING,
    PassInputs,
    exchange_bound,
    finish,
    finish_shards,
    raise_bound,
    segments_without_classes,
    vocabulary_pass,
)
from cut_cross_entropy.kernels.tokens import (
    BackwardTokens,
    compact_for_backward,
    multiplied_logits,
    scatter_rows,
    score_targets,
)
from cut_cross_entropy.outputs import Asked
from cut_cross_entropy.problem import (
    NO_FILTER,
    Filter,
    Gradients,
    KernelState,
    MadeProblem,
    Needed,
    PerToken,
    Problem,
    low_columns,
)
from cut_cross_entropy.validation import check_target_range

FEW_FREQUENT = 1024  # frequent classes whose sum bounds those of a pass that stores none


def forward(problem: Problem, filter_: Filter, training: bool) -> KernelState:
    """Compute loss and log-sum-exp of every token, and the values that the backward needs again.

    As :func:`forward_outputs` without further sums.
    """
    if isinstance(problem, MadeProblem):
        return made_rows.forward(problem, problem.make_rows, training and filter_.is_on)
    return forward_outputs(problem, filter_, training, NOTHING)[0]


def forward_outputs(
    problem: Problem, filter_: Filter, training: bool, asked: Asked
) -> tuple[KernelState, FurtherSums | None]:
    """Compute loss, log-sum-exp and further sums, and the values that the backward needs again.

    Args:
        problem: the call; with a group, nll and lse are those of all shards' classes.
        filter_: if it is on, a training step orders the tokens by content and computes energy and
            mass of every strip.
        training: copy the valid embeddings, so that ignored tokens cost nothing else; the copy is
            freed on return. Without, only whole blocks of ignored tokens are skipped.
        asked: the sums to compute besides, without a group: entropy, log_sum_sq, rank, max_logit.
            Without any there is no tensor of them.
    """
    with_strips = training and filter_.is_on
    e, group = problem.e, problem.group
    num_tokens, num_classes = e.shape[0], problem.c.shape[0]
    if group is None:
        check_target_range(problem.targets, num_classes, problem.ignore_index)
    num_blocks = -(-num_tokens // BLOCK_T)
    # Blocks without a token are skipped, so their strips are never written.
    strips = e.new_zeros((num_blocks, num_classes) if with_strips else 0, dtype=torch.int16)
    if num_tokens == 0:
        nll, lse, support, shard_mass = (e.new_zeros(0, dtype=torch.float32) for _ in range(4))
        state = KernelState(
            nll,
            lse,
            strips=strips,
            origin=e.new_zeros(0, dtype=torch.int64),
            support=support,
            shard_mass=shard_mass,
        )
        return state, None

    problem = in_compute_dtype(problem)
    tokens, target_logits, bound = score_targets(problem, compact=training, by_content=with_strips)
    multiplier = None
    if problem.multiplier is not None:
        multiplier, target_logits, bound = multiplied_logits(
            tokens, problem.multiplier, target_logits, bound
        )
    flags = torch.zeros(num_blocks, dtype=torch.int32, device=e.device)
    inputs = PassInputs(
        tokens.e,
        c=problem.c,
        bias=problem.bias,
        softcap=problem.softcap,
        bound=bound,
        flags=flags,
        energy_bound=torch.empty_like(bound) if with_strips else None,
        multiplier=multiplier,
        limits=target_logits if asked.rank else None,
        targets=tokens.targets if asked.rank else None,
        low_e=tokens.low_e,
        low_c=low_columns(problem),
    )

    raise_bound_by_frequent(inputs, problem, FEW_FREQUENT, extrapolate=True)
    if inputs.energy_bound is not None:
        bound_by_likely(inputs, problem, tokens.targets, inputs.energy_bound)
        if group is not None:  # the strips of all shards are relative to the same bound
            exchange_bound(inputs.energy_bound, group)

    out = strips if with_strips else None
    if num_classes > 0:
        segments = vocabulary_pass(inputs, num_classes, out, asked=asked)
        vocabulary_pass(inputs, num_classes, out, online=True, repair=segments)
    else:
        segments = segments_without_classes(bound)
    if group is None:
        state = finish(segments, target_logits, tokens, out, inputs.strip_bound)
        return state, further_sums(segments, target_logits, tokens, asked) if asked else None
    state = finish_shards(segments, target_logits, tokens, out, inputs.strip_bound, group=group)
    return state, None


def backward(
    upstream: PerToken,
    saved: KernelState,
    problem: Problem,
    filter_: Filter,
    needed: Needed,
    eta: Tensor | None = None,
    q: Tensor | None = None,
    *,
    grad_low_e: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Gradients:
    """Compute the gradients of e, c and bias, contiguous; empty tensors if not needed.

    With a group the gradient of e is the part of this shard's classes; nothing is exchanged. The
    number of kept strips, or without a filter that of valid tokens, is read from the device: the
    one synchronisation of a step, besides that for the scale that the exact path reads.

    Args:
        upstream: gradients of nll and lse, (N,) each.
        saved: results of the forward.
        problem: the call.
        filter_: tolerance 0, or a forward without strips, means no filter.
        needed: the gradients to compute.
        eta, q: (N,) further factors of the logit gradient, see ``logit_gradient``; None for 0.
        grad_low_e: (N, R) zeros, receives the gradient of ``AdaptedProblem.low_e``; None if it is
            not needed. The gradient of c is that of ``low_c`` then.
        dtype: of the gradients; None for those of the inputs.
    """
    e, bias, first = problem.e, problem.bias, problem.frozen_columns
    low_c = low_columns(problem)
    c = problem.c if low_c is None else low_c
    wanted = Wanted(
        needed.e,
        c.new_empty((c.shape[0], c.shape[1] - first), dtype=dtype) if needed.c else None,
        bias.new_empty(bias.shape, dtype=dtype) if bias is not None and needed.bias else None,
        first,
        grad_low_e,
        dtype_e=dtype,
    )
    if e.shape[0] == 0 or c.shape[0] == 0:
        grad_e = e.new_zeros(e.shape, dtype=dtype) if needed.e else None
        for grad in (wanted.c, wanted.bias):
            if grad is not None:
                grad.zero_()
    else:
        grad_e = _compute(upstream, saved, problem, filter_, wanted, eta=eta, q=q)
    grad_c = wanted.c
    if grad_c is not None and first:
        grad_c = F.pad(grad_c, (first, 0))
    grads = (grad_e, grad_c, wanted.bias)
    return Gradients(*(e.new_empty(0, dtype=dtype) if grad is None else grad for grad in grads))


def _compute(
    upstream: PerToken,
    saved: KernelState,
    problem: Problem,
    filter_: Filter,
    wanted: Wanted,
    eta: Tensor | None,
    q: Tensor | None,
) -> Tensor | None:
    """Compact the tokens; write dC and dbias, return dE."""
    use_filter = filter_.tolerance > 0 and saved.strips.numel() > 0
    # The filter knows neither the energies of q, nor the tail of a multiplied softcap.
    is_capped = problem.softcap is not None and problem.multiplier is not None
    use_filter = use_filter and q is None and not is_capped
    if problem.multiplier is not None:
        factor = problem.multiplier.float()
        upstream = PerToken(*(grad * factor for grad in upstream))
        eta, q = (None if x is None else x * factor for x in (eta, q))
    filter_ = filter_ if use_filter else NO_FILTER
    flat_support = math.log2(filtered.FLAT_SUPPORT)
    count_valid = not wanted.split(filter_)[0]
    tokens = compact_for_backward(upstream, saved, problem, flat_support, count_valid=count_valid)
    if any(x is not None for x in (problem.multiplier, eta, q)):
        multiplier = problem.multiplier
        tokens = replace(
            tokens,
            multiplier=None if multiplier is None else tokens.gather(multiplier, 1.0),
            eta=None if eta is None else tokens.gather(eta, 0.0),
            q=None if q is None else tokens.gather(q, 0.0),
        )
    if tokens.eta is not None:
        tokens = replace(tokens, target_grad=_target_grad(tokens, tokens.eta, saved))
    return gradients_of_tokens(in_compute_dtype(problem), tokens, saved, filter_, wanted)


def gradients_of_tokens(
    problem: Problem,
    tokens: BackwardTokens,
    saved: KernelState,
    filter_: Filter,
    wanted: Wanted,
) -> Tensor | None:
    """Write dC and dbias of compacted tokens, return dE: by the filtered stage or the exact one.

    Args:
        problem: as :func:`in_compute_dtype` returns it.
        tokens: their embeddings may be overwritten.
        saved: with the strips, if the filter is on.
        filter_: if the data are too flat for it, all gradients are exact.
        wanted: the gradients to compute.
    """
    by_filter, exactly = wanted.split(filter_)
    grad_e: Tensor | None = None
    num_valid: int | None
    if by_filter:
        outcome = filtered.filtered_gradients(problem, tokens, by_filter, saved, filter_)
        grad_e, num_valid = outcome.grad_e, outcome.num_valid
        if outcome.too_flat:
            exactly = wanted
    else:
        num_valid = None if tokens.num_valid is None else int(tokens.num_valid.wait())
        if recording() and num_valid is not None:
            report(FilterRecord("exact", 1.0, 0.0, 0, num_valid))

    if exactly:
        num_rows = _rows_to_compute(num_valid, tokens.e.shape[0])
        rows = tokens.at(slice(0, num_rows))
        if isinstance(problem, MadeProblem):
            sums = made_rows.exact_gradients(problem, rows, exactly)
        else:
            sums = exact_gradients(problem, rows, exactly)
        if sums is not None:
            grad_e = _embedding_gradient(tokens, exactly.dtype_e or problem.e.dtype)
            scatter_rows(sums, rows.origin, grad_e)
    return grad_e


def _target_grad(tokens: BackwardTokens, eta: Tensor, saved: KernelState) -> Tensor:
    """Return :attr:`BackwardTokens.target_grad` with the term of an entropy."""
    log_p = -tokens.gather(saved.nll, 0.0)
    factor = tokens.a + eta * log_p.clamp_min(-200)
    grad = (log_p.exp() * factor - tokens.b).abs()
    grad = torch.where(tokens.lse.isnan(), 0, grad)  # keeps the strips of its own block alone
    return torch.where(tokens.target_grad < 0, tokens.target_grad, grad)  # these are marks


def in_compute_dtype(problem: Problem) -> Problem:
    """Return the problem as the stages take it: c and bias contiguous, c of the compute dtype."""
    bias, c = problem.bias, problem.c
    if bias is not None:
        bias = bias.contiguous()
    if problem.has_rows:
        c = c.to(problem.compute_dtype).contiguous()
    if c is problem.c and bias is problem.bias:
        return problem
    return replace(problem, c=c, bias=bias)


def raise_bound_by_frequent(
    inputs: PassInputs, problem: Problem, most: int = 8192, *, extrapolate: bool = False
) -> None:
    """Raise the bounds to the log-sum-exp of the frequent classes, by a short pass over these.

    ``most`` of them are enough to keep sums from an overflow. Stored powers want a closer bound.
    With ``extrapolate``, those of tokens that are spread over many classes by an estimate of all.
    """
    num_frequent = _num_frequent(problem)
    if problem.group is None:
        num_frequent = min(num_frequent, most)
    num_classes = problem.c.shape[0]
    if 0 < num_frequent < num_classes or (problem.group is not None and num_frequent > 0):
        asked = Asked(log_sum_sq=extrapolate)
        segments = vocabulary_pass(inputs, num_frequent, None, asked=asked, online=True)
        all_classes = num_classes
        if problem.group is not None:
            all_classes *= world_size(problem.group)
        raise_bound(inputs.bound, segments, num_frequent, all_classes)


def _num_frequent(problem: Problem) -> int:
    """Return how many of the first classes to take as the frequent ones, in whole tiles.

    Tokenizers number classes by frequency.
    """
    num_classes, block_v = problem.c.shape[0], tiles_on(problem.c.device).block_v
    if problem.group is None:
        return min(max(1024, num_classes // 64), 8192) // block_v * block_v
    # The frequent classes are in the first shard; the other processes wait for at most an eighth of
    # it. A shard without the target has no bound before this pass, however few its classes.
    all_classes = num_classes * world_size(problem.group)
    num_frequent = min(max(1024, all_classes // 64), 8192, max(1024, num_classes // 8))
    return min(num_frequent // block_v * block_v, num_classes)


def _embedding_gradient(tokens: BackwardTokens, dtype: torch.dtype) -> Tensor:
    """Return zeros for dE, in the memory of the compacted embeddings if it fits; those are lost."""
    if tokens.e.dtype == dtype:
        return tokens.e.zero_()
    return torch.zeros_like(tokens.e, dtype=dtype)


def _rows_to_compute(num_valid: int | None, num_tokens: int) -> int:
    """Return how many of the compacted rows to compute: about a whole number of blocks.

    The number is a multiple of 16 if ``num_tokens`` is and not otherwise, since kernels are
    compiled for either (``launch``): a batch with more ignored tokens compiles nothing new.
    """
    if num_valid is None:
        return num_tokens
    short = 0 if num_tokens % 16 == 0 else 1
    blocks = max(1, -(-(num_valid + short) // BLOCK_T))
    return min(num_tokens, blocks * BLOCK_T - short)
