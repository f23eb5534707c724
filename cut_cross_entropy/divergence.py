"""Divergence of a student from a teacher at each token: what distillation minimises."""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from cut_cross_entropy.arguments import Prepared, prepare, stand_in
from cut_cross_entropy.budget import divergence_tokens_per_chunk
from cut_cross_entropy.call_context import is_offloaded, is_traced, is_transformed, plain
from cut_cross_entropy.constants import DEFAULT_MEMORY_BUDGET, IGNORE_INDEX
from cut_cross_entropy.device_support import autocast_type, kernels_unavailable
from cut_cross_entropy.dispatch import choose_impl, filter_tolerance, gradients_needed
from cut_cross_entropy.distributed.options import VocabParallelOptions
from cut_cross_entropy.divergence_problem import DivergenceProblem, DivergenceState, Summation
from cut_cross_entropy.heads.chunks import HeadProblem
from cut_cross_entropy.heads.compiled import outside_graphs_with_heads
from cut_cross_entropy.heads.divergences import joined, needed_in_the_forward
from cut_cross_entropy.heads.divergences import run_divergence as run_head_divergence
from cut_cross_entropy.heads.divergences import run_divergence_sum as run_head_sum
from cut_cross_entropy.heads.head import Head
from cut_cross_entropy.implementations import chunked_divergence, reference
from cut_cross_entropy.implementations.chunked_divergence import log_mixture
from cut_cross_entropy.operators.divergences import run_divergence, run_divergence_sum
from cut_cross_entropy.options import (
    FilterEps,
    ImplName,
    LinearCrossEntropyImpl,
    Reduction,
    check_filter_eps,
    impl_name,
)
from cut_cross_entropy.problem import Needed, Problem
from cut_cross_entropy.reductions import divided
from cut_cross_entropy.validation import (
    check_num_items,
    check_per_token,
    check_reduction,
    check_target_range,
)

Tail: TypeAlias = Literal["drop", "renormalise", "bucket"]
"""Values of ``tail=``."""

TAILS: tuple[str, ...] = get_args(Tail)
_IMPLS = ("auto", "cce", "chunked", "reference")
FILTER_SHARE = 1.5
"""Tolerance of a divergence's filter, relative to that of a cross-entropy.

Of a dropped class the products with 64 directions are kept. With a share of 2, dE errs by 1.65 to
1.8 roundings on made data and by 1.95 on hidden states of Gemma 3 270M (docs/engineering_log.md).
"""
ROUNDING_SHARE = {torch.bfloat16: 1.0, torch.float16: 0.125}
"""Rounding error of a dtype relative to bfloat16's; in float32 nothing is small enough to drop."""


@dataclass(frozen=True)
class TokenDivergence:
    """Results of :func:`linear_divergence`, 0 at tokens left out.

    All have the leading shape of ``e_student``, in float32 (float64 for float64 inputs of the
    student), and are differentiable in the student's inputs.

    Args:
        divergence: of the student from the teacher, in nats, never below 0; with a reduction their
            mean or sum, a scalar.
        student_entropy: of the student's distribution at this temperature, in nats.
        student_logprobs: log-probability of the targets under the student, at this temperature;
            None without targets.
        mask: bool, False at tokens left out.
    """

    divergence: Tensor
    student_entropy: Tensor
    student_logprobs: Tensor | None
    mask: Tensor


