"""Moves tokens: compacts the valid ones, scores their targets, scatters rows back.

Valid tokens (not ignored) are compacted into the first rows, in their order; the rows behind them
are filled with zeros and marked absent. Nothing here waits for the device to learn how many there
are, and everything takes few launches: on small problems their cost is the time of a step. Shape
legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels.launch import (
    HostCopy,
    aligned_rows,
    is_captured,
    launch,
    next_power_of_2,
    pointers,
)
from cut_cross_entropy.kernels.order import order_by_content
from cut_cross_entropy.kernels.primitives import (
    ABSENT,
    FLAT,
    LOG2E,
    RANK_STEP,
    gather_rows,
    transform_logits,
)
from cut_cross_entropy.problem import (
    AdaptedProblem,
    KernelState,
    PerToken,
    Problem,
    gradient_scale,
    low_columns,
)

SCAN = 4096  # tokens per step of the scan


@triton.jit(do_not_specialize=["N"])
def list_valid_kernel(
    targets_ptr,  # (N,)
    origin_ptr,  # (N,) out: position of the i-th valid token; N behind the last
    count_ptr,  # () int32 out: valid tokens
    N,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """List the valid tokens, in one program."""
    found = 0
    for start in range(0, N, BLOCK):
        positions = start + tl.arange(0, BLOCK)
        targets = tl.load(targets_ptr + positions, mask=positions < N, other=ignore_index)
        kept = ((targets != ignore_index) & (positions < N)).to(tl.int32)
        rank = found + tl.cumsum(kept, 0) - 1
        tl.store(origin_ptr + rank, positions.to(tl.int64), mask=kept != 0)
        found += tl.sum(kept, 0)
    tl.store(count_ptr, found)
    for start in range(0, N, BLOCK):
        positions = start + tl.arange(0, BLOCK)
        nowhere = tl.zeros((BLOCK,), tl.int64) + N
        tl.store(origin_ptr + positions, nowhere, mask=(positions >= found) & (positions < N))


def list_in_place(targets: Tensor, ignore_index: int) -> Tensor:
    """Return the position of each valid token, N for the others: (N,) int64."""
    positions = torch.arange(targets.shape[0], device=targets.device)
    return torch.where(targets != ignore_index, positions, targets.shape[0])


def list_valid(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the positions of the valid tokens and their number, on the device.

    The positions are (N,) int64, compacted, with N behind the last; the number is () int32.
    """
    num_tokens = targets.shape[0]
    origin = torch.empty(num_tokens, dtype=torch.int64, device=targets.device)
    count = torch.empty((), dtype=torch.int32, device=targets.device)
    launch(
        list_valid_kernel,
        (1,),
        targets_ptr=targets.contiguous(),
        origin_ptr=origin,
        count_ptr=count,
        N=num_tokens,
        ignore_index=ignore_index,
        BLOCK=SCAN,
        num_warps=8,
    )
    return origin, count


@dataclass(frozen=True)
class Tokens:
    """Tokens in the order in which the kernels compute them.

    Args:
        e: (N, D) contiguous, of the compute dtype; zeros in absent rows if compacted.
        targets: (N,) int64 row of c; -1 where absent or out of range.
        origin: (N,) int64 position of the token in the caller's order; N where absent.
        low_e: (N, R) rows of :attr:`AdaptedProblem.low_e`; None without such columns.
    """

    e: Tensor
    targets: Tensor
    origin: Tensor
    low_e: Tensor | None = field(default=None, kw_only=True)

    def gather(self, values: Tensor, fill: float) -> Tensor:
        """Return values (N,) of the caller's tokens in the order of the rows, float32."""
        padded = F.pad(values.float(), (0, 1), value=fill)
        return padded[self.origin]


@triton.jit
def copy_row(source_row, step, out_row, is_token, D, BLOCK_D: tl.constexpr):
    """Copy a row whose elements are ``step`` apart; write zeros for what is no token."""
    available = tl.where(is_token, D, 0)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        value = tl.load(source_row + d * step, mask=d < available, other=0.0)
        tl.store(out_row + d, value.to(out_row.dtype.element_ty), mask=d < D)


