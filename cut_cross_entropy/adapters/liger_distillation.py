"""Liger's distillation losses: its fused linear JSD by kernels, and the chunked one."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cut_cross_entropy.adapters.seam import Adapter, OutputLayer, Seam, in_dtype_of
from cut_cross_entropy.token_logprobs import token_logprobs

_NAME = "LigerFusedLinearJSDFunction"
_OUTPUT_LAYERS = ("student_input", "student_weight", "teacher_input", "teacher_weight")
_seam = functools.partial(
    Seam, package="liger-kernel", version="0.8.5", name=_NAME, method="forward"
)

JSD_SEAM = _seam(
    module="liger_kernel.ops",
    parameters=(
        *_OUTPUT_LAYERS,
        "shift_labels",
        "jsd_beta",
        "ignore_index",
        "temperature",
        "accum_dtype",
        "jsd_impl",
        "jsd_mode",
    ),
    copies=(
        ("liger_kernel.ops.fused_linear_jsd", _NAME),
        ("liger_kernel.transformers.fused_linear_jsd", _NAME),
        ("liger_kernel.transformers.functional", _NAME),
    ),
)

CHUNKED_JSD_SEAM = _seam(
    module="liger_kernel.chunked_loss.jsd_loss",
    parameters=(
        *_OUTPUT_LAYERS,
        "true_labels",
        "student_bias",
        "teacher_bias",
        "weight_hard_loss",
        "weight_soft_loss",
        "beta",
        "ignore_index",
        "temperature",
        "compiled",
        "chunk_size",
        "return_soft_hard_loss",
    ),
    copies=(("liger_kernel.chunked_loss.functional", _NAME),),
)

CHUNKED_JSD_FUNCTION_SEAM = replace(
    CHUNKED_JSD_SEAM,
    module="liger_kernel.chunked_loss.functional",
    name="liger_fused_linear_jsd",
    copies=(),
)


def distillation(adapter: Adapter) -> list[tuple[Seam, Callable[..., Any]]]:
    """Return Liger's distillation functions, each with the one that takes its place."""

    def jsd(
        student_input: Tensor,  # (N, D)
        student_weight: Tensor,  # (V, D)
        teacher_input: Tensor,  # (N, D of the teacher)
        teacher_weight: Tensor,  # (V, D of the teacher)
        shift_labels: Tensor | None = None,  # (N,)
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
        jsd_impl: Any = None,
        jsd_mode: Any = None,
    ) -> Tensor:
        result = adapter.compute_divergence(
            OutputLayer(student_input, student_weight),
            OutputLayer(teacher_input, teacher_weight),
            beta=jsd_beta,
            temperature=temperature,
            mask=None if shift_labels is None else shift_labels != ignore_index,
            reduction="mean",
        )
        return result.divergence

    def chunked_jsd(
        student_input: Tensor,  # (N, D)
        student_weight: Tensor,  # (V, D)
        teacher_input: Tensor,  # (N, D of the teacher)
        teacher_weight: Tensor,  # (V of the teacher, D of the teacher)
        true_labels: Tensor,  # (N,)
        student_bias: Tensor | None = None,  # (V,)
        teacher_bias: Tensor | None = None,  # (V of the teacher,)
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> Any:
        weight = in_dtype_of(student_input, student_weight)
        bias = in_dtype_of(student_input, student_bias)
        padded, padded_bias = weight, bias
        missing = len(teacher_weight) - len(student_weight)
        if missing > 0:  # Liger gives the student the logit 0 there
            padded = F.pad(weight, (0, 0, 0, missing))
            padded_bias = None if bias is None else F.pad(bias, (0, missing))
        with_hard_loss = weight_hard_loss != 0 or return_soft_hard_loss
        in_one_walk = with_hard_loss and temperature == 1 and missing <= 0
        result = adapter.compute_divergence(
            OutputLayer(student_input, padded, padded_bias),
            OutputLayer(teacher_input, teacher_weight, teacher_bias),
            beta=beta,
            temperature=temperature,
            targets=true_labels if in_one_walk else None,
            mask=None if in_one_walk else true_labels != ignore_index,
            ignore_index=ignore_index,
            # A gradient by the log-probabilities too waits for the backward, together with this.
            reduction="none" if in_one_walk else "mean",
        )
        count = result.mask.sum().clamp(min=1)
        soft = result.divergence.sum() / (count if in_one_walk else 1)
        loss, hard = weight_soft_loss * soft, torch.zeros_like(soft)
        if with_hard_loss:
            logprobs = result.student_logprobs
            if logprobs is None:  # Liger's hard loss has no temperature
                logprobs = token_logprobs(
                    student_input,
                    weight,
                    true_labels,
                    bias=bias,
                    ignore_index=ignore_index,
                    **adapter.options,
                ).logprobs
            hard = -logprobs.sum() / count
            loss = loss + weight_hard_loss * hard
        # Only the first has a gradient with Liger.
        return (loss, soft.detach(), hard.detach()) if return_soft_hard_loss else loss

    return [
        (JSD_SEAM, jsd),
        (CHUNKED_JSD_SEAM, chunked_jsd),
        (CHUNKED_JSD_FUNCTION_SEAM, chunked_jsd),
    ]
