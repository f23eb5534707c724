"""verl: the kernel behind ``use_fused_kernels`` with ``impl_backend: triton``, and Megatron's."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cut_cross_entropy.adapters.seam import Adapter, Seam, in_dtype_of
from cut_cross_entropy.distributed.options import VocabParallelOptions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NAME = "linear_cross_entropy"

SEAM = Seam(
    package="verl",
    version="0.9.1",
    module="verl.utils.kernel.linear_cross_entropy",
    name=_NAME,
    method="forward",
    parameters=("hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"),
    copies=(
        ("verl.models.mcore.model_forward_fused", _NAME),
        ("verl.models.mcore.model_forward_1f1b_overlap", _NAME),
    ),
)


def verl(**options: Any) -> Adapter:
    """Compute verl's fused log-probabilities and entropies with :func:`token_logprobs`.

    It replaces ``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy``, which FSDP workers
    call with ``use_fused_kernels=True`` and ``fused_kernel_options.impl_backend=triton``, and
    Megatron workers with ``use_fused_kernels=True``. For ``impl_backend=liger`` see
    :func:`cut_cross_entropy.adapters.liger.liger`. Sizes of D need not be multiples of 128.

    Options, the result and errors: see :class:`~cut_cross_entropy.adapters.seam.Adapter`.
    Each worker process needs its own.
    """
    adapter = Adapter(options)

    def logprobs_and_entropy(
        hidden: Tensor,  # (..., D)
        weight: Tensor,  # (V, D), or (V / R, D) with a group
        labels: Tensor,  # (...), ids of the whole vocabulary
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: "ProcessGroup | None" = None,
    ) -> tuple[Tensor, Any]:
        if reduction != "none":
            raise NotImplementedError(f"reduction must be 'none', got {reduction!r}")
        shards = None
        if (
            dist_process_group is not None
            and torch.distributed.get_world_size(dist_process_group) > 1
        ):
            start = torch.distributed.get_rank(dist_process_group) * len(weight)
            # verl sums the parts of the gradient of e itself, in the backward of the gathering of
            # its sequence-parallel tokens.
            shards = VocabParallelOptions(start, start + len(weight), dist_process_group, False)
        result = adapter.compute(
            hidden.reshape(-1, hidden.shape[-1]),
            in_dtype_of(hidden, weight),
            labels.reshape(-1),
            temperature=temperature,
            outputs=["entropy"],
            vocab_parallel_options=shards,
        )
        return result.logprobs, result.entropy

    return adapter.install((SEAM, logprobs_and_entropy))
