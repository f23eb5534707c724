"""Compatibility: names that Apple's releases keep here. They live in ``distributed``."""

from cut_cross_entropy.distributed.options import VocabParallelOptions, partition_n_into_range

__all__ = ["VocabParallelOptions", "partition_n_into_range"]
