"""VeOmni: its chunked log-probabilities and top-k distillation, which verl's engine calls."""

import functools
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.adapters.seam import Adapter, Seam, in_dtype_of
from cut_cross_entropy.token_logprobs import TokenLogprobs
from cut_cross_entropy.topk_divergence import topk_divergence

_FOLDER = "veomni.ops.kernels.cross_entropy"

_seam = functools.partial(Seam, package="veomni", version="0.1.12", method="forward")

SEAM = _seam(
    module=f"{_FOLDER}.chunk_logprobs",
    name="_ChunkedLinearLogProbs",
    parameters=("hidden_states", "weight", "labels", "temperature", "chunk_size", "ignore_index"),
)

DISTILLATION_SEAM = _seam(
    module=f"{_FOLDER}.chunk_topk_distill",
    name="_ChunkedLinearTopkDistill",
    parameters=(
        "hidden_states",
        "weight",
        "labels",
        "teacher_topk_ids",
        "teacher_topk_log_probs",
        "temperature",
        "chunk_size",
        "ignore_index",
        "log_prob_min_clamp",
    ),
)


def veomni(**options: Any) -> Adapter:
    """Compute VeOmni's log-probabilities and top-k distillation with :func:`token_logprobs`.

    It replaces ``_ChunkedLinearLogProbs`` and ``_ChunkedLinearTopkDistill``, the functions behind
    ``return_log_probs=True`` of VeOmni's models, which verl's engine ``veomni`` calls with
    ``use_fused_kernels=True``. The size of chunks is ignored.

    Options, the result and errors: see :class:`~cut_cross_entropy.adapters.seam.Adapter`.
    Each worker process needs its own.
    """
    adapter = Adapter(options)

    def compute(
        hidden_states: Tensor,  # (..., D)
        weight: Tensor,  # (V, D)
        labels: Tensor,  # (...)
        temperature: float,
        chunk_size: int,
        ignore_index: int,
        candidates: Tensor | None = None,  # (..., K)
    ) -> TokenLogprobs:
        return adapter.compute(
            hidden_states,
            in_dtype_of(hidden_states, weight),
            labels,
            temperature=temperature,
            ignore_index=ignore_index,
            outputs=["entropy"],
            candidates=candidates,
        )

    def logprobs_and_entropy(*arguments: Any) -> tuple[Any, ...]:
        result = compute(*arguments)
        return result.logprobs, result.entropy

    def with_distillation(
        hidden_states: Tensor,
        weight: Tensor,
        labels: Tensor,
        teacher_topk_ids: Tensor,  # (..., K)
        teacher_topk_log_probs: Tensor,  # (..., K)
        temperature: float,
        chunk_size: int,
        ignore_index: int,
        log_prob_min_clamp: float | None,
    ) -> tuple[Any, ...]:
        call = (hidden_states, weight, labels, temperature, chunk_size, ignore_index)
        result = compute(*call, candidates=teacher_topk_ids)
        student, teacher = result.candidate_logprobs, teacher_topk_log_probs.float()
        assert student is not None
        masses = [torch.where(result.mask, x.exp().sum(-1), 0).detach() for x in (student, teacher)]
        if log_prob_min_clamp is not None:
            student, teacher = (x.clamp_min(log_prob_min_clamp) for x in (student, teacher))
        mask = result.mask[..., None].expand_as(student)
        divergence = topk_divergence(student, teacher, mask=mask)
        return result.logprobs, result.entropy, divergence, *masses

    return adapter.install((SEAM, logprobs_and_entropy), (DISTILLATION_SEAM, with_distillation))
