"""Compatibility: names that Apple's releases keep here. They live in ``distributed``."""

from cut_cross_entropy.distributed.options import VocabParallelOptions

__all__ = ["VocabParallelOptions"]
