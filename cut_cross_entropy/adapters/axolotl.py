"""axolotl: the loss of its knowledge distillation from a teacher's likeliest classes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cut_cross_entropy.adapters.seam import Adapter, Seam, in_dtype_of
from cut_cross_entropy.constants import IGNORE_INDEX
from cut_cross_entropy.token_logprobs import token_logprobs
from cut_cross_entropy.topk_divergence import topk_divergence

SEAM = Seam(
    package="axolotl",
    version="0.19.0",
    module="axolotl.integrations.kd.kernels.liger",
    name="LigerFusedLinearKLTopKLogprobFunction",
    method="forward",
    parameters=(
        "student_input",
        "student_lm_head_weight",
        "target_token_ids",
        "target_logprobs",
        "target_mask",
        "true_labels",
        "student_lm_head_bias",
        "weight_hard_loss",
        "weight_soft_loss",
        "ignore_index",
        "temperature",
        "beta",
        "compiled",
        "chunk_size",
        "compute_ce_loss",
        "normalize_topk",
    ),
)


def axolotl(**options: Any) -> Adapter:
    """Compute axolotl's distillation loss from candidates of :func:`token_logprobs`.

    It replaces ``LigerFusedLinearKLTopKLogprobFunction`` of axolotl's plugin for knowledge
    distillation, whose definitions it keeps: with ``kd_normalize_topk`` the student's
    probabilities are normalised over all entries of a token, padding included, and the square of
    ``kd_temperature`` multiplies the value of the loss but not its gradient. The loss is float32,
    where axolotl rounds it to the dtype of the hidden states. The size of chunks and ``compiled``
    are ignored.

    Options, the result and errors: see :class:`~cut_cross_entropy.adapters.seam.Adapter`.
    """
    adapter = Adapter(options)

    def topk_loss(
        student_input: Tensor,  # (B, T, D)
        student_lm_head_weight: Tensor,  # (V, D)
        target_token_ids: Tensor,  # (B, T, K)
        target_logprobs: Tensor,  # (B, T, K)
        target_mask: Tensor,  # (B, T, K), 0 where there is no candidate
        true_labels: Tensor,  # (B, T), not shifted
        student_lm_head_bias: Tensor | None = None,  # (V,)
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        beta: float = 0.0,
        compiled: bool = False,
        chunk_size: int = 1024,
        compute_ce_loss: bool = True,
        normalize_topk: bool = True,
    ) -> Tensor:
        weight = in_dtype_of(student_input, student_lm_head_weight)
        bias = in_dtype_of(student_input, student_lm_head_bias)
        labels = F.pad(true_labels, (0, 1), value=ignore_index)[:, 1:]
        has_label, mask = labels != ignore_index, target_mask.bool()
        distilled = mask.any(-1)
        with_hard_loss = compute_ce_loss and weight_hard_loss > 0
        in_one_walk = with_hard_loss and temperature == 1  # the hard loss has no temperature
        # A token that is distilled has a target, any class, with or without a label.
        targets = torch.where(distilled, target_token_ids[..., 0], IGNORE_INDEX)
        if in_one_walk:
            targets = torch.where(has_label, labels, targets)
        result = adapter.compute(
            student_input,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            candidates=target_token_ids,
            # Normalised over the candidates in the end, they need no sum over all classes.
            support=target_token_ids if normalize_topk and not in_one_walk else None,
        )
        student = result.candidate_logprobs
        assert student is not None
        if normalize_topk:
            student = student - student.logsumexp(-1, keepdim=True)
        soft = topk_divergence(student, target_logprobs, beta=beta, mask=mask).sum()
        loss = weight_soft_loss * (soft + (temperature**2 - 1) * soft.detach())
        if with_hard_loss:
            logprobs = result.logprobs
            if not in_one_walk:
                ids = torch.where(has_label, labels, IGNORE_INDEX)
                logprobs = token_logprobs(
                    student_input, weight, ids, bias=bias, **adapter.options
                ).logprobs
            loss = loss - weight_hard_loss * torch.where(has_label, logprobs, 0).sum()
        return loss

    return adapter.install((SEAM, topk_loss))
