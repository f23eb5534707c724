"""The loss and its gradients by kernels: what ``impl="cce"`` and its presets run.

Shape legend: ``cut_cross_entropy.kernels``.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cut_cross_entropy.filter_report import FilterRecord, recording, report
from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.combine import finish, raise_bound
from cut_cross_entropy.kernels.config import Tiles, tiles_on
from cut_cross_entropy.kernels.dense import dense_gradients
from cut_cross_entropy.kernels.forward import walk_classes
from cut_cross_entropy.kernels.grad_c import grad_c as compute_grad_c
from cut_cross_entropy.kernels.grad_c import order_classes
from cut_cross_entropy.kernels.grad_e import grad_e as compute_grad_e
from cut_cross_entropy.kernels.prepare import (
    BackwardTokens,
    Tokens,
    prepare_backward,
    scatter_rows,
    score_targets,
)
from cut_cross_entropy.kernels.selection import (
    CHUNK,
    Counts,
    Kept,
    Places,
    StripList,
    class_offsets,
    find_places,
    keep_strips,
    list_strips,
)
from cut_cross_entropy.kernels.strips import strip_gradients, sum_by_class
from cut_cross_entropy.kernels.tail import share_moments, weighted_row_sum, write_tails
from cut_cross_entropy.validation import check_target_range

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

    c = c.to(compute_dtype).contiguous()
    bias = None if bias is None else bias.contiguous()
    tokens, target, bound = score_targets(
        e, c, bias, targets, ignore_index, softcap, compact=compact
    )
    flags = torch.zeros(num_blocks, dtype=torch.int32, device=e.device)

    # Tokenizers number frequent classes first, so a short walk over these gives a tight bound.
    hot = min(max(1024, num_classes // 64), 8192) // tiles.block_v * tiles.block_v
    if hot < num_classes:
        few = (c[:hot], None if bias is None else bias[:hot])
        frequent, _ = walk_classes(
            tokens.e, *few, bound, softcap, tiles, energy=None, flags=flags, online=True
        )
        raise_bound(bound, frequent)

    out = energy if with_energy else None
    parts = walk_classes(tokens.e, c, bias, bound, softcap, tiles, out, flags)
    walk_classes(tokens.e, c, bias, bound, softcap, tiles, out, flags, True, True, parts)
    nll, lse, spread = finish(parts, target, tokens, out)
    return nll, lse, energy, spread


@dataclass(frozen=True)
class _Problem:
    """What the parts of the backward share; tokens that count are in front."""

    tokens: Tokens
    c: Tensor
    bias: Tensor | None
    lse: Tensor  # (N,) log2; +inf: no token
    a: Tensor
    b: Tensor
    sharp: Tensor
    scale: Tensor
    softcap: float | None
    tiles: Tiles
    memory_budget: int

    def of(self, places: Tensor) -> "_Problem":
        """The tokens at ``places`` alone."""
        return replace(
            self,
            tokens=self.tokens.at(places),
            lse=self.lse[places],
            a=self.a[places],
            b=self.b[places],
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
        bias.new_empty(bias.shape) if bias is not None and need_bias else None,
    )
    if e.shape[0] == 0:
        for grad in (result.c, result.bias):
            if grad is not None:
                grad.zero_()
    else:
        filtered = tolerance > 0 and energy.numel() > 0
        moved = prepare_backward(
            grad_nll,
            grad_lse,
            e,
            targets,
            nll,
            lse,
            spread,
            c.shape[0],
            ignore_index,
            compute_dtype,
            math.log2(FLAT_GROUPS),
        )
        problem = _problem(moved, c, bias, softcap, compute_dtype, memory_budget)
        sparse = _Gradients(
            result.e if filtered and filter_e else None,
            result.c if filtered and filter_c else None,
            result.bias if filtered and filter_c else None,
        )
        if sparse.e is None and sparse.c is None and sparse.bias is None:
            if recording():
                count = int((problem.sharp != -2).sum())
                report(FilterRecord("exact", 1.0, 0.0, 0, count))
        elif not _filtered(problem, sparse, energy, tolerance):
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
    moved: BackwardTokens,
    c: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    compute_dtype: torch.dtype,
    memory_budget: int,
) -> _Problem:
    scale = moved.a.new_ones(())
    if compute_dtype == torch.float16:
        # 1/N times a small probability underflows; a power of two brings it back unharmed.
        largest = torch.maximum(moved.a.abs().max(), moved.b.abs().max())
        exponent = -torch.floor(torch.log2(largest))
        scale = torch.where(torch.isfinite(exponent), torch.exp2(exponent), scale)
    return _Problem(
        moved.tokens,
        c.to(compute_dtype).contiguous(),
        None if bias is None else bias.contiguous(),
        moved.lse,
        moved.a,
        moved.b,
        moved.sharp,
        scale,
        softcap,
        tiles_on(c.device),
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


def _filtered(problem: _Problem, grads: _Gradients, energy: Tensor, tolerance: float) -> bool:
    """Gradients of the kept strips plus the tail; False if the data is too flat for that."""
    if energy.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the filtered gradient reads the number of kept strips from the device, which a CUDA "
            "graph cannot capture; use impl='cce_exact' or filter_eps=None"
        )
    kept = keep_strips(energy, problem.sharp, tolerance)
    selected = _Selected.of(kept, problem)
    counts = kept.read()  # the one synchronisation: all before it is queued, all after is short

    num_strips = int(counts.strips.sum())
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
            _dense(problem.of(flat_first[: counts.flat_tokens]), grads, accumulate=True)
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
        shares: (V,) of the tail's mass.
        moments: (2,) see share_moments; only with a softcap.
        center: (D,) mean row of c over the tail.
        offsets: (groups, V) see class_offsets.
        order: (V,) see order_classes.
        places: of all strips.
    """

    shares: Tensor
    moments: Tensor | None
    center: Tensor
    offsets: Tensor
    order: Tensor
    places: Places

    @classmethod
    def of(cls, kept: Kept, problem: _Problem) -> "_Selected":
        # Weights are non-negative: where their sum is 0, so are they.
        shares = kept.weights / kept.weights.sum().clamp_min(torch.finfo(torch.float32).tiny)
        return cls(
            shares,
            None if problem.softcap is None else share_moments(shares),
            weighted_row_sum(shares, problem.c),
            class_offsets(kept.sizes),
            order_classes(kept.masks, 0, kept.masks.shape[1]),
            find_places(kept, (0, kept.shape[0]), (0, kept.shape[1])),
        )


