"""The logits of a block of tokens and classes of two models, and launches of what reads them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.divergence_problem import DivergenceGrads, DivergenceState
from cut_cross_entropy.implementations.blocks import MIN_CLASSES, Blocks
from cut_cross_entropy.kernels.launch import cdiv, launch, next_power_of_2
from cut_cross_entropy.kernels.triton.divergence_logits import (
    BLOCK,
    CROSS,
    FEW_ROWS,
    FIRST,
    FROM_STUDENT,
    FROM_TEACHER,
    HIGH,
    LONG_BLOCK,
    LONG_ROW,
    MIXTURE,
    OTHERS,
    RELATIVE,
    TARGET,
    TEACHER_HIGH,
    TEACHER_RELATIVE,
    TEACHER_TOTAL,
    TOTAL,
    WIDE_BLOCK,
    WIDE_WARPS,
    combine_sums_kernel,
    logit_gradients_kernel,
    mixture_sums_kernel,
    sums_kernel,
)
from cut_cross_entropy.kernels.triton.primitives import LN2
from cut_cross_entropy.problem import gradient_scale

COMBINED = 8  # tokens of a program that adds up parts of sums


@dataclass(frozen=True)
class StoredLogits:
    """Memory for the products of a block of both models, in float32.

    Args:
        student, teacher: the inputs without ignored tokens.
        memory: (tokens, stride) of the student's products, which their gradients overwrite, and
            of the teacher's.
    """

    student: Blocks
    teacher: Blocks
    memory: tuple[Tensor, Tensor]

    @classmethod
    def allocate(
        cls, student: Blocks, teacher: Blocks, num_tokens: int, num_classes: int
    ) -> "StoredLogits":
        """Allocate memory for blocks of at most that many tokens and classes."""
        stride = -(-num_classes // MIN_CLASSES) * MIN_CLASSES  # rows stay aligned
        shape, make = (num_tokens, stride), student.problem.e.new_empty
        memory = make(shape, dtype=torch.float32), make(shape, dtype=torch.float32)
        return cls(student, teacher, memory)

    @property
    def factor_type(self) -> torch.dtype:
        """Dtype of logit gradients, as factors of products."""
        return self.student.problem.compute_dtype if self.student.half_products else torch.float32

    def gradients(self, tokens: slice, classes: slice) -> Tensor:
        """Return the place of the logit gradients of a block, (tokens, classes)."""
        place = self.memory[0].view(self.factor_type)
        return place[: tokens.stop - tokens.start, : classes.stop - classes.start]

    def token_blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Blocks of tokens with the embeddings of student and teacher."""
        for tokens in self.student.token_blocks():
            yield tokens, self.student.embeddings(tokens), self.teacher.embeddings(tokens)

    def multiply(
        self, e: Tensor, e_teacher: Tensor, tokens: slice, classes: slice, first: int
    ) -> None:
        """Store the products of some classes of a block of both, whose first class is ``first``."""
        for side, rows, memory in zip(
            (self.student, self.teacher), (e, e_teacher), self.memory, strict=True
        ):
            columns = slice(classes.start - first, classes.stop - first)
            out = memory[: tokens.stop - tokens.start, columns]
            side.store_product(rows, side.classifier(classes).T, out)

    def add_sums(
        self, tokens: slice, classes: slice, sums: Tensor, kind: int, has_targets: bool
    ) -> None:
        """Add a block whose products are stored to the sums of its tokens.

        Args:
            tokens, classes: the block.
            sums: :func:`room_for_sums`, whose values the first block of classes overwrites.
            kind: see :func:`kind_of_divergence`.
            has_targets: whether to sum what log-probabilities of targets need.
        """
        num_parts = self._run(
            sums_kernel,
            tokens,
            classes,
            in_parts=True,
            columns_ptr=self._columns(tokens, classes) if has_targets else None,
            sums_ptr=sums[1:],
            num_tokens=sums.shape[2],
            KIND=kind,
        )
        combine(sums[: 1 + num_parts], kind, first=int(classes.start == 0))

    def mixture_sums(self, tokens: slice, classes: slice, lses: Tensor, beta: float) -> Tensor:
        """Return the sums (2, T) relative to the mixture of such a block.

        Args:
            tokens, classes: the block.
            lses: (2, T) log-sum-exps of student and teacher, log2.
            beta: share of the teacher in the mixture.
        """
        shape = (parts_of(classes.stop - classes.start), 2, lses.shape[1])
        sums = torch.empty(shape, dtype=torch.float32, device=lses.device)
        lse, teacher_lse = lses
        self._run(
            mixture_sums_kernel,
            tokens,
            classes,
            in_parts=True,
            lse_ptr=lse,
            teacher_lse_ptr=teacher_lse,
            sums_ptr=sums,
            share=beta,
            rest=1 - beta,
            num_tokens=sums.shape[2],
        )
        return sums.sum(0)

    def write_gradients(
        self,
        tokens: slice,
        classes: slice,
        values: "TokenValues",
        kind: int,
        beta: float,
    ) -> Tensor:
        """Overwrite the student's products of a block with the gradients by them.

        Args:
            tokens, classes: the block.
            values: of its tokens.
            kind: see :func:`kind_of_divergence`.
            beta: from 0 to 1.

        Returns:
            The gradients times the scale of the values, (T, classes).
        """
        has_targets, out = values.g_logprobs is not None, self.gradients(tokens, classes)
        is_wide = out.shape[0] <= FEW_ROWS and out.shape[1] >= LONG_ROW
        self._run(
            logit_gradients_kernel,
            tokens,
            classes,
            BLOCK=WIDE_BLOCK if is_wide else classes_at_a_time(out.shape[1]),
            num_warps=WIDE_WARPS if is_wide else 4,
            lse_ptr=values.lse,
            teacher_lse_ptr=values.teacher_lse,
            relative_ptr=values.relative,
            entropy_ptr=values.entropy,
            g_divergence_ptr=values.g_divergence,
            g_entropy_ptr=values.g_entropy,
            g_logprob_ptr=values.g_logprobs,
            miss_ptr=values.miss,
            columns_ptr=self._columns(tokens, classes) if has_targets else None,
            grad_ptr=out,
            grad_stride=out.stride(0),
            share=beta,
            rest=1 - beta,
            KIND=kind,
        )
        return out

    def _columns(self, tokens: slice, classes: slice) -> Tensor:
        """Return the column of each token's target in a block of classes; -1 if elsewhere."""
        targets = self.student.targets[tokens]
        here = (targets >= classes.start) & (targets < classes.stop)
        return torch.where(here, targets - classes.start, -1).int()

    def _run(
        self, kernel: Any, tokens: slice, classes: slice, in_parts: bool = False, **arguments: Any
    ) -> int:
        """Launch a kernel over the tokens of a block whose products are stored.

        Returns:
            The number of programs of a token: one, or one for each part of the classes.
        """
        of_student, of_teacher = (
            (
                products,
                None if side.problem.bias is None else side.problem.bias[classes],
                None if side.multiplier is None else side.multiplier[tokens],
                side.problem.softcap,
            )
            for side, products in zip((self.student, self.teacher), self.memory, strict=True)
        )
        num_classes = classes.stop - classes.start
        num_parts = parts_of(num_classes) if in_parts else 1
        arguments.setdefault("BLOCK", classes_at_a_time(num_classes))
        launch(
            kernel,
            (tokens.stop - tokens.start, num_parts),
            of_student=of_student,
            of_teacher=of_teacher,
            num_classes=num_classes,
            stride=self.memory[0].stride(0),
            **arguments,
        )
        return num_parts


