"""Compatibility: names that Apple's releases keep here. See ``families``."""

from cut_cross_entropy.transformers.families import forward_of, patch_of
from cut_cross_entropy.transformers.utils import PatchOptions, TransformersModelT, apply_lce

__all__ = ["PatchOptions", "TransformersModelT", "apply_lce", "cce_forward", "patch_phi3"]

_PATCH_OPTS: PatchOptions | None = None

cce_forward = forward_of("phi3", __name__)
patch_phi3 = patch_of("phi3", __name__)