@outside_graphs_with_heads
def linear_divergence(
    e_student: Tensor,
    head_student: Tensor | Head,
    e_teacher: Tensor,
    head_teacher: Tensor | Head,
    *,
    beta: float = 0.0,
    temperature: float | Tensor = 1.0,
    targets: Tensor | None = None,
    mask: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    reduction: Reduction = "none",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    filter_eps: FilterEps = "auto",
    impl: ImplName | LinearCrossEntropyImpl = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    vocab_parallel_options: VocabParallelOptions | None = None,
) -> TokenDivergence:
    """Divergence of a student from a frozen teacher, token by token, without either's logits.

    With the distributions p of the student and q of the teacher, each the softmax of
    ``softcap(logit_scale * (e @ head.T + bias)) / temperature``, the divergence is ``KL(q || p)``
    for beta 0, ``KL(p || q)`` for beta 1, and between them the generalised Jensen-Shannon
    divergence ``beta KL(q || m) + (1 - beta) KL(p || m)`` from the mixture
    ``m = (1 - beta) p + beta q``. It is not multiplied by the square of the temperature. These are
    the definitions of ``trl.DistillationTrainer`` (`Agarwal et al.
    <https://arxiv.org/abs/2306.13649>`_).

    Examples:
        >>> student = torch.randn(2, 5, 8, requires_grad=True)  # (batch, time, D of the student)
        >>> head = torch.randn(11, 8)
        >>> teacher, teacher_head = torch.randn(2, 5, 16), torch.randn(11, 16)
        >>> result = linear_divergence(student, head, teacher, teacher_head, beta=0.5)
        >>> result.divergence.shape
        torch.Size([2, 5])
        >>> result.divergence.mean().backward()
        >>> mean = linear_divergence(student, head, teacher, teacher_head, reduction="mean")
        >>> mean.divergence.shape
        torch.Size([])

    Args:
        e_student: embeddings, (..., D), float32, bfloat16, float16 or float64.
        head_student: classifier, (V, D), of the dtype of ``e_student`` (any under autocast); or a
            :class:`~cut_cross_entropy.heads.Head`, which brings bias, softcap and scale with it.
        e_teacher: (..., D') of the same leading shape, any D' and dtype. Has no gradient.
        head_teacher: (V, D'), of the dtype of ``e_teacher``, or a ``Head``. Has no gradient. Where
            vocabularies were padded differently, pass the rows of the classes that both have.
        beta: from 0 to 1.
        temperature: above 0; a number, or a tensor that broadcasts against the leading shape. It
            divides the logits of both models, and has no gradient.
        targets: class ids of the leading shape, int64 or int32, already aligned with the
            embeddings, for the student's log-probabilities.
        mask: bool, of the leading shape; False leaves a token out.
        student_bias: (V,), of the dtype of the head or float32.
        teacher_bias: the same for the teacher. Has no gradient.
        student_softcap: logits become ``softcap * tanh(logits / softcap)``.
        teacher_softcap: the same for the teacher.
        student_logit_scale: factor of the logits, before the softcap.
        teacher_logit_scale: the same for the teacher.
        reduction: of the divergences alone: ``"none"``, ``"mean"`` over the tokens that count, or
            ``"sum"``. With the last two ``"cce"`` and ``"chunked"`` compute the gradients in the
            forward and the logits of each model once, where the budget holds those of enough
            tokens; until the backward pass they take 4 bytes per element of ``e_student`` and
            ``head_student``. A gradient by entropies or log-probabilities then computes the logits
            again.
        token_weights: floats that broadcast against the leading shape: each divergence is
            multiplied by its own, and the mean divided by the sum of those of the tokens that
            count. Differentiable; if they require a gradient, the logits are computed again in the
            backward.
        num_items_in_batch: divides the sum in place of the mean's own divisor, as trainers that
            accumulate gradients have it.
        ignore_index: target value of tokens to leave out.
        filter_eps: fraction of the gradient of a sum or mean that the kernels may skip, as in
            :func:`linear_cross_entropy`: None skips nothing, ``"auto"`` what the dtype cannot
            represent, which in float32 is nothing. Divergences, gradients without a reduction, and
            those of small problems are exact.
        impl: ``"cce"`` and ``"chunked"`` compute blocks of tokens and classes in bounded memory,
            with Triton kernels between the products or without; ``"auto"`` is ``"cce"`` on GPUs
            with Triton, but for float64; ``"reference"`` stores the logits of both.
        memory_budget: bytes of scratch memory beyond results and accumulators.
        vocab_parallel_options: the classes of both heads whose rows this process holds; not needed
            where the heads are DTensors. Each process of the group gets the same results.

    Returns:
        A :class:`TokenDivergence`.

    Raises:
        TypeError: an argument or a tensor of the wrong type, layout or dtype.
        ValueError: shapes or devices that do not fit, or an option out of range; on the CPU a
            class id or a temperature out of range.
        RuntimeError: ``impl="cce"`` where its kernels cannot run.
    """
    chosen = impl_name(impl)
    if chosen not in _IMPLS:
        raise ValueError(
            f"impl of linear_divergence must be one of {', '.join(_IMPLS)}, got {chosen!r}"
        )
    _check_beta(beta)
    check_reduction(reduction)
    check_num_items(num_items_in_batch, reduction)
    check_filter_eps(filter_eps)
    _check_models(e_student, head_student, e_teacher, head_teacher)
    if targets is None:
        ignore_index = IGNORE_INDEX  # no value of theirs has a meaning
    marked = _targets(e_student, targets, mask, ignore_index)
    shared: dict[str, Any] = {
        "temperature": temperature,
        "ignore_index": ignore_index,
        "memory_budget": memory_budget,
        "vocab_parallel_options": vocab_parallel_options,
    }
    student = _prepare(
        "student",
        e_student,
        head_student,
        marked,
        bias=student_bias,
        softcap=student_softcap,
        logit_scale=student_logit_scale,
        **shared,
    )
    with torch.no_grad():
        teacher = _prepare(
            "teacher",
            e_teacher.detach(),
            head_teacher if isinstance(head_teacher, Head) else head_teacher.detach(),
            marked,
            bias=None if not isinstance(teacher_bias, Tensor) else teacher_bias.detach(),
            softcap=teacher_softcap,
            logit_scale=teacher_logit_scale,
            **shared,
        )
    _check_shards(student.problem, teacher.problem, chosen)
    problem, has_targets = student.problem, targets is not None
    weights: Tensor | None = None
    if token_weights is not None:
        check_per_token("token_weights", token_weights, marked)
        whole_weights = token_weights.to(problem.wide).expand(marked.shape)
        # A token that is left out has no divergence, whatever its weight.
        kept = problem.targets != ignore_index
        weights = torch.where(kept, student.flatten(whole_weights, 0.0), 0)
    compared = DivergenceProblem(problem, teacher.problem, float(beta), has_targets)
    with student.computing():
        has_head = any(isinstance(x, HeadProblem) for x in (problem, teacher.problem))
        if chosen == "reference":
            both = joined(problem), joined(teacher.problem)
            found = _reference(DivergenceProblem(*both, compared.beta, has_targets))
        else:
            by_kernels = _by_kernels(chosen, problem, teacher.problem)
            needed = None
            if reduction != "none":
                needed = _gradients_in_the_forward(student, teacher, weights, by_kernels)
            if needed is not None:
                run_sum = run_head_sum if has_head else run_divergence_sum
                tolerance = _tolerance(filter_eps, problem.compute_dtype)
                summation = Summation(weights, needed, tolerance)
                total, (_, *others) = run_sum(compared, summation, by_kernels)
                found = DivergenceState(total, *others)
            else:
                run = run_head_divergence if has_head else run_divergence
                found = run(compared, by_kernels)
    divergence = found.divergence
    if divergence.ndim and weights is not None:
        divergence = divergence * weights
    if reduction == "none":
        divergence = student.per_token(divergence)
    else:
        divergence = divided(
            divergence.sum(),
            reduction,
            problem.targets,
            ignore_index,
            num_items_in_batch=num_items_in_batch,
            weights=weights,
        )
    return TokenDivergence(
        divergence,
        student.per_token(found.entropy),
        student.per_token(found.logprobs) if has_targets else None,
        student.per_token(problem.targets != ignore_index),
    )