def classes_at_a_time(num_classes: int) -> int:
    """Return how many classes of a block a program reads at a time."""
    return LONG_BLOCK if num_classes >= LONG_ROW else BLOCK


def parts_of(num_classes: int) -> int:
    """Return how many parts a block of classes is summed in."""
    return cdiv(num_classes, classes_at_a_time(num_classes))


def kind_of_divergence(beta: float) -> int:
    """Return which of the three formulas a beta has, as the kernels number them."""
    if beta == 0:
        return int(FROM_TEACHER.value)
    return int((FROM_STUDENT if beta == 1 else MIXTURE).value)


def room_for_sums(num_classes: int, num_tokens: int, like: Tensor) -> Tensor:
    """Return memory (1 + parts, 8, num_tokens) for sums over blocks of at most ``num_classes``.

    The first part is for the sums; without a class they are those of none.
    """
    parts = parts_of(num_classes)
    if num_classes >= LONG_ROW:  # the last block may be shorter, and have more
        parts = max(parts, parts_of(LONG_ROW - 1))
    sums = like.new_empty((1 + parts, 8, num_tokens), dtype=torch.float32)
    if num_classes == 0:
        sums[0] = 0
        for row in (HIGH, TARGET, TEACHER_HIGH):
            sums[0, row] = -torch.inf
    return sums


