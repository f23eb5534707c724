"""Liger: its scaled cross-entropy of a linear layer, and its distillation losses.

verl's ``liger`` backend calls the former too.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cut_cross_entropy.adapters.liger_distillation import distillation
from cut_cross_entropy.adapters.seam import Adapter, Seam
from cut_cross_entropy.distributed.options import VocabParallelOptions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NAME = "LigerFusedLinearScaledCrossEntropyFunction"
_TP_NAME = "LigerFusedLinearScaledCrossEntropyTPFunction"
_FILE = "liger_kernel.ops.fused_linear_scaled_cross_entropy"

_seam = functools.partial(
    Seam, package="liger-kernel", version="0.8.5", module="liger_kernel.ops", method="apply"
)

SEAM = _seam(
    name=_NAME,
    parameters=(
        "_input",
        "weight",
        "target",
        "temperature",
        "ignore_index",
        "m_tiles_per_cluster",
        "return_entropy",
        "selected_token_ids",
    ),
    copies=(
        (_FILE, _NAME),
        (
            "verl.utils.experimental.torch_functional",
            "_LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY",
        ),
    ),
)

TENSOR_PARALLEL_SEAM = _seam(
    name=_TP_NAME,
    parameters=(
        "_input",
        "weight",
        "target",
        "tp_group",
        "temperature",
        "ignore_index",
        "tiles_per_reduce",
        "return_entropy",
    ),
    copies=((_FILE, _TP_NAME), ("liger_kernel.transformers.functional", _TP_NAME)),
)


def liger(**options: Any) -> Adapter:
    """Compute Liger's scaled cross-entropy and JSD of linear layers without logits.

    It replaces ``liger_kernel.ops.LigerFusedLinearScaledCrossEntropyFunction`` and its
    tensor-parallel twin, ``...TPFunction``, by :func:`token_logprobs`. The entropy is float32,
    where Liger rounds it to the dtype of the hidden states.

    It replaces both functions of the name ``LigerFusedLinearJSDFunction``, behind
    ``liger_kernel.transformers.LigerFusedLinearJSD`` and
    ``liger_kernel.chunked_loss.LigerFusedLinearJSDLoss``, by :func:`linear_divergence`, where of
    the options all but ``filter_mass`` count. As there, classes that only the teacher has
    get the student's logit 0 in the latter; they cost a copy of the student's head.

    Sizes of tiles and chunks, dtypes of accumulators and ``compiled`` are ignored.

    Options, the result and errors: see :class:`~cut_cross_entropy.adapters.seam.Adapter`.
    """
    adapter = Adapter(options)

    def compute(
        tensors: tuple[Tensor, ...],
        temperature: float,
        ignore_index: int,
        return_entropy: bool,
        **more: Any,
    ) -> Any:
        outputs = ["entropy"] if return_entropy else []
        result = adapter.compute(
            *tensors, temperature=temperature, ignore_index=ignore_index, outputs=outputs, **more
        )
        found = (-result.logprobs, result.entropy, result.candidate_logprobs)
        asked = tuple(x for x in found if x is not None)
        return asked if len(asked) > 1 else asked[0]

    def nll(
        _input: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        target: Tensor,  # (N,)
        temperature: float = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
        selected_token_ids: Tensor | None = None,  # (K,), the same for all tokens
    ) -> Any:
        candidates = None
        if selected_token_ids is not None:
            candidates = selected_token_ids.expand(len(target), -1)
        tensors = (_input, weight, target)
        return compute(tensors, temperature, ignore_index, return_entropy, candidates=candidates)

    def tensor_parallel_nll(
        _input: Tensor,  # (N, D), the same on all processes
        weight: Tensor,  # (V / R, D), the rows of this process
        target: Tensor,  # (N,), ids of the whole vocabulary
        tp_group: "ProcessGroup | None",
        temperature: float = 1.0,
        ignore_index: int = -100,
        tiles_per_reduce: int = 1,
        return_entropy: bool = False,
    ) -> Any:
        start = torch.distributed.get_rank(tp_group) * len(weight)
        shard = VocabParallelOptions(start, start + len(weight), tp_group)
        return compute(
            (_input, weight, target),
            temperature,
            ignore_index,
            return_entropy,
            vocab_parallel_options=shard,
        )

    return adapter.install(
        (SEAM, nll), (TENSOR_PARALLEL_SEAM, tensor_parallel_nll), *distillation(adapter)
    )
