"""``cce_patch``: any language model of transformers, without its logits."""

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, overload

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from cut_cross_entropy.constants import DEFAULT_MEMORY_BUDGET
from cut_cross_entropy.options import LCE_IMPL_DEFAULT, LinearCrossEntropyImpl
from cut_cross_entropy.transformers import install
from cut_cross_entropy.transformers.registry import (
    classes_of_type,
    is_known,
    model_types,
    remote_classes,
    takes_labels,
)
from cut_cross_entropy.transformers.utils import PatchOptions, TransformersModelT

AXOLOTL_CCE_FORK = True
"""Tells axolotl that every model type it may ask for is supported."""

PatchFunction = Callable[..., Any]


@overload
def cce_patch(
    model_or_type: TransformersModelT,
    impl: str | LinearCrossEntropyImpl = ...,
    reduction: str = ...,
    filter_eps: float | str | None = ...,
    accum_e_fp32: bool = ...,
    accum_c_fp32: bool = ...,
    filter_e_grad: bool = ...,
    filter_c_grad: bool = ...,
    train_only: bool = ...,
    remote_model_id: str | None = ...,
    *,
    memory_budget: int = ...,
    filter_mass: float | None = ...,
) -> TransformersModelT: ...


@overload
def cce_patch(
    model_or_type: str | PretrainedConfig,
    impl: str | LinearCrossEntropyImpl = ...,
    reduction: str = ...,
    filter_eps: float | str | None = ...,
    accum_e_fp32: bool = ...,
    accum_c_fp32: bool = ...,
    filter_e_grad: bool = ...,
    filter_c_grad: bool = ...,
    train_only: bool = ...,
    remote_model_id: str | None = ...,
    *,
    memory_budget: int = ...,
    filter_mass: float | None = ...,
) -> None: ...


def cce_patch(
    model_or_type: Any,
    impl: str | LinearCrossEntropyImpl = LCE_IMPL_DEFAULT,
    reduction: str = "mean",
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    train_only: bool = False,
    remote_model_id: str | None = None,
    *,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    filter_mass: float | None = None,
) -> Any:
    """Compute the loss of a language model without its logits.

    Calls with ``labels`` get the loss and the gradients that the model's own code asks for, from
    ``linear_cross_entropy``. In training ``outputs.logits`` is None; in evaluation it is a tensor
    that computes itself when it is used. Calls without labels are not touched.

    Args:
        model_or_type: a model, also inside PEFT, DDP or ``torch.compile``; or a model type such as
            ``"llama"`` or a config, for all models of that type in this process.
        impl: see ``linear_cross_entropy``, and so for the options of the filter.
        reduction: ``"mean"``, or ``"sum"`` or ``"none"`` instead of what the model asks for. A
            causal model with ``"none"`` returns (B, T - 1) losses.
        filter_eps: as there.
        accum_e_fp32: as there.
        accum_c_fp32: as there.
        filter_e_grad: as there.
        filter_c_grad: as there.
        train_only: leave calls in evaluation mode alone.
        remote_model_id: the repository or folder whose own code defines the model type. That code
            runs.
        memory_budget: as there, bytes.
        filter_mass: as there.

    Returns:
        ``model_or_type`` itself if it is a model, patched in place; None for a type or a config.

    Raises:
        RuntimeError: a model type that the installed transformers does not know, or a model whose
            forward takes no labels.
        TypeError, ValueError: an argument of the wrong type, or out of range.
    """
    options = PatchOptions(
        impl,
        reduction,
        filter_eps,
        accum_e_fp32,
        accum_c_fp32,
        filter_e_grad,
        filter_c_grad,
        train_only,
        memory_budget=memory_budget,
        filter_mass=filter_mass,
    )
    if isinstance(model_or_type, nn.Module):
        model_type = getattr(
            getattr(language_model(model_or_type), "config", None), "model_type", ""
        )
    else:
        model_type = _type_name(model_or_type)
    patch_function = PATCH_FNS.assigned.get(model_type, patch_any)
    if remote_model_id is None:
        return patch_function(model_or_type, options)
    return patch_function(model_or_type, options, remote_model_id=remote_model_id)


