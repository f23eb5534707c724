"""Puts a patched forward on a model or a class, and takes it away again.

An instance gets a class of its own: a subclass with the same name, so that copies, pickles and the
replicas of ``nn.DataParallel`` stay patched. A class gets the forward itself.
"""

import functools
import inspect
import types
from typing import Any

from torch import nn

from cut_cross_entropy.adapters.trl import SEAM as TRL_HEAD
from cut_cross_entropy.lazy.notices import warn_once
from cut_cross_entropy.transformers.forward import is_patched_forward, patched_forward
from cut_cross_entropy.transformers.utils import PatchOptions

_MARK = "_cce_patch_of"  # on a subclass for instances: the class that it stands for


def patch_instance(model: nn.Module, options: PatchOptions) -> None:
    """Patch one model; a patch that it has already is replaced."""
    unpatch_instance(model)
    own_forward = model.__dict__.get("forward")
    model_class: Any = type(model)
    model.__class__ = _patched_subclass(model_class, options)
    if own_forward is not None:
        # accelerate and others shadow the forward of the class by one of the instance. Wrap that
        # one; whoever strips wrappers off it arrives at the patched forward of the class.
        function = getattr(own_forward, "__func__", None)
        names_labels = "labels" in inspect.signature(own_forward).parameters
        if function is None or not names_labels:

            def function(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return own_forward(*args, **kwargs)

            # What takes (*args, **kwargs) hands them on to the forward of the class.
            function.__signature__ = (  # type: ignore[attr-defined]
                _with_self(own_forward) if names_labels else inspect.signature(model_class.forward)
            )
        _warn_if_idle(model, function)
        forward = patched_forward(function, options, _has_patch)
        forward.__wrapped__ = type(model).forward  # type: ignore[attr-defined]
        model.__dict__["forward"] = types.MethodType(forward, model)


def unpatch_instance(model: nn.Module) -> None:
    """Undo :func:`patch_instance`; nothing for a model that has no patch of its own."""
    original = getattr(type(model), _MARK, None)
    if original is None:
        return
    own_forward: Any = getattr(model.__dict__.get("forward"), "__func__", None)
    if is_patched_forward(own_forward):
        if own_forward is type(model).forward:  # what is left when accelerate unwraps a model
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = types.MethodType(own_forward.cce_original, model)
    model.__class__ = _without_patch(type(model))


def patch_class(cls: type, options: PatchOptions) -> None:
    """Patch all models of a class, those that exist already too."""
    unpatch_class(cls)
    inherited = "forward" not in cls.__dict__
    original = cls.forward  # type: ignore[attr-defined]
    forward: Any = patched_forward(original, options, lambda model: forward.cce_installed)
    forward.cce_inherited = inherited
    forward.cce_installed = True
    cls.forward = forward  # type: ignore[attr-defined]


def unpatch_class(cls: type) -> None:
    """Undo :func:`patch_class`; nothing for a class that is not patched."""
    forward: Any = cls.__dict__.get("forward")
    if not is_patched_forward(forward) or not hasattr(forward, "cce_inherited"):
        return
    forward.cce_installed = False
    if forward.cce_inherited:
        del cls.forward  # type: ignore[attr-defined]
    else:
        cls.forward = forward.cce_original  # type: ignore[attr-defined]


def is_patched_class(cls: type) -> bool:
    """Whether the forward of ``cls`` is a patched one, its own or inherited."""
    return is_patched_forward(getattr(cls, "forward", None))


def _has_patch(model: nn.Module) -> bool:
    return hasattr(type(model), _MARK)


@functools.cache
def _patched_subclass(cls: Any, options: PatchOptions) -> Any:
    def reduce_ex(self: Any, protocol: Any) -> Any:
        _, _, *state = super(subclass, self).__reduce_ex__(max(2, protocol))
        return (_rebuild, (cls, options), *state)

    def set_attribute(self: Any, name: str, value: Any) -> None:
        if name == "forward":
            _warn_if_idle(self, getattr(value, "__func__", value))
        super(subclass, self).__setattr__(name, value)

    subclass: Any = type(
        cls.__name__,
        (cls,),
        {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "__reduce_ex__": reduce_ex,
            "__setattr__": set_attribute,
            "forward": patched_forward(cls.forward, options, _has_patch),
            _MARK: cls,
        },
    )
    return subclass


def _rebuild(cls: type, options: PatchOptions) -> nn.Module:
    """An empty instance of the patched ``cls``, for copies and pickles."""
    subclass = _patched_subclass(cls, options)
    model: nn.Module = subclass.__new__(subclass)
    return model


def _without_patch(cls: type) -> type:
    """``cls`` without the patched class among its bases, which others may have subclassed since."""
    if _MARK in cls.__dict__:
        original: type = cls.__dict__[_MARK]
        return original
    bases = tuple(_without_patch(base) if hasattr(base, _MARK) else base for base in cls.__bases__)
    namespace = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    rebuilt: type = type(cls)(cls.__name__, bases, namespace)  # type: ignore[call-overload]
    return rebuilt


def _with_self(forward: Any) -> inspect.Signature:
    self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(forward)
    return signature.replace(parameters=[self, *signature.parameters.values()])


def _warn_if_idle(model: nn.Module, function: Any) -> None:
    """Say so if a trainer's own fused head stands before the patched forward."""
    code = getattr(function, "__code__", None)  # its signature claims to be that of the model
    if code is None or TRL_HEAD.is_replaced():
        return
    if "fused_lm_head" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
        warn_once(
            type(model).__name__,
            "fused_lm_head",
            "TRL computes the loss with a fused head of its own (fused_lm_head=True), which never "
            "reaches the patched forward: for those calls the patch is idle, and "
            "cut_cross_entropy.adapters.trl() is what computes them without logits",
        )
