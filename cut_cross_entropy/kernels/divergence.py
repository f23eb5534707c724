"""Divergence of a student from a teacher: products of the library, and kernels that read both.

A block has all tokens, if they fit, and some classes. The library stores its logits of student and
teacher in float32; a kernel then reads both once for all sums, another for the gradient, which it
writes as a factor of the products for dE and dC. A divergence from the teacher or from the student
needs one walk over the classes, since its terms can be summed before the log-sum-exps are known. A
mixture of both takes a second one, unless the budget holds all classes of some tokens: their logits
are still there then. Formulas: ``implementations.chunked_divergence``. Shape legend:
``cut_cross_entropy.kernels``; T is the number of tokens of a block.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.distributed.collectives import gather_shards
from cut_cross_entropy.divergence_results import DivergenceGrads, DivergenceState
from cut_cross_entropy.implementations.blocks import MAX_TOKENS, MIN_CLASSES, Blocks
from cut_cross_entropy.implementations.chunked_divergence import in_any_shard
from cut_cross_entropy.kernels.exact import MAX_ELEMENTS
from cut_cross_entropy.kernels.launch import launch
from cut_cross_entropy.kernels.primitives import LN2, logit_slope, transform_logits
from cut_cross_entropy.problem import Gradients, Needed, Problem, gradient_scale

FROM_TEACHER, FROM_STUDENT, MIXTURE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
BLOCK = 1024  # classes that a program reads at a time
MANY_TOKENS = 192
"""Tokens of a block of all classes, at least: with fewer, products wait for the memory."""
EVEN_TOKENS, EVEN_CLASSES = (256, 64), 1024
"""Multiples of these fill the multiprocessors with whole tiles of the library's products."""
LOWEST = tl.constexpr(-2.0e4)
"""Log2 of the probability that stands for -inf in a mixture: its exponential is 0 too."""

# Rows of the sums of a walk, float32; exponents are relative to the highest logit so far.
HIGH, TOTAL, OTHERS, FIRST, TARGET, TEACHER_HIGH, TEACHER_TOTAL, CROSS = range(8)
RELATIVE, TEACHER_RELATIVE = range(2)


@triton.jit
def two_logits(
    student_ptr,
    teacher_ptr,
    bias_ptr,
    teacher_bias_ptr,
    multiplier_ptr,
    teacher_multiplier_ptr,
    row,
    classes,
    num_classes,
    stride,
    softcap,
    teacher_softcap,
    HAS_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    HAS_MULTIPLIER: tl.constexpr,
    TEACHER_MULTIPLIER: tl.constexpr,
):
    """Load some logits of one token from the products, in units of log2, (1, BLOCK) each."""
    inside = classes < num_classes
    place = row.to(tl.int64) * stride + classes
    multiplier, teacher_multiplier = 1.0, 1.0  # unused
    if HAS_MULTIPLIER:
        multiplier = tl.load(multiplier_ptr + row + tl.arange(0, 1))
    if TEACHER_MULTIPLIER:
        teacher_multiplier = tl.load(teacher_multiplier_ptr + row + tl.arange(0, 1))
    student = transform_logits(
        tl.load(student_ptr + place, mask=inside, other=0.0)[None, :],
        bias_ptr=bias_ptr,
        classes=classes,
        inside=inside,
        softcap=softcap,
        HAS_BIAS=HAS_BIAS,
        SOFTCAP=SOFTCAP,
        TOKEN_AXIS=0,
        multiplier=multiplier,
        HAS_MULTIPLIER=HAS_MULTIPLIER,
    )
    teacher = transform_logits(
        tl.load(teacher_ptr + place, mask=inside, other=0.0)[None, :],
        bias_ptr=teacher_bias_ptr,
        classes=classes,
        inside=inside,
        softcap=teacher_softcap,
        HAS_BIAS=TEACHER_BIAS,
        SOFTCAP=TEACHER_SOFTCAP,
        TOKEN_AXIS=0,
        multiplier=teacher_multiplier,
        HAS_MULTIPLIER=TEACHER_MULTIPLIER,
    )
    return student, teacher


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
def log_mixture(log_p, log_q, log_share, log_rest):
    """Return log2 of the mixture of both, whose shares are given as log2."""
    ours = tl.maximum(log_p, LOWEST) + log_rest
    theirs = tl.maximum(log_q, LOWEST) + log_share
    larger = tl.maximum(ours, theirs)
    return larger + tl.log2(tl.exp2(ours - larger) + tl.exp2(theirs - larger))


