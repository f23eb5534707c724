"""Classifiers that are spread over processes; see docs/distributed.md."""

from cut_cross_entropy.distributed.options import (
    DataParallelOptions,
    VocabParallelOptions,
    partition_n_into_range,
)

__all__ = ["DataParallelOptions", "VocabParallelOptions", "partition_n_into_range"]
