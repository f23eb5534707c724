"""One call of the loss as the implementations see it.

Operators take tensors and plain values only: :class:`Flat` dataclasses turn into these, and
``cut_cross_entropy.operators.declaration`` makes the schema of their fields. Named tuples are
tuples of tensors, as operators return them.

Shape legend: ``cut_cross_entropy.implementations``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Flat:
    """A dataclass whose fields are arguments of operators."""

    __match_args__: tuple[str, ...]

    def flat(self) -> tuple[Any, ...]:
        """All fields but those of subclasses, in order; PyTorch 2.7 cannot trace ``astuple``."""
        return tuple([getattr(self, name) for name in self.__match_args__])


@dataclass(frozen=True)
class Problem(Flat):
    """The inputs of a loss and the options that every implementation shares.

    Args:
        e: embeddings, (N, D).
        c: classifier, (V, D).
        targets: (N,), int32 or int64.
        bias: (V,), or None.
        ignore_index: target value of tokens without a loss.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None leaves them as they are.
        compute_dtype: dtype of the factors of ``e @ c.T``.
        memory_budget: bytes of scratch memory beyond results and accumulators.
        first_class: class id of the first row of ``c``.
        group: name of the process group over which the classes are sharded; None if ``c`` holds
            all of them.
        frozen_columns: columns of ``c``, from the first, whose gradient nobody reads: it may be 0
            there instead of what it is.
        multiplier: (N,) of dtype :attr:`wide`, by which the logits of each token are multiplied
            after the softcap; None leaves them as they are. Temperature and logit scale end here:
            ``s * softcap(y; t)`` with scale s is ``softcap(s * y; s * t)``.
    """

    e: Tensor
    c: Tensor
    targets: Tensor
    bias: Tensor | None
    ignore_index: int
    softcap: float | None
    compute_dtype: torch.dtype
    memory_budget: int
    first_class: int = 0
    group: str | None = None
    frozen_columns: int = 0
    multiplier: Tensor | None = None

    @property
    def wide(self) -> torch.dtype:
        """Dtype of the results and accumulators: float32, or float64 for float64 inputs."""
        return torch.promote_types(self.compute_dtype, torch.float32)

    @property
    def most_classes(self) -> int:
        """Number of classes that :meth:`class_rows` may be asked for."""
        return self.c.shape[0]

    @property
    def has_rows(self) -> bool:
        """Whether ``c`` has the values of its rows, not their shape alone."""
        return True

    def class_rows(self, classes: slice) -> Tensor:
        """Return the rows of ``c`` of some classes."""
        return self.c if classes == slice(0, self.c.shape[0]) else self.c[classes]

    def empty_grad_c(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return memory for the gradient of ``c``, contiguous; 0 in the frozen columns."""
        make = self.c.new_zeros if self.frozen_columns else self.c.new_empty
        return make(self.c.shape, dtype=dtype)

    def put_grad_c(self, out: Tensor, classes: slice, rows: Tensor) -> None:
        """Write the gradient of some rows, less the frozen columns, into that memory."""
        out[classes, self.frozen_columns :] = rows

    @property
    def local_targets(self) -> Tensor:
        """Targets (N,) counted from the first row of ``c``."""
        return self.targets - self.first_class if self.first_class else self.targets


@dataclass(frozen=True)
class AdaptedProblem(Problem):
    """A problem with the logits ``e @ c.T + low_e @ low_c.T``, which is that of an adapter.

    ``c`` has no gradient: among the gradients of this problem, that of c is the one of ``low_c``.

    Args:
        low_e: (N, R), of the compute dtype; R is a multiple of ``RANK_STEP``.
        low_c: (V, R), contiguous, of the compute dtype.
    """

    low_e: Tensor = field(kw_only=True)
    low_c: Tensor = field(kw_only=True)

    def __post_init__(self) -> None:
        assert self.low_c.shape == (self.c.shape[0], self.low_e.shape[1])


@dataclass(frozen=True)
class MadeProblem(AdaptedProblem):
    """An adapted problem whose rows are made on demand; R may be 0.

    ``c`` has the shape and device of the rows, and no values.

    Args:
        make_rows: returns the rows of some classes, contiguous and of the compute dtype.
    """

    make_rows: Callable[[slice], Tensor] = field(kw_only=True)

    @property
    def has_rows(self) -> bool:
        """Return False: they are made."""
        return False

    def of_classes(self, classes: slice) -> AdaptedProblem:
        """Make the rows of some classes, and return their problem; the targets stay as they are."""
        return AdaptedProblem(
            self.e,
            self.make_rows(classes),
            self.targets,
            None if self.bias is None else self.bias[classes].contiguous(),
            ignore_index=self.ignore_index,
            softcap=self.softcap,
            compute_dtype=self.compute_dtype,
            memory_budget=self.memory_budget,
            multiplier=self.multiplier,
            low_e=self.low_e,
            low_c=self.low_c[classes],
        )


