"""Compatibility: names that Apple's releases keep here. They live in ``options``."""

from cut_cross_entropy.options import CCEPreset, CCEPresets, LinearCrossEntropyImpl

__all__ = ["CCEPreset", "CCEPresets", "LinearCrossEntropyImpl"]
