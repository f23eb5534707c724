"""Losses and exact gradients of classes whose rows are made chunk by chunk.

Of a sum of losses whose only gradient is that of e, the rows of a chunk serve for both products
while they are there: powers of its logits are stored (``powers``), and their product with the rows
is added to dE. The powers are relative to a bound of each token that holds for all chunks; where a
chunk raises it, the sum so far is scaled. What the target adds is left out of the products, as in
``exact_sum``: its row waits in the memory of the result. Otherwise the rows are made twice, for the
log-sum-exps and for the gradients. Shape legend: ``cut_cross_entropy.kernels``.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cut_cross_entropy.filter_report import FilterRecord, recording, report
from cut_cross_entropy.kernels import BLOCK_T, exact
from cut_cross_entropy.kernels.exact import Wanted, add_product, chunk_gradients
from cut_cross_entropy.kernels.launch import aligned_rows, cdiv, launch, next_power_of_2, pointers
from cut_cross_entropy.kernels.lse import (
    PassInputs,
    Segments,
    coarser_support,
    finish,
    sum_of_powers,
    vocabulary_pass,
)
from cut_cross_entropy.kernels.made_rows_pass import (
    ALIGNED,
    COPIES,
    ChunkPass,
    ChunkSizes,
    PowerSums,
    aligned_slices,
    choose_sizes,
)
from cut_cross_entropy.kernels.powers import Chunk, finish_sums
from cut_cross_entropy.kernels.tokens import (
    BackwardTokens,
    Tokens,
    compact_for_backward,
    scatter_rows,
)
from cut_cross_entropy.kernels.triton.made_rows import finish_rows_kernel
from cut_cross_entropy.problem import Gradients, KernelState, MadeProblem, Needed, PerToken, Problem
from cut_cross_entropy.validation import check_target_range

SHARE = 4  # of the budget, a fourth is for strips where these are stored, and the rest for rows


class LossAndGradient(NamedTuple):
    """The sum of all losses, (), and its gradient by e, (N, D) float32."""

    loss: Tensor
    grad_e: Tensor


def loss_and_gradient(
    problem: Problem, make_rows: Callable[[slice], Tensor], weights: Tensor | None = None
) -> LossAndGradient:
    """Compute the sum of all losses and its exact gradient by e.

    The number of valid tokens is read from the device while it computes bounds.

    Args:
        problem: without a group; ``c`` has the shape and the device of all rows and no values.
        make_rows: returns the rows of some classes, contiguous and of the compute dtype.
        weights: (N,), factors of the losses; None for 1.
    """
    e, (num_tokens, dim), num_classes = problem.e, problem.e.shape, problem.c.shape[0]
    check_target_range(problem.targets, num_classes, problem.ignore_index)
    grad_e = e.new_zeros((num_tokens, dim), dtype=torch.float32)
    if num_tokens == 0:
        return LossAndGradient(grad_e.new_zeros(()), grad_e)
    chunk_pass, sizes = ChunkPass.of(problem, make_rows, grad_e), choose_sizes(problem, num_tokens)
    sums: PowerSums | None = None
    for classes in sizes.chunks(num_classes):
        inputs = chunk_pass.inputs(classes)
        chunk_pass.score(inputs, classes.start)
        if sums is None:
            sums = PowerSums.zeros(problem, chunk_pass.num_rows(), sizes)
        sums.add(inputs, chunk_pass.tokens.targets)
        del inputs  # frees the rows before the next ones are made
    assert sums is not None
    end = slice(0, sums.products.shape[0])
    tokens, multiplier = chunk_pass.tokens, chunk_pass.multiplier
    nll, factor, of_target = aligned_rows(3, num_tokens, torch.float32, e.device, zeros=True)
    chunk = Chunk(
        Tokens(tokens.e[end], tokens.targets[end], tokens.origin[end]),
        PassInputs(
            tokens.e[end],
            problem.c,
            bias=None,
            softcap=problem.softcap,
            bound=chunk_pass.bound[end],
            flags=chunk_pass.flags,
            multiplier=None if multiplier is None else multiplier[end],
        ),
        logits=chunk_pass.logits[end],
        weights=None if weights is None else tokens.gather(weights, 0.0)[end],
        nll=nll[end],
        factor=factor[end],
        target=of_target[end],
        segment_tiles=1,
    )
    of_others = sum_of_powers(torch.cat(sums.others))[None]
    finish_sums(chunk, Segments(of_others, of_others[:0]))
    launch(
        finish_rows_kernel,
        (end.stop,),
        sums_ptr=sums.products,
        **pointers(chunk, "factor target"),
        origin_ptr=tokens.origin,
        out_ptr=grad_e,
        num_tokens=num_tokens,
        D=dim,
        BLOCK_D=min(1024, next_power_of_2(dim)),
    )
    return LossAndGradient(nll.sum(), grad_e)


def token_losses(problem: Problem, make_rows: Callable[[slice], Tensor]) -> PerToken:
    """Compute loss and log-sum-exp of every token, (N,) each.

    Args:
        problem, make_rows: see :func:`loss_and_gradient`.
    """
    state = forward(problem, make_rows, with_strips=False)
    return PerToken(state.nll, state.lse)


def forward(
    problem: Problem, make_rows: Callable[[slice], Tensor], with_strips: bool
) -> KernelState:
    """Compute loss and log-sum-exp of every token, and what a filtered backward needs again.

    With strips the rows are made twice: the logits of the targets have to be known before the
    energies of the strips, which are relative to one bound in all chunks.

    Args:
        problem, make_rows: see :func:`loss_and_gradient`; an adapted problem has columns of its
            own, which ``make_rows`` leaves out.
        with_strips: order the tokens by content, and compute energy and mass of every strip.
    """
    e, num_tokens, num_classes = problem.e, problem.e.shape[0], problem.c.shape[0]
    check_target_range(problem.targets, num_classes, problem.ignore_index)
    num_blocks = cdiv(num_tokens, BLOCK_T)
    strips = e.new_zeros((num_blocks, num_classes) if with_strips else 0, dtype=torch.int16)
    if num_tokens == 0:
        nothing = [e.new_zeros(0, dtype=torch.float32) for _ in range(4)]
        origin = e.new_zeros(0, dtype=torch.int64)
        nll, lse, support, mass = nothing
        return KernelState(nll, lse, strips, origin=origin, support=support, shard_mass=mass)
    chunk_pass = ChunkPass.of(problem, make_rows, None, by_content=with_strips)
    chunks = choose_sizes(problem, 0).chunks(num_classes)
    targets = energy_bound = None
    if with_strips:
        targets = F.pad(problem.targets, (0, 1), value=-1)[chunk_pass.tokens.origin]
        targets = torch.where((targets >= 0) & (targets < num_classes), targets, -1).long()
        energy_bound = chunk_pass.score_all(chunks, targets)
    parts, squares = [], []
    for classes in chunks:
        inputs = replace(chunk_pass.inputs(classes), energy_bound=energy_bound)
        if not with_strips:
            chunk_pass.score(inputs, classes.start)
        count = inputs.c.shape[0]
        inputs.flags.zero_()
        own = None
        if with_strips:  # blocks without a token are skipped
            own = strips.new_zeros((num_blocks, count))
        segments = vocabulary_pass(inputs, count, own)
        vocabulary_pass(inputs, count, own, online=True, repair=segments)
        parts.append(segments.lse)
        squares.append(segments.squares)
        if own is not None:
            strips[:, classes] = own
        del inputs  # frees the rows before the next ones are made
    whole = Segments(torch.cat(parts), torch.cat(squares))
    if targets is None or energy_bound is None:
        lse = sum_of_powers(whole.lse)[None]
        return finish(
            Segments(lse, whole.squares),
            chunk_pass.logits,
            chunk_pass.tokens,
            None,
            chunk_pass.bound,
        )
    tokens = replace(chunk_pass.tokens, targets=targets)
    state = finish(whole, chunk_pass.logits, tokens, strips, energy_bound)
    return state._replace(support=coarser_support(state.support, whole.lse.shape[0]))


def chunks_of_rows(problem: Problem, multiple: int) -> list[slice]:
    """Return chunks of classes for a filtered backward, which stores strips besides the rows.

    Args:
        problem: see :func:`loss_and_gradient`.
        multiple: number of classes that starts of chunks are multiples of.
    """
    num_classes, dim = problem.c.shape
    row_bytes = COPIES * problem.compute_dtype.itemsize * dim
    most = problem.memory_budget // SHARE * (SHARE - 1) // row_bytes
    most = max(1, most // multiple) * multiple
    at_once = cdiv(num_classes, cdiv(num_classes, most))
    return ChunkSizes(cdiv(at_once, multiple) * multiple, 0).chunks(num_classes)


def exact_gradients(
    problem: MadeProblem, tokens: BackwardTokens, wanted: Wanted, *, accumulate: bool = False
) -> Tensor | None:
    """Compute gradients of some tokens from all classes, chunk by chunk.

    Args:
        problem, tokens, wanted, accumulate: as in ``exact.exact_gradients``.

    Returns:
        dE in float32, (N, D), if wanted.
    """
    total = total_low = None
    zeros = functools.partial(problem.e.new_zeros, dtype=torch.float32)
    if wanted.e:
        total = zeros(tokens.e.shape)
    if wanted.low_e is not None:
        total_low = zeros(wanted.low_e.shape)
    problem = replace(problem, memory_budget=max(1, problem.memory_budget // 2))
    for classes in choose_sizes(problem, 0).chunks(problem.c.shape[0]):
        low_e = None if total_low is None else torch.zeros_like(total_low)
        of_chunk = replace(
            wanted,
            c=None if wanted.c is None else wanted.c[classes],
            bias=None if wanted.bias is None else wanted.bias[classes],
            low_e=low_e,
        )
        part = problem.of_classes(classes)
        local = replace(tokens, targets=tokens.targets - classes.start)
        own = exact.exact_gradients(part, local, of_chunk, accumulate=accumulate)
        if total is not None and own is not None:
            total += own
        if total_low is not None and low_e is not None:
            total_low += low_e
        del part  # frees the rows before the next ones are made
    if total_low is not None and wanted.low_e is not None:
        wanted.low_e.add_(total_low)
    return total


def gradients(
    upstream: PerToken,
    saved: PerToken,
    problem: Problem,
    make_rows: Callable[[slice], Tensor],
    needed: Needed,
    take_rows: Callable[[slice, Tensor], None],
) -> Gradients:
    """Compute the exact gradients of e and bias in their dtypes; that of the rows is handed over.

    Args:
        upstream: gradients of the results of :func:`token_losses`.
        saved: these results.
        problem, make_rows: see :func:`loss_and_gradient`.
        needed: the gradients to compute.
        take_rows: gets some classes and the gradient of their rows, float32, without the frozen
            columns.
    """
    e, bias, (num_tokens, dim) = problem.e, problem.bias, problem.e.shape
    num_classes, first = problem.c.shape[0], problem.frozen_columns
    grad_e = torch.zeros_like(e, memory_format=torch.contiguous_format) if needed.e else None
    grad_bias = torch.zeros_like(bias) if needed.bias and bias is not None else None
    absent = e.new_empty(0)
    results = Gradients(
        absent if grad_e is None else grad_e, absent, absent if grad_bias is None else grad_bias
    )
    if num_tokens == 0:
        return results
    multiplier = None
    if problem.multiplier is not None:
        multiplier = problem.multiplier.float()
        upstream = PerToken(*(grad * multiplier for grad in upstream))
    state = KernelState(*saved, *(saved.nll.new_empty(0) for _ in range(4)))
    tokens = compact_for_backward(upstream, state, problem, 0.0, count_valid=True)
    tokens = replace(
        tokens, multiplier=None if multiplier is None else tokens.gather(multiplier, 1.0)
    )
    valid = num_tokens if tokens.num_valid is None else int(tokens.num_valid.wait())
    if recording():
        report(FilterRecord("exact", 1.0, 0.0, 0, valid))
    tokens = tokens.at(slice(0, min(-(-max(valid, 1) // BLOCK_T) * BLOCK_T, num_tokens)))
    num_rows = tokens.e.shape[0]
    sizes = choose_sizes(problem, num_rows, dim - first if needed.c else 0)
    parts = [
        slice(start, min(start + sizes.tokens, num_rows))
        for start in range(0, num_rows, sizes.tokens)
    ]
    width = cdiv(sizes.classes, ALIGNED) * ALIGNED  # rows stay aligned
    buffer = tokens.e.new_empty((min(num_rows, sizes.tokens), width))
    sums_e = e.new_zeros((num_rows if needed.e else 0, dim), dtype=torch.float32)
    for classes in sizes.chunks(num_classes):
        here = replace(
            problem,
            c=make_rows(classes),
            bias=None if bias is None else bias[classes].contiguous(),
        )
        local, count = tokens.targets - classes.start, classes.stop - classes.start
        local = torch.where((local >= 0) & (local < count), local, -1)
        some = replace(tokens, targets=local)
        sums_c = e.new_zeros((count if needed.c else 0, dim - first), dtype=torch.float32)
        sums_bias = e.new_zeros(count if needed.bias else 0, dtype=torch.float32)
        for part in parts:
            grads = buffer[: part.stop - part.start, :count]
            part_of_tokens = some.at(part)
            chunk_gradients(here, part_of_tokens, (0, count), grads)
            if needed.e:
                for columns in aligned_slices(count):
                    add_product(sums_e[part], grads[:, columns], here.c[columns])
            if needed.c:
                for columns in aligned_slices(count):
                    right = part_of_tokens.e[:, first:]
                    add_product(sums_c[columns], grads[:, columns].T, right)
            if needed.bias:
                sums_bias += grads.sum(0, dtype=torch.float32)
        del here  # frees the rows before the next ones are made
        if needed.c:
            take_rows(classes, sums_c.div_(tokens.scale))
        if grad_bias is not None:
            grad_bias[classes] = sums_bias.div_(tokens.scale)
    if grad_e is not None:
        scatter_rows(sums_e.div_(tokens.scale), tokens.origin, grad_e)
    return results