def _gradients_in_the_forward(
    student: Prepared, teacher: Prepared, weights: Tensor | None, by_kernels: bool
) -> Needed | None:
    """Return which gradients of a sum the forward is to compute; None if it is to leave them."""
    problem, other = student.problem, teacher.problem
    possible = (
        problem.group is None
        # The gradient of a weight is the divergence of its token, which a sum does not return.
        and not (weights is not None and weights.requires_grad)
        and not student.wholes  # the backward would gather them again
        and not is_transformed()
        and not is_offloaded()  # gradients would be copied to the host and back
    )
    if not possible:
        return None
    if isinstance(problem, HeadProblem) or isinstance(other, HeadProblem):
        return needed_in_the_forward(problem, other, by_kernels)
    needed = gradients_needed(problem)
    tokens_per_chunk = (
        divergence_tokens_per_chunk if by_kernels else chunked_divergence.tokens_per_chunk
    )
    enough = any(needed.flat()) and tokens_per_chunk(problem, other, needed) > 0
    return needed if enough else None


def _tolerance(filter_eps: FilterEps, dtype: torch.dtype) -> float:
    """Return the tolerance of the kernels' filter; 0 turns it off."""
    tolerance = FILTER_SHARE * filter_tolerance(filter_eps)
    return tolerance * ROUNDING_SHARE.get(dtype, 0) if isinstance(filter_eps, str) else tolerance


