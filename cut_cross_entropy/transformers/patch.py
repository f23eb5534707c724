"""``cce_patch``: any language model of transformers, without its logits."""

import inspect
from collections.abc import Callable, Iterator, MutableMapping
from importlib import import_module
from inspect import Parameter
from typing import TYPE_CHECKING, Any, TypedDict, overload

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from cut_cross_entropy.constants import DEFAULT_MEMORY_BUDGET
from cut_cross_entropy.device_support import kernels_unavailable
from cut_cross_entropy.options import (
    KERNEL_IMPLS,
    LCE_IMPL_DEFAULT,
    FilterEps,
    ImplName,
    LinearCrossEntropyImpl,
    Reduction,
    check_chunk_size,
)
from cut_cross_entropy.transformers import install
from cut_cross_entropy.transformers.registry import (
    classes_of_type,
    is_known,
    model_types,
    remote_classes,
    takes_labels,
)
from cut_cross_entropy.transformers.utils import PatchOptions, TransformersModelT
from cut_cross_entropy.validation import explains_unknown_keywords

if TYPE_CHECKING:
    from typing_extensions import Unpack

AXOLOTL_CCE_FORK = True
"""Tells axolotl that every model type it may ask for is supported."""

PatchFunction = Callable[..., Any]


class PatchKeywords(TypedDict, total=False):
    """Options of :func:`cce_patch` as keywords."""

    filter_eps: FilterEps
    accum_e_fp32: bool
    accum_c_fp32: bool
    filter_e_grad: bool
    filter_c_grad: bool
    train_only: bool
    remote_model_id: str | None
    memory_budget: int
    filter_mass: float | None
    recompute: bool
    lazy_logits: bool
    c_grad_chunk_size: int


@overload
def cce_patch(
    model_or_type: TransformersModelT,
    impl: ImplName | LinearCrossEntropyImpl = ...,
    reduction: Reduction = ...,
    **options: "Unpack[PatchKeywords]",
) -> TransformersModelT: ...


@overload
def cce_patch(
    model_or_type: str | PretrainedConfig,
    impl: ImplName | LinearCrossEntropyImpl = ...,
    reduction: Reduction = ...,
    **options: "Unpack[PatchKeywords]",
) -> None: ...


@explains_unknown_keywords
def cce_patch(
    model_or_type: Any,
    impl: ImplName | LinearCrossEntropyImpl = LCE_IMPL_DEFAULT,
    reduction: Reduction = "mean",
    filter_eps: FilterEps = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    train_only: bool = False,
    remote_model_id: str | None = None,
    *,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    filter_mass: float | None = None,
    recompute: bool = False,
    lazy_logits: bool = False,
    c_grad_chunk_size: int = 0,
) -> Any:
    """Compute the loss of a language model without its logits.

    Calls with ``labels`` get the loss and the gradients that the model's own code asks for, from
    ``linear_cross_entropy``. In training ``outputs.logits`` is None; in evaluation it is a tensor
    that computes itself when it is used. Calls without labels are not touched, but for
    ``lazy_logits=True``.

    Examples:
        >>> model = cce_patch(model)  # doctest: +SKIP
        >>> cce_patch("llama")  # every Llama of this process  # doctest: +SKIP

    Args:
        model_or_type: a model, also inside PEFT, DDP or ``torch.compile``; or a model type such as
            ``"llama"`` or a config, for all models of that type in this process.
        impl: an implementation by name or enum member, see ``linear_cross_entropy``. Refused at
            once if it cannot run where the model is and the machine has no other place for it.
        reduction: ``"mean"``, or ``"sum"`` or ``"none"`` instead of what the model asks for. A
            causal model with ``"none"`` returns (B, T - 1) losses.
        filter_eps: fraction of the gradient that the kernels may skip: None, ``"auto"``,
            ``"high"`` or a float from 0 to 1, see ``linear_cross_entropy``.
        accum_e_fp32: accepted for compatibility; gradients are always accumulated in float32.
        accum_c_fp32: as ``accum_e_fp32``.
        filter_e_grad: whether the filter may apply to the gradient of the hidden states.
        filter_c_grad: whether the filter may apply to the gradient of the head.
        train_only: leave calls in evaluation mode alone.
        remote_model_id: repository or folder whose own code defines the model type; without code
            of its own, the classes of transformers are patched. That code runs.
        memory_budget: bytes of scratch memory beyond results and accumulators.
        filter_mass: upper bound of the probability that the filter may replace, in [0, 1]; None
            sets no bound.
        recompute: compute the logits again in the backward pass, also where an exact
            implementation could leave gradients in the forward: one more product, less memory.
        lazy_logits: calls without labels, except with ``use_cache=True``, return logits that are
            computed when they are used. What trainers make of logits needs none: ``log_softmax``
            and ``gather``, ``logsumexp``, entropies and means over the classes are computed by
            ``token_logprobs``. Read them before the weights change.
        c_grad_chunk_size: accepted for compatibility; ``memory_budget`` bounds scratch memory.

    Returns:
        ``model_or_type`` itself if it is a model, patched in place; None for a type or a config.

    Raises:
        RuntimeError: a model type that the installed transformers does not know, a model whose
            forward takes no labels, or an ``impl`` that cannot run on this machine.
        TypeError, ValueError: an argument of the wrong type, or out of range.
    """
    check_chunk_size(c_grad_chunk_size)
    options = PatchOptions(
        impl,
        reduction,
        filter_eps,
        accum_e_fp32,
        accum_c_fp32=accum_c_fp32,
        filter_e_grad=filter_e_grad,
        filter_c_grad=filter_c_grad,
        train_only=train_only,
        memory_budget=memory_budget,
        filter_mass=filter_mass,
        recompute=recompute,
        lazy_logits=lazy_logits,
    )
    if isinstance(model_or_type, nn.Module):
        model = language_model(model_or_type)
        model_type = getattr(getattr(model, "config", None), "model_type", "")
        _refuse_where_nothing_can_run(options.impl, model)
    else:
        model_type = _type_name(model_or_type)
    patch_function = _imported(model_type, PATCH_FNS.assigned.get(model_type, patch_any))
    return _call(patch_function, model_or_type, options, remote_model_id)


