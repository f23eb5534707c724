"""Kernels that read the logits of student and teacher: sums of a token, and logit gradients.

The library has stored the products of a block of tokens and classes in float32; each kernel applies
bias, softcap and multiplier to both models' and reads them once. Formulas:
``implementations.chunked_divergence``. Shape legend: ``cut_cross_entropy.kernels``; T is the number
of tokens of a block. Of what belongs to all tokens a kernel gets the first token of the block: to
make views of it for each block takes the host longer than to launch a kernel.
"""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.triton.primitives import LN2, logit_slope, transform_logits

FROM_TEACHER, FROM_STUDENT, MIXTURE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
BLOCK, LONG_BLOCK = 1024, 2048
"""Classes that a program reads at a time; the second for rows of many."""
LONG_ROW = 2**15  # classes
WIDE_BLOCK, WIDE_WARPS, FEW_ROWS = 4096, 8, 384
"""Classes at a time and warps of a program that writes gradients, where so few rows take all."""
HIGHEST = tl.constexpr(120.0)
"""Log2 of a ratio whose exponential is still finite: p of any higher one is 0 beside q."""

# Rows of the sums of some classes, float32; exponents are relative to the highest logit of these.
HIGH, TOTAL, OTHERS, FIRST, TARGET, TEACHER_HIGH, TEACHER_TOTAL, CROSS = range(8)
# Rows of what logit gradients read of a token, log2, and for a mixture what its teacher is from it;
# RELATIVE: see ``DivergenceState``.
LSE, TEACHER_LSE, RELATIVE, TEACHER_RELATIVE = range(4)


@triton.jit
def load_logits(
    model,  # pointers to products (T, stride), bias (classes,) or None, multiplier (N,) or None
    row,  # of the token in its block
    token,
    classes,  # (BLOCK,) columns
    num_classes,
    stride,
):
    """Load some logits of one token from the products, in units of log2, (1, BLOCK).

    The last member of ``model`` is its softcap, or None.
    """
    inside = classes < num_classes
    multiplier = None
    if model[2] is not None:
        multiplier = tl.load(model[2] + token + tl.arange(0, 1))
    return transform_logits(
        tl.load(model[0] + row.to(tl.int64) * stride + classes, mask=inside, other=0.0)[None, :],
        classes,
        inside,
        model[1],
        model[3],
        multiplier=multiplier,
        TOKEN_AXIS=0,
    )


@triton.jit
def relative_to(logits, high):
    """Return the logits less their maximum, which may be -inf if all are."""
    return logits - tl.where(high == float("-inf"), 0.0, high)[:, None]


@triton.jit
def expected(p, x):
    """Return ``p * x``, 0 where p is."""
    return tl.where(p == 0.0, 0.0, p * x)


@triton.jit
def mixture_ratios(log_p, log_q, share, rest):
    """Return log2 of q over p, bounded, and of their mixture over p.

    The mixture has the given shares of q and p. Where p is 0, both have no meaning.
    """
    ratio = tl.minimum(log_q - log_p, HIGHEST)
    return ratio, tl.log2(rest + share * tl.exp2(ratio))


