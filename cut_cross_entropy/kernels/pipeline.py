"""The loss and its gradients by kernels: what ``impl="cce"`` and its presets run.

Shape legend: ``cut_cross_entropy.kernels``.
"""

import math

import torch
from torch import Tensor

from cut_cross_entropy.distributed.collectives import world_size
from cut_cross_entropy.filter_report import FilterRecord, recording, report
from cut_cross_entropy.kernels import BLOCK_T, filtered
from cut_cross_entropy.kernels.combine import exchange_bound, finish, finish_shards, raise_bound
from cut_cross_entropy.kernels.config import tiles_on
from cut_cross_entropy.kernels.forward import Walk, walk_classes
from cut_cross_entropy.kernels.prepare import prepare_backward, score_targets
from cut_cross_entropy.kernels.problem import Gradients, assemble, write_dense
from cut_cross_entropy.validation import check_target_range


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
    first_class: int = 0,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """nll and lse (N,) in the caller's order; what the backward needs: strip energies, spread, and
    the probability of the classes that are here.

    Without ``with_energy`` the last three are empty. With ``compact`` ignored tokens cost nothing
    but a copy of ``e``, which is freed on return; without, whole blocks of them cost nothing.

    With a ``group`` the rows of ``c`` are the classes from ``first_class`` on, its other processes
    hold the rest, and nll and lse are those of all classes. The last result is empty without one.
    """
    if group is None:
        check_target_range(targets, c.shape[0], ignore_index)
    tiles = tiles_on(e.device)
    num_tokens, num_classes = e.shape[0], c.shape[0]
    num_blocks = -(-num_tokens // BLOCK_T)
    # Blocks without a token are skipped, and their bytes have to read as nothing.
    energy = e.new_zeros((num_blocks, num_classes) if with_energy else 0, dtype=torch.uint8)
    if num_tokens == 0:
        nothing = e.new_zeros(0, dtype=torch.float32)
        return nothing, nothing.clone(), energy, nothing.clone(), nothing.clone()

    c = c.to(compute_dtype).contiguous()
    bias = None if bias is None else bias.contiguous()
    tokens, target, bound = score_targets(
        e, c, bias, targets, ignore_index, softcap, compact, first_class, sharded=group is not None
    )
    flags = torch.zeros(num_blocks, dtype=torch.int32, device=e.device)
    walk = Walk(tokens.e, c, bias, softcap, tiles, flags)

    # Tokenizers number frequent classes first, so a short walk over these gives a tight bound.
    hot = min(max(1024, num_classes // 64), 8192) // tiles.block_v * tiles.block_v
    if group is not None:
        # They are in the first shard; an eighth of it is what the others can be made to wait for.
        # A shard without the target has no bound at all before this walk, however few its classes.
        hot = min(
            max(1024, num_classes * world_size(group) // 64), 8192, max(1024, num_classes // 8)
        )
        hot = min(hot // tiles.block_v * tiles.block_v, num_classes)
    if 0 < hot < num_classes or (group is not None and hot > 0):
        frequent, _ = walk_classes(walk, hot, bound, energy=None, online=True)
        raise_bound(bound, frequent)
    if group is not None and with_energy:
        exchange_bound(bound, group)  # bytes of all shards stand against the same bound

    out = energy if with_energy else None
    if num_classes > 0:
        parts = walk_classes(walk, num_classes, bound, out)
        walk_classes(walk, num_classes, bound, out, online=True, only_flagged=True, results=parts)
    else:
        nothing = torch.full_like(bound, -torch.inf)[None]
        parts = (nothing, nothing)
    if group is None:
        nll, lse, spread = finish(parts, target, tokens, out)
        return nll, lse, energy, spread, nll.new_empty(0)
    nll, lse, spread, shard = finish_shards(parts, target, tokens, out, group)
    return nll, lse, energy, spread, shard


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
    shard: Tensor,  # (N,) or empty
    ignore_index: int,
    softcap: float | None,
    compute_dtype: torch.dtype,
    memory_budget: int,
    tolerance: float,
    filter_mass: float,
    filter_e: bool,
    filter_c: bool,
    need_e: bool,
    need_c: bool,
    need_bias: bool,
    first_class: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of e, c and bias in their own dtypes; an empty tensor for each not needed.

    That of e is the part of the classes that are here; nothing is exchanged.
    ``tolerance`` 0, or an empty ``energy``, means no filter. How many strips are kept, or without a
    filter how many tokens count, is read from the device: the one synchronisation of a step.
    """
    use_filter = tolerance > 0 and energy.numel() > 0
    result = Gradients(
        None,
        torch.empty(c.shape, dtype=c.dtype, device=c.device) if need_c else None,
        bias.new_empty(bias.shape) if bias is not None and need_bias else None,
    )
    filter_e = filter_e and use_filter and need_e
    filter_c = filter_c and use_filter and (result.c is not None or result.bias is not None)
    if e.shape[0] == 0 or c.shape[0] == 0:
        result.e = torch.zeros_like(e, memory_format=torch.contiguous_format) if need_e else None
        for grad in (result.c, result.bias):
            if grad is not None:
                grad.zero_()
    else:
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
            math.log2(filtered.FLAT_GROUPS),
            first_class,
            count_them=not (filter_e or filter_c),
        )
        own = shard if shard.numel() > 0 else None
        problem = assemble(moved, c, bias, softcap, compute_dtype, memory_budget, own)
        sparse = Gradients(
            e.new_zeros(e.shape) if filter_e else None,
            result.c if filter_c else None,
            result.bias if filter_c else None,
        )
        if filter_e or filter_c:
            count: int | None
            done, count = filtered.write_filtered(problem, sparse, energy, tolerance, filter_mass)
            if not done:
                sparse = Gradients(None, None, None)
        else:
            count = None if moved.count is None else int(moved.count.wait())
            if recording() and count is not None:
                report(FilterRecord("exact", 1.0, 0.0, 0, count))
        rest = Gradients(
            None,
            None if sparse.c is not None else result.c,
            None if sparse.bias is not None else result.bias,
        )
        new_e = e.dtype if need_e and sparse.e is None else None
        write_dense(problem, rest, accumulate=False, new_e=new_e, count=count)
        result.e = rest.e if sparse.e is None else sparse.e
    empty = e.new_empty(0)
    grads = (result.e, result.c, result.bias)
    out = [empty.clone() if grad is None else grad for grad in grads]
    return out[0], out[1], out[2]
