"""Language models of Hugging Face transformers without their logits.

>>> from cut_cross_entropy.transformers import cce_patch
>>> model = cce_patch(model)  # doctest: +SKIP
"""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "cut_cross_entropy.transformers needs transformers: pip install transformers"
    ) from error

from cut_cross_entropy.lazy.notices import CutCrossEntropyWarning, call_count
from cut_cross_entropy.transformers.patch import cce_patch, cce_unpatch, is_patched
from cut_cross_entropy.transformers.utils import PatchOptions

__all__ = [
    "CutCrossEntropyWarning",
    "PatchOptions",
    "call_count",
    "cce_patch",
    "cce_unpatch",
    "is_patched",
]