@triton.jit(do_not_specialize=["num_classes", "stride", "num_tokens"])
def add_sums_kernel(
    student_ptr,  # (T, stride) products of the student
    teacher_ptr,  # (T, stride)
    bias_ptr,  # (classes,)
    teacher_bias_ptr,  # (classes,)
    multiplier_ptr,  # (T,)
    teacher_multiplier_ptr,  # (T,)
    columns_ptr,  # (T,) column of the target; negative if it is not here
    sums_ptr,  # (8, T) in, out: see HIGH and the others
    num_tokens,
    num_classes,
    stride,
    softcap,
    teacher_softcap,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    HAS_MULTIPLIER: tl.constexpr,
    TEACHER_MULTIPLIER: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
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
    if HAS_TARGETS:
        column = tl.load(columns_ptr + row)
        others = tl.where(begin, tl.load(sums_ptr + 2 * num_tokens + row), others)
    for start in range(0, num_classes, BLOCK):
        classes = start + tl.arange(0, BLOCK)
        student, teacher = two_logits(
            student_ptr,
            teacher_ptr=teacher_ptr,
            bias_ptr=bias_ptr,
            teacher_bias_ptr=teacher_bias_ptr,
            multiplier_ptr=multiplier_ptr,
            teacher_multiplier_ptr=teacher_multiplier_ptr,
            row=row,
            classes=classes,
            num_classes=num_classes,
            stride=stride,
            softcap=softcap,
            teacher_softcap=teacher_softcap,
            HAS_BIAS=HAS_BIAS,
            TEACHER_BIAS=TEACHER_BIAS,
            SOFTCAP=SOFTCAP,
            TEACHER_SOFTCAP=TEACHER_SOFTCAP,
            HAS_MULTIPLIER=HAS_MULTIPLIER,
            TEACHER_MULTIPLIER=TEACHER_MULTIPLIER,
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
        if HAS_TARGETS:
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
    if HAS_TARGETS:
        tl.store(sums_ptr + 2 * num_tokens + row + one, tl.sum(others, 1))


@triton.jit(do_not_specialize=["num_classes", "stride", "num_tokens"])
def add_mixture_sums_kernel(
    student_ptr,  # (T, stride) products of the student
    teacher_ptr,  # (T, stride)
    bias_ptr,  # (classes,)
    teacher_bias_ptr,  # (classes,)
    multiplier_ptr,  # (T,)
    teacher_multiplier_ptr,  # (T,)
    lse_ptr,  # (T,) log2
    teacher_lse_ptr,  # (T,) log2
    sums_ptr,  # (2, T) in, out: of the student and of the teacher relative to the mixture
    log_share,
    log_rest,
    num_tokens,
    num_classes,
    stride,
    softcap,
    teacher_softcap,
    HAS_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    HAS_MULTIPLIER: tl.constexpr,
    TEACHER_MULTIPLIER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the classes of a block to what student and teacher are from their mixture, of a token."""
    row = tl.program_id(0)
    one = tl.arange(0, 1)
    lse = tl.load(lse_ptr + row)
    teacher_lse = tl.load(teacher_lse_ptr + row)
    ours = tl.zeros((1, BLOCK), tl.float32)
    theirs = tl.zeros((1, BLOCK), tl.float32)
    for start in range(0, num_classes, BLOCK):
        classes = start + tl.arange(0, BLOCK)
        student, teacher = two_logits(
            student_ptr,
            teacher_ptr=teacher_ptr,
            bias_ptr=bias_ptr,
            teacher_bias_ptr=teacher_bias_ptr,
            multiplier_ptr=multiplier_ptr,
            teacher_multiplier_ptr=teacher_multiplier_ptr,
            row=row,
            classes=classes,
            num_classes=num_classes,
            stride=stride,
            softcap=softcap,
            teacher_softcap=teacher_softcap,
            HAS_BIAS=HAS_BIAS,
            TEACHER_BIAS=TEACHER_BIAS,
            SOFTCAP=SOFTCAP,
            TEACHER_SOFTCAP=TEACHER_SOFTCAP,
            HAS_MULTIPLIER=HAS_MULTIPLIER,
            TEACHER_MULTIPLIER=TEACHER_MULTIPLIER,
        )
        log_p = student - lse
        log_q = teacher - teacher_lse
        log_m = log_mixture(log_p, log_q, log_share, log_rest)
        ours += expected(tl.exp2(log_p), log_p - log_m)
        theirs += expected(tl.exp2(log_q), log_q - log_m)
    out = sums_ptr + row + one
    tl.store(out, tl.load(out) + tl.sum(ours, 1))
    tl.store(out + num_tokens, tl.load(out + num_tokens) + tl.sum(theirs, 1))


@triton.jit(do_not_specialize=["num_classes", "stride"])
def logit_gradients_kernel(
    student_ptr,  # (T, stride) products of the student
    teacher_ptr,  # (T, stride)
    bias_ptr,  # (classes,)
    teacher_bias_ptr,  # (classes,)
    multiplier_ptr,  # (T,)
    teacher_multiplier_ptr,  # (T,)
    lse_ptr,  # (T,) log2, like the three that follow
    teacher_lse_ptr,  # (T,)
    relative_ptr,  # (T,) of the student
    entropy_ptr,  # (T,)
    g_divergence_ptr,  # (T,) times the scale, like the three that follow
    g_entropy_ptr,  # (T,)
    g_logprob_ptr,  # (T,)
    miss_ptr,  # (T,) gradient by the logit of the target
    columns_ptr,  # (T,) column of the target; negative if it is not here
    grad_ptr,  # (T, stride) out
    log_share,
    log_rest,
    rest,
    num_classes,
    stride,
    softcap,
    teacher_softcap,
    KIND: tl.constexpr,
    HAS_DIVERGENCE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LOGPROB: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    HAS_MULTIPLIER: tl.constexpr,
    TEACHER_MULTIPLIER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient by some of the student's products of one token."""
    row = tl.program_id(0)
    classes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    student, teacher = two_logits(
        student_ptr,
        teacher_ptr=teacher_ptr,
        bias_ptr=bias_ptr,
        teacher_bias_ptr=teacher_bias_ptr,
        multiplier_ptr=multiplier_ptr,
        teacher_multiplier_ptr=teacher_multiplier_ptr,
        row=row,
        classes=classes,
        num_classes=num_classes,
        stride=stride,
        softcap=softcap,
        teacher_softcap=teacher_softcap,
        HAS_BIAS=HAS_BIAS,
        TEACHER_BIAS=TEACHER_BIAS,
        SOFTCAP=SOFTCAP,
        TEACHER_SOFTCAP=TEACHER_SOFTCAP,
        HAS_MULTIPLIER=HAS_MULTIPLIER,
        TEACHER_MULTIPLIER=TEACHER_MULTIPLIER,
    )
    log_p = student - tl.load(lse_ptr + row)
    p = tl.exp2(log_p)
    grad = tl.zeros((1, BLOCK), tl.float32)
    if HAS_DIVERGENCE:
        g = tl.load(g_divergence_ptr + row)
        log_q = teacher - tl.load(teacher_lse_ptr + row)
        if KIND == FROM_TEACHER:
            grad = g * (p - tl.exp2(log_q))
        else:
            reference = log_q
            if KIND == MIXTURE:
                reference = log_mixture(log_p, log_q, log_share, log_rest)
                g *= rest
            grad = g * LN2 * expected(p, log_p - reference - tl.load(relative_ptr + row))
    if HAS_ENTROPY:
        surplus = expected(p, log_p + tl.load(entropy_ptr + row))
        grad -= tl.load(g_entropy_ptr + row) * LN2 * surplus
    if HAS_LOGPROB:
        is_target = (classes == tl.load(columns_ptr + row))[None, :]
        part = -tl.load(g_logprob_ptr + row) * p
        grad += tl.where(is_target, tl.load(miss_ptr + row), part)
    if HAS_MULTIPLIER:
        multiplier = tl.load(multiplier_ptr + row)
        grad *= multiplier
    if SOFTCAP:
        capped = student
        if HAS_MULTIPLIER:
            capped = capped / multiplier
        grad *= tl.where((classes < num_classes)[None, :], logit_slope(capped, softcap), 0.0)
    place = row.to(tl.int64) * stride + classes[None, :]
    inside = (classes < num_classes)[None, :]
    tl.store(grad_ptr + place, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class _Walk:
    """Blocks of both models, and the memory that holds the logits of one.

    Args:
        student, teacher: the inputs without ignored tokens.
        logits: of the student, and of the teacher; memory for a block each, float32.
        factor: the same for the logit gradients; empty in the forward.
        stride: elements of a row of a block.
    """

    student: Blocks
    teacher: Blocks
    logits: tuple[Tensor, Tensor]
    factor: Tensor
    stride: int

    @classmethod
    def of(cls, student: Problem, teacher: Problem, needed: Needed | None, kind: int) -> "_Walk":
        """Choose blocks that fit the budget, and allocate their memory."""
        blocks, others = Blocks(student), Blocks(teacher)
        num_classes, factor_type = student.c.shape[0], blocks.wide
        if blocks.half_products:
            factor_type = student.compute_dtype
        tokens = max(1, min(blocks.num_kept, MAX_TOKENS))
        element = 8 if needed is None else 8 + factor_type.itemsize
        widened = sum(  # bytes of a row of e or c that is copied in float32
            4 * side.problem.c.shape[1]
            for side in (blocks, others)
            if side.problem.c.dtype != torch.float32 and not side.half_products
        )
        budget = student.memory_budget
        left = budget - num_classes * widened
        of_all_classes = left // (num_classes * element + widened) if num_classes else 0
        of_all_classes = min(of_all_classes, MAX_ELEMENTS // max(1, num_classes))
        is_enough = of_all_classes >= min(tokens, MANY_TOKENS)
        if kind == MIXTURE.value and needed is None and student.group is None and is_enough:
            classes = num_classes
            if of_all_classes < tokens:
                multiple = next(n for n in (*EVEN_TOKENS, 1) if n <= of_all_classes)
                tokens = of_all_classes // multiple * multiple
        else:
            per_class = widened + (4 * student.c.shape[1] if needed and needed.c else 0)
            classes = 0
            while True:
                classes = (budget - tokens * widened) // (element * tokens + per_class)
                classes = min(classes, MAX_ELEMENTS // tokens)
                if classes >= MIN_CLASSES or tokens == 1:
                    break
                tokens = max(1, tokens // 2)
            multiple = EVEN_CLASSES if classes >= EVEN_CLASSES else MIN_CLASSES
            classes = min(num_classes, max(MIN_CLASSES, classes // multiple * multiple))
        blocks.shape = others.shape = (tokens, classes)
        stride = -(-classes // MIN_CLASSES) * MIN_CLASSES  # rows stay aligned
        make = student.e.new_empty
        return cls(
            blocks,
            others,
            (
                make(tokens * stride, dtype=torch.float32),
                make(tokens * stride, dtype=torch.float32),
            ),
            make(tokens * stride if needed else 0, dtype=factor_type),
            stride,
        )

    def token_blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Blocks of tokens with the embeddings of student and teacher."""
        for tokens in self.student.token_blocks():
            yield tokens, self.student.embeddings(tokens), self.teacher.embeddings(tokens)

    def block(self, memory: Tensor, tokens: slice, classes: slice) -> Tensor:
        """Return memory of a block as (tokens, classes)."""
        return memory.view(-1, self.stride)[
            : tokens.stop - tokens.start, : classes.stop - classes.start
        ]

    def multiply(self, e: Tensor, e_teacher: Tensor, tokens: slice, classes: slice) -> None:
        """Store the products of a block of both."""
        for side, rows, memory in zip(
            (self.student, self.teacher), (e, e_teacher), self.logits, strict=True
        ):
            out = self.block(memory, tokens, classes)
            side.store_product(rows, side.classifier(classes).T, out)

    def run(
        self, kernel: Any, tokens: slice, classes: slice, *, columns: int = 1, **arguments: Any
    ) -> None:
        """Launch a kernel over the tokens of a block whose products are stored."""
        student, teacher = self.student, self.teacher
        sides = (student, teacher)
        biases = [None if x.problem.bias is None else x.problem.bias[classes] for x in sides]
        multipliers = [None if x.multiplier is None else x.multiplier[tokens] for x in sides]
        softcaps = [x.problem.softcap for x in sides]
        launch(
            kernel,
            (tokens.stop - tokens.start, columns),
            student_ptr=self.logits[0],
            teacher_ptr=self.logits[1],
            bias_ptr=biases[0],
            teacher_bias_ptr=biases[1],
            multiplier_ptr=multipliers[0],
            teacher_multiplier_ptr=multipliers[1],
            num_classes=classes.stop - classes.start,
            stride=self.stride,
            softcap=softcaps[0] or 0.0,
            teacher_softcap=softcaps[1] or 0.0,
            HAS_BIAS=biases[0] is not None,
            TEACHER_BIAS=biases[1] is not None,
            SOFTCAP=softcaps[0] is not None,
            TEACHER_SOFTCAP=softcaps[1] is not None,
            HAS_MULTIPLIER=multipliers[0] is not None,
            TEACHER_MULTIPLIER=multipliers[1] is not None,
            BLOCK=BLOCK,
            **arguments,
        )


def forward(student: Problem, teacher: Problem, beta: float, has_targets: bool) -> DivergenceState:
    """Compute divergence, entropy, log-probabilities and what the backward needs.

    As ``chunked_divergence.forward``, for inputs other than float64.
    """
    kind, group = _kind(beta), student.group
    walk = _Walk.of(student, teacher, None, kind)
    blocks = walk.student
    sums = blocks.targets.new_zeros((8, blocks.num_kept), dtype=torch.float32)
    for row in (HIGH, TARGET, TEACHER_HIGH):  # a list of rows would be copied to the device
        sums[row] = -torch.inf
    of_mixture = torch.zeros_like(sums[:2])
    results = torch.zeros_like(sums[:6])
    is_whole = group is None and blocks.shape[1] == student.c.shape[0]
    for tokens, e, e_teacher in walk.token_blocks():
        of_tokens = sums[:, tokens].contiguous()
        for classes in blocks.class_blocks():
            walk.multiply(e, e_teacher, tokens, classes)
            walk.run(
                add_sums_kernel,
                tokens,
                classes,
                columns_ptr=_columns(blocks, tokens, classes) if has_targets else None,
                sums_ptr=of_tokens,
                num_tokens=of_tokens.shape[1],
                KIND=kind,
                HAS_TARGETS=has_targets,
            )
        sums[:, tokens] = of_tokens
        if is_whole and kind == MIXTURE.value:  # the logits are still there
            _finish(of_tokens, results[:, tokens], kind, has_targets)
            _add_mixture_sums(
                walk, tokens, slice(0, student.c.shape[0]), of_mixture, results=results, beta=beta
            )
    if group is not None:
        sums = _sum_shards(sums, kind, group)
    _finish(sums, results, kind, has_targets)
    if kind == MIXTURE.value:
        if not is_whole:
            for tokens, e, e_teacher in walk.token_blocks():
                for classes in blocks.class_blocks():
                    walk.multiply(e, e_teacher, tokens, classes)
                    _add_mixture_sums(walk, tokens, classes, of_mixture, results=results, beta=beta)
        if group is not None:
            of_mixture = gather_shards(of_mixture, group).sum(0)
        of_mixture *= LN2.value
        results[0] = (1 - beta) * of_mixture[RELATIVE] + beta * of_mixture[TEACHER_RELATIVE]
        results[5] = of_mixture[RELATIVE]
    results[:2].clamp_(min=0)
    if has_targets:
        results[2] = torch.where(in_any_shard(blocks), results[2], torch.nan)
    divergence, entropy, logprobs, lse, teacher_lse, relative = (
        blocks.scatter(x.clone()) for x in results
    )
    if not has_targets:
        logprobs = logprobs.new_empty(0)
    return DivergenceState(divergence, entropy, logprobs, lse, teacher_lse, relative)


def _add_mixture_sums(
    walk: _Walk,
    tokens: slice,
    classes: slice,
    of_mixture: Tensor,
    *,
    results: Tensor,
    beta: float,
) -> None:
    """Add a block whose products are stored to the sums (2, N) relative to the mixture."""
    sums = of_mixture[:, tokens].contiguous()
    walk.run(
        add_mixture_sums_kernel,
        tokens,
        classes,
        lse_ptr=results[3, tokens] / LN2.value,
        teacher_lse_ptr=results[4, tokens] / LN2.value,
        sums_ptr=sums,
        num_tokens=sums.shape[1],
        **_shares(beta),
    )
    of_mixture[:, tokens] = sums


def _sum_shards(sums: Tensor, kind: int, group: str) -> Tensor:
    """Combine the sums (8, N) of all processes, whose exponents are relative to different logits.

    All compute the same from the same numbers.
    """
    parts = gather_shards(sums, group)
    total = parts.new_zeros(sums.shape)
    falls = []
    for row in (HIGH, TEACHER_HIGH):
        total[row] = parts[:, row].amax(0)
        # A shard without a class, or whose logits are all -inf, adds nothing.
        fall = total[row] - parts[:, row]
        falls.append(torch.where(parts[:, row] == -torch.inf, 0, fall))
    fall, teacher_fall = falls
    shrink, teacher_shrink = torch.exp2(-fall), torch.exp2(-teacher_fall)
    total[TARGET] = parts[:, TARGET].amax(0)
    total[TOTAL] = (parts[:, TOTAL] * shrink).sum(0)
    total[OTHERS] = (parts[:, OTHERS] * shrink).sum(0)
    total[FIRST] = ((parts[:, FIRST] - fall * parts[:, TOTAL]) * shrink).sum(0)
    total[TEACHER_TOTAL] = (parts[:, TEACHER_TOTAL] * teacher_shrink).sum(0)
    if kind == FROM_TEACHER.value:
        shifted = parts[:, CROSS] + (fall - teacher_fall) * parts[:, TEACHER_TOTAL]
        total[CROSS] = (shifted * teacher_shrink).sum(0)
    elif kind == FROM_STUDENT.value:
        shifted = parts[:, CROSS] + (teacher_fall - fall) * parts[:, TOTAL]
        total[CROSS] = (shifted * shrink).sum(0)
    return total


def _finish(sums: Tensor, results: Tensor, kind: int, has_targets: bool) -> None:
    """Turn the sums (8, T) of tokens into their results (6, T), in the order of the state."""
    log_total, log_teacher_total = sums[TOTAL].log2(), sums[TEACHER_TOTAL].log2()
    results[1] = log_total - sums[FIRST] / sums[TOTAL]
    results[3] = sums[HIGH] + log_total
    results[4] = sums[TEACHER_HIGH] + log_teacher_total
    if kind == FROM_TEACHER.value:
        results[0] = sums[CROSS] / sums[TEACHER_TOTAL] + (log_total - log_teacher_total)
    elif kind == FROM_STUDENT.value:
        results[0] = sums[CROSS] / sums[TOTAL] + (log_teacher_total - log_total)
        results[5] = results[0]
    results *= LN2.value
    if has_targets:
        # Precise where the target has most of the probability, and never above 0.
        misses = sums[OTHERS] / sums[TOTAL]
        likely = torch.log1p(-misses.clamp(max=0.5))
        logprobs = (sums[TARGET] - sums[HIGH] - log_total) * LN2.value
        results[2] = torch.where(misses < 0.5, likely, logprobs).clamp(max=0)


def backward(
    grads: DivergenceGrads,
    state: DivergenceState,
    student: Problem,
    teacher: Problem,
    beta: float,
    needed: Needed,
) -> Gradients:
    """Compute the gradients of the student's e, c and bias; an empty tensor for each not needed.

    As ``chunked_divergence.backward``, for inputs other than float64.
    """
    kind = _kind(beta)
    walk = _Walk.of(student, teacher, needed, kind)
    blocks, e, c, bias = walk.student, student.e, student.c, student.bias
    per_token = _PerToken.of(grads, state, walk)
    grad_e_sum = e.new_zeros((blocks.num_kept if needed.e else 0, e.shape[1]), dtype=torch.float32)
    grad_c = torch.empty_like(c, memory_format=torch.contiguous_format) if needed.c else None
    grad_bias = None
    if needed.bias and bias is not None:
        grad_bias = bias.new_empty(bias.shape)
    # A single product writes the rows of dC, in place; not those of scaled gradients.
    is_single = blocks.num_kept <= blocks.shape[0] and blocks.num_kept > 0
    in_place = (
        is_single
        and grad_c is not None
        and grad_c.dtype == walk.factor.dtype
        and grad_c.dtype != torch.float16
    )
    for classes in blocks.class_blocks():
        num_rows = classes.stop - classes.start
        rows = e.new_zeros(
            (num_rows if needed.c and not in_place else 0, c.shape[1]), dtype=torch.float32
        )
        rows_of_bias = e.new_zeros(num_rows, dtype=torch.float32)
        for tokens, e_block, e_teacher in walk.token_blocks():
            walk.multiply(e_block, e_teacher, tokens, classes)
            per_token.write_logit_gradients(walk, tokens, classes, kind, beta)
            factor = walk.block(walk.factor, tokens, classes)
            if needed.e:
                blocks.add_product(factor, blocks.classifier(classes), grad_e_sum[tokens])
            if grad_c is not None:
                if in_place:
                    torch.mm(factor.T, e_block, out=grad_c[classes])
                else:
                    blocks.add_product(factor.T, e_block, rows)
            if grad_bias is not None:
                rows_of_bias += factor.sum(0, dtype=torch.float32)
        if grad_c is not None and not in_place:
            grad_c[classes] = rows.div_(per_token.scale)
        if grad_bias is not None:
            grad_bias[classes] = rows_of_bias.div_(per_token.scale)
    nothing = e.new_empty(0)
    grad_e = None
    if needed.e:
        grad_e = blocks.scatter(grad_e_sum.div_(per_token.scale)).to(e.dtype)
    found = (grad_e, grad_c, grad_bias)
    return Gradients(*(nothing.clone() if grad is None else grad for grad in found))


@dataclass(frozen=True)
class _PerToken:
    """Values (kept tokens,) that logit gradients have: gradients of results, and log2 of results.

    Args:
        g_divergence, g_entropy, g_logprobs: gradients of the results times the scale; None for 0.
        miss: gradient by the logit of the target; None without ``g_logprobs``.
        lse, teacher_lse, relative, entropy: results, log2.
        scale: power of two that brings the gradients near 1 where they are factors in
            float16.
    """

    g_divergence: Tensor | None
    g_entropy: Tensor | None
    g_logprobs: Tensor | None
    miss: Tensor | None
    lse: Tensor
    teacher_lse: Tensor
    relative: Tensor
    entropy: Tensor
    scale: Tensor

    @classmethod
    def of(cls, grads: DivergenceGrads, state: DivergenceState, walk: _Walk) -> "_PerToken":
        blocks = walk.student
        upstream = [None if x is None else blocks.gather(x.float()) for x in grads]
        scale = state.lse.new_ones(())
        given = [x.abs() for x in upstream if x is not None]
        if walk.factor.dtype == torch.float16 and given:
            largest = torch.stack(given).amax(0)
            scale = gradient_scale(largest, largest)
        g_divergence, g_entropy, g_logprobs = (None if x is None else x * scale for x in upstream)
        miss = None
        if g_logprobs is not None:
            # A target out of range: never a plausible number.
            g_logprobs = torch.where(blocks.in_range, g_logprobs, torch.nan)
            miss = -g_logprobs * torch.expm1(blocks.gather(state.logprobs))
        logs = (state.lse, state.teacher_lse, state.relative, state.entropy)
        lse, teacher_lse, relative, entropy = (blocks.gather(x) / LN2.value for x in logs)
        return cls(
            g_divergence,
            g_entropy,
            g_logprobs,
            miss,
            lse=lse,
            teacher_lse=teacher_lse,
            relative=relative,
            entropy=entropy,
            scale=scale,
        )

    def write_logit_gradients(
        self, walk: _Walk, tokens: slice, classes: slice, kind: int, beta: float
    ) -> None:
        """Write the logit gradients of a block whose products are stored, times the scale."""
        has_targets = self.g_logprobs is not None
        walk.run(
            logit_gradients_kernel,
            tokens,
            classes,
            columns=triton.cdiv(classes.stop - classes.start, BLOCK),
            lse_ptr=self.lse[tokens],
            teacher_lse_ptr=self.teacher_lse[tokens],
            relative_ptr=self.relative[tokens],
            entropy_ptr=self.entropy[tokens],
            g_divergence_ptr=_part(self.g_divergence, tokens),
            g_entropy_ptr=_part(self.g_entropy, tokens),
            g_logprob_ptr=_part(self.g_logprobs, tokens),
            miss_ptr=_part(self.miss, tokens),
            columns_ptr=_columns(walk.student, tokens, classes) if has_targets else None,
            grad_ptr=walk.factor,
            rest=1 - beta,
            KIND=kind,
            HAS_DIVERGENCE=self.g_divergence is not None,
            HAS_ENTROPY=self.g_entropy is not None,
            HAS_LOGPROB=has_targets,
            **_shares(beta),
        )


def _kind(beta: float) -> int:
    if beta == 0:
        return int(FROM_TEACHER.value)
    return int((FROM_STUDENT if beta == 1 else MIXTURE).value)


def _shares(beta: float) -> dict[str, Any]:
    """Return log2 of the shares of teacher and student in the mixture."""
    if not 0 < beta < 1:
        return {"log_share": 0.0, "log_rest": 0.0}
    return {"log_share": math.log2(beta), "log_rest": math.log1p(-beta) / math.log(2)}


def _columns(blocks: Blocks, tokens: slice, classes: slice) -> Tensor:
    """Return the column of each token's target in a block of classes; -1 if it is elsewhere."""
    targets = blocks.targets[tokens]
    here = (targets >= classes.start) & (targets < classes.stop)
    return torch.where(here, targets - classes.start, -1).int()


def _part(values: Tensor | None, tokens: slice) -> Tensor | None:
    return None if values is None else values[tokens]