def _refuse_where_nothing_can_run(impl: Any, model: nn.Module) -> None:
    """Refuse kernels for a model that this machine has no place for.

    Raises:
        RuntimeError: they can run neither where the model is nor on a GPU.
    """
    if impl not in KERNEL_IMPLS:
        return
    devices = {parameter.device for parameter in model.parameters()}
    places = devices | ({torch.device("cuda")} if torch.cuda.is_available() else set())
    if "meta" in {place.type for place in places}:
        return
    reasons = [kernels_unavailable(place) for place in places]
    if reasons and all(reasons):
        raise RuntimeError(
            f"impl={impl!r} cannot run on this machine: {reasons[0]}. "
            "Use impl='auto', 'chunked', 'torch_compile' or 'reference'"
        )


def _imported(model_type: str, entry: PatchFunction | tuple[str, str]) -> PatchFunction:
    """The function that an entry of :data:`PATCH_FNS` names.

    Raises:
        RuntimeError: a pair that does not name a function.
    """
    if callable(entry):
        return entry
    try:
        module, name = entry
        function: PatchFunction = getattr(import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"PATCH_FNS[{model_type!r}] must be a function or a pair (module, function), "
            f"got {entry!r}"
        ) from error
    return function


def _call(
    function: PatchFunction, model_or_type: Any, options: PatchOptions, remote_model_id: str | None
) -> Any:
    """Call a function of :data:`PATCH_FNS` with as many arguments as it takes."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # a function without a Python signature
        return function(model_or_type, options)
    named = {p.name: p.kind for p in parameters}
    kinds = list(named.values())
    if named.get("remote_model_id", Parameter.POSITIONAL_ONLY) is not Parameter.POSITIONAL_ONLY:
        return function(model_or_type, options, remote_model_id=remote_model_id)
    positional = sum(
        kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds
    )
    if positional > 2 or Parameter.VAR_POSITIONAL in kinds:
        return function(model_or_type, options, remote_model_id)
    if Parameter.VAR_KEYWORD in kinds:
        return function(model_or_type, options, remote_model_id=remote_model_id)
    return function(model_or_type, options)


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

    A patched model does not make its type patched: ``is_patched("llama")`` is True only after
    ``cce_patch("llama")``, while other models of that type may have patches of their own.

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
    """Patch any model or type: the entry of :data:`PATCH_FNS` for every type.

    Args:
        maybe_model: a model, a model type or a config.
        patch_options: options of the loss.
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
                f"takes labels, got {type(model).__name__}; cut_cross_entropy.lazy.lazy_head "
                "serves other modules"
            )
        install.patch_instance(model, patch_options)
        return maybe_model
    if remote_model_id is not None:
        classes = remote_classes(remote_model_id, _type_name(maybe_model))
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


class PatchFunctions(MutableMapping[str, PatchFunction | tuple[str, str]]):
    """A function for every model type that the installed transformers knows.

    An assigned function, or a pair of the names of its module and itself, replaces the general one
    for its type. ``cce_patch`` calls it with the model, type or config, the :class:`PatchOptions`,
    and with ``remote_model_id``, which may be None, if the function takes it.

    Raises:
        KeyError: an unknown model type.
    """

    def __init__(self) -> None:
        self.assigned: dict[str, PatchFunction | tuple[str, str]] = {}

    def __getitem__(self, model_type: str) -> PatchFunction | tuple[str, str]:
        if model_type in self.assigned:
            return self.assigned[model_type]
        if isinstance(model_type, str) and is_known(model_type):
            return patch_any
        raise KeyError(model_type)

    def __setitem__(self, model_type: str, entry: PatchFunction | tuple[str, str]) -> None:
        self.assigned[model_type] = entry

    def __delitem__(self, model_type: str) -> None:
        del self.assigned[model_type]

    def __iter__(self) -> Iterator[str]:
        yield from sorted({*model_types(), *self.assigned})

    def __len__(self) -> int:
        return len({*model_types(), *self.assigned})


PATCH_FNS = PatchFunctions()
"""The function that patches each model type; see :class:`PatchFunctions`."""