@triton.jit
def load_target(all_targets_ptr, position, N, V, first_class):
    """Load the target at a position of the caller.

    Returns whether the token exists, whether its target is a row of c, and that row or else -1.
    """
    present = position < N
    target = tl.load(all_targets_ptr + position, mask=present, other=-1).to(tl.int64) - first_class
    usable = present & (target >= 0) & (target < V)
    return present, usable, tl.where(usable, target, -1)


# V is the number of classes of a chunk where the classifier is made in chunks.
@triton.jit(do_not_specialize=["N", "V", "stride_n", "first_class"])
def score_targets_kernel(
    source_ptr,  # (N, D) embeddings of the caller
    c_ptr,  # (V, D)
    bias_ptr,  # (V,), or None
    low_e_ptr,  # (N, LOW_RANK) of the caller
    low_c_ptr,  # (V, LOW_RANK)
    all_targets_ptr,  # (N,) of the caller
    origin_ptr,  # (N,)
    multiplier_ptr,  # (N,) in the order of the rows, or None
    e_ptr,  # (N, D) out if COMPACT, else in
    targets_ptr,  # (N,) out: row of c; -1 for none
    logits_ptr,  # (N,) out: logit of the target, log2; NaN (+inf if SHARDED) if it is not here
    bound_ptr,  # (N,) out: first bound of the log-sum-exp; +inf for no token. None: not computed,
    # and only the logits of the targets that are here are written
    rows_ptr,  # (N, D) out, in the caller's order: the target's row of c, if it is here; or None
    N,
    V,
    D,
    stride_n,
    stride_d,
    softcap,  # or None
    first_class,
    COMPACT: tl.constexpr,
    SHARDED: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Move one token to its row, and compute the logit of its target."""
    token = tl.program_id(0).to(tl.int64)
    origin = tl.load(origin_ptr + token)
    if COMPACT:
        e_row, e_step = source_ptr + origin * stride_n, stride_d
        copy_row(e_row, e_step, e_ptr + token * D, origin < N, D, BLOCK_D=BLOCK_D)
    else:
        e_row, e_step = e_ptr + token * D, 1
    lane = tl.zeros((1,), tl.int64)
    position = origin + lane
    _, usable, target = load_target(all_targets_ptr, position, N, V, first_class)
    available = tl.where(tl.max(target, 0) >= 0, D, 0)
    total = tl.zeros((1, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        e = tl.load(e_row + d * e_step, mask=d < available, other=0.0)
        c = gather_rows(c_ptr, target, usable, d, D).to(tl.float32)
        total += e.to(c_ptr.dtype.element_ty).to(tl.float32)[None, :] * c
        if rows_ptr is not None:
            tl.store(rows_ptr + origin * D + d[None, :], c, mask=(d < available)[None, :])
    row = token + lane
    product = tl.sum(total, 1)[:, None]
    for first in tl.static_range(0, LOW_RANK, RANK_STEP):
        columns = first + tl.arange(0, RANK_STEP)
        low_e = gather_rows(low_e_ptr, position, usable, columns, LOW_RANK).to(tl.float32)
        low_c = gather_rows(low_c_ptr, target, usable, columns, LOW_RANK).to(tl.float32)
        product += tl.sum(low_e * low_c, 1)[:, None]
    multiplier = None
    if multiplier_ptr is not None:
        multiplier = tl.load(multiplier_ptr + row)
    logit = transform_logits(product, target, usable, bias_ptr, softcap, multiplier=multiplier)
    logit = tl.reshape(logit, (1,))
    tl.store(targets_ptr + row, target)
    if bound_ptr is None:
        tl.store(logits_ptr + row, logit, mask=usable)
    else:
        bound = tl.where(logit < float("inf"), logit, 0.0)  # the pass finds NaN and +inf again
        # Of a sharded vocabulary: the least over the shards is the logit of the one that holds it.
        absent = float("inf") if SHARDED else float("nan")
        tl.store(logits_ptr + row, tl.where(usable, logit, absent))
        tl.store(bound_ptr + row, tl.where(position < N, bound, float("inf")))


def score_targets(
    problem: Problem, compact: bool, by_content: bool = False
) -> tuple[Tokens, Tensor, Tensor]:
    """Return the tokens, the logits of their targets and a first bound, (N,) float32, log2.

    ``problem.c`` is contiguous and of the compute dtype. With ``compact`` the embeddings of valid
    tokens are copied into the first rows, with ``by_content`` in order of content; without, tokens
    keep their positions. The logit of a target that is not a row of ``problem.c`` is NaN, or +inf
    with a group; its bound is -inf.
    """
    e, c = problem.e, problem.c
    num_tokens, dim = e.shape
    if compact:
        origin, count = list_valid(problem.targets, problem.ignore_index)
        if by_content:
            origin = order_by_content(e, origin, count)
        rows = torch.empty((num_tokens, dim), dtype=c.dtype, device=e.device)
    else:
        origin = list_in_place(problem.targets, problem.ignore_index)
        rows = e.to(c.dtype).contiguous()
    targets = torch.empty(num_tokens, dtype=torch.int64, device=e.device)
    logits, bound = aligned_rows(2, num_tokens, torch.float32, e.device)
    tokens = Tokens(rows, targets, origin, low_e=low_rows(problem, origin))
    score(problem, tokens, logits, compact=compact, bound=bound)
    return tokens, logits, bound


def score(
    problem: Problem,
    tokens: Tokens,  # targets, out; e, out if compact
    logits: Tensor,  # (N,) log2, out
    *,
    compact: bool,
    bound: Tensor | None = None,  # (N,) out
    multiplier: Tensor | None = None,  # (N,) in the order of the tokens
    rows: Tensor | None = None,  # (N, D) of the targets in the caller's order, out
) -> None:
    """Compute the logits of the targets, and their rows of ``problem.c``.

    Without ``bound`` those of targets that are not rows of ``problem.c`` keep their values.
    """
    (num_tokens, dim), low_c = problem.e.shape, low_columns(problem)
    launch(
        score_targets_kernel,
        (num_tokens,),
        source_ptr=problem.e,
        c_ptr=problem.c,
        bias_ptr=problem.bias,
        low_e_ptr=problem.low_e if isinstance(problem, AdaptedProblem) else None,
        low_c_ptr=low_c,
        multiplier_ptr=multiplier,
        all_targets_ptr=problem.targets.contiguous(),
        **pointers(tokens, "origin e targets"),
        logits_ptr=logits,
        bound_ptr=bound,
        rows_ptr=rows,
        N=num_tokens,
        V=problem.c.shape[0],
        D=dim,
        stride_n=problem.e.stride(0),
        stride_d=problem.e.stride(1),
        softcap=problem.softcap,
        first_class=problem.first_class,
        COMPACT=compact,
        SHARDED=problem.group is not None,
        LOW_RANK=0 if low_c is None else low_c.shape[1],
        BLOCK_D=min(1024, next_power_of_2(dim)),
    )


def low_rows(problem: Problem, origin: Tensor) -> Tensor | None:
    """Return the rows of ``low_e`` in the order of the tokens, 0 where absent."""
    if not isinstance(problem, AdaptedProblem) or low_columns(problem) is None:
        return None
    return F.pad(problem.low_e, (0, 0, 0, 1))[origin]


def multiplied_logits(
    tokens: Tokens, multiplier: Tensor, logits: Tensor, bound: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the multiplier (N,) in the order of the rows, and the two vectors times it."""
    own = tokens.gather(multiplier, 1.0)
    # Infinities are marks: no target here, no token.
    logits, bound = (torch.where(x.isfinite(), x * own, x) for x in (logits, bound))
    return own, logits, bound


@triton.jit(do_not_specialize=["N", "stride_n", "first_class"])
def backward_tokens_kernel(
    source_ptr,  # (N, D) embeddings of the caller
    all_targets_ptr,  # (N,) of the caller, like all that follow
    grad_nll_ptr,
    grad_lse_ptr,
    nll_in_ptr,
    lse_in_ptr,
    support_ptr,  # (N,) compacted: log2 of the effective support
    origin_ptr,  # (N,)
    e_ptr,  # (N, D) out
    targets_ptr,  # (N,) out, like all that follow
    a_ptr,
    b_ptr,
    lse_ptr,  # log2; +inf for no token
    target_grad_ptr,  # absolute; FLAT for flat tokens, ABSENT for no token
    N,
    V,
    D,
    stride_n,
    stride_d,
    flat_support,
    first_class,
    HAS_SUPPORT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Move one token and its gradients to its row."""
    row = tl.program_id(0).to(tl.int64)
    origin = tl.load(origin_ptr + row)
    source_row = source_ptr + origin * stride_n
    copy_row(source_row, stride_d, e_ptr + row * D, origin < N, D, BLOCK_D=BLOCK_D)
    lane = tl.zeros((1,), tl.int64)
    position = origin + lane
    present, usable, target = load_target(all_targets_ptr, position, N, V, first_class)
    b = tl.load(grad_nll_ptr + position, mask=present, other=0.0).to(tl.float32)
    a = b + tl.load(grad_lse_ptr + position, mask=present, other=0.0).to(tl.float32)
    lse = tl.load(lse_in_ptr + position, mask=present, other=float("inf")) * LOG2E
    nll = tl.load(nll_in_ptr + position, mask=present, other=0.0)
    # No shard of the vocabulary holds the target: never a plausible number.
    a = tl.where((usable == 0) & (nll != nll), float("nan"), a)
    target_grad = tl.abs(a * tl.exp2(0.0 - nll * LOG2E) - b)
    target_grad = tl.where(present, target_grad, ABSENT)
    if HAS_SUPPORT:
        flat = present & (tl.load(support_ptr + row + lane) > flat_support)
        target_grad = tl.where(flat, FLAT, target_grad)
    tl.store(targets_ptr + row + lane, target)
    tl.store(a_ptr + row + lane, a)
    tl.store(b_ptr + row + lane, b)
    tl.store(lse_ptr + row + lane, lse)
    tl.store(target_grad_ptr + row + lane, target_grad)


@dataclass(frozen=True)
class BackwardTokens(Tokens):
    """Valid tokens, compacted, with what the gradient of their logits needs, (N,) float32 each.

    Args:
        lse: log2; +inf where absent.
        a: gradient of the loss plus that of lse, the factor of the probabilities.
        b: gradient of the loss, the factor of the one-hot target.
        target_grad: absolute gradient of the target's logit, a lower bound of the root of the
            energy of the token's gradient; FLAT for tokens whose distribution is flat, ABSENT where
            absent.
        scale: () power of two by which stored logit gradients are multiplied, see gradient_scale.
        shard_mass: probability of this shard's classes; None if all classes are here.
        num_valid: number of valid tokens on its way to the host; None if not asked for, or if the
            host cannot wait for it.
        multiplier, eta, q: (N,) float32 as in logit_gradient; None for 1, 0 and 0.
    """

    lse: Tensor
    a: Tensor
    b: Tensor
    target_grad: Tensor
    scale: Tensor
    shard_mass: Tensor | None
    num_valid: HostCopy | None
    multiplier: Tensor | None = None
    eta: Tensor | None = None
    q: Tensor | None = None

    @property
    def is_flat(self) -> Tensor:
        """(N,) whether the token's distribution is flat."""
        flat: float = FLAT.value
        return self.target_grad == flat

    def at(self, rows: Tensor | slice) -> "BackwardTokens":
        """Return the tokens of some rows."""
        vectors = {
            field.name: getattr(self, field.name)[rows]
            for field in fields(self)
            if field.name not in ("scale", "shard_mass", "num_valid")
            and getattr(self, field.name) is not None
        }
        shard_mass = None if self.shard_mass is None else self.shard_mass[rows]
        return replace(self, **vectors, shard_mass=shard_mass, num_valid=None)

    def without(self, absent: Tensor) -> "BackwardTokens":
        """Return the same rows with some tokens marked absent; ``absent`` is an (N,) mask."""
        return replace(
            self,
            lse=torch.where(absent, torch.inf, self.lse),
            a=torch.where(absent, 0, self.a),
            b=torch.where(absent, 0, self.b),
        )


def compact_for_backward(
    upstream: PerToken,  # gradients of nll and lse, (N,) each
    saved: KernelState,
    problem: Problem,
    flat_support: float,
    *,
    count_valid: bool,
) -> BackwardTokens:
    """Compact the valid tokens with their gradients.

    ``flat_support`` is the log2 of the support above which a token counts as flat. With
    ``count_valid`` the number of valid tokens is sent to the host.
    """
    e = problem.e
    num_tokens, dim = e.shape
    if saved.origin.numel() > 0:
        origin = saved.origin  # the strips are those of this order
        count = (origin < num_tokens).sum(dtype=torch.int32) if count_valid else None
    else:
        origin, count = list_valid(problem.targets, problem.ignore_index)
    num_valid = None
    # On its way while the copy below is made. A CUDA graph computes all rows, valid or not.
    if count_valid and count is not None and not (e.is_meta or is_captured(e)):
        num_valid = HostCopy(count)
    # A copy even where nothing is ignored: the products that follow read every row, and a NaN in
    # the embedding of an ignored token would reach dC as 0 * NaN.
    rows = torch.empty((num_tokens, dim), dtype=problem.compute_dtype, device=e.device)
    targets = torch.empty(num_tokens, dtype=torch.int64, device=e.device)
    a, b, lse, target_grad = aligned_rows(4, num_tokens, torch.float32, e.device)
    tokens = BackwardTokens(
        e=rows,
        targets=targets,
        origin=origin,
        lse=lse,
        a=a,
        b=b,
        target_grad=target_grad,
        scale=a.new_ones(()),
        shard_mass=saved.shard_mass if saved.shard_mass.numel() > 0 else None,
        num_valid=num_valid,
        low_e=low_rows(problem, origin),
    )
    launch(
        backward_tokens_kernel,
        (num_tokens,),
        source_ptr=e,
        all_targets_ptr=problem.targets.contiguous(),
        grad_nll_ptr=upstream.nll.contiguous(),
        grad_lse_ptr=upstream.lse.contiguous(),
        nll_in_ptr=saved.nll,
        lse_in_ptr=saved.lse,
        support_ptr=saved.support,
        **pointers(tokens, "origin e targets a b lse target_grad"),
        N=num_tokens,
        V=problem.c.shape[0],
        D=dim,
        stride_n=e.stride(0),
        stride_d=e.stride(1),
        flat_support=flat_support,
        first_class=problem.first_class,
        HAS_SUPPORT=saved.support.numel() > 0,
        BLOCK_D=min(1024, next_power_of_2(dim)),
    )
    if problem.compute_dtype == torch.float16:
        tokens = replace(tokens, scale=gradient_scale(a, b))
    return tokens


@triton.jit(do_not_specialize=["out_rows"])
def scatter_rows_kernel(
    rows_ptr,  # (N, D) contiguous
    origin_ptr,  # (N,) row of out; out_rows for none
    out_ptr,  # (out_rows, D) contiguous
    out_rows,
    D,
    BLOCK_D: tl.constexpr,
):
    """Copy row i to row ``origin[i]`` of the result."""
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
        rows_ptr=rows,
        origin_ptr=origin,
        out_ptr=out,
        out_rows=out.shape[0],
        D=dim,
        BLOCK_D=min(1024, next_power_of_2(dim)),
    )
