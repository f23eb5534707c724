"""Compatibility: names that Apple's releases keep here. See ``families``."""

from cut_cross_entropy.transformers.families import forward_of, patch_of
from cut_cross_entropy.transformers.utils import PatchOptions, TransformersModelT, apply_lce

__all__ = ["PatchOptions", "TransformersModelT", "apply_lce", "cce_forward", "patch_mistral"]

_PATCH_OPTS: PatchOptions | None = None

cce_forward = forward_of("mistral", __name__)
patch_mistral = patch_of("mistral", __name__)
