"""Triton kernels of ``kernels.exact``."""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.triton.primitives import (
    halves,
    load_token_values,
    logit_gradient,
    low_rank_product,
    multiply_step,
    swizzle_program,
    transform_logits,
)


@triton.jit
def store_gradients(
    product,  # (BLOCK_T, classes) rows of e times rows of c
    classes,  # (classes,) class ids
    tokens,  # (BLOCK_T,)
    values,  # (BLOCK_T,) each: lse, a, b, targets
    out,  # pointer to (N, chunk), strides, first class, numbers of tokens and classes, scale
    bias_ptr,  # (V,), or None
    softcap,  # or None
    eta,  # (BLOCK_T,), or None, like the two that follow
    q,
    multiplier,
):
    """Store the logit gradients of a tile of products."""
    grad_ptr, stride, stride_class, first_class, N, V, scale = out
    inside = classes < V
    logits = transform_logits(
        product, classes, inside, bias_ptr, softcap, multiplier=multiplier, TOKEN_AXIS=0
    )
    p = tl.exp2(logits - values[0][:, None])
    onehot = classes[None, :] == values[3][:, None]
    grad = logit_gradient(
        logits,
        p,
        onehot,
        inside,
        values,
        softcap=softcap,
        multiplier=multiplier,
        eta=eta,
        q=q,
        TOKEN_AXIS=0,
    )
    # 32 bits reach: a chunk is bounded in elements
    place = tokens[:, None] * stride + (classes - first_class)[None, :] * stride_class
    grad = (grad * scale).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + place, grad, mask=(tokens < N)[:, None] & inside[None, :])


@triton.jit(
    do_not_specialize=[
        "first_class",
        "stop_class",
        "segment_tiles",
        "num_segments",
        "num_blocks",
        "swizzle_width",
    ]
)
def chunk_gradients_kernel(
    e,  # (N, D)
    c,  # (V, D)
    bias_ptr,  # (V,), or None
    low_e_ptr,  # (N, LOW_RANK)
    low_c_ptr,  # (V, LOW_RANK)
    values,  # pointers to lse (log2; +inf: no token), a, b and targets, (N,) each, and scale, ()
    eta_ptr,  # (N,), or None, like the two that follow; see logit_gradient
    q_ptr,
    multiplier_ptr,
    num_rows_ptr,  # () int32 tokens to compute, the first ones; None: all
    grad_ptr,  # (N, chunk) out
    N,
    V,
    D,
    softcap,  # or None
    first_class,
    stop_class,
    stride_out,
    stride_class,
    segment_tiles,
    num_segments,
    num_blocks,
    swizzle_width,
    LOW_RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the gradients of one block of tokens for one segment of a chunk of the classes.

    Tiles are (tokens, classes) here: nothing is summed over tokens, and the values of a token are
    then needed in few threads.
    """
    block, segment = swizzle_program(num_blocks, swizzle_width, num_segments)
    if num_rows_ptr is not None:  # noqa: SIM102 (a constant, then a value of the device)
        if block * BLOCK_T >= tl.load(num_rows_ptr):
            return
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = tokens < N
    of_tokens = load_token_values(values, tokens, is_token)
    scale = tl.load(values[4])
    eta = None
    if eta_ptr is not None:
        eta = tl.load(eta_ptr + tokens, mask=is_token, other=0.0)
    q = None
    if q_ptr is not None:
        q = tl.load(q_ptr + tokens, mask=is_token, other=0.0)
    multiplier = None
    if multiplier_ptr is not None:
        multiplier = tl.load(multiplier_ptr + tokens, mask=is_token, other=1.0)
    start = first_class + segment * segment_tiles * BLOCK_V
    tiles = min(segment_tiles, tl.cdiv(stop_class - start, BLOCK_V))
    steps = tl.cdiv(D, BLOCK_D)
    out = (grad_ptr, stride_out, stride_class, first_class, N, V, scale)
    # A wide tile ends in two halves, which need fewer registers at a time.
    NUM_PARTS: tl.constexpr = 2 if BLOCK_V > BLOCK_T else 1
    PART: tl.constexpr = BLOCK_V // NUM_PARTS
    classes = start + tl.arange(0, BLOCK_V)
    product = low_rank_product(
        low_e_ptr, low_c_ptr, (tokens, classes), (is_token, classes < V), LOW_RANK, TOKEN_AXIS=0
    )
    shape = (N, V, D)
    for i in tl.range(0, tiles * steps, flatten=True):
        step = (i, block * BLOCK_T, start)
        product = multiply_step(product, e, c, step, shape, TILE=(BLOCK_T, BLOCK_V, BLOCK_D))
        if i % steps == steps - 1:
            v = start + (i // steps) * BLOCK_V
            left, right = halves(product, BLOCK_T=BLOCK_T, BLOCK_V=BLOCK_V)
            for part in tl.static_range(NUM_PARTS):
                store_gradients(
                    left if part == 0 else right,
                    classes=v + part * PART + tl.arange(0, PART),
                    tokens=tokens,
                    values=of_tokens,
                    out=out,
                    bias_ptr=bias_ptr,
                    softcap=softcap,
                    eta=eta,
                    q=q,
                    multiplier=multiplier,
                )
            classes = v + BLOCK_V + tl.arange(0, BLOCK_V)
            product = low_rank_product(
                low_e_ptr,
                low_c_ptr,
                (tokens, classes),
                (is_token, classes < V),
                LOW_RANK,
                TOKEN_AXIS=0,
            )
