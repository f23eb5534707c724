"""Drops ignored tokens, and scores the targets.

Tokens that count are moved to the front, in their order; the places behind them are filled with
zeros and marked absent. Nothing here waits for the device to learn how many there are, and
everything is done by few launches: on small problems their cost is what one waits for. Shape
legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels.buffers import aligned_rows
from cut_cross_entropy.kernels.host_copy import HostCopy
from cut_cross_entropy.kernels.launch import is_captured, launch
from cut_cross_entropy.kernels.primitives import LOG2E, transform_logits

SCAN = 4096  # tokens a step of the scan


@triton.jit(do_not_specialize=["N"])
def compact_kernel(
    targets_ptr,  # (N,)
    origin_ptr,  # (N,) out: place of the i-th token that counts; N behind the last
    count_ptr,  # () int32 out: tokens that count
    N,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """One program lists the tokens that count."""
    found = 0
    for start in range(0, N, BLOCK):
        places = start + tl.arange(0, BLOCK)
        targets = tl.load(targets_ptr + places, mask=places < N, other=ignore_index)
        kept = ((targets != ignore_index) & (places < N)).to(tl.int32)
        rank = found + tl.cumsum(kept, 0) - 1
        tl.store(origin_ptr + rank, places.to(tl.int64), mask=kept != 0)
        found += tl.sum(kept, 0)
    tl.store(count_ptr, found)
    for start in range(0, N, BLOCK):
        places = start + tl.arange(0, BLOCK)
        nowhere = tl.zeros((BLOCK,), tl.int64) + N
        tl.store(origin_ptr + places, nowhere, mask=(places >= found) & (places < N))


def keep_places(targets: Tensor, ignore_index: int) -> Tensor:
    """(N,) int64: the place of each token that counts, N for the others."""
    places = torch.arange(targets.shape[0], device=targets.device)
    return torch.where(targets != ignore_index, places, targets.shape[0])


def list_tokens(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(N,) int64, where the tokens that count come from, in front; N behind them. And () int32, how
    many they are.
    """
    num_tokens = targets.shape[0]
    origin = torch.empty(num_tokens, dtype=torch.int64, device=targets.device)
    count = torch.empty((), dtype=torch.int32, device=targets.device)
    launch(
        compact_kernel,
        (1,),
        targets.contiguous(),
        origin,
        count,
        num_tokens,
        ignore_index,
        BLOCK=SCAN,
        num_warps=8,
    )
    return origin, count


@dataclass(frozen=True)
class Tokens:
    """The tokens that count, in front.

    Args:
        e: (N, D) contiguous, in the compute dtype; zeros where absent if moved.
        targets: (N,) int64; -1 where absent or out of range.
        origin: (N,) int64: place of the token in the caller's order; N where absent.
    """

    e: Tensor
    targets: Tensor
    origin: Tensor

    def at(self, places: Tensor) -> "Tokens":
        """The tokens at some places alone."""
        return Tokens(self.e[places], self.targets[places], self.origin[places])


@triton.jit
def copy_row(source_ptr, out_ptr, origin, row, N, D, stride_n, stride_d, BLOCK_D: tl.constexpr):
    """Row ``origin`` of the source to a row of the result; zeros where there is none."""
    available = tl.where(origin < N, D, 0)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        value = tl.load(
            source_ptr + origin * stride_n + d * stride_d, mask=d < available, other=0.0
        )
        tl.store(out_ptr + row * D + d, value.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["N", "stride_n", "first_class"])
