"""Triton kernels of ``kernels.exact_products``."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens"])
def scale_rows_kernel(
    product_ptr,  # (N, D) powers times c
    e_ptr,  # (N, D)
    c_ptr,  # (V, D)
    factor_ptr,  # (N,)
    unit_ptr,  # () of the scaled embeddings
    target_ptr,  # (N,)
    targets_ptr,  # (N,)
    origin_ptr,  # (N,) row of out; num_tokens for none
    out_ptr,  # (num_tokens, D) out: dE in the caller's order
    scaled_ptr,  # (N, D) out: e times the factor and the unit
    num_tokens,
    D,
    NEED_E: tl.constexpr,
    NEED_C: tl.constexpr,
    HAS_UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turn one token's product of powers into its gradient, and scale its embedding for dC."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row)
    unit = 1.0
    if HAS_UNIT:
        unit = tl.load(unit_ptr)
    weight = tl.load(target_ptr + row)
    target = tl.load(targets_ptr + row)
    origin = tl.load(origin_ptr + row)
    of_target = tl.where(target >= 0, D, 0)
    of_token = tl.where(origin < num_tokens, D, 0)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        if NEED_E:
            product = tl.load(product_ptr + row * D + d, mask=d < D, other=0.0)
            c = tl.load(c_ptr + target * D + d, mask=d < of_target, other=0.0).to(tl.float32)
            tl.store(out_ptr + origin * D + d, product * factor - weight * c, mask=d < of_token)
        if NEED_C:
            e = tl.load(e_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
            tl.store(
                scaled_ptr + row * D + d,
                (e * factor * unit).to(scaled_ptr.dtype.element_ty),
                mask=d < D,
            )


@triton.jit
def sum_run(
    run,  # first place among the sorted targets, the place behind the last, and the target
    sources,  # pointers to sorted targets, tokens, embeddings and 1 - p, see add_targets_kernel
    d,  # (BLOCK_D,) features
    D,
    NEED_C: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum 1 - p times embeddings, and 1 - p, of the tokens that have a target, in their order."""
    start, stop, target = run
    sorted_ptr, order_ptr, e_ptr, target_ptr = sources
    sums = tl.zeros((BLOCK_D,), tl.float32)
    weights = 0.0
    found = RUN
    while found == RUN:
        places = start + tl.arange(0, RUN)
        same = tl.load(sorted_ptr + places, mask=places < stop, other=-1) == target
        token = tl.load(order_ptr + places, mask=same, other=0)
        weight = tl.load(target_ptr + token, mask=same, other=0.0)
        if NEED_C:
            rows = tl.load(
                e_ptr + token[:, None] * D + d[None, :],
                mask=same[:, None] & (d < D)[None, :],
                other=0.0,
            )
            sums += tl.sum(rows.to(tl.float32) * weight[:, None], 0)
        weights += tl.sum(weight, 0)
        found = tl.sum(same.to(tl.int32), 0)
        start += RUN
    return sums, weights


@triton.jit(do_not_specialize=["N"])
def sum_windows_kernel(
    sorted_ptr,  # (N,) see add_targets_kernel, like all that follow
    order_ptr,
    e_ptr,
    target_ptr,
    parts_ptr,  # (windows, D) out
    weights_ptr,  # (windows,) out
    N,
    D,
    NEED_C: tl.constexpr,
    WINDOW: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the tokens of a window whose target is the last one of the window before."""
    window = tl.program_id(0) + 1
    first = window * WINDOW
    target = tl.load(sorted_ptr + first)
    if (target < 0) | (target != tl.load(sorted_ptr + first - 1)):
        return
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    run = (first, min(first + WINDOW, N), target)
    sources = (sorted_ptr, order_ptr, e_ptr, target_ptr)
    sums, weights = sum_run(run, sources, d, D, NEED_C=NEED_C, RUN=RUN, BLOCK_D=BLOCK_D)
    if NEED_C:
        tl.store(parts_ptr + window * D + d, sums, mask=d < D)
    tl.store(weights_ptr + window, weights)


@triton.jit(do_not_specialize=["N"])
def add_targets_kernel(
    sorted_ptr,  # (N,) targets in order; -1 for none
    order_ptr,  # (N,) token of each
    e_ptr,  # (N, D)
    target_ptr,  # (N,) 1 - p of the target
    parts_ptr,  # (windows, D) sums of windows of these tokens, see sum_windows_kernel
    weights_ptr,  # (windows,) likewise
    grad_c_ptr,  # (V, D) in, out
    grad_bias_ptr,  # (V,) in, out
    N,
    D,
    NEED_C: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    WINDOW: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Subtract what the tokens of one target add to its row, one after the other.

    The program of the first of these tokens computes it; those of the others end at once.
    """
    first = tl.program_id(0)
    target = tl.load(sorted_ptr + first)
    before = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1)
    if (target < 0) | (target == before):
        return
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    window = first // WINDOW + 1
    run = (first, min(window * WINDOW, N), target)
    sources = (sorted_ptr, order_ptr, e_ptr, target_ptr)
    sums, weights = sum_run(run, sources, d, D, NEED_C=NEED_C, RUN=RUN, BLOCK_D=BLOCK_D)
    place = window * WINDOW
    while tl.load(sorted_ptr + place, mask=place < N, other=-1) == target:
        if NEED_C:
            sums += tl.load(parts_ptr + window * D + d, mask=d < D, other=0.0)
        weights += tl.load(weights_ptr + window)
        window += 1
        place += WINDOW
    if NEED_C:
        out = grad_c_ptr + target * D + d
        tl.store(out, tl.load(out, mask=d < D, other=0.0) - sums, mask=d < D)
    if NEED_BIAS:  # noqa: SIM102 (a constant, then a value of the device)
        if tl.program_id(1) == 0:
            tl.store(grad_bias_ptr + target, tl.load(grad_bias_ptr + target) - weights)
