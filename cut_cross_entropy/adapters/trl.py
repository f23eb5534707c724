"""TRL: the fused output layer of its trainers, and the divergence of its distillation trainer."""

import functools
from typing import Any

from torch import Tensor

from cut_cross_entropy.adapters.seam import Adapter, OutputLayer, Seam, in_dtype_of
from cut_cross_entropy.distributed.options import is_dtensor

_seam = functools.partial(Seam, package="trl", version="1.16.0")

SEAM = _seam(
    module="trl.trainer.utils",
    name="_ChunkedLogProbFunction",
    method="forward",
    parameters=(
        "hidden",
        "weight",
        "bias",
        "targets",
        "temperature",
        "chunk_size",
        "final_logit_softcapping",
        "logit_scale",
        "outputs",
    ),
)

DIVERGENCE_SEAM = _seam(
    module="trl.trainer.distillation_trainer",
    name="ChunkedDivergenceFunction",
    method="forward",
    parameters=(
        "student_hidden",
        "student_weight",
        "student_bias",
        "teacher_hidden",
        "teacher_weight",
        "teacher_bias",
        "beta",
        "temperature",
        "student_logit_scale",
        "student_final_logit_softcapping",
        "teacher_logit_scale",
        "teacher_final_logit_softcapping",
    ),
)

DIVERGENCE_LOSS_SEAM = _seam(
    module="trl.trainer.distillation_trainer",
    name="_chunked_divergence_loss",
    parameters=(
        "student_hidden_states",
        "teacher_hidden_states",
        "student_lm_head_weight",
        "teacher_lm_head_weight",
        "completion_mask",
        "beta",
        "num_items_in_batch",
        "student_lm_head_bias",
        "teacher_lm_head_bias",
        "student_logit_scale",
        "teacher_logit_scale",
        "student_final_logit_softcapping",
        "teacher_final_logit_softcapping",
        "temperature",
    ),
)

# TRL's names of outputs, in the order of the tuple that its function returns, and ours.
_OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq",
    "mean_logits": "mean_logit",
    "is_top1": "rank",
}


def trl(**options: Any) -> Adapter:
    """Compute the log-probabilities of TRL's trainers with :func:`token_logprobs`.

    It replaces ``trl.trainer.utils._ChunkedLogProbFunction``, the function between the last hidden
    states and the numbers of each token, and the distillation trainer's
    ``_chunked_divergence_loss`` and ``ChunkedDivergenceFunction`` by :func:`linear_divergence`,
    where of the options all but ``filter_mass`` count. Masks, sharded heads and other losses
    stay TRL's. A divergence of heads that DeepSpeed's ZeRO-3 has partitioned is refused.

    Options, the result and errors: see :class:`~cut_cross_entropy.adapters.seam.Adapter`.
    """
    adapter = Adapter(options)

    def logprobs(
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(_OUTPUTS),
    ) -> tuple[Tensor | None, ...]:
        known = ("log_probs", *_OUTPUTS)
        if not set(outputs) <= set(known):
            raise NotImplementedError(f"outputs must be among {known}, got {tuple(outputs)}")
        result = adapter.compute(
            hidden,
            in_dtype_of(hidden, weight),
            targets,
            bias=in_dtype_of(hidden, bias),
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            outputs=[ours for theirs, ours in _OUTPUTS.items() if theirs in outputs],
        )
        # TRL gives these two no gradient.
        log_sum_sq = None if result.log_sum_sq is None else result.log_sum_sq.detach()
        mean_logit = None if result.mean_logit is None else result.mean_logit.detach()
        is_top1 = None if result.rank is None else result.rank == 0
        return result.logprobs, result.entropy, log_sum_sq, mean_logit, is_top1

    def divergence(
        student_hidden: Tensor,  # (N, D)
        student_weight: Tensor,  # (V, D)
        student_bias: Tensor | None,  # (V,)
        teacher_hidden: Tensor,  # (N, D of the teacher)
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        _refuse_partitioned(student_weight, teacher_weight)
        softcap, scale = student_final_logit_softcapping, student_logit_scale
        student = OutputLayer(student_hidden, student_weight, student_bias, softcap, scale)
        softcap, scale = teacher_final_logit_softcapping, teacher_logit_scale
        teacher = OutputLayer(teacher_hidden, teacher_weight, teacher_bias, softcap, scale)
        result = adapter.compute_divergence(student, teacher, beta=beta, temperature=temperature)
        return result.divergence, result.student_entropy.detach()  # TRL's has no gradient

    def divergence_loss(
        student_hidden_states: Tensor,  # (B, K, D)
        teacher_hidden_states: Tensor,  # (B, K, D of the teacher)
        student_lm_head_weight: Tensor,  # (V, D)
        teacher_lm_head_weight: Tensor,  # (V, D of the teacher)
        completion_mask: Tensor,  # (B, K), 0 for tokens that are left out
        beta: float,
        num_items_in_batch: Tensor | int | None = None,
        student_lm_head_bias: Tensor | None = None,  # (V,)
        teacher_lm_head_bias: Tensor | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_final_logit_softcapping: float | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _refuse_partitioned(student_lm_head_weight, teacher_lm_head_weight)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(student_hidden_states.device)
        weight, bias = map(_whole, (student_lm_head_weight, student_lm_head_bias))
        softcap = student_final_logit_softcapping
        student = OutputLayer(student_hidden_states, weight, bias, softcap, student_logit_scale)
        weight, bias = map(_whole, (teacher_lm_head_weight, teacher_lm_head_bias))
        softcap = teacher_final_logit_softcapping
        teacher = OutputLayer(teacher_hidden_states, weight, bias, softcap, teacher_logit_scale)
        result = adapter.compute_divergence(
            student,
            teacher,
            mask=completion_mask != 0,
            beta=beta,
            temperature=temperature,
            reduction="mean",
            num_items_in_batch=num_items_in_batch,
        )
        # The trainer logs the entropies, and gives them no gradient.
        return result.divergence, result.student_entropy.detach().sum(), result.mask.sum()

    return adapter.install(
        (SEAM, logprobs), (DIVERGENCE_SEAM, divergence), (DIVERGENCE_LOSS_SEAM, divergence_loss)
    )


def _refuse_partitioned(*weights: Tensor) -> None:
    """Refuse output layers of a divergence that DeepSpeed's ZeRO-3 has partitioned.

    Raises:
        NotImplementedError: there is one.
    """
    if any(hasattr(x, "ds_id") and x.numel() == 0 for x in weights):
        raise NotImplementedError(
            "adapters.trl() does not gather the output layers of DeepSpeed's ZeRO-3 for a "
            "divergence: use ZeRO-2, or remove the adapter"
        )


def _whole(parameter: Any) -> Any:
    """Return a parameter that is a DTensor as a whole, as the trainer's own function does."""
    return parameter.full_tensor() if is_dtensor(parameter) else parameter