def _by_kernels(impl: str, student: Problem, teacher: Problem) -> bool:
    """Return whether kernels do what lies between the products.

    Raises:
        RuntimeError: they were asked for, and cannot run here.
    """
    device, wide = student.e.device, torch.promote_types(student.wide, teacher.wide)
    if impl == "auto":
        possible = device.type == "cuda" and kernels_unavailable(device) is None
    else:
        possible = impl == "cce"
        choose_impl(impl, device, torch.float32)  # refuses
    return possible and wide == torch.float32


def _check_beta(beta: float) -> None:
    """Accept a number from 0 to 1.

    Raises:
        TypeError, ValueError: anything else.
    """
    if isinstance(beta, bool) or not isinstance(beta, (int, float, torch.SymFloat)):
        raise TypeError(f"beta must be a float, got {type(beta).__name__}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be a float from 0 to 1, got {beta!r}")


def _check_models(
    e_student: Tensor,
    head_student: Tensor | Head,
    e_teacher: Tensor,
    head_teacher: Tensor | Head,
) -> None:
    """Check what the two models must have in common.

    Raises:
        TypeError: not a tensor.
        ValueError: different tokens, classes or devices.
    """
    named = {
        "e_student": e_student,
        "head_student": stand_in(head_student),
        "e_teacher": e_teacher,
        "head_teacher": stand_in(head_teacher),
    }
    for name, tensor in named.items():
        _check_device(name, tensor, "e_student", e_student)
        if tensor.ndim < 1:
            raise ValueError(f"{name} must have a last dimension of features, got a scalar")
    _check_shape(
        "e_teacher", e_teacher.shape[:-1], "leading shape of e_student", e_student.shape[:-1]
    )
    num_classes, others = (named[f"head_{name}"].shape[0] for name in ("student", "teacher"))
    if others != num_classes:
        raise ValueError(
            f"head_teacher must have the classes of head_student, V = {num_classes}, "
            f"got {others}: pass the rows of the classes that both have"
        )


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Check that an argument is a tensor on the device of another.

    Raises:
        TypeError: not a tensor.
        ValueError: different devices.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if isinstance(other, Tensor) and tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}"
        )


def _check_shape(name: str, got: torch.Size, of: str, expected: torch.Size) -> None:
    if got != expected:
        raise ValueError(f"{name} must have the {of}, {tuple(expected)}, got {tuple(got)}")


def _targets(
    e_student: Tensor, targets: Tensor | None, mask: Tensor | None, ignore_index: int
) -> Tensor:
    """Return the targets, or any class, of the tokens that count, ``ignore_index`` elsewhere.

    Raises:
        TypeError, ValueError: targets or a mask that do not fit.
    """
    shape = e_student.shape[:-1]
    for name, given in (("targets", targets), ("mask", mask)):
        if given is not None:
            _check_device(name, given, "e_student", e_student)
            _check_shape(name, given.shape, "leading shape of e_student", shape)
    _check_mask_dtype(mask)
    if targets is None:
        targets = torch.zeros(shape, dtype=torch.int64, device=e_student.device)  # any class
    return targets if mask is None else torch.where(mask, targets, ignore_index)


def _check_mask_dtype(mask: Tensor | None) -> None:
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"the dtype of mask must be torch.bool, got {mask.dtype}")


def _prepare(
    role: str,
    e: Tensor,
    head: Tensor | Head,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float | Tensor,
    ignore_index: int,
    memory_budget: int,
    vocab_parallel_options: VocabParallelOptions | None,
) -> Prepared:
    """Return the problem of one of the models, whose name errors have."""
    arguments = {
        "ignore_index": ignore_index,
        "softcap": softcap,
        "shift": 0,
        "memory_budget": memory_budget,
        "temperature": temperature,
        "logit_scale": logit_scale,
        "vocab_parallel_options": vocab_parallel_options,
        "data_parallel_options": None,
    }
    if torch.compiler.is_compiling():
        return prepare(e, head, targets, bias, **arguments)  # type: ignore[arg-type]
    try:
        return prepare(e, head, targets, bias, **arguments)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise type(error)(f"{role}: {error}") from error


