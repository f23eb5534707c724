"""Kernels that read the logits of student and teacher: sums of a token, and logit gradients.

The library has stored the products of a block of tokens and classes in float32; each kernel applies
bias, softcap and multiplier to both models' and reads them once. Formulas:
``implementations.chunked_divergence``. Shape legend: ``cut_cross_entropy.kernels``; T is the number
of tokens of a block.
"""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.triton.primitives import LN2, logit_slope, transform_logits

FROM_TEACHER, FROM_STUDENT, MIXTURE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
BLOCK, LONG_BLOCK = 1024, 2048
"""Classes that a program reads at a time; the second for rows of many, which end at about once."""
LONG_ROW = 2**15  # classes
HIGHEST = tl.constexpr(120.0)
"""Log2 of a ratio whose exponential is still finite: p of any higher one is 0 beside q."""

# Rows of the sums of a walk, float32; exponents are relative to the highest logit so far.
HIGH, TOTAL, OTHERS, FIRST, TARGET, TEACHER_HIGH, TEACHER_TOTAL, CROSS = range(8)
RELATIVE, TEACHER_RELATIVE = range(2)


@triton.jit
def load_logits(
    products_ptr,  # (T, stride) of one of the models
    block,  # row, class ids, number of classes, stride
    bias_ptr,  # (classes,), or None, like the two that follow
    multiplier_ptr,  # (T,)
    softcap,
):
    """Load some logits of one token from the products, in units of log2, (1, BLOCK)."""
    row, classes, num_classes, stride = block
    inside = classes < num_classes
    multiplier = None
    if multiplier_ptr is not None:
        multiplier = tl.load(multiplier_ptr + row + tl.arange(0, 1))
    return transform_logits(
        tl.load(products_ptr + row.to(tl.int64) * stride + classes, mask=inside, other=0.0)[
            None, :
        ],
        classes,
        inside,
        bias_ptr,
        softcap,
        multiplier=multiplier,
        TOKEN_AXIS=0,
    )


@triton.jit
def rebase(high, logits):
    """Return the higher maximum, what the exponents fall by, and the factor of earlier sums."""
    higher = tl.maximum(high, tl.max(logits, 1))
    # Nothing seen yet, nothing to scale; infinity less infinity is no number.
    fall = tl.where((high == float("-inf")) | (high == higher), 0.0, higher - high)
    return higher, fall, tl.exp2(-fall)


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


