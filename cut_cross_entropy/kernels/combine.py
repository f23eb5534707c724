"""Puts the segments of the forward together: bounds for the full walk, then loss and lse.

Shape legend: ``cut_cross_entropy.kernels``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.distributed.collectives import gather_shards, maximum_over_group
from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.launch import launch
from cut_cross_entropy.kernels.prepare import Tokens
from cut_cross_entropy.kernels.primitives import FORCED

LN2 = tl.constexpr(0.6931471805599453)
GROUPS = 1024  # of classes, whose probabilities the forward has at hand when one process walks them


@triton.jit
def logsumexp2(ptr, tokens, present, N, num_segments, BLOCK_T: tl.constexpr):
    """Log2 of the sum over segments of powers of two, in their order; -inf stays -inf."""
    highest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    for segment in range(num_segments):
        value = tl.load(ptr + tl.cast(segment, tl.int64) * N + tokens, mask=present, other=0.0)
        highest = tl.maximum(highest, value, propagate_nan=tl.PropagateNan.ALL)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for segment in range(num_segments):
        value = tl.load(ptr + tl.cast(segment, tl.int64) * N + tokens, mask=present, other=0.0)
        total += tl.exp2(value - base)
    return base + tl.log2(total)


@triton.jit(do_not_specialize=["N", "num_segments"])
def bound_kernel(
    lse_ptr,  # (segments, N)
    bound_ptr,  # (N,) in, out
    N,
    num_segments,
    BLOCK_T: tl.constexpr,
):
    """Raises the bound to the log-sum-exp of some classes."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < N
    bound = tl.load(bound_ptr + tokens, mask=inside, other=float("inf"))
    present = inside & (bound != float("inf"))
    lse = logsumexp2(lse_ptr, tokens, present, N, num_segments, BLOCK_T)
    higher = tl.maximum(bound, tl.where(lse < float("inf"), lse, float("-inf")))
    tl.store(bound_ptr + tokens, higher, mask=present)


@triton.jit(do_not_specialize=["N", "num_segments"])
def finish_kernel(
    lse_parts_ptr,  # (segments, N) log2
    spread_parts_ptr,  # (segments, N) log2
    logits_ptr,  # (N,) of the targets, log2
    targets_ptr,  # (N,)
    origin_ptr,  # (N,)
    nll_ptr,  # (N,) out, caller's order
    lse_ptr,  # (N,) out, caller's order
    spread_ptr,  # (N,) out, in front
    energy_ptr,  # (blocks, V) in, out
    N,
    V,
    num_segments,
    HAS_ENERGY: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Loss and log-sum-exp of a block; marks the strips that hold its targets."""
    block = tl.program_id(0)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < N
    origin = tl.load(origin_ptr + tokens, mask=inside, other=N)
    present = origin < N
    lse = logsumexp2(lse_parts_ptr, tokens, present, N, num_segments, BLOCK_T)
    nll = lse - tl.load(logits_ptr + tokens, mask=present, other=0.0)
    # The sum and the target's logit come from different kernels; a probability stays below 1.
    nll = tl.maximum(nll, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(nll_ptr + origin, nll * LN2, mask=present)
    tl.store(lse_ptr + origin, lse * LN2, mask=present)
    if HAS_ENERGY:
        squares = logsumexp2(spread_parts_ptr, tokens, present, N, num_segments, BLOCK_T)
        tl.store(spread_ptr + tokens, tl.where(present, 2 * lse - squares, 0.0), mask=inside)
        target = tl.load(targets_ptr + tokens, mask=present, other=-1)
        marks = tl.full((BLOCK_T,), FORCED, tl.uint8)  # programs that meet write the same byte
        tl.store(energy_ptr + block.to(tl.int64) * V + target, marks, mask=target >= 0)


def raise_bound(bound: Tensor, lse_parts: Tensor) -> None:
    """Raise ``bound`` (N,) to the log-sum-exp over the segments (segments, N), in place."""
    num_segments, num_tokens = lse_parts.shape
    launch(
        bound_kernel,
        (triton.cdiv(num_tokens, BLOCK_T),),
        lse_parts,
        bound,
        num_tokens,
        num_segments,
        BLOCK_T=BLOCK_T,
    )


def finish(
    parts: tuple[Tensor, Tensor],  # lse and spread by segment, (segments, N) each
    logits: Tensor,  # (N,)
    tokens: Tokens,
    energy: Tensor | None,  # (blocks, V)
) -> tuple[Tensor, Tensor, Tensor]:
    """nll and lse in the caller's order, 0 where ignored, and the spread (empty without energy).

    The spread is the log2 of how many groups of classes a token is spread over.
    """
    num_segments, num_tokens = parts[0].shape
    device = logits.device
    nll = torch.zeros(num_tokens, dtype=torch.float32, device=device)
    lse = torch.zeros(num_tokens, dtype=torch.float32, device=device)
    spread = nll.new_empty(0 if energy is None else num_tokens)
    launch(
        finish_kernel,
        (triton.cdiv(num_tokens, BLOCK_T),),
        parts[0],
        parts[1],
        logits,
        tokens.targets,
        tokens.origin,
        nll,
        lse,
        spread,
        energy,
        num_tokens,
        0 if energy is None else energy.shape[1],
        num_segments,
        HAS_ENERGY=energy is not None,
        BLOCK_T=BLOCK_T,
    )
    return nll, lse, spread


def exchange_bound(bound: Tensor, group: str) -> None:
    """Raise ``bound`` (N,) to the highest of the shards, in place: N floats."""
    maximum_over_group(bound, group)


def finish_shards(
    parts: tuple[Tensor, Tensor],  # lse and spread by segment of this shard, (segments, N) each
    logits: Tensor,  # (N,) +inf where the target is in another shard
    tokens: Tokens,
    energy: Tensor | None,  # (blocks, V)
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`finish`, of all shards; and the probability of the classes of this one, in front.

    Every process finishes from the same gathered numbers, so all have the same bits. With energies
    the spread travels beside the pairs of lse and logit. The last two results are empty without.
    """
    own = _sum_of_powers(parts[0])
    numbers = [own, logits] if energy is None else [own, logits, _sum_of_powers(parts[1])]
    gathered = gather_shards(torch.stack(numbers), group)  # (shards, 2 or 3, N)
    lse_parts, spread_parts = (gathered[:, i].contiguous() for i in (0, -1))
    least = gathered[:, 1].amin(0)
    least = torch.where(least == torch.inf, torch.nan, least)  # no shard holds the target
    nll, lse, spread = finish((lse_parts, spread_parts), least, tokens, energy)
    if energy is None:
        return nll, lse, spread, nll.new_empty(0)
    # Shards have more and finer groups than one process has. Were a token's classes strewn over
    # GROUPS of them, this many more would meet in one; what counts as flat then stays the same.
    groups = 64 * parts[0].shape[0] * gathered.shape[0]
    if groups > GROUPS:
        spread = -torch.log2(torch.exp2(-spread) + (1 / GROUPS - 1 / groups))
    return nll, lse, spread, torch.exp2(own - _sum_of_powers(lse_parts))


def _sum_of_powers(parts: Tensor) -> Tensor:
    """Log2 of the sum of 2^x over the first axis: (parts, N) to (N,)."""
    ln2 = 0.6931471805599453
    return torch.logsumexp(parts * ln2, 0) / ln2
