"""Moves tokens: compacts the valid ones, scores their targets, scatters rows back.

Valid tokens (not ignored) are compacted into the first rows, in their order; the rows behind them
are filled with zeros and marked absent. Nothing here waits for the device to learn how many there
are, and everything takes few launches: on small problems their cost is the time of a step. Shape
legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cut_cross_entropy.kernels.launch import (
    HostCopy,
    aligned_rows,
    cdiv,
    is_captured,
    launch,
    next_power_of_2,
    pointers,
)
from cut_cross_entropy.kernels.order import order_by_content
from cut_cross_entropy.kernels.triton.primitives import (
    FLAT,
)
from cut_cross_entropy.kernels.triton.tokens import (
    backward_tokens_kernel,
    gradient_scale_kernel,
    list_valid_kernel,
    scatter_rows_kernel,
    score_targets_kernel,
    without_flat_kernel,
)
from cut_cross_entropy.problem import (
    AdaptedProblem,
    KernelState,
    PerToken,
    Problem,
    low_columns,
)

SCAN = 4096  # tokens per step of a program that goes through all


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
        scale: () factor of stored logit gradients in half precision, with which the common factor
            of many targets, 1 / N, is 1: rounded, it would be off for all of them alike. It and its
            inverse are normal numbers.
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
    def values(self) -> tuple[Tensor, ...]:
        """Tensors that are one argument of the kernels which compute gradients of logits."""
        return self.lse, self.a, self.b, self.targets, self.scale

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

    def without_flat(self) -> "BackwardTokens":
        """Return the same rows with the flat tokens marked absent, in one launch."""
        num_tokens = self.lse.shape[0]
        lse, a, b = aligned_rows(3, num_tokens, torch.float32, self.lse.device)
        launch(
            without_flat_kernel,
            (cdiv(num_tokens, SCAN),),
            **pointers(self, "target_grad lse a b"),
            lse_out_ptr=lse,
            a_out_ptr=a,
            b_out_ptr=b,
            N=num_tokens,
            BLOCK=SCAN,
        )
        return replace(self, lse=lse, a=a, b=b)

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
    write_scale(tokens)
    return tokens


def write_scale(tokens: BackwardTokens) -> None:
    """Write :attr:`BackwardTokens.scale`, which is 1 before, where gradients are stored in half."""
    if tokens.e.dtype == torch.float32:
        return
    launch(
        gradient_scale_kernel,
        (1,),
        **pointers(tokens, "a b"),
        scale_ptr=tokens.scale,
        N=tokens.a.shape[0],
        BLOCK=SCAN,
        num_warps=8,
    )


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
