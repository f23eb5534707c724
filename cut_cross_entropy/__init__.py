"""Cross-entropy of ``e @ c.T`` without the logits: memory for a vocabulary of any size."""

from cut_cross_entropy.distributed.options import DataParallelOptions, VocabParallelOptions
from cut_cross_entropy.filter_report import FilterRecord, record_filter
from cut_cross_entropy.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from cut_cross_entropy.options import LinearCrossEntropyImpl

__version__ = "0.1.0"

__all__ = [
    "DataParallelOptions",
    "FilterRecord",
    "LinearCrossEntropy",
    "LinearCrossEntropyImpl",
    "VocabParallelOptions",
    "__version__",
    "linear_cross_entropy",
    "record_filter",
]
