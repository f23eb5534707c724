"""The logits of a block of tokens and classes of two models, and launches of what reads them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cut_cross_entropy.divergence_problem import DivergenceGrads, DivergenceState
from cut_cross_entropy.implementations.blocks import MIN_CLASSES, Blocks, part_of
from cut_cross_entropy.implementations.chunked_divergence import in_any_shard
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
ALIGNED_TOKENS = 4  # of float32 are 16 bytes, which kernels are compiled for


class TokenSums(NamedTuple):
    """Sums over the classes of each token, columns of rows that are aligned.

    Args:
        sums: (8, N), see ``kernels.triton.divergence_logits.HIGH`` and the others.
        logs: (4, N), see ``LSE`` there and the others.
    """

    sums: Tensor
    logs: Tensor

    @classmethod
    def allocate(cls, num_tokens: int, like: Tensor) -> "TokenSums":
        """Allocate the sums of some tokens on the device of ``like``."""
        columns = cdiv(num_tokens, ALIGNED_TOKENS) * ALIGNED_TOKENS
        made = like.new_empty((12, columns), dtype=torch.float32)[:, :num_tokens]
        return cls(*made.split((8, 4)))

    def clear(self) -> None:
        """Set the sums to those of no class."""
        self.sums.zero_()
        for row in (HIGH, TARGET, TEACHER_HIGH):
            self.sums[row] = -torch.inf


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
        place, num_tokens = self.memory[0], tokens.stop - tokens.start
        if num_tokens < len(place):
            place = place[:num_tokens]
        first = slice(0, classes.stop - classes.start)
        return part_of(place.view(self.factor_type), first, 1)

    def token_blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Blocks of tokens with the embeddings of student and teacher."""
        for tokens in self.student.token_blocks():
            yield tokens, self.student.embeddings(tokens), self.teacher.embeddings(tokens)

    def multiply(
        self, e: Tensor, e_teacher: Tensor, tokens: slice, classes: slice, first: int
    ) -> None:
        """Store the products of some classes of a block of both, whose first class is ``first``."""
        num_tokens = tokens.stop - tokens.start
        places = slice(classes.start - first, classes.stop - first)
        for side, rows, memory in (
            (self.student, e, self.memory[0]),
            (self.teacher, e_teacher, self.memory[1]),
        ):
            if num_tokens < len(memory):
                memory = memory[:num_tokens]
            side.store_product(rows, side.classifier(classes).T, part_of(memory, places, 1))

    def add_sums(
        self,
        tokens: slice,
        classes: slice,
        parts: Tensor,
        out: TokenSums,
        kind: int,
        has_targets: bool,
    ) -> None:
        """Add a block whose products are stored to the sums of its tokens.

        Args:
            tokens, classes: the block.
            parts: :func:`room_for_parts`, of which the first has the sums of earlier classes.
            out: of all tokens, where the sums go with the last block of classes.
            kind: see :func:`kind_of_divergence`.
            has_targets: whether to sum what log-probabilities of targets need.
        """
        num_parts = self._run(
            sums_kernel,
            tokens,
            classes,
            in_parts=True,
            targets_ptr=self.student.targets if has_targets else None,
            first_class=classes.start,
            sums_ptr=parts,
            num_tokens=parts.shape[2],
            KIND=kind,
        )
        is_last = classes.stop == self.student.problem.c.shape[0]
        combine(
            parts,
            out if is_last else None,
            kind,
            part=range(int(classes.start == 0), 1 + num_parts),
            first_token=tokens.start,
        )

    def mixture_parts(self, tokens: slice, classes: slice, logs: Tensor, beta: float) -> Tensor:
        """Return the sums relative to the mixture of parts of such a block, (parts, 2, T).

        Args:
            tokens, classes: the block.
            logs: of :class:`TokenSums`.
            beta: share of the teacher in the mixture.
        """
        num_tokens = tokens.stop - tokens.start
        shape = (parts_of(classes.stop - classes.start), 2, num_tokens)
        sums = torch.empty(shape, dtype=torch.float32, device=logs.device)
        self._run(
            mixture_sums_kernel,
            tokens,
            classes,
            in_parts=True,
            logs_ptr=logs,
            logs_stride=logs.stride(0),
            sums_ptr=sums,
            share=beta,
            rest=1 - beta,
            num_tokens=num_tokens,
        )
        return sums

    def sum_mixture(self, tokens: slice, logs: Tensor, beta: float) -> None:
        """Sum a block of all classes relative to the mixture, after :meth:`add_sums`."""
        every = slice(0, self.student.problem.c.shape[0])
        parts = self.mixture_parts(tokens, every, logs, beta)
        torch.sum(parts, 0, out=logs[RELATIVE:, tokens])

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
            values: of all tokens.
            kind: see :func:`kind_of_divergence`.
            beta: from 0 to 1.

        Returns:
            The gradients times the scale of the values, (T, classes).
        """
        out = self.gradients(tokens, classes)
        is_wide = out.shape[0] <= FEW_ROWS and out.shape[1] >= LONG_ROW
        self._run(
            logit_gradients_kernel,
            tokens,
            classes,
            BLOCK=WIDE_BLOCK if is_wide else classes_at_a_time(out.shape[1]),
            num_warps=WIDE_WARPS if is_wide else 4,
            logs_ptr=values.logs,
            logs_stride=values.logs.stride(0),
            entropy_ptr=values.entropy,
            g_divergence_ptr=values.g_divergence,
            g_entropy_ptr=values.g_entropy,
            g_logprob_ptr=values.g_logprobs,
            miss_ptr=values.miss,
            targets_ptr=None if values.g_logprobs is None else self.student.targets,
            first_class=classes.start,
            grad_ptr=out,
            grad_stride=out.stride(0),
            share=beta,
            rest=1 - beta,
            KIND=kind,
        )
        return out

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
                side.multiplier,
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
            first_token=tokens.start,
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


def room_for_parts(num_classes: int, num_tokens: int, like: Tensor) -> Tensor:
    """Return memory (1 + parts, 8, num_tokens) for sums over blocks of at most ``num_classes``."""
    parts = parts_of(num_classes)
    if num_classes >= LONG_ROW:  # the last block may be shorter, and have more
        parts = max(parts, parts_of(LONG_ROW - 1))
    return like.new_empty((1 + parts, 8, num_tokens), dtype=torch.float32)


def combine(
    parts: Tensor, out: TokenSums | None, kind: int, part: range, first_token: int = 0
) -> None:
    """Add up parts of sums (parts, 8, T).

    Args:
        parts: at least those to add up.
        out: of all tokens, where to write; None where classes are missing: in place of the first.
        kind: see :func:`kind_of_divergence`.
        part: the parts to add up.
        first_token: of the T tokens.
    """
    num_tokens = parts.shape[2]
    launch(
        combine_sums_kernel,
        (cdiv(num_tokens, COMBINED),),
        parts_ptr=parts,
        sums_ptr=parts if out is None else out.sums,
        logs_ptr=None if out is None else out.logs,
        first_token=0 if out is None else first_token,
        num_tokens=num_tokens,
        stride=num_tokens if out is None else out.sums.stride(0),
        first_part=part.start,
        num_parts=part.stop,
        KIND=kind,
        PARTS=next_power_of_2(part.stop),
        TOKENS=COMBINED,
    )


def finish(
    found: TokenSums, kind: int, beta: float, blocks: Blocks, has_targets: bool
) -> DivergenceState:
    """Return the results of all tokens from the sums of those that are not ignored."""
    sums = found.sums
    lse, teacher_lse, relative, of_teacher = found.logs * LN2.value
    log_total = sums[TOTAL].log2()
    entropy = (log_total - sums[FIRST] / sums[TOTAL]) * LN2.value
    if kind == FROM_TEACHER.value:
        log_ratio = log_total - sums[TEACHER_TOTAL].log2()
        divergence = (sums[CROSS] / sums[TEACHER_TOTAL] + log_ratio) * LN2.value
        relative = torch.zeros_like(divergence)
    elif kind == FROM_STUDENT.value:
        divergence = relative.clone()
    else:
        divergence = (1 - beta) * relative + beta * of_teacher
    logprobs = sums.new_empty(0)
    if has_targets:
        # Precise where the target has most of the probability, and never above 0.
        misses = sums[OTHERS] / sums[TOTAL]
        likely = torch.log1p(-misses.clamp(max=0.5))
        logprobs = (sums[TARGET] - sums[HIGH] - log_total) * LN2.value
        logprobs = torch.where(misses < 0.5, likely, logprobs).clamp(max=0)
        logprobs = blocks.scatter(torch.where(in_any_shard(blocks), logprobs, torch.nan))
    return DivergenceState(
        blocks.scatter(divergence.clamp_(min=0)),
        blocks.scatter(entropy.clamp_(min=0)),
        logprobs,
        blocks.scatter(lse.clone()),
        teacher_lse=blocks.scatter(teacher_lse.clone()),
        relative=blocks.scatter(relative.clone()),
    )


@dataclass(frozen=True)
class TokenValues:
    """Values (N,) that logit gradients have: gradients of results, and log2 of results.

    Args:
        g_divergence, g_entropy, g_logprobs: gradients of the results times the scale; None for 0.
        miss: gradient by the logit of the target; None without ``g_logprobs``.
        logs: (3 or 4, N), see :class:`TokenSums`.
        entropy: log2; None without ``g_entropy``.
    """

    g_divergence: Tensor | None
    g_entropy: Tensor | None
    g_logprobs: Tensor | None
    miss: Tensor | None
    logs: Tensor
    entropy: Tensor | None

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
        logs = (state.lse, state.teacher_lse, state.relative)
        return cls(
            g_divergence,
            g_entropy,
            g_logprobs,
            miss,
            logs=torch.stack([blocks.gather(x) for x in logs]) / LN2.value,
            entropy=None if g_entropy is None else blocks.gather(state.entropy) / LN2.value,
        )


def scale_of(grads: DivergenceGrads, blocks: Blocks, factor_type: torch.dtype) -> Tensor:
    """Return the power of two () that brings gradients (N,) near 1 where float16 holds them."""
    given = [x.abs() for x in grads if x is not None]
    if factor_type == torch.float16 and given:
        largest = blocks.gather(torch.stack(given).amax(0).float())
        return gradient_scale(largest, largest)
    return blocks.targets.new_ones((), dtype=torch.float32)
