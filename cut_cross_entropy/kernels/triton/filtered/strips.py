"""Triton kernels of ``kernels.filtered.strips``."""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.triton.primitives import (
    gather_rows,
    load_rows,
    load_token_values,
    logit_gradient,
    low_rank_product,
    popcount,
    transform_logits,
)


@triton.jit
def stored_rows(grad_ptr, borrowed_ptr, slots, first_borrowed, BLOCK_T: tl.constexpr):
    """Return where the logit gradients of strips are stored, a pointer for each slot."""
    slots = slots.to(tl.int64)
    own = grad_ptr + slots * BLOCK_T
    borrowed = borrowed_ptr + (slots - first_borrowed) * BLOCK_T
    # Rows are aligned to 16 bytes, which Triton does not see through the choice.
    return tl.multiple_of(tl.where(slots < first_borrowed, own, borrowed), (16,))


@triton.jit(do_not_specialize=["num_tiles_ptr", "first_block", "first_borrowed"])
def strip_gradients_kernel(
    e,  # (N, D)
    values,  # pointers to lse (log2; +inf: no token), a, b and targets, (N,) each, and scale, ()
    c_ptr,  # (V, D)
    bias_ptr,  # (V,), or None
    low_e_ptr,  # (N, LOW_RANK)
    low_c_ptr,  # (V, LOW_RANK)
    eta_ptr,  # (N,), or None, like the one that follows
    multiplier_ptr,
    classes_ptr,  # (K,)
    slots_ptr,  # (K,)
    starts_ptr,  # (blocks + 1,)
    first_tile_ptr,  # (blocks + 1,)
    num_tiles_ptr,  # () int32, or None if there are as many as programs
    tile_block_ptr,  # (tiles,) block of each program's tile, counted from first_block
    tile_start_ptr,  # (tiles,) its first strip
    grad_ptr,  # (first_borrowed, BLOCK_T) out
    borrowed_ptr,  # (K - first_borrowed, BLOCK_T) out
    bias_grad_ptr,  # (K,) out
    kept_mass_ptr,  # (tiles, BLOCK_T) out
    N,
    D,
    softcap,  # or None
    first_block,
    first_borrowed,
    BIAS_GRAD: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the logit gradients of one tile of strips."""
    place = tl.program_id(0)
    if num_tiles_ptr is not None:  # noqa: SIM102 (a constant, then a value of the device)
        if place >= tl.load(num_tiles_ptr):
            return
    local_block = tl.load(tile_block_ptr + place)
    start = tl.load(tile_start_ptr + place)
    strips = start + tl.arange(0, BLOCK_S)
    inside = strips < tl.load(starts_ptr + local_block + 1)
    classes = tl.load(classes_ptr + strips, mask=inside, other=0)
    first_token = (first_block + local_block) * BLOCK_T
    features = tl.arange(0, BLOCK_D)
    tokens = first_token + tl.arange(0, BLOCK_T)
    is_token = tokens < N
    product = low_rank_product(
        low_e_ptr, low_c_ptr, (tokens, classes), (is_token, inside), LOW_RANK
    )
    for d in range(0, D, BLOCK_D):
        c_tile = gather_rows(c_ptr, classes, inside, d + features, D)
        e_tile = load_rows(e, first_token, N, d, D, ROWS=BLOCK_T, COLUMNS=BLOCK_D)
        product = tl.dot(c_tile, e_tile.T, product, input_precision="ieee")

    # The tile ends in two halves, which need fewer registers at a time: what is spilled here goes
    # to the L2 cache.
    HALF: tl.constexpr = BLOCK_T // 2
    left, right = tl.split(tl.permute(tl.reshape(product, (BLOCK_S, 2, HALF)), (0, 2, 1)))
    slots = tl.load(slots_ptr + strips, mask=inside, other=0)
    rows = stored_rows(grad_ptr, borrowed_ptr, slots, first_borrowed, BLOCK_T=BLOCK_T)
    scale = tl.load(values[4])
    tile = tl.load(first_tile_ptr + local_block)
    tile += (start - tl.load(starts_ptr + local_block)) // BLOCK_S
    bias_grad = tl.zeros((BLOCK_S,), tl.float32)
    for half in tl.static_range(2):
        columns = half * HALF + tl.arange(0, HALF)
        tokens = first_token + columns
        is_token = tokens < N
        of_tokens = load_token_values(values, tokens, is_token)
        eta = None
        multiplier = None
        if eta_ptr is not None:
            eta = tl.load(eta_ptr + tokens, mask=is_token, other=0.0)
        if multiplier_ptr is not None:
            multiplier = tl.load(multiplier_ptr + tokens, mask=is_token, other=1.0)
        part = left if half == 0 else right
        logits = transform_logits(part, classes, inside, bias_ptr, softcap, multiplier=multiplier)
        p = tl.exp2(logits - of_tokens[0][None, :])
        onehot = (classes[:, None] == of_tokens[3][None, :]) & inside[:, None]
        grad = logit_gradient(
            logits, p, onehot, inside, of_tokens, softcap=softcap, multiplier=multiplier, eta=eta
        )
        tl.store(kept_mass_ptr + tile * BLOCK_T + columns, tl.sum(p, 0))
        if BIAS_GRAD:
            bias_grad += tl.sum(grad, 1)
        out = rows[:, None] + columns[None, :]
        tl.store(out, (grad * scale).to(grad_ptr.dtype.element_ty), mask=inside[:, None])
    if BIAS_GRAD:
        tl.store(bias_grad_ptr + slots, bias_grad, mask=inside)


@triton.jit(
    do_not_specialize=[
        "masks_ptr",
        "offsets_ptr",
        "chunk_starts_ptr",
        "first_class",
        "stop_class",
        "first_slot",
    ]
)
def sum_classes_kernel(
    values_ptr,  # (K,) by slot
    masks_ptr,  # (V,) of one superblock, like the two that follow
    offsets_ptr,  # (V,) see Kept
    chunk_starts_ptr,  # (chunks,) slot of a chunk's first strip
    out_ptr,  # (V,) float32, in, out
    first_class,
    stop_class,
    first_slot,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the strips of each class in their order."""
    classes = first_class + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = classes < stop_class
    count = popcount(tl.load(masks_ptr + classes, mask=inside, other=0))
    start = tl.load(chunk_starts_ptr + classes // CHUNK, mask=inside, other=0) - first_slot
    start += tl.load(offsets_ptr + classes, mask=inside, other=0)
    total = tl.load(out_ptr + classes, mask=inside, other=0.0)
    for i in range(tl.max(count, 0)):
        total += tl.load(values_ptr + start + i, mask=inside & (i < count), other=0.0)
    tl.store(out_ptr + classes, total, mask=inside)
