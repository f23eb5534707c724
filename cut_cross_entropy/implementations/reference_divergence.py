"""Divergences of full log-probabilities, which PyTorch differentiates: what defines correct.

The last dimension has the classes, or the candidates that stand for them.
"""

import math

import torch
from torch import Tensor

from cut_cross_entropy.call_context import is_traced, plain
from cut_cross_entropy.device_support import autocast_type
from cut_cross_entropy.divergence_problem import DivergenceProblem, DivergenceState
from cut_cross_entropy.implementations.reference import all_logits
from cut_cross_entropy.validation import check_target_range

LOWEST = -1e4
"""Log-probability that stands for -inf in a mixture: its exponential is 0 too."""


def forward(problem: DivergenceProblem) -> DivergenceState:
    """Compute the results from the logits of both models, without what a backward reads."""
    student, teacher, beta, has_targets = problem
    if not (torch.compiler.is_compiling() or is_traced()):
        check_target_range(plain(student.targets), student.c.shape[0], student.ignore_index)
    with torch.autocast(autocast_type(student.e.device), enabled=False):
        log_p = all_logits(student).log_softmax(1)
        log_q = all_logits(teacher).log_softmax(1).to(log_p.dtype)
        kept = student.targets != student.ignore_index
        entropy = torch.where(kept, -_expected(log_p, log_p), 0)
        found = torch.where(kept, divergence(log_p, log_q, beta), 0)
        logprobs = log_p.new_empty(0)
        if has_targets:
            ids = torch.where(kept, student.targets, 0).long()[:, None]
            here = (ids >= 0) & (ids < log_p.shape[1])
            at_target = log_p.gather(1, torch.where(here, ids, 0))
            logprobs = torch.where(kept, torch.where(here, at_target, torch.nan)[:, 0], 0)
    nothing = log_p.new_empty(0)
    return DivergenceState(found, entropy, logprobs, nothing, teacher_lse=nothing, relative=nothing)


def divergence(log_p: Tensor, log_q: Tensor, beta: float, is_complete: bool = True) -> Tensor:
    """Divergence of ``log_p`` (..., K) from ``log_q``, not below 0 of complete distributions."""
    if beta == 0:
        result = _expected(log_q, log_q - log_p)
    elif beta == 1:
        result = _expected(log_p, log_p - log_q)
    else:
        log_m = log_mixture(log_p, log_q, beta)
        of_student, of_teacher = _expected(log_p, log_p - log_m), _expected(log_q, log_q - log_m)
        result = beta * of_teacher + (1 - beta) * of_student
    # The gradient of a divergence that is 0 up to rounding is that of the sum.
    return result - result.detach().clamp(max=0) if is_complete else result


def log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Logarithm of ``(1 - beta) p + beta q``."""
    return torch.logaddexp(
        log_p.clamp(min=LOWEST) + math.log1p(-beta), log_q.clamp(min=LOWEST) + math.log(beta)
    )


def _expected(log_p: Tensor, x: Tensor) -> Tensor:
    """Sum of ``p * x`` over the last dimension; a probability of 0 contributes nothing."""
    return (log_p.exp() * torch.where(log_p == -torch.inf, 0, x)).sum(-1)