def score_targets_kernel(
    source_ptr,  # (N, D) embeddings of the caller
    c_ptr,  # (V, D)
    bias_ptr,  # (V,)
    all_targets_ptr,  # (N,) of the caller
    origin_ptr,  # (N,)
    e_ptr,  # (N, D) out if COPY, else in
    targets_ptr,  # (N,) out
    logits_ptr,  # (N,) out: logit of the target, log2; NaN (+inf if SHARDED) if it is not here
    bound_ptr,  # (N,) out: where to start from; +inf for no token
    N,
    V,
    D,
    stride_n,
    stride_d,
    softcap,
    first_class,
    COPY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SHARDED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Moves one token to its place and computes the logit of its target."""
    row = tl.program_id(0).to(tl.int64)
    origin = tl.load(origin_ptr + row)
    if COPY:
        copy_row(source_ptr, e_ptr, origin, row, N, D, stride_n, stride_d, BLOCK_D)
        e_row, e_step = source_ptr + origin * stride_n, stride_d
    else:
        e_row, e_step = e_ptr + row * D, 1
    lane = tl.zeros((1,), tl.int64)
    present = (origin + lane) < N
    target = tl.load(all_targets_ptr + origin + lane, mask=present, other=-1).to(tl.int64)
    target -= first_class
    usable = present & (target >= 0) & (target < V)
    target = tl.where(usable, target, -1)
    first = tl.max(target, 0)
    available = tl.where(first >= 0, D, 0)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = d < available
        e = tl.load(e_row + d * e_step, mask=mask, other=0.0)
        c = tl.load(c_ptr + first * D + d, mask=mask, other=0.0)
        total += e.to(c_ptr.dtype.element_ty).to(tl.float32) * c.to(tl.float32)
    product = tl.sum(total, 0) + tl.zeros((1, 1), tl.float32)
    logit = transform_logits(product, bias_ptr, target, usable, softcap, HAS_BIAS, SOFTCAP)
    logit = tl.reshape(logit, (1,))
    bound = tl.where(logit < float("inf"), logit, 0.0)  # NaN and +inf: the walk finds them again
    tl.store(targets_ptr + row + lane, target)
    # In a shard of the classes: the least over the shards is that of the shard that holds it.
    absent = float("inf") if SHARDED else float("nan")
    tl.store(logits_ptr + row + lane, tl.where(usable, logit, absent))
    tl.store(bound_ptr + row + lane, tl.where(present, bound, float("inf")))


def score_targets(
    e: Tensor,  # (N, D)
    c: Tensor,  # (V, D) contiguous, of the compute dtype
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    ignore_index: int,
    softcap: float | None,
    compact: bool,
    first_class: int = 0,
    sharded: bool = False,
) -> tuple[Tokens, Tensor, Tensor]:
    """The tokens, the logits of their targets and a first bound, (N,) each, log2.

    The targets of the tokens are counted from ``first_class``. Logits of targets that are no row of
    ``c`` are NaN, or +inf where ``c`` is one shard of the classes, and their bound is -inf.
    With ``compact`` the tokens that count are moved to the front; without, every token keeps its
    place and nothing is copied if ``e`` is contiguous and of the compute dtype.
    """
    num_tokens, dim = e.shape
    if compact:
        origin, _ = list_tokens(targets, ignore_index)
    else:
        origin = keep_places(targets, ignore_index)
    device = e.device
    front = (
        torch.empty((num_tokens, dim), dtype=c.dtype, device=device)
        if compact
        else e.to(c.dtype).contiguous()
    )
    placed = torch.empty(num_tokens, dtype=torch.int64, device=device)
    logits, bound = aligned_rows(2, num_tokens, torch.float32, device)
    launch(
        score_targets_kernel,
        (num_tokens,),
        e,
        c,
        bias,
        targets.contiguous(),
        origin,
        front,
        placed,
        logits,
        bound,
        num_tokens,
        c.shape[0],
        dim,
        e.stride(0),
        e.stride(1),
        softcap or 0.0,
        first_class,
        COPY=compact,
        HAS_BIAS=bias is not None,
        SOFTCAP=softcap is not None,
        SHARDED=sharded,
        BLOCK_D=min(1024, triton.next_power_of_2(dim)),
    )
    return Tokens(front, placed, origin), logits, bound


@triton.jit(do_not_specialize=["N", "stride_n", "first_class"])
def backward_tokens_kernel(
    source_ptr,  # (N, D) embeddings of the caller
    all_targets_ptr,  # (N,) of the caller, like all that follow
    grad_nll_ptr,
    grad_lse_ptr,
    nll_in_ptr,
    lse_in_ptr,
    spread_ptr,  # (N,) in front
    origin_ptr,  # (N,)
    e_ptr,  # (N, D) out
    targets_ptr,  # (N,) out, like all that follow
    a_ptr,
    b_ptr,
    lse_ptr,  # log2; +inf for no token
    sharp_ptr,  # energy of the gradient at the target; -1 for flat tokens, -2 for none
    N,
    V,
    D,
    stride_n,
    stride_d,
    flat_spread,
    first_class,
    HAS_SPREAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Moves one token and its gradients to its place."""
    row = tl.program_id(0).to(tl.int64)
    origin = tl.load(origin_ptr + row)
    copy_row(source_ptr, e_ptr, origin, row, N, D, stride_n, stride_d, BLOCK_D)
    lane = tl.zeros((1,), tl.int64)
    place = origin + lane
    present = place < N
    target = tl.load(all_targets_ptr + place, mask=present, other=-1).to(tl.int64) - first_class
    usable = present & (target >= 0) & (target < V)
    b = tl.load(grad_nll_ptr + place, mask=present, other=0.0).to(tl.float32)
    a = b + tl.load(grad_lse_ptr + place, mask=present, other=0.0).to(tl.float32)
    lse = tl.load(lse_in_ptr + place, mask=present, other=float("inf")) * LOG2E
    nll = tl.load(nll_in_ptr + place, mask=present, other=0.0)
    # No shard of the classes holds the target: never a plausible number.
    a = tl.where((usable == 0) & (nll != nll), float("nan"), a)
    miss = 1.0 - tl.exp2(0.0 - nll * LOG2E)
    energy = tl.where(present, miss * miss, -2.0)
    if HAS_SPREAD:
        flat = present & (tl.load(spread_ptr + row + lane) > flat_spread)
        energy = tl.where(flat, -1.0, energy)
    tl.store(targets_ptr + row + lane, tl.where(usable, target, -1))
    tl.store(a_ptr + row + lane, a)
    tl.store(b_ptr + row + lane, b)
    tl.store(lse_ptr + row + lane, lse)
    tl.store(sharp_ptr + row + lane, energy)


@dataclass(frozen=True)
class BackwardTokens:
    """The tokens that count, in front, with what the gradient of their logits needs, (N,) each.

    Args:
        tokens: see :class:`Tokens`.
        a, b: gradients of loss plus lse, and of the loss.
        lse: log2; +inf where there is no token.
        sharp: (1 - p)^2 of the target, which the gradient's energy exceeds; -1 for tokens whose
            distribution is flat, -2 where there is no token.
        count: how many they are; None if nobody asked, or nobody may wait for it.
    """

    tokens: Tokens
    a: Tensor
    b: Tensor
    lse: Tensor
    sharp: Tensor
    count: HostCopy | None


def prepare_backward(
    grad_nll: Tensor,  # (N,)
    grad_lse: Tensor,  # (N,)
    e: Tensor,  # (N, D)
    targets: Tensor,  # (N,)
    nll: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    spread: Tensor,  # (N,) in front, or empty
    num_classes: int,
    ignore_index: int,
    compute_dtype: torch.dtype,
    flat_spread: float,
    first_class: int = 0,
    count_them: bool = False,
) -> BackwardTokens:
    """Move the tokens that count, and their gradients, to the front."""
    num_tokens, dim = e.shape
    origin, found = list_tokens(targets, ignore_index)
    device, count = e.device, None
    # On its way while the copy below is made. A CUDA graph takes all of them, whatever they are.
    if count_them and not (e.is_meta or is_captured(e)):
        count = HostCopy(found)
    # A copy even where nothing is ignored: the products that follow read every row, and a NaN in
    # the embedding of an ignored token would reach dC as 0 * NaN.
    front = torch.empty((num_tokens, dim), dtype=compute_dtype, device=device)
    placed = torch.empty(num_tokens, dtype=torch.int64, device=device)
    a, b, own_lse, sharp = aligned_rows(4, num_tokens, torch.float32, device)
    launch(
        backward_tokens_kernel,
        (num_tokens,),
        e,
        targets.contiguous(),
        grad_nll.contiguous(),
        grad_lse.contiguous(),
        nll,
        lse,
        spread,
        origin,
        front,
        placed,
        a,
        b,
        own_lse,
        sharp,
        num_tokens,
        num_classes,
        dim,
        e.stride(0),
        e.stride(1),
        flat_spread,
        first_class,
        HAS_SPREAD=spread.numel() > 0,
        BLOCK_D=min(1024, triton.next_power_of_2(dim)),
    )
    return BackwardTokens(Tokens(front, placed, origin), a, b, own_lse, sharp, count)


@triton.jit(do_not_specialize=["out_rows"])
def scatter_rows_kernel(
    rows_ptr,  # (N, D) contiguous
    origin_ptr,  # (N,) row of out; out_rows for none
    out_ptr,  # (out_rows, D) contiguous
    out_rows,
    D,
    BLOCK_D: tl.constexpr,
):
    """Row i to row ``origin[i]`` of the result."""
    row = tl.program_id(0).to(tl.int64)
    origin = tl.load(origin_ptr + row)
    available = tl.where(origin < out_rows, D, 0)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = d < available
        value = tl.load(rows_ptr + row * D + d, mask=mask, other=0.0)
        tl.store(out_ptr + origin * D + d, value.to(out_ptr.dtype.element_ty), mask=mask)


def scatter_rows(rows: Tensor, origin: Tensor, out: Tensor) -> None:
    """Write row i of ``rows`` to row ``origin[i]`` of ``out``, where there is one."""
    num_rows, dim = rows.shape
    if num_rows == 0:
        return
    launch(
        scatter_rows_kernel,
        (num_rows,),
        rows,
        origin,
        out,
        out.shape[0],
        dim,
        BLOCK_D=min(1024, triton.next_power_of_2(dim)),
    )
