"""Options for classifiers whose classes are spread over processes."""

from cut_cross_entropy.distributed.options import VocabParallelOptions, partition_n_into_range

__all__ = ["VocabParallelOptions", "partition_n_into_range"]
