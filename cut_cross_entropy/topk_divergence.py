"""Divergence of a student from a teacher over a few candidates of each token."""

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from cut_cross_entropy.distributed.dtensor import refuse_dtensors
from cut_cross_entropy.divergence_arguments import (
    check_beta,
    check_mask_dtype,
    check_placed,
    check_shape,
)
from cut_cross_entropy.implementations.reference_divergence import divergence
from cut_cross_entropy.options import did_you_mean
from cut_cross_entropy.validation import check_float_dtype, check_logprobs

Tail: TypeAlias = Literal["drop", "renormalise", "bucket"]
"""Values of ``tail=``."""

TAILS: tuple[str, ...] = get_args(Tail)


def topk_divergence(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    beta: float = 0.0,
    tail: Tail = "drop",
    mask: Tensor | None = None,
) -> Tensor:
    """Divergence over K candidates of each token, as of ``candidate_logprobs``.

    Examples:
        >>> student = torch.randn(4, 100).log_softmax(-1)[:, :8]
        >>> teacher = torch.randn(4, 100).log_softmax(-1)[:, :8]
        >>> topk_divergence(student, teacher, tail="bucket").shape
        torch.Size([4])

    Args:
        student_logprobs: (..., K) log-probabilities of the candidates over all classes.
        teacher_logprobs: (..., K) of the same candidates; a -inf at both stands for no candidate.
            Has no gradient.
        beta: as in :func:`linear_divergence`.
        tail: ``"drop"`` sums over the candidates alone, and can be below 0; ``"renormalise"``
            divides the probabilities of each side by their sum, so that logits do as well;
            ``"bucket"`` adds one class with the remaining probability of each side.
        mask: (..., K) bool, False where there is no candidate: ``candidates >= 0`` for those of
            :func:`token_logprobs`, whose results are 0 there. None: all are candidates.

    Returns:
        (...) divergences, float32 or wider; 0 where the mask leaves no candidate.

    Raises:
        TypeError: not tensors of floats, or a mask that is not of bool.
        ValueError: different shapes or devices, no dimension of candidates, or an unknown ``tail``;
            on the CPU a log-probability above 0.
        NotImplementedError: DTensors.
    """
    check_beta(beta)
    if not isinstance(tail, str) or tail not in TAILS:
        hint = did_you_mean(tail, TAILS) if isinstance(tail, str) else ""
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}{hint}")
    named = {"student_logprobs": student_logprobs, "teacher_logprobs": teacher_logprobs}
    refuse_dtensors(**named, mask=mask)
    for name, given in named.items():
        check_placed(name, given, "student_logprobs", student_logprobs)
        check_float_dtype(name, given)
        if given.ndim < 1 or given.shape[-1] < 1:
            raise ValueError(f"{name} must have shape (..., K), K > 0, got {tuple(given.shape)}")
    if mask is not None:
        named["mask"] = mask
        check_placed("mask", mask, "student_logprobs", student_logprobs)
        check_mask_dtype(mask)
    for name, given in named.items():
        check_shape(name, given.shape, "shape of student_logprobs", student_logprobs.shape)
    if tail != "renormalise":  # which takes logits as well
        for name in ("student_logprobs", "teacher_logprobs"):
            check_logprobs(name, named[name], mask)
    wide = torch.promote_types(student_logprobs.dtype, torch.float32)
    log_p, log_q = student_logprobs.to(wide), teacher_logprobs.detach().to(wide)
    if mask is not None:
        log_p, log_q = (torch.where(mask, x, -torch.inf) for x in (log_p, log_q))
    if tail == "renormalise":
        log_p, log_q = (_normalised(x) for x in (log_p, log_q))
    elif tail == "bucket":
        log_p, log_q = (torch.cat([x, _log_rest(x)], -1) for x in (log_p, log_q))
    return divergence(log_p, log_q, float(beta), is_complete=tail != "drop")


def _normalised(logprobs: Tensor) -> Tensor:
    """Log-probabilities (..., K) over the K alone; -inf where all are."""
    total = logprobs.logsumexp(-1, keepdim=True)
    return logprobs - torch.where(total == -torch.inf, 0, total)


def _log_rest(logprobs: Tensor) -> Tensor:
    """Logarithm (..., 1) of the probability that is left by ``logprobs`` (..., K)."""
    # Rounding may leave nothing or less: one rounding of 1 is what can be told from that.
    epsilon = torch.finfo(logprobs.dtype).eps
    total = logprobs.logsumexp(-1, keepdim=True).clamp(max=-epsilon)
    # The form of log(1 - exp(x)) that keeps its digits on each side of -log 2; the argument of the
    # other is replaced, since its gradient would be multiplied by 0.
    near = total > -math.log(2)
    small = torch.log(-torch.expm1(torch.where(near, total, -math.log(2))))
    large = torch.log1p(-torch.exp(torch.where(near, -math.log(2), total)))
    return torch.where(near, small, large)
