"""Trainers whose log-probabilities and divergences of tokens come from this package.

Each adapter replaces a function of an installed trainer, and puts it back when it is removed. None
imports its trainer before it is called.
"""

from cut_cross_entropy.adapters.axolotl import axolotl
from cut_cross_entropy.adapters.liger import liger
from cut_cross_entropy.adapters.megatron import MegatronContext, megatron_output_processor
from cut_cross_entropy.adapters.nemo_rl import nemo_rl
from cut_cross_entropy.adapters.prime_rl import prime_rl
from cut_cross_entropy.adapters.seam import Adapter
from cut_cross_entropy.adapters.torchtitan import torchtitan
from cut_cross_entropy.adapters.trl import trl
from cut_cross_entropy.adapters.veomni import veomni
from cut_cross_entropy.adapters.verl import verl

__all__ = [
    "Adapter",
    "MegatronContext",
    "axolotl",
    "liger",
    "megatron_output_processor",
    "nemo_rl",
    "prime_rl",
    "torchtitan",
    "trl",
    "veomni",
    "verl",
]