@triton.jit(do_not_specialize=["num_classes", "stride", "num_tokens", "first_token", "first_class"])
def sums_kernel(
    of_student,  # products, bias, multiplier, softcap: see load_logits
    of_teacher,
    targets_ptr,  # (N,) int64; None: no targets
    sums_ptr,  # (1 + parts, 8, T) out from the second on: see HIGH and the others
    first_token,
    first_class,
    num_tokens,
    num_classes,
    stride,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum some of the classes of one token.

    Without a loop over the classes of a token a program needs few registers, so that enough loads
    are in flight, and no sum is scaled when a maximum rises.
    """
    row = tl.program_id(0)
    part = tl.program_id(1)
    token = first_token + row
    classes = part * BLOCK + tl.arange(0, BLOCK)
    student = load_logits(of_student, row, token, classes, num_classes, stride=stride)
    teacher = load_logits(of_teacher, row, token, classes, num_classes, stride=stride)
    high = tl.max(student, 1)
    teacher_high = tl.max(teacher, 1)
    exponent = relative_to(student, high)
    teacher_exponent = relative_to(teacher, teacher_high)
    p = tl.exp2(exponent)
    q = tl.exp2(teacher_exponent)
    out = sums_ptr + (1 + part) * 8 * num_tokens + row + tl.arange(0, 1)
    tl.store(out, high)
    tl.store(out + num_tokens, tl.sum(p, 1))
    tl.store(out + 3 * num_tokens, tl.sum(expected(p, exponent), 1))
    tl.store(out + 5 * num_tokens, teacher_high)
    tl.store(out + 6 * num_tokens, tl.sum(q, 1))
    if KIND == FROM_TEACHER:
        cross = expected(q, teacher_exponent - exponent)
        tl.store(out + 7 * num_tokens, tl.sum(cross, 1))
    if KIND == FROM_STUDENT:
        cross = expected(p, exponent - teacher_exponent)
        tl.store(out + 7 * num_tokens, tl.sum(cross, 1))
    if targets_ptr is not None:
        column = tl.load(targets_ptr + token) - first_class
        is_other = (classes != column)[None, :]
        tl.store(out + 2 * num_tokens, tl.sum(tl.where(is_other, p, 0.0), 1))
        logit = tl.sum(tl.where(is_other, 0.0, student), 1)
        is_here = (column >= part * BLOCK) & (column < (part + 1) * BLOCK)
        tl.store(out + 4 * num_tokens, tl.where(is_here, logit, float("-inf")))


@triton.jit
def fall_to(high, part_high):
    """Return what the exponents of a part fall by; 0 without a class of any probability."""
    return tl.where(part_high == float("-inf"), 0.0, high - part_high)


@triton.jit(do_not_specialize=["num_tokens", "stride", "first_token", "first_part", "num_parts"])
def combine_sums_kernel(
    parts_ptr,  # (parts, 8, T) see HIGH and the others
    sums_ptr,  # (8, stride) out, which may be one of the parts
    logs_ptr,  # (4, stride) out: see LSE and the others; None where classes are missing
    first_token,  # in what is written
    num_tokens,
    stride,
    first_part,  # parts before it do not count
    num_parts,
    KIND: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Add up parts of the sums of some tokens, whose exponents are relative to different logits."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    parts = tl.arange(0, PARTS)[:, None]
    inside = (parts >= first_part) & (parts < num_parts) & (tokens < num_tokens)[None, :]
    place = parts_ptr + parts * 8 * num_tokens + tokens[None, :]
    nothing = float("-inf")
    highs = tl.load(place, mask=inside, other=nothing)
    p = tl.load(place + num_tokens, mask=inside, other=0.0)
    others = tl.load(place + 2 * num_tokens, mask=inside, other=0.0)
    first = tl.load(place + 3 * num_tokens, mask=inside, other=0.0)
    target = tl.max(tl.load(place + 4 * num_tokens, mask=inside, other=nothing), 0)
    teacher_highs = tl.load(place + 5 * num_tokens, mask=inside, other=nothing)
    q = tl.load(place + 6 * num_tokens, mask=inside, other=0.0)
    cross = tl.load(place + 7 * num_tokens, mask=inside, other=0.0)
    tl.debug_barrier()  # other threads have read what this one overwrites
    high = tl.max(highs, 0)
    teacher_high = tl.max(teacher_highs, 0)
    fall = fall_to(high[None, :], highs)
    teacher_fall = fall_to(teacher_high[None, :], teacher_highs)
    shrink = tl.exp2(-fall)
    teacher_shrink = tl.exp2(-teacher_fall)
    out, kept = sums_ptr + first_token + tokens, tokens < num_tokens
    total = tl.sum(p * shrink, 0)
    teacher_total = tl.sum(q * teacher_shrink, 0)
    tl.store(out, high, mask=kept)
    tl.store(out + stride, total, mask=kept)
    tl.store(out + 2 * stride, tl.sum(others * shrink, 0), mask=kept)
    tl.store(out + 3 * stride, tl.sum(expected(shrink, first - fall * p), 0), mask=kept)
    tl.store(out + 4 * stride, target, mask=kept)
    tl.store(out + 5 * stride, teacher_high, mask=kept)
    tl.store(out + 6 * stride, teacher_total, mask=kept)
    if KIND == FROM_TEACHER:
        cross = tl.sum(expected(teacher_shrink, cross + (fall - teacher_fall) * q), 0)
        tl.store(out + 7 * stride, cross, mask=kept)
    if KIND == FROM_STUDENT:
        cross = tl.sum(expected(shrink, cross + (teacher_fall - fall) * p), 0)
        tl.store(out + 7 * stride, cross, mask=kept)
    if logs_ptr is not None:
        log_total, log_teacher_total = tl.log2(total), tl.log2(teacher_total)
        logs = logs_ptr + first_token + tokens
        tl.store(logs, high + log_total, mask=kept)
        tl.store(logs + stride, teacher_high + log_teacher_total, mask=kept)
        if KIND == FROM_STUDENT:
            relative = cross / total + (log_teacher_total - log_total)
            tl.store(logs + 2 * stride, relative, mask=kept)


@triton.jit(do_not_specialize=["num_classes", "stride", "num_tokens", "first_token", "logs_stride"])
def mixture_sums_kernel(
    of_student,  # products, bias, multiplier, softcap: see load_logits
    of_teacher,
    logs_ptr,  # (4, logs_stride): see LSE and the others
    sums_ptr,  # (parts, 2, T) out: of student and teacher relative to the mixture
    first_token,
    logs_stride,
    share,
    rest,
    num_tokens,
    num_classes,
    stride,
    BLOCK: tl.constexpr,
):
    """Sum what student and teacher are from their mixture over some of the classes of a token."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    token = first_token + row
    classes = part * BLOCK + tl.arange(0, BLOCK)
    student = load_logits(of_student, row, token, classes, num_classes, stride=stride)
    teacher = load_logits(of_teacher, row, token, classes, num_classes, stride=stride)
    log_p = student - tl.load(logs_ptr + token)
    log_q = teacher - tl.load(logs_ptr + logs_stride + token)
    p = tl.exp2(log_p)
    ratio, of_mixture = mixture_ratios(log_p, log_q, share, rest)
    # Without p the mixture is a share of q.
    ahead = tl.where(p == 0.0, -tl.log2(share), ratio - of_mixture)
    out = sums_ptr + part * 2 * num_tokens + row + tl.arange(0, 1)
    tl.store(out, tl.sum(-expected(p, of_mixture), 1))
    tl.store(out + num_tokens, tl.sum(expected(tl.exp2(log_q), ahead), 1))


@triton.jit(
    do_not_specialize=[
        "num_classes", "stride", "grad_stride", "first_token", "first_class", "logs_stride",
    ]
)  # fmt: skip
def logit_gradients_kernel(
    of_student,  # products, bias, multiplier, softcap: see load_logits
    of_teacher,
    logs_ptr,  # (3 or 4, logs_stride): see LSE and the others
    entropy_ptr,  # (N,) log2; read with g_entropy_ptr
    g_divergence_ptr,  # (N,) times the scale, or None, like the two that follow
    g_entropy_ptr,  # (N,)
    g_logprob_ptr,  # (N,)
    miss_ptr,  # (N,) gradient by the logit of the target; read with g_logprob_ptr, like the next
    targets_ptr,  # (N,) int64
    grad_ptr,  # (T, grad_stride) out, in the memory of the products
    first_token,
    first_class,
    logs_stride,
    share,
    rest,
    num_classes,
    stride,
    grad_stride,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite the student's products of one token by the gradient by them.

    In half precision a block of classes is written where the program has read already.
    """
    row = tl.program_id(0)
    token = first_token + row
    lse = tl.load(logs_ptr + token)
    multiplier = 1.0  # unused
    if of_student[2] is not None:
        multiplier = tl.load(of_student[2] + token)
    for start in range(0, num_classes, BLOCK):
        classes = start + tl.arange(0, BLOCK)
        student = load_logits(of_student, row, token, classes, num_classes, stride=stride)
        teacher = load_logits(of_teacher, row, token, classes, num_classes, stride=stride)
        inside = (classes < num_classes)[None, :]
        log_p = student - lse
        p = tl.exp2(log_p)
        grad = tl.zeros((1, BLOCK), tl.float32)
        if g_divergence_ptr is not None:
            g = tl.load(g_divergence_ptr + token)
            log_q = teacher - tl.load(logs_ptr + logs_stride + token)
            if KIND == FROM_TEACHER:
                grad = g * (p - tl.exp2(log_q))
            else:
                ahead = log_p - log_q
                if KIND == MIXTURE:
                    _, of_mixture = mixture_ratios(log_p, log_q, share, rest)
                    ahead = -of_mixture
                    g *= rest
                relative = tl.load(logs_ptr + 2 * logs_stride + token)
                grad = g * LN2 * expected(p, ahead - relative)
        if g_entropy_ptr is not None:
            surplus = expected(p, log_p + tl.load(entropy_ptr + token))
            grad -= tl.load(g_entropy_ptr + token) * LN2 * surplus
        if g_logprob_ptr is not None:
            is_target = (classes == tl.load(targets_ptr + token) - first_class)[None, :]
            part = -tl.load(g_logprob_ptr + token) * p
            grad += tl.where(is_target, tl.load(miss_ptr + token), part)
        if of_student[2] is not None:
            grad *= multiplier
        if of_student[3] is not None:
            capped = student
            if of_student[2] is not None:
                capped = capped / multiplier
            grad *= tl.where(inside, logit_slope(capped, of_student[3]), 0.0)
        place = row.to(tl.int64) * grad_stride + classes[None, :]
        tl.debug_barrier()  # other threads have read what this one overwrites
        tl.store(grad_ptr + place, grad.to(grad_ptr.dtype.element_ty), mask=inside)