def combine(parts: Tensor, kind: int, first: int = 0) -> Tensor:
    """Add up the sums (parts, 8, T) from the given part on, in place of those of the first.

    Returns:
        (8, T).
    """
    num_parts, _, num_tokens = parts.shape
    launch(
        combine_sums_kernel,
        (cdiv(num_tokens, COMBINED),),
        parts_ptr=parts,
        sums_ptr=parts,
        num_tokens=num_tokens,
        first_part=first,
        num_parts=num_parts,
        KIND=kind,
        PARTS=next_power_of_2(num_parts),
        TOKENS=COMBINED,
    )
    return parts[0]


def from_student(sums: Tensor) -> Tensor:
    """Return the divergence (T,) of the student from the teacher, from the sums (8, T), log2."""
    log_ratio = sums[TEACHER_TOTAL].log2() - sums[TOTAL].log2()
    return sums[CROSS] / sums[TOTAL] + log_ratio


def log_sum_exps(sums: Tensor) -> Tensor:
    """Return the log-sum-exps (2, T) of student and teacher from the sums (8, T), log2."""
    step = TEACHER_HIGH - HIGH
    highs, totals = sums[HIGH : TEACHER_HIGH + 1 : step], sums[TOTAL : TEACHER_TOTAL + 1 : step]
    return highs + totals.log2()


def finish(sums: Tensor, results: Tensor, kind: int, has_targets: bool) -> None:
    """Turn the sums (8, T) of tokens into their results (6, T), in the order of the state.

    Of a mixture the divergence is still missing.
    """
    log_total, log_teacher_total = sums[TOTAL].log2(), sums[TEACHER_TOTAL].log2()
    results[1] = log_total - sums[FIRST] / sums[TOTAL]
    results[3] = sums[HIGH] + log_total
    results[4] = sums[TEACHER_HIGH] + log_teacher_total
    if kind == FROM_TEACHER.value:
        results[0] = sums[CROSS] / sums[TEACHER_TOTAL] + (log_total - log_teacher_total)
    elif kind == FROM_STUDENT.value:
        results[0] = results[5] = from_student(sums)
    results *= LN2.value
    if has_targets:
        # Precise where the target has most of the probability, and never above 0.
        misses = sums[OTHERS] / sums[TOTAL]
        likely = torch.log1p(-misses.clamp(max=0.5))
        logprobs = (sums[TARGET] - sums[HIGH] - log_total) * LN2.value
        results[2] = torch.where(misses < 0.5, likely, logprobs).clamp(max=0)


def finish_mixture(sums: Tensor, results: Tensor, beta: float) -> None:
    """Turn the sums (2, T) relative to the mixture into the results that miss them."""
    of_student, of_teacher = sums[RELATIVE] * LN2.value, sums[TEACHER_RELATIVE] * LN2.value
    results[0] = (1 - beta) * of_student + beta * of_teacher
    results[5] = of_student


@dataclass(frozen=True)
class TokenValues:
    """Values (T,) that logit gradients have: gradients of results, and log2 of results.

    Args:
        g_divergence, g_entropy, g_logprobs: gradients of the results times the scale; None for 0.
        miss: gradient by the logit of the target; None without ``g_logprobs``.
        lse, teacher_lse, relative, entropy: results, log2.
    """

    g_divergence: Tensor | None
    g_entropy: Tensor | None
    g_logprobs: Tensor | None
    miss: Tensor | None
    lse: Tensor
    teacher_lse: Tensor
    relative: Tensor
    entropy: Tensor

    @classmethod
    def of(
        cls, grads: DivergenceGrads, state: DivergenceState, blocks: Blocks, scale: Tensor
    ) -> "TokenValues":
        """Return the values of the tokens that are not ignored.

        Args:
            grads, state: of all tokens.
            blocks: of the student.
            scale: () of the gradients.
        """
        g_divergence, g_entropy, g_logprobs = (
            None if x is None else blocks.gather(x.float()) * scale for x in grads
        )
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
            lse,
            teacher_lse=teacher_lse,
            relative=relative,
            entropy=entropy,
        )

    def part(self, tokens: slice) -> "TokenValues":
        """Return the values of some of the tokens."""
        given = {name: x for name, x in vars(self).items() if x is not None}
        return replace(self, **{name: x[tokens] for name, x in given.items()})


def scale_of(grads: DivergenceGrads, blocks: Blocks, factor_type: torch.dtype) -> Tensor:
    """Return the power of two () that brings gradients (N,) near 1 where float16 holds them."""
    given = [x.abs() for x in grads if x is not None]
    if factor_type == torch.float16 and given:
        largest = blocks.gather(torch.stack(given).amax(0).float())
        return gradient_scale(largest, largest)
    return blocks.targets.new_ones((), dtype=torch.float32)
