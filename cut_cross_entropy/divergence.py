"""Divergence of a student from a teacher at each token: what distillation minimises."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.constants import DEFAULT_MEMORY_BUDGET, IGNORE_INDEX
from cut_cross_entropy.distributed.dtensor import refuse_dtensors
from cut_cross_entropy.distributed.options import VocabParallelOptions
from cut_cross_entropy.divergence_arguments import (
    check_beta,
    check_models,
    check_shards,
    frozen,
    marked_targets,
    prepare_model,
)
from cut_cross_entropy.divergence_dispatch import compare
from cut_cross_entropy.heads.compiled import outside_graphs_with_heads
from cut_cross_entropy.heads.head import Head
from cut_cross_entropy.options import (
    FilterEps,
    ImplName,
    LinearCrossEntropyImpl,
    Reduction,
    did_you_mean,
    impl_name,
)
from cut_cross_entropy.reductions import divided
from cut_cross_entropy.validation import check_num_items, check_options, check_per_token

_IMPLS = ("auto", "cce", "chunked", "reference")


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
        NotImplementedError: DTensors whose sharding has no meaning here.
    """
    chosen = impl if isinstance(impl, str) else impl_name(impl)
    if chosen not in _IMPLS:
        raise ValueError(
            f"impl of linear_divergence must be one of {', '.join(_IMPLS)}, "
            f"got {chosen!r}{did_you_mean(chosen, _IMPLS)}"
        )
    check_beta(beta)
    check_options(
        ignore_index=ignore_index,
        reduction=reduction,
        memory_budget=memory_budget,
        filter_eps=filter_eps,
    )
    check_num_items(num_items_in_batch, reduction)
    refuse_dtensors(mask=mask, token_weights=token_weights, num_items_in_batch=num_items_in_batch)
    check_models(e_student, head_student, e_teacher, head_teacher)
    if targets is None:
        ignore_index = IGNORE_INDEX  # no value of theirs has a meaning
    marked = marked_targets(e_student, targets, mask, ignore_index)
    shared: dict[str, Any] = {
        "temperature": temperature,
        "ignore_index": ignore_index,
        "memory_budget": memory_budget,
        "vocab_parallel_options": vocab_parallel_options,
    }
    student = prepare_model(
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
        teacher = prepare_model(
            "teacher",
            frozen(e_teacher),
            frozen(head_teacher),
            marked,
            bias=frozen(teacher_bias),
            softcap=teacher_softcap,
            logit_scale=teacher_logit_scale,
            **shared,
        )
    check_shards(student.problem, teacher.problem, chosen)
    problem, has_targets = student.problem, targets is not None
    weights: Tensor | None = None
    if token_weights is not None:
        check_per_token("token_weights", token_weights, marked)
        whole_weights = token_weights.to(problem.wide).expand(marked.shape)
        # A token that is left out has no divergence, whatever its weight.
        kept = problem.targets != ignore_index
        weights = torch.where(kept, student.flatten(whole_weights, 0.0), 0)
    found = compare(
        chosen,
        student,
        teacher,
        beta=float(beta),
        has_targets=has_targets,
        is_summed=reduction != "none",
        weights=weights,
        filter_eps=filter_eps,
    )
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
