"""Cross-entropy of ``e @ c.T`` without the logits: memory for a vocabulary of any size."""

from typing import TYPE_CHECKING, Any

from cut_cross_entropy.distributed.options import DataParallelOptions, VocabParallelOptions
from cut_cross_entropy.divergence import TokenDivergence, linear_divergence
from cut_cross_entropy.filter_report import FilterRecord, record_filter
from cut_cross_entropy.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from cut_cross_entropy.options import LinearCrossEntropyImpl
from cut_cross_entropy.token_logprobs import TokenLogprobs, token_logprobs
from cut_cross_entropy.topk_divergence import topk_divergence
from cut_cross_entropy.utils import compute_z_loss, recommend_c_grad_chunk_size

if TYPE_CHECKING:
    from cut_cross_entropy.transformers.patch import cce_patch as cce_patch

__version__ = "26.12.0"

__all__ = [
    "DataParallelOptions",
    "FilterRecord",
    "LinearCrossEntropy",
    "LinearCrossEntropyImpl",
    "TokenDivergence",
    "TokenLogprobs",
    "VocabParallelOptions",
    "__version__",
    "compute_z_loss",
    "linear_cross_entropy",
    "linear_divergence",
    "recommend_c_grad_chunk_size",
    "record_filter",
    "token_logprobs",
    "topk_divergence",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "cce_patch":  # imported when it is asked for: transformers is optional
        return import_module("cut_cross_entropy.transformers").cce_patch
    if name == "adapters":
        return import_module("cut_cross_entropy.adapters")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "adapters", "cce_patch"])
