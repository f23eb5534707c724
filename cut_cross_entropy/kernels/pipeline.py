"""The loss and its gradients by kernels: what ``impl="cce"`` and its presets run.

Shape legend: ``cut_cross_entropy.kernels``.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cut_cross_entropy.filter_report import FilterRecord, recording, report
from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.config import Tiles, tiles_on
from cut_cross_entropy.kernels.dense import dense_gradients
from cut_cross_entropy.kernels.forward import walk_classes
from cut_cross_entropy.kernels.grad_c import grad_c as compute_grad_c
from cut_cross_entropy.kernels.grad_e import grad_e as compute_grad_e
from cut_cross_entropy.kernels.prepare import (
    Tokens,
    prepare_tokens,
    scatter_rows,
    target_logits,
)
from cut_cross_entropy.kernels.selection import (
    CHUNK,
    Kept,
    choose_threshold,
    class_offsets,
    kept_strips,
    list_strips,
    mark_targets,
)
from cut_cross_entropy.kernels.strips import strip_gradients, sum_by_class
from cut_cross_entropy.kernels.tail import tail_slope, weighted_row_sum
from cut_cross_entropy.validation import check_target_range

LN2 = math.log(2)
STRIP_BYTES = 2 * BLOCK_T + 8  # a strip's logit gradient and its place in the lists
DENSE_FRACTION = 0.45  # of strips kept: beyond it the dense path is faster
FLAT_FRACTION = 0.5  # of tokens that are flat: beyond it all are treated so
FLAT_GROUPS = 400  # effective number of class groups from which a token counts as flat


def forward(
    e: Tensor,  # (N, D)
    c: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    ignore_index: int,
    softcap: float | None,
    compute_dtype: torch.dtype,
    with_energy: bool,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll and lse (N,) in the caller's order; strip energies and spread for the backward.

    Without ``with_energy`` the last two are empty. With ``compact`` ignored tokens cost nothing but
    a copy of ``e``, which is freed on return; without, whole blocks of them cost nothing.
    """
    check_target_range(targets, c.shape[0], ignore_index)
    tiles = tiles_on(e.device)
    num_tokens, num_classes = e.shape[0], c.shape[0]
    num_blocks = -(-num_tokens // BLOCK_T)
    # Blocks without a token are skipped, and their bytes have to read as nothing.
    energy = e.new_zeros((num_blocks, num_classes) if with_energy else 0, dtype=torch.uint8)
    if num_tokens == 0:
        nothing = e.new_zeros(0, dtype=torch.float32)
        return nothing, nothing.clone(), energy, nothing.clone()

    tokens = prepare_tokens(
        e, targets, num_classes, ignore_index, compute_dtype, compact=compact or with_energy
    )
    c = c.to(compute_dtype).contiguous()
    target = target_logits(tokens, c, bias, softcap)
    flags = torch.zeros(num_blocks, dtype=torch.int32, device=e.device)

    # Tokenizers number frequent classes first, so a short walk over these gives a tight bound.
    bound = _usable_bound(target, tokens)
    hot = min(max(1024, num_classes // 64), 8192) // tiles.block_v * tiles.block_v
    if 0 < hot < num_classes:
        few = (c[:hot], None if bias is None else bias[:hot])
        lse, _ = walk_classes(
            tokens.e, *few, bound, softcap, tiles, energy=None, flags=flags, online=True
        )
        bound = _usable_bound(torch.maximum(target, _logsumexp2(lse)), tokens)

    out = energy if with_energy else None
    results = walk_classes(tokens.e, c, bias, bound, softcap, tiles, out, flags)
    walk_classes(tokens.e, c, bias, bound, softcap, tiles, out, flags, True, True, results)
    lse = _logsumexp2(results[0])
    # The sum and the target's logit come from different kernels; a probability stays below 1.
    nll = torch.where(tokens.wrong, torch.nan, (lse - target).clamp_min(0) * LN2)
    spread = e.new_empty(0, dtype=torch.float32)
    if with_energy:
        mark_targets(energy, tokens.targets)
        spread = torch.where(tokens.present, 2 * lse - _logsumexp2(results[1]), 0)
    return tokens.scatter(nll), tokens.scatter(lse * LN2), energy, spread


def _usable_bound(bound: Tensor, tokens: Tokens) -> Tensor:
    """Finite or -inf for tokens, +inf where there is none."""
    bound = torch.where(bound < torch.inf, bound, 0)  # NaN and +inf: the walk will find them again
    return torch.where(tokens.present, bound, torch.inf)


def _logsumexp2(values: Tensor) -> Tensor:
    """Log2 of the sum of powers of two over dimension 0."""
    return torch.logsumexp(values * LN2, dim=0) / LN2


@dataclass(frozen=True)
class _Problem:
    """What the parts of the backward share; tokens that count are in front."""

    tokens: Tokens
    c: Tensor
    bias: Tensor | None
    lse: Tensor  # (N,) log2; +inf: no token
    a: Tensor
    b: Tensor
    scale: Tensor
    softcap: float | None
    tiles: Tiles
    memory_budget: int

    def of(self, places: Tensor) -> "_Problem":
        """The tokens at ``places`` alone."""
        tokens = Tokens(
            self.tokens.e[places],
            self.tokens.targets[places],
            self.tokens.present[places],
            self.tokens.wrong[places],
            self.tokens.origin[places],
        )
        return replace(
            self, tokens=tokens, lse=self.lse[places], a=self.a[places], b=self.b[places]
        )

    def without(self, absent: Tensor) -> "_Problem":
        """The same places with some tokens taken out."""
        return replace(
            self,
            lse=torch.where(absent, torch.inf, self.lse),
            a=torch.where(absent, 0, self.a),
            b=torch.where(absent, 0, self.b),
        )


@dataclass
class _Gradients:
    """Outputs of the backward, None where not needed."""

    e: Tensor | None
    c: Tensor | None
    bias: Tensor | None


def backward(
    grad_nll: Tensor,  # (N,)
    grad_lse: Tensor,  # (N,)
    e: Tensor,  # (N, D)
    c: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    nll: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    energy: Tensor,  # (blocks, V) uint8, or empty
    spread: Tensor,  # (N,)
    ignore_index: int,
    softcap: float | None,
    compute_dtype: torch.dtype,
    memory_budget: int,
    tolerance: float,
    filter_e: bool,
    filter_c: bool,
    need_e: bool,
    need_c: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of e, c and bias in their own dtypes; an empty tensor for each not needed.

    ``tolerance`` 0, or an empty ``energy``, means no filter. The filtered path reads the number of
    kept strips from the device: the one synchronisation of a step.
    """
    result = _Gradients(
        torch.zeros(e.shape, dtype=e.dtype, device=e.device) if need_e else None,
        torch.empty(c.shape, dtype=c.dtype, device=c.device) if need_c else None,
        torch.empty_like(bias) if bias is not None and need_bias else None,
    )
    if e.shape[0] == 0:
        for grad in (result.c, result.bias):
            if grad is not None:
                grad.zero_()
    else:
        problem = _problem(
            grad_nll, grad_lse, e, c, targets, bias, lse, ignore_index, softcap, compute_dtype,
            memory_budget,
        )  # fmt: skip
        filtered = tolerance > 0 and energy.numel() > 0
        if not filtered and recording():
            count = int(problem.tokens.present.sum())
            report(FilterRecord("exact", 1.0, 0.0, 0, count))
        sparse = _Gradients(
            result.e if filtered and filter_e else None,
            result.c if filtered and filter_c else None,
            result.bias if filtered and filter_c else None,
        )
        if sparse.e is not None or sparse.c is not None or sparse.bias is not None:
            p = torch.exp(-problem.tokens.gather(nll))
            done = _filtered(problem, sparse, energy, spread, p, tolerance)
            if not done:
                sparse = _Gradients(None, None, None)
        rest = _Gradients(
            None if sparse.e is not None else result.e,
            None if sparse.c is not None else result.c,
            None if sparse.bias is not None else result.bias,
        )
        _dense(problem, rest, accumulate=False)
    empty = e.new_empty(0)
    grads = (result.e, result.c, result.bias)
    out = [empty.clone() if grad is None else grad for grad in grads]
    return out[0], out[1], out[2]


def _problem(
    grad_nll: Tensor,
    grad_lse: Tensor,
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    softcap: float | None,
    compute_dtype: torch.dtype,
    memory_budget: int,
) -> _Problem:
    tokens = prepare_tokens(e, targets, c.shape[0], ignore_index, compute_dtype)
    b = tokens.gather(grad_nll.float())
    a = b + tokens.gather(grad_lse.float())
    a = torch.where(tokens.wrong, torch.nan, a)  # never a plausible number
    scale = a.new_ones(())
    if compute_dtype == torch.float16:
        # 1/N times a small probability underflows; a power of two brings it back unharmed.
        largest = torch.maximum(a.abs().max(), b.abs().max())
        exponent = -torch.floor(torch.log2(largest))
        scale = torch.where(torch.isfinite(exponent), torch.exp2(exponent), scale)
    return _Problem(
        tokens,
        c.to(compute_dtype).contiguous(),
        bias,
        torch.where(tokens.present, tokens.gather(lse) / LN2, torch.inf),
        a,
        b,
        scale,
        softcap,
        tiles_on(e.device),
        memory_budget,
    )


def _dense(problem: _Problem, grads: _Gradients, accumulate: bool) -> None:
    if grads.e is None and grads.c is None and grads.bias is None:
        return
    tokens = problem.tokens
    total = dense_gradients(
        tokens.e,
        problem.c,
        problem.bias,
        problem.lse,
        problem.a,
        problem.b,
        tokens.targets,
        problem.scale,
        problem.softcap,
        problem.tiles,
        problem.memory_budget,
        grads.e is not None,
        grads.c,
        grads.bias,
        accumulate,
    )
    if total is not None and grads.e is not None:
        scatter_rows(total, tokens.origin, grads.e)


def _filtered(
    problem: _Problem,
    grads: _Gradients,
    energy: Tensor,
    spread: Tensor,
    p_target: Tensor,
    tolerance: float,
) -> bool:
    """Gradients of the kept strips plus the tail; False if the data is too flat for that."""
    tokens = problem.tokens
    flat = tokens.present & (spread > math.log2(FLAT_GROUPS))
    sharp = tokens.present & ~flat
    gradient_energy = torch.where(sharp, (1 - p_target).square(), 0).sum()
    kept = kept_strips(energy, choose_threshold(energy, gradient_energy, tolerance))
    if energy.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the filtered gradient reads the number of kept strips from the device, which a CUDA "
            "graph cannot capture; use impl='cce_exact' or filter_eps=None"
        )

    numbers = torch.cat(
        [
            kept.counts.sum(1, dtype=torch.int64),
            kept.counts.sum(0, dtype=torch.int64),
            kept.active.long(),
            torch.stack([flat.sum(), tokens.present.sum()]),
        ]
    ).tolist()  # the one synchronisation
    num_blocks, num_chunks = kept.counts.shape
    by_block, by_chunk = numbers[:num_blocks], numbers[num_blocks : num_blocks + num_chunks]
    active = numbers[num_blocks + num_chunks : -2]
    num_flat, num_present = numbers[-2:]
    used_blocks = -(-num_present // BLOCK_T)
    possible = used_blocks * energy.shape[1]
    too_flat = num_flat > FLAT_FRACTION * num_present or sum(by_block) > DENSE_FRACTION * possible
    mass = None
    if not too_flat:
        mass = _strips_and_tail(
            problem.without(flat), grads, kept, by_block, by_chunk, active, sharp
        )
    if recording():
        report(
            FilterRecord(
                path="dense" if too_flat else "filtered",
                strips_kept=1.0 if too_flat else sum(by_block) / max(1, possible),
                dropped_mass=0.0 if mass is None else float(mass.sum()) / max(1, num_present),
                flat_tokens=num_flat,
                tokens=num_present,
            )
        )
    if too_flat:
        return False
    if num_flat:
        places = torch.sort((~flat).to(torch.uint8), stable=True).indices[:num_flat]
        _dense(problem.of(places), grads, accumulate=True)
    return True


def _strips_and_tail(
    problem: _Problem,
    grads: _Gradients,
    kept: Kept,
    by_block: list[int],
    by_chunk: list[int],
    active: list[int],
    sharp: Tensor,
) -> Tensor:
    """Writes the gradients; returns the dropped mass of each token, (N,)."""
    tokens, c, tiles = problem.tokens, problem.c, problem.tiles
    num_tokens, num_classes = tokens.e.shape[0], c.shape[0]
    num_blocks, num_chunks = kept.counts.shape
    total_weight = kept.weights.double().sum()
    shares = torch.where(total_weight > 0, kept.weights / total_weight, 0).float()
    center = weighted_row_sum(shares, c)
    offsets = class_offsets(kept.masks)
    capacity = max(1, problem.memory_budget // STRIP_BYTES)
    whole = sum(by_block) <= capacity
    held = torch.zeros((num_blocks, BLOCK_T), dtype=torch.float32, device=c.device)

    def gradients_of(blocks: tuple[int, int], chunks: tuple[int, int], by_class: bool):  # type: ignore[no-untyped-def]
        """Strips of a rectangle, and what they hold."""
        counts = by_chunk[chunks[0] : chunks[1]]
        if blocks != (0, num_blocks):
            counts = by_block[blocks[0] : blocks[1]]
        first = sum(by_chunk[: chunks[0]])
        local = offsets - first if by_class else None
        strips = list_strips(kept, sum(counts), blocks, chunks, local)
        return strips, strip_gradients(
            tokens.e, c, problem.bias, problem.lse, problem.a, problem.b, tokens.targets,
            problem.scale, strips, problem.softcap, tiles,
            bias_grad=grads.bias is not None,
        )  # fmt: skip

    dropped = torch.zeros(num_tokens, dtype=torch.float32, device=c.device)

    def tail_of(held: Tensor, blocks: tuple[int, int]) -> Tensor:
        """a times the dropped mass of each token, (N,), for the blocks at hand."""
        here = slice(blocks[0] * BLOCK_T, min(num_tokens, blocks[1] * BLOCK_T))
        tail = torch.zeros(num_tokens, dtype=torch.float32, device=c.device)
        mass = (1 - held.reshape(-1)[: here.stop - here.start]).clamp_min(0)
        dropped[here] = torch.where(sharp[here], mass, 0)
        if problem.softcap is not None:
            natural = torch.where(sharp[here], problem.lse[here] * LN2, 0)
            mass = mass * tail_slope(natural, mass, shares, problem.softcap)
        tail[here] = torch.where(sharp[here], problem.a[here] * mass, 0)
        return tail

    everything = ((0, num_blocks), (0, num_chunks))
    tail = torch.zeros(num_tokens, dtype=torch.float32, device=c.device)
    # What is stored at once is bounded: in rounds over blocks for dE, over classes for dC.
    rounds = [everything[0]] if whole else _ranges(by_block, capacity)
    for blocks in rounds if (whole or grads.e is not None) else []:
        strips, (stored, bias_sums, held) = gradients_of(blocks, everything[1], by_class=whole)
        part = tail_of(held, blocks)
        tail += part
        if grads.e is not None:
            compute_grad_e(
                stored, c, strips, problem.scale, part, center, tokens.origin, grads.e, tiles
            )
    if grads.c is None and grads.bias is None:
        return dropped
    raise_tail = not whole and grads.e is None
    rounds = [everything[1]] if whole else _ranges(by_chunk, capacity)
    if raise_tail:  # dC alone in rounds: the mass has to be known before the first
        held = torch.zeros_like(held)
        for chunks in rounds:
            held += gradients_of(everything[0], chunks, by_class=True)[1][2]
        tail = tail_of(held, everything[0])
    mean = weighted_row_sum(tail, tokens.e)
    for chunks in rounds:
        if not whole:
            strips, (stored, bias_sums, _) = gradients_of(everything[0], chunks, by_class=True)
        first = sum(by_chunk[: chunks[0]])
        classes = (chunks[0] * CHUNK, min(num_classes, chunks[1] * CHUNK))
        if grads.c is not None:
            compute_grad_c(
                stored, tokens.e, kept.masks, offsets, first, classes,
                sum(active[slice(*chunks)]), problem.scale, shares, mean, grads.c, tiles,
            )  # fmt: skip
        if grads.bias is not None:
            here = slice(*classes)
            sums = sum_by_class(bias_sums, offsets, first, classes)
            grads.bias[here] = (sums + shares[here] * tail.sum()).to(grads.bias.dtype)
    return dropped


def _ranges(counts: list[int], capacity: int) -> list[tuple[int, int]]:
    """Consecutive ranges whose counts sum to at most ``capacity`` (or hold a single element)."""
    ranges, start, total = [], 0, 0
    for i, count in enumerate(counts):
        if total + count > capacity and i > start:
            ranges.append((start, i))
            start, total = i, 0
        total += count
    ranges.append((start, len(counts)))
    return ranges