@triton.jit(do_not_specialize=["num_classes", "stride", "num_tokens"])
def add_sums_kernel(
    student_ptr,  # (T, stride) products of the student
    teacher_ptr,  # (T, stride)
    bias_ptr,  # (classes,), or None, like the three that follow
    teacher_bias_ptr,  # (classes,)
    multiplier_ptr,  # (T,)
    teacher_multiplier_ptr,  # (T,)
    columns_ptr,  # (T,) column of the target, negative if it is not here; None: no targets
    sums_ptr,  # (8, T) in, out: see HIGH and the others
    num_tokens,
    num_classes,
    stride,
    softcap,  # or None
    teacher_softcap,  # or None
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the classes of a block to the sums of one token."""
    row = tl.program_id(0)
    one = tl.arange(0, 1)
    high = tl.load(sums_ptr + row + one)
    teacher_high = tl.load(sums_ptr + 5 * num_tokens + row + one)
    total = tl.zeros((1, BLOCK), tl.float32)
    others = tl.zeros((1, BLOCK), tl.float32)
    first = tl.zeros((1, BLOCK), tl.float32)
    teacher_total = tl.zeros((1, BLOCK), tl.float32)
    cross = tl.zeros((1, BLOCK), tl.float32)
    # Earlier blocks are one more summand.
    begin = tl.arange(0, BLOCK)[None, :] == 0
    total = tl.where(begin, tl.load(sums_ptr + num_tokens + row), total)
    first = tl.where(begin, tl.load(sums_ptr + 3 * num_tokens + row), first)
    teacher_total = tl.where(begin, tl.load(sums_ptr + 6 * num_tokens + row), teacher_total)
    cross = tl.where(begin, tl.load(sums_ptr + 7 * num_tokens + row), cross)
    column = 0
    if columns_ptr is not None:
        column = tl.load(columns_ptr + row)
        others = tl.where(begin, tl.load(sums_ptr + 2 * num_tokens + row), others)
    for start in range(0, num_classes, BLOCK):
        classes = start + tl.arange(0, BLOCK)
        block = (row, classes, num_classes, stride)
        student = load_logits(student_ptr, block, bias_ptr, multiplier_ptr, softcap)
        teacher = load_logits(
            teacher_ptr, block, teacher_bias_ptr, teacher_multiplier_ptr, teacher_softcap
        )
        high, fall, shrink = rebase(high, student)
        teacher_high, teacher_fall, teacher_shrink = rebase(teacher_high, teacher)
        exponent = relative_to(student, high)
        teacher_exponent = relative_to(teacher, teacher_high)
        p = tl.exp2(exponent)
        q = tl.exp2(teacher_exponent)
        if KIND == FROM_TEACHER:
            ahead = expected(q, teacher_exponent - exponent)
            shift = (fall - teacher_fall)[:, None]
            cross = (cross + shift * teacher_total) * teacher_shrink[:, None] + ahead
        if KIND == FROM_STUDENT:
            ahead = expected(p, exponent - teacher_exponent)
            shift = (teacher_fall - fall)[:, None]
            cross = (cross + shift * total) * shrink[:, None] + ahead
        first = (first - fall[:, None] * total) * shrink[:, None] + expected(p, exponent)
        total = total * shrink[:, None] + p
        teacher_total = teacher_total * teacher_shrink[:, None] + q
        if columns_ptr is not None:
            is_other = (classes != column)[None, :]
            others = others * shrink[:, None] + tl.where(is_other, p, 0.0)
            if (column >= start) & (column < start + BLOCK):
                logit = tl.sum(tl.where(is_other, 0.0, student), 1)
                tl.store(sums_ptr + 4 * num_tokens + row + one, logit)
    tl.store(sums_ptr + row + one, high)
    tl.store(sums_ptr + num_tokens + row + one, tl.sum(total, 1))
    tl.store(sums_ptr + 3 * num_tokens + row + one, tl.sum(first, 1))
    tl.store(sums_ptr + 5 * num_tokens + row + one, teacher_high)
    tl.store(sums_ptr + 6 * num_tokens + row + one, tl.sum(teacher_total, 1))
    tl.store(sums_ptr + 7 * num_tokens + row + one, tl.sum(cross, 1))
    if columns_ptr is not None:
        tl.store(sums_ptr + 2 * num_tokens + row + one, tl.sum(others, 1))


@triton.jit(do_not_specialize=["num_classes", "stride", "num_tokens"])
def add_mixture_sums_kernel(
    student_ptr,  # (T, stride) products of the student
    teacher_ptr,  # (T, stride)
    bias_ptr,  # (classes,), or None, like the three that follow
    teacher_bias_ptr,  # (classes,)
    multiplier_ptr,  # (T,)
    teacher_multiplier_ptr,  # (T,)
    lse_ptr,  # (T,) log2
    teacher_lse_ptr,  # (T,) log2
    sums_ptr,  # (2, T) in, out: of the student and of the teacher relative to the mixture
    share,
    rest,
    num_tokens,
    num_classes,
    stride,
    softcap,  # or None
    teacher_softcap,  # or None
    BLOCK: tl.constexpr,
):
    """Add the classes of a block to what student and teacher are from their mixture, of a token."""
    row = tl.program_id(0)
    one = tl.arange(0, 1)
    lse = tl.load(lse_ptr + row)
    teacher_lse = tl.load(teacher_lse_ptr + row)
    ours = tl.zeros((1, BLOCK), tl.float32)
    theirs = tl.zeros((1, BLOCK), tl.float32)
    log_share = tl.log2(share)
    for start in range(0, num_classes, BLOCK):
        classes = start + tl.arange(0, BLOCK)
        block = (row, classes, num_classes, stride)
        student = load_logits(student_ptr, block, bias_ptr, multiplier_ptr, softcap)
        teacher = load_logits(
            teacher_ptr, block, teacher_bias_ptr, teacher_multiplier_ptr, teacher_softcap
        )
        log_p = student - lse
        log_q = teacher - teacher_lse
        p = tl.exp2(log_p)
        ratio, of_mixture = mixture_ratios(log_p, log_q, share, rest)
        ours -= expected(p, of_mixture)
        # Without p the mixture is a share of q.
        ahead = tl.where(p == 0.0, -log_share, ratio - of_mixture)
        theirs += expected(tl.exp2(log_q), ahead)
    out = sums_ptr + row + one
    tl.store(out, tl.load(out) + tl.sum(ours, 1))
    tl.store(out + num_tokens, tl.load(out + num_tokens) + tl.sum(theirs, 1))


@triton.jit(do_not_specialize=["num_classes", "stride", "grad_stride"])
def logit_gradients_kernel(
    student_ptr,  # (T, stride) products of the student
    teacher_ptr,  # (T, stride)
    bias_ptr,  # (classes,), or None, like the three that follow
    teacher_bias_ptr,  # (classes,)
    multiplier_ptr,  # (T,)
    teacher_multiplier_ptr,  # (T,)
    lse_ptr,  # (T,) log2, like the three that follow
    teacher_lse_ptr,  # (T,)
    relative_ptr,  # (T,) of the student
    entropy_ptr,  # (T,)
    g_divergence_ptr,  # (T,) times the scale, or None, like the two that follow
    g_entropy_ptr,  # (T,)
    g_logprob_ptr,  # (T,)
    miss_ptr,  # (T,) gradient by the logit of the target; read with g_logprob_ptr, like the next
    columns_ptr,  # (T,) column of the target; negative if it is not here
    grad_ptr,  # (T, grad_stride) out, in the memory of student_ptr
    share,
    rest,
    num_classes,
    stride,
    grad_stride,
    softcap,  # or None
    teacher_softcap,  # or None
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite the student's products of one token by the gradient by them.

    In half precision a block of classes is written where the program has read already.
    """
    row = tl.program_id(0)
    lse = tl.load(lse_ptr + row)
    multiplier = 1.0  # unused
    if multiplier_ptr is not None:
        multiplier = tl.load(multiplier_ptr + row)
    for start in range(0, num_classes, BLOCK):
        classes = start + tl.arange(0, BLOCK)
        block = (row, classes, num_classes, stride)
        student = load_logits(student_ptr, block, bias_ptr, multiplier_ptr, softcap)
        teacher = load_logits(
            teacher_ptr, block, teacher_bias_ptr, teacher_multiplier_ptr, teacher_softcap
        )
        inside = (classes < num_classes)[None, :]
        log_p = student - lse
        p = tl.exp2(log_p)
        grad = tl.zeros((1, BLOCK), tl.float32)
        if g_divergence_ptr is not None:
            g = tl.load(g_divergence_ptr + row)
            log_q = teacher - tl.load(teacher_lse_ptr + row)
            if KIND == FROM_TEACHER:
                grad = g * (p - tl.exp2(log_q))
            else:
                ahead = log_p - log_q
                if KIND == MIXTURE:
                    _, of_mixture = mixture_ratios(log_p, log_q, share, rest)
                    ahead = -of_mixture
                    g *= rest
                grad = g * LN2 * expected(p, ahead - tl.load(relative_ptr + row))
        if g_entropy_ptr is not None:
            surplus = expected(p, log_p + tl.load(entropy_ptr + row))
            grad -= tl.load(g_entropy_ptr + row) * LN2 * surplus
        if g_logprob_ptr is not None:
            is_target = (classes == tl.load(columns_ptr + row))[None, :]
            part = -tl.load(g_logprob_ptr + row) * p
            grad += tl.where(is_target, tl.load(miss_ptr + row), part)
        if multiplier_ptr is not None:
            grad *= multiplier
        if softcap is not None:
            capped = student
            if multiplier_ptr is not None:
                capped = capped / multiplier
            grad *= tl.where(inside, logit_slope(capped, softcap), 0.0)
        place = row.to(tl.int64) * grad_stride + classes[None, :]
        tl.debug_barrier()  # other threads have read what this one overwrites
        tl.store(grad_ptr + place, grad.to(grad_ptr.dtype.element_ty), mask=inside)