def _check_shards(student: Problem, teacher: Problem, impl: str) -> None:
    """Check that a process holds the same classes of both heads.

    Raises:
        ValueError: it does not, or the implementation needs all.
    """
    held = [(x.group, x.first_class, x.c.shape[0]) for x in (student, teacher)]
    if held[0] != held[1]:
        names = [
            "all classes" if group is None else f"classes {first} to {first + count} of a group"
            for group, first, count in held
        ]
        raise ValueError(
            "head_teacher must be spread over the same processes as head_student, class by class: "
            f"this one holds {names[0]} of the student and {names[1]} of the teacher"
        )
    if student.group is not None and impl == "reference":
        raise ValueError(
            "impl='reference' of linear_divergence needs all classes: use 'auto', 'cce' or "
            "'chunked' where they are spread over processes"
        )


def _reference(problem: DivergenceProblem) -> DivergenceState:
    """Compute the results from the logits of both models."""
    student, teacher, beta, has_targets = problem
    if not (torch.compiler.is_compiling() or is_traced()):
        check_target_range(plain(student.targets), student.c.shape[0], student.ignore_index)
    with torch.autocast(autocast_type(student.e.device), enabled=False):
        log_p = reference.all_logits(student).log_softmax(1)
        log_q = reference.all_logits(teacher).log_softmax(1).to(log_p.dtype)
        kept = student.targets != student.ignore_index
        entropy = torch.where(kept, -_expected(log_p, log_p), 0)
        divergence = torch.where(kept, _divergence(log_p, log_q, beta), 0)
        logprobs = log_p.new_empty(0)
        if has_targets:
            ids = torch.where(kept, student.targets, 0).long()[:, None]
            here = (ids >= 0) & (ids < log_p.shape[1])
            found = log_p.gather(1, torch.where(here, ids, 0))
            logprobs = torch.where(kept, torch.where(here, found, torch.nan)[:, 0], 0)
    nothing = log_p.new_empty(0)
    return DivergenceState(
        divergence, entropy, logprobs, nothing, teacher_lse=nothing, relative=nothing
    )


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
            divides the probabilities of each side by their sum; ``"bucket"`` adds one class with
            the remaining probability of each side.
        mask: (..., K) bool, False where there is no candidate: ``candidates >= 0`` for those of
            :func:`token_logprobs`, whose results are 0 there. None: all are candidates.

    Returns:
        (...) divergences, float32 or wider; 0 where the mask leaves no candidate.

    Raises:
        TypeError: not tensors of floats, or a mask that is not of bool.
        ValueError: different shapes or devices, no dimension of candidates, or an unknown ``tail``.
    """
    _check_beta(beta)
    if not isinstance(tail, str) or tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")
    named = {"student_logprobs": student_logprobs, "teacher_logprobs": teacher_logprobs}
    for name, given in named.items():
        _check_device(name, given, "student_logprobs", student_logprobs)
        if not given.is_floating_point():
            raise TypeError(f"the dtype of {name} must be a floating point one, got {given.dtype}")
        if given.ndim < 1 or given.shape[-1] < 1:
            raise ValueError(f"{name} must have shape (..., K), K > 0, got {tuple(given.shape)}")
    if mask is not None:
        named["mask"] = mask
        _check_device("mask", mask, "student_logprobs", student_logprobs)
        _check_mask_dtype(mask)
    for name, given in named.items():
        _check_shape(name, given.shape, "shape of student_logprobs", student_logprobs.shape)
    wide = torch.promote_types(student_logprobs.dtype, torch.float32)
    log_p, log_q = student_logprobs.to(wide), teacher_logprobs.detach().to(wide)
    if mask is not None:
        log_p, log_q = (torch.where(mask, x, -torch.inf) for x in (log_p, log_q))
    if tail == "renormalise":
        log_p, log_q = (_normalised(x) for x in (log_p, log_q))
    elif tail == "bucket":
        log_p, log_q = (torch.cat([x, _log_rest(x)], -1) for x in (log_p, log_q))
    return _divergence(log_p, log_q, float(beta), is_complete=tail != "drop")


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


def _expected(log_p: Tensor, x: Tensor) -> Tensor:
    """Sum of ``p * x`` over the last dimension; a probability of 0 contributes nothing."""
    return (log_p.exp() * torch.where(log_p == -torch.inf, 0, x)).sum(-1)


def _divergence(log_p: Tensor, log_q: Tensor, beta: float, is_complete: bool = True) -> Tensor:
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