def _strips_and_tail(
    problem: _Problem, grads: _Gradients, kept: Kept, selected: _Selected, counts: Counts
) -> Tensor:
    """Writes the gradients; returns the dropped mass of each token, (N,)."""
    tokens, c, tiles = problem.tokens, problem.c, problem.tiles
    num_classes = c.shape[0]
    num_blocks, num_chunks = kept.shape
    all_blocks, all_chunks = (0, num_blocks), (0, num_chunks)
    by_block, by_chunk = counts.strips.sum(1).tolist(), counts.strips.sum(0).tolist()
    capacity = max(1, problem.memory_budget // STRIP_BYTES)
    whole = sum(by_block) <= capacity
    tails = torch.zeros(problem.a.shape[0], dtype=torch.float32, device=c.device)
    mass = torch.zeros_like(tails)

    def compute(
        blocks: tuple[int, int], chunks: tuple[int, int], by_class: bool
    ) -> tuple[StripList, Tensor, Tensor, Tensor]:
        """Strips of a rectangle: their list, gradients, sums, and what each token's hold."""
        offsets = selected.offsets if by_class else None
        first = sum(by_chunk[: chunks[0]])
        places = selected.places if whole else find_places(kept, blocks, chunks)
        strips = list_strips(kept, counts, blocks, chunks, places, offsets, first)
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

    def add_tails(held: Tensor, first_block: int) -> None:
        write_tails(
            held,
            problem.a,
            problem.lse,
            problem.sharp,
            selected.moments,
            problem.softcap,
            first_block,
            tails,
            mass,
        )

    # What is stored at once is bounded: in rounds over blocks for dE, over classes for dC.
    need_classes = grads.c is not None or grads.bias is not None
    if whole or grads.e is not None:
        for blocks in [all_blocks] if whole else _ranges(by_block, capacity):
            strips, stored, sums, held = compute(blocks, all_chunks, by_class=whole)
            add_tails(held, blocks[0])
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
        held = torch.zeros((num_blocks, BLOCK_T), dtype=torch.float32, device=c.device)
        for chunks in _ranges(by_chunk, capacity):
            held += compute(all_blocks, chunks, by_class=True)[3]
        add_tails(held, 0)
    if not need_classes:
        return mass

    mean = weighted_row_sum(tails, tokens.e)
    for chunks in [all_chunks] if whole else _ranges(by_chunk, capacity):
        if not whole:
            _, stored, sums, _ = compute(all_blocks, chunks, by_class=True)
        first = sum(by_chunk[: chunks[0]])
        classes = (chunks[0] * CHUNK, min(num_classes, chunks[1] * CHUNK))
        if grads.c is not None:
            compute_grad_c(
                stored,
                tokens.e,
                kept.masks,
                selected.offsets,
                first,
                selected.order if whole else order_classes(kept.masks, *classes),
                int(counts.active[slice(*chunks)].sum()),
                problem.scale,
                selected.shares,
                mean,
                grads.c,
                tiles,
            )
        if grads.bias is not None:
            here = slice(*classes)
            by_class = sum_by_class(sums, selected.offsets, first, classes)
            grads.bias[here] = (by_class + selected.shares[here] * tails.sum()).to(grads.bias.dtype)
    return mass


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
