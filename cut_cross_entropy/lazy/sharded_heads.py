"""Heads that have their weight only while their own hooks hold it: FSDP of both kinds, and ZeRO-3.

Such a head is not called where the model calls it: that would gather the weight for nothing. It is
called once, where the loss (or whatever else reads the logits) is computed, so that the hooks
gather the weight before it, free it after it, and do the same around its backward.
"""

from typing import Any

import torch
from torch import Tensor, nn

# The packages whose hooks on a head gather its weight. What other hooks do is not known.
_GATHERING_PACKAGES = ("torch", "deepspeed")


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP, of either kind, gathers the parameters of ``module`` around its forward."""
    cls = type(module)  # by what only these two have: to import them takes long
    return hasattr(cls, "set_requires_gradient_sync") or hasattr(cls, "summon_full_params")


def is_partitioned(module: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 has partitioned parameters of ``module`` or of its parts."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def gathers(head: nn.Module) -> bool:
    """Whether ``head`` has its weight only while it is called."""
    if type(head) is nn.Linear:  # nearly always; and FSDP gives the head a class of its own
        return hasattr(head._parameters.get("weight"), "ds_id")
    return is_sharded(head) or is_partitioned(head)


def product_of(head: nn.Module) -> nn.Module:
    """The module that multiplies: the one that FSDP1 has wrapped, or the head itself."""
    wrapped = head._modules.get("_fsdp_wrapped_module")
    return head if wrapped is None else wrapped


def own_parameter(module: nn.Module, name: str) -> Any:
    """A parameter (or what the module has under its name) as it is now.

    ZeRO-3 gathers a parameter that is asked for by name while its model runs, and keeps it.
    """
    parameters = module._parameters
    if name in parameters:
        return dict.__getitem__(parameters, name)
    return getattr(module, name, None)


def whole_shape(weight: Any) -> Any:
    """The shape of a weight, of the whole where a process holds a part."""
    return weight.ds_shape if hasattr(weight, "ds_shape") else weight.shape


def why_not_deferred(head: nn.Module) -> str | None:
    """Why a head that gathers has to be called where the model calls it, or None."""
    if head.__dict__.get("_distribute_module_applied"):
        return "its head is sharded by itself and tensor-parallel too"
    if is_partitioned(head) and type(head).forward is not nn.Linear.forward:
        return "its head has parts that DeepSpeed ZeRO-3 partitions by themselves"
    product = product_of(head)
    hooks = (*head._forward_hooks.values(), *head._forward_pre_hooks.values())
    if product is not head:
        hooks += (*product._forward_hooks.values(), *product._forward_pre_hooks.values())
    for hook in hooks:
        function = getattr(hook, "func", hook)  # of a functools.partial
        package = str(getattr(function, "__module__", "")).split(".")[0]
        if package not in _GATHERING_PACKAGES:
            return f"its head is sharded and has forward hooks ({package}), which need the logits"
    return None


def promised_dtype(head: nn.Module, x: Tensor, autocast_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the logits that a call of ``head`` with ``x`` would give."""
    if autocast_dtype is not None and x.dtype != torch.float64:
        return autocast_dtype
    policy = _policy(head)
    asked = getattr(policy, "output_dtype", None) or getattr(policy, "param_dtype", None)
    if asked is not None:
        return asked  # type: ignore[no-any-return]
    return next((p.dtype for p in head.parameters()), x.dtype)


def _policy(head: nn.Module) -> Any:
    """The mixed precision of FSDP2 or FSDP1."""
    get_state: Any = getattr(head, "_get_fsdp_state", None)
    if get_state is not None:
        return getattr(get_state(), "_mp_policy", None)
    return getattr(head, "mixed_precision", None)


def num_rows(head: nn.Module) -> int | None:
    """Return the number of classes of ``head``, or None if it does not say."""
    features = getattr(head, "out_features", None)
    if isinstance(features, int) and is_partitioned(head):
        return features  # without a look at the weight, which would gather it
    weight = own_parameter(head, "weight")
    if isinstance(weight, Tensor) and len(whole_shape(weight)) == 2:
        return int(whole_shape(weight)[0])
    return features if isinstance(features, int) else None


def why_not_intercept(head: nn.Module, gathers: bool) -> str | None:
    """Return why the calls of ``head`` have to stay as they are, or None.

    Args:
        gathers: whether it has its weight only while it is called.
    """
    if head._backward_hooks or head._backward_pre_hooks:
        return "its head has backward hooks, which need the logits"
    if head.__dict__.get("_hf_tp_plan"):
        return "its head is tensor-parallel"
    return why_not_deferred(head) if gathers else None