def low_columns(problem: Problem) -> Tensor | None:
    """Return the columns (V, R) of c that are a tensor of their own; None if there are none."""
    has_columns = isinstance(problem, AdaptedProblem) and problem.low_c.shape[1] > 0
    return problem.low_c if has_columns else None  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Needed(Flat):
    """The gradients that a backward pass has to compute."""

    e: bool
    c: bool
    bias: bool


@dataclass(frozen=True)
class Filter(Flat):
    """Which part of the gradient the kernels may skip.

    Args:
        tolerance: root of the dropped energy, relative to that of the gradient; 0 turns the
            filter off.
        max_mass: largest mean probability of a token that the tail may stand for, in [0, 1].
        max_error: relative error that the tail may make in dE, in multiples of the rounding error
            of bfloat16. It is estimated on a sample, and the tolerance is only where that starts; 0
            leaves the tolerance as it is.
        most_dropped: mean probability of a token, among the classes of this process, from which on
            the gradients are computed in full instead; 1 for no such limit. Not known, so without
            effect, where rows are made on demand.
        e: whether it applies to the gradient of ``e``.
        c: whether it applies to the gradients of ``c`` and ``bias``.
    """

    tolerance: float
    max_mass: float = 1.0
    e: bool = True
    c: bool = True
    max_error: float = 0.0
    most_dropped: float = 1.0

    @property
    def is_on(self) -> bool:
        """Whether any gradient is filtered."""
        return self.tolerance > 0 and (self.e or self.c)

    def split(self, needed: Needed) -> tuple[Needed, Needed]:
        """Return the gradients that are exact, and those that are filtered."""
        e, c = self.is_on and self.e, self.is_on and self.c
        return (
            Needed(needed.e and not e, needed.c and not c, needed.bias and not c),
            Needed(needed.e and e, needed.c and c, needed.bias and c),
        )


NO_FILTER = Filter(0.0)


class PerToken(NamedTuple):
    """Loss and log-sum-exp of every token, or two gradients of the same shape.

    Args:
        nll: (N,), ``lse`` less the logit of the target; 0 for ignored tokens.
        lse: (N,), 0 for ignored tokens.
    """

    nll: Tensor
    lse: Tensor


class KernelState(NamedTuple):
    """The results of the kernels' forward pass: :class:`PerToken`, and what their backward needs.

    Args:
        nll: (N,) float32; as in :class:`PerToken`.
        lse: (N,) float32.
        strips: (blocks, V) int16, energy (low byte) and mass (high byte) of each strip; empty
            without a filter, like all that follow.
        origin: (N,) int64, position of each row in the caller's order; N where absent.
        support: (N,) float32, compacted: log2 of the effective number of groups of classes (the
            Renyi-2 support) over which a token's probability extends.
        shard_mass: (N,) float32, compacted: probability of the classes of this process; empty if
            it has all.
    """

    nll: Tensor
    lse: Tensor
    strips: Tensor
    origin: Tensor
    support: Tensor
    shard_mass: Tensor


class Gradients(NamedTuple):
    """Gradients of the inputs, contiguous and in their dtypes; empty where not needed.

    Args:
        e: (N, D).
        c: (V, D).
        bias: (V,).
    """

    e: Tensor
    c: Tensor
    bias: Tensor


class SumGradients(NamedTuple):
    """The sum of all losses and its gradients, float32 or wider; empty where not needed.

    Args:
        loss: ().
        e: (N, D).
        c: (V, D).
        bias: (V,).
    """

    loss: Tensor
    e: Tensor
    c: Tensor
    bias: Tensor


class Directions(NamedTuple):
    """A direction in the space of the inputs, for forward-mode differentiation.

    Args:
        e: (N, D), or None if ``e`` is constant along it; likewise the others.
        c: (V, D).
        bias: (V,).
    """

    e: Tensor | None
    c: Tensor | None
    bias: Tensor | None


def gradient_scale(a: Tensor, b: Tensor) -> Tensor:
    """Return the power of two () that brings logit gradients in half precision near 1.

    A gradient ``a * p - b * onehot`` of order 1/N underflows in float16; scaling by a power of two
    changes no digit. ``a`` and ``b`` are (N,); the scale is 1 if they are empty, 0 or not finite.
    """
    one = a.new_ones(())
    if a.numel() == 0:
        return one
    largest = torch.maximum(a.abs().max(), b.abs().max())
    exponent = -torch.floor(torch.log2(largest))
    return torch.where(torch.isfinite(exponent), torch.exp2(exponent), one)
