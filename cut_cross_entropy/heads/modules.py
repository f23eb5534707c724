"""Reads a head off a module: linear layers, quantised ones, and those of PEFT around them.

PEFT is not imported: its modules are recognised by their classes' names and read by the attributes
that its layers share.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cut_cross_entropy.heads.head import Head, LowRank
from cut_cross_entropy.heads.quantised import ChosenRows, quantised_rows


class UnknownHeadError(NotImplementedError):
    """A module whose logits are not known to be those of a :class:`Head`; says why."""


def head_of(module: nn.Module, *, logit_scale: float = 1.0, softcap: float | None = None) -> Head:
    """Return the head that gives the logits of ``module``, with its own tensors.

    It holds for the state of the module at this moment: its mode, its active adapters. The module
    is not called, so none of its hooks runs. Source of DoRA: Liu et al., arXiv 2402.09353; of LoRA:
    Hu et al., arXiv 2106.09685.

    Args:
        module: an ``nn.Linear``; a quantised one of bitsandbytes (4 bits), HQQ or torchao
            (weights only); a LoRA, rsLoRA or DoRA layer of PEFT around one of them, with any number
            of active adapters (one, for DoRA); PEFT's wrappers of ``modules_to_save`` and
            ``trainable_token_indices``.
        logit_scale: factor of the logits that the model applies after ``module``.
        softcap: what the model applies after that, see :class:`Head`.

    Raises:
        TypeError: not a module.
        UnknownHeadError: a module of another kind, a NotImplementedError. The message says what to
            do.

    Examples:
        >>> head_of(torch.nn.Linear(8, 11), softcap=30.0).bias.shape
        torch.Size([11])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    for part in module.modules():
        # Those of accelerate move tensors, and leave the product alone.
        if "forward" in vars(part) and not hasattr(part, "_hf_hook"):
            raise UnknownHeadError(
                f"a layer whose forward was replaced ({type(part).__name__}): pass a Head that "
                "says what it computes"
            )
    parts = parts_of(module)
    return Head(
        parts.weight,
        parts.bias,
        low_rank=parts.low_rank,
        logit_scale=logit_scale,
        softcap=softcap,
    )


def parts_of(module: Any) -> Head:
    """Return the same without scale and softcap, whatever stands in for a ``forward``."""
    if _is_of_peft(module):
        name = type(module).__name__
        if name == "ModulesToSaveWrapper":
            return _saved_module(module)
        if name == "TrainableTokensWrapper":
            return _trainable_tokens(module)
        if hasattr(module, "lora_A") and hasattr(module, "lora_B"):
            return _lora(module)
        raise UnknownHeadError(
            f"an adapter of PEFT that is not LoRA ({name}): merge it, or use its logits"
        )
    rows = quantised_rows(module)
    if isinstance(rows, str):
        raise UnknownHeadError(rows)
    if rows is not None:
        return Head(rows, module.bias)
    weight: Any = getattr(module, "weight", None)
    if not (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward):
        raise UnknownHeadError(
            f"not a linear layer ({type(module).__name__}): pass a Head that says what it computes"
        )
    if type(weight) not in (Tensor, nn.Parameter):
        raise UnknownHeadError(
            f"the weight is a tensor subclass ({type(weight).__name__}): pass a RowSource"
        )
    return Head(weight, module.bias)


def _is_of_peft(module: Any) -> bool:
    return any(cls.__module__.startswith("peft.") for cls in type(module).__mro__)


def _saved_module(module: Any) -> Head:
    if module.disable_adapters or not module.active_adapters:
        return parts_of(module.original_module)
    return parts_of(module.modules_to_save[module.active_adapters[0]])


def _trainable_tokens(module: Any) -> Head:
    layer = module.token_adapter
    base = parts_of(layer.get_base_layer())
    if module.disable_adapters or layer.disable_adapters or not module.active_adapters:
        if layer.merged:
            raise UnknownHeadError("disabled adapters that are merged still: unmerge them")
        return base
    if layer.merged:
        return base
    if not isinstance(base.weight, Tensor) or base.low_rank:
        raise UnknownHeadError("trainable tokens of a head that is quantised or has other adapters")
    weight, low_rank = base.weight, []
    for name in layer.active_adapters:
        if name not in layer.token_indices:
            continue
        ids = torch.tensor(layer.token_indices[name], device=weight.device)
        # The rows of these tokens, less those that the product with the weight has in it.
        change = layer.trainable_tokens_delta[name] - weight[ids]
        chosen = ChosenRows((weight.shape[0], ids.shape[0]), change.dtype, weight.device, ids=ids)
        low_rank.append(LowRank(change, chosen))
    return Head(weight, base.bias, low_rank=tuple(low_rank))


def _lora(module: Any) -> Head:
    base = parts_of(module.get_base_layer())
    if module.disable_adapters:
        if module.merged:
            raise UnknownHeadError("disabled adapters that are merged still: unmerge them")
        return base
    if module.merged:
        return base
    if getattr(module, "fan_in_fan_out", False):
        raise UnknownHeadError("an adapter of a transposed weight (fan_in_fan_out)")
    active = [name for name in module.active_adapters if name in module.lora_A]
    bias, adapters = base.bias, list(base.low_rank)
    for name in active:
        variant = getattr(module, "lora_variant", {}).get(name)
        is_dora = type(variant).__name__ == "DoraLinearVariant"
        if variant is not None and not is_dora:
            raise UnknownHeadError(
                f"a variant of LoRA that is not DoRA ({type(variant).__name__}): merge it, or use "
                "its logits"
            )
        if is_dora and (len(active) > 1 or adapters):
            raise UnknownHeadError("several active adapters of which one is DoRA: merge the others")
        down, up, scale = module.lora_A[name], module.lora_B[name], module.scaling[name]
        if type(down) is not nn.Linear or type(up) is not nn.Linear or down.bias is not None:
            raise UnknownHeadError("adapters that are not two linear layers")
        if up.bias is not None:
            if is_dora:
                raise UnknownHeadError("DoRA with a bias of its adapter")
            own = up.bias * scale
            bias = own if bias is None else bias + own
        adapters.append(
            LowRank(
                down.weight,
                up.weight,
                float(scale),
                module.lora_dropout[name],
                module.lora_magnitude_vector[name].weight if is_dora else None,
            )
        )
    return Head(base.weight, bias, low_rank=tuple(adapters))
