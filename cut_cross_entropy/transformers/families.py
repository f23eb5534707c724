"""Compatibility: forwards and patch functions by family, as Apple's releases have them.

Here one mechanism serves every model, so the modules of the families differ in a name only.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from cut_cross_entropy.transformers.forward import is_patched_forward, patched_forward
from cut_cross_entropy.transformers.patch import patch_any
from cut_cross_entropy.transformers.registry import classes_of_type
from cut_cross_entropy.transformers.utils import PatchOptions

Forward = Callable[..., Any]


def forward_of(model_type: str, module_name: str) -> Forward:
    """The ``cce_forward`` of a family: a forward that can be put on any class like its own.

    It computes the loss by the options in ``_PATCH_OPTS`` of its module, read at each call; None
    is the unpatched forward.
    """
    original: Any = classes_of_type(model_type)[0].forward
    if is_patched_forward(original):
        original = original.cce_original
    module: Any = sys.modules[module_name]

    @functools.cache
    def patched(options: PatchOptions) -> Forward:
        return patched_forward(original, options, lambda model: True)

    def cce_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        options = module._PATCH_OPTS
        forward = original if options is None else patched(options)
        return forward(self, *args, **kwargs)

    cce_forward.__module__ = module_name
    cce_forward.__doc__ = original.__doc__
    cce_forward.__signature__ = patched(PatchOptions()).__signature__  # type: ignore[attr-defined]
    return cce_forward


def patch_of(model_type: str, module_name: str) -> Callable[..., PreTrainedModel | None]:
    """The ``patch_<model>`` of a family: what :func:`cce_patch` does, with options as an object."""
    module: Any = sys.modules[module_name]

    def patch(
        maybe_model: PreTrainedModel | str | PretrainedConfig,
        patch_options: PatchOptions,
        remote_model_id: str | None = None,
    ) -> PreTrainedModel | None:
        module._PATCH_OPTS = patch_options
        patched: PreTrainedModel | None = patch_any(maybe_model, patch_options, remote_model_id)
        return patched

    patch.__name__ = patch.__qualname__ = f"patch_{model_type}"
    patch.__module__ = module_name
    patch.__doc__ = f"Patch a model, the type {model_type!r} or a config; see :func:`cce_patch`."
    return patch
