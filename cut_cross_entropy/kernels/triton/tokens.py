"""Triton kernels of ``kernels.tokens``."""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.triton.primitives import (
    ABSENT,
    FLAT,
    LOG2E,
    RANK_STEP,
    gather_rows,
    transform_logits,
)


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
    # The strips of a broken embedding are kept for what they hold, without those of other blocks.
    target_grad = tl.where(lse != lse, 0.0, target_grad)
    target_grad = tl.where(present, target_grad, ABSENT)
    if HAS_SUPPORT:
        flat = present & (tl.load(support_ptr + row + lane) > flat_support)
        target_grad = tl.where(flat, FLAT, target_grad)
    tl.store(targets_ptr + row + lane, target)
    tl.store(a_ptr + row + lane, a)
    tl.store(b_ptr + row + lane, b)
    tl.store(lse_ptr + row + lane, lse)
    tl.store(target_grad_ptr + row + lane, target_grad)


@triton.jit(do_not_specialize=["N"])
def gradient_scale_kernel(
    a_ptr,  # (N,)
    b_ptr,  # (N,)
    scale_ptr,  # () out
    N,
    BLOCK: tl.constexpr,
):
    """Write the inverse of the largest factor of a target, in one program.

    Or of a probability, where those are much larger. Where nothing is finite or positive, 1.
    """
    largest_a = 0.0
    largest_b = 0.0
    for start in range(0, N, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        a = tl.abs(tl.load(a_ptr + tokens, mask=tokens < N, other=0.0))
        b = tl.abs(tl.load(b_ptr + tokens, mask=tokens < N, other=0.0))
        largest_a = tl.maximum(largest_a, tl.max(tl.where(a < float("inf"), a, 0.0), 0))
        largest_b = tl.maximum(largest_b, tl.max(tl.where(b < float("inf"), b, 0.0), 0))
    largest = tl.where(largest_b * 64 > largest_a, largest_b, largest_a)
    inverse = 1.0 / tl.minimum(tl.maximum(largest, 1e-37), 1e37)
    tl.store(scale_ptr, tl.where(largest > 1e-37, inverse, 1.0))


@triton.jit(do_not_specialize=["N"])
def without_flat_kernel(
    target_grad_ptr,  # (N,) see BackwardTokens, like all that follow
    lse_ptr,  # (N,)
    a_ptr,  # (N,)
    b_ptr,  # (N,)
    lse_out_ptr,  # (N,) out
    a_out_ptr,  # (N,) out
    b_out_ptr,  # (N,) out
    N,
    BLOCK: tl.constexpr,
):
    """Copy what marks a token as present, of all but the flat ones."""
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < N
    flat = tl.load(target_grad_ptr + tokens, mask=inside, other=0.0) == FLAT
    lse = tl.load(lse_ptr + tokens, mask=inside, other=0.0)
    a = tl.load(a_ptr + tokens, mask=inside, other=0.0)
    b = tl.load(b_ptr + tokens, mask=inside, other=0.0)
    tl.store(lse_out_ptr + tokens, tl.where(flat, float("inf"), lse), mask=inside)
    tl.store(a_out_ptr + tokens, tl.where(flat, 0.0, a), mask=inside)
    tl.store(b_out_ptr + tokens, tl.where(flat, 0.0, b), mask=inside)


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
