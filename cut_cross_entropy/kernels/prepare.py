"""Drops ignored tokens without asking the device how many there are, and scores the targets.

Tokens that count are moved to the front, in their order; the places behind them are filled with
zeros and marked absent. Nothing here waits for the device. Shape legend:
``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels.config import launch_device
from cut_cross_entropy.kernels.primitives import transform_logits


@dataclass(frozen=True)
class Tokens:
    """The tokens that count, in front.

    Args:
        e: (N, D) contiguous, in the compute dtype; zeros where absent.
        targets: (N,) int64; -1 where absent or out of range.
        present: (N,) bool: the first ``count`` places.
        wrong: (N,) bool: present, with a target out of range.
        origin: (N,) int64: place of the token in the caller's order; N where absent.
    """

    e: Tensor
    targets: Tensor
    present: Tensor
    wrong: Tensor
    origin: Tensor

    def gather(self, per_token: Tensor) -> Tensor:
        """(N,) in the caller's order to (N,) in front; 0 where absent."""
        last = per_token.shape[0] - 1
        return torch.where(self.present, per_token[self.origin.clamp_max(last)], 0)

    def scatter(self, values: Tensor) -> Tensor:
        """(N,) in front to (N,) in the caller's order; 0 for ignored tokens."""
        out = values.new_zeros(values.shape[0] + 1)
        out[self.origin] = torch.where(self.present, values, 0)
        return out[:-1]


def prepare_tokens(
    e: Tensor,  # (N, D)
    targets: Tensor,  # (N,)
    num_classes: int,
    ignore_index: int,
    compute_dtype: torch.dtype,
    compact: bool = True,
) -> Tokens:
    """Move the tokens that count to the front, in the compute dtype.

    ``compact=False`` leaves every token in its place and copies nothing where ``e`` is contiguous
    and of the compute dtype already; blocks of ignored tokens are still skipped.
    """
    num_tokens = targets.shape[0]
    kept = targets != ignore_index
    places = torch.arange(num_tokens, device=e.device)
    if compact:
        rank = kept.cumsum(0)
        origin = torch.full((num_tokens + 1,), num_tokens, dtype=torch.int64, device=e.device)
        origin[torch.where(kept, rank - 1, num_tokens)] = places
        origin = origin[:-1]
        present = places < rank[-1]
        front = torch.empty((num_tokens, e.shape[1]), dtype=compute_dtype, device=e.device)
        _gather_rows(e, origin, front)
        targets = targets.long()[origin.clamp_max(num_tokens - 1)]
    else:
        origin = torch.where(kept, places, num_tokens)
        present = kept
        front = e.to(compute_dtype).contiguous()
        targets = targets.long()
    in_range = (targets >= 0) & (targets < num_classes)
    return Tokens(
        e=front,
        targets=torch.where(present & in_range, targets, -1),
        present=present,
        wrong=present & ~in_range,
        origin=origin,
    )


@triton.jit
def gather_rows_kernel(
    source_ptr,  # (N, D)
    origin_ptr,  # (N,) row of source; N for none
    out_ptr,  # (N, D) contiguous
    N,
    D,
    stride_n,
    stride_d,
    BLOCK_D: tl.constexpr,
):
    """Row ``origin[i]`` of the source to row i, zeros where there is none."""
    row = tl.program_id(0).to(tl.int64)
    origin = tl.load(origin_ptr + row)
    available = tl.where(origin < N, D, 0)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        value = tl.load(
            source_ptr + origin * stride_n + d * stride_d, mask=d < available, other=0.0
        )
        tl.store(out_ptr + row * D + d, value.to(out_ptr.dtype.element_ty), mask=d < D)


def _gather_rows(source: Tensor, origin: Tensor, out: Tensor) -> None:
    num_rows, dim = out.shape
    if num_rows == 0:
        return
    with launch_device(out.device):
        gather_rows_kernel[(num_rows,)](
            source,
            origin,
            out,
            num_rows,
            dim,
            source.stride(0),
            source.stride(1),
            BLOCK_D=min(1024, triton.next_power_of_2(dim)),
        )


@triton.jit
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
    with launch_device(out.device):
        scatter_rows_kernel[(num_rows,)](
            rows, origin, out, out.shape[0], dim, BLOCK_D=min(1024, triton.next_power_of_2(dim))
        )


@triton.jit
def target_logits_kernel(
    e_ptr,  # (N, D)
    c_ptr,  # (V, D)
    bias_ptr,  # (V,)
    targets_ptr,  # (N,) -1: none
    out_ptr,  # (N,) out, log2
    D,
    softcap,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logit of each token's target in units of log2; -inf without a target."""
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + token)
    available = tl.where(target >= 0, D, 0)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = d < available
        e = tl.load(e_ptr + token * D + d, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(c_ptr + target * D + d, mask=mask, other=0.0).to(tl.float32)
        total += e * c
    product = tl.sum(total, 0) + tl.zeros((1, 1), tl.float32)
    classes = target + tl.zeros((1,), tl.int64)
    logit = transform_logits(product, bias_ptr, classes, classes >= 0, softcap, HAS_BIAS, SOFTCAP)
    tl.store(out_ptr + token + tl.zeros((1, 1), tl.int64), logit)


def target_logits(
    tokens: Tokens,
    c: Tensor,  # (V, D) contiguous, of the compute dtype
    bias: Tensor | None,  # (V,)
    softcap: float | None,
) -> Tensor:
    """(N,) float32, in units of log2; -inf where there is no target."""
    num_tokens, dim = tokens.e.shape
    out = torch.empty(num_tokens, dtype=torch.float32, device=c.device)
    with launch_device(c.device):
        target_logits_kernel[(num_tokens,)](
            tokens.e,
            c,
            bias,
            tokens.targets,
            out,
            dim,
            softcap or 0.0,
            HAS_BIAS=bias is not None,
            SOFTCAP=softcap is not None,
            BLOCK_D=min(1024, triton.next_power_of_2(dim)),
        )
    return out
