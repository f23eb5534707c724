"""Compatibility: names that Apple's releases keep here. They live in ``distributed``."""

from cut_cross_entropy.vocab_parallel import utils
from cut_cross_entropy.vocab_parallel.utils import VocabParallelOptions

__all__ = ["VocabParallelOptions", "utils"]