def cce_unpatch(model_or_type: Any) -> Any:
    """Undo :func:`cce_patch`, for a model, a model type or a config.

    Returns:
        The model, or None for a type or a config. What was not patched stays as it is.

    Raises:
        RuntimeError: an unknown model type.
        TypeError: neither model, type nor config.
    """
    if isinstance(model_or_type, nn.Module):
        install.unpatch_instance(language_model(model_or_type))
        return model_or_type
    for cls in classes_of_type(_type_name(model_or_type)):
        install.unpatch_class(cls)
    return None


def is_patched(model_or_type: Any) -> bool:
    """Whether a model computes its loss without logits, or all models of a type do.

    Raises:
        RuntimeError: an unknown model type.
        TypeError: neither model, type nor config.
    """
    if isinstance(model_or_type, nn.Module):
        return install.is_patched_class(type(language_model(model_or_type)))
    classes = classes_of_type(_type_name(model_or_type))
    return all(install.is_patched_class(cls) for cls in classes)


def patch_any(
    maybe_model: Any, patch_options: PatchOptions, remote_model_id: str | None = None
) -> Any:
    """What :data:`PATCH_FNS` has for every type: one mechanism for all models.

    Args:
        maybe_model: a model, a model type or a config.
        patch_options: how to compute the loss.
        remote_model_id: see :func:`cce_patch`.

    Returns:
        The model, or None for a type or a config.

    Raises:
        RuntimeError: see :func:`cce_patch`.
    """
    if isinstance(maybe_model, nn.Module):
        model = language_model(maybe_model)
        if not takes_labels(type(model)):
            raise RuntimeError(
                f"model_or_type must be a model with a language modelling head, whose forward "
                f"takes labels, got {type(model).__name__}"
            )
        install.patch_instance(model, patch_options)
        return maybe_model
    if remote_model_id is not None:
        classes = remote_classes(remote_model_id)
    else:
        classes = classes_of_type(_type_name(maybe_model))
    for cls in classes:
        install.patch_class(cls, patch_options)
    return None


def language_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers: PEFT, DDP, FSDP1, DataParallel, ``torch.compile``."""
    while not isinstance(model, PreTrainedModel):
        get_base_model: Any = getattr(model, "get_base_model", None)
        if get_base_model is not None:
            inner = get_base_model()
        else:
            names = ("module", "_orig_mod", "_fsdp_wrapped_module")
            inner = next((model._modules[name] for name in names if name in model._modules), None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _type_name(type_or_config: Any) -> str:
    if isinstance(type_or_config, PretrainedConfig):
        return type_or_config.model_type
    if isinstance(type_or_config, str):
        return type_or_config
    raise TypeError(
        "model_or_type must be a model, a config or the name of a model type, "
        f"got {type(type_or_config).__name__}"
    )


class PatchFunctions(MutableMapping[str, PatchFunction]):
    """A function for every model type that the installed transformers knows.

    An assigned function replaces the general one for its type. ``cce_patch`` calls it with the
    model, type or config and the :class:`PatchOptions`, and with ``remote_model_id`` if it has one.

    Raises:
        KeyError: an unknown model type.
    """

    def __init__(self) -> None:
        self.assigned: dict[str, PatchFunction] = {}

    def __getitem__(self, model_type: str) -> PatchFunction:
        if model_type in self.assigned:
            return self.assigned[model_type]
        if isinstance(model_type, str) and is_known(model_type):
            return patch_any
        raise KeyError(model_type)

    def __setitem__(self, model_type: str, function: PatchFunction) -> None:
        self.assigned[model_type] = function

    def __delitem__(self, model_type: str) -> None:
        del self.assigned[model_type]

    def __iter__(self) -> Iterator[str]:
        yield from sorted({*model_types(), *self.assigned})

    def __len__(self) -> int:
        return len({*model_types(), *self.assigned})


PATCH_FNS = PatchFunctions()
"""The function that patches each model type; see :class:`PatchFunctions`."""
