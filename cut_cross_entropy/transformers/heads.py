"""Finds the modules that project onto the vocabulary."""

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

from cut_cross_entropy.transformers.gathering import (
    is_partitioned,
    own_parameter,
    product_of,
    whole_shape,
    why_not_deferred,
)

# Where the heads of a model without output embeddings were found last; each call looks there
# again, since adapters and resizing replace the modules, but walking all modules is slow.
_found_names: "WeakKeyDictionary[nn.Module, tuple[str, ...]]" = WeakKeyDictionary()

_GENERAL_GETTER = PreTrainedModel.get_output_embeddings


def find_heads(model: nn.Module) -> list[nn.Module]:
    """The heads of ``model`` as they are now.

    They are its output embeddings; of a model that names none, the linear layers as wide as a
    vocabulary of its configuration.
    """
    head = _output_embeddings(model)
    if head is not None:
        return [head]
    sizes = set(vocabulary_sizes(getattr(model, "config", None)))
    names = _found_names.get(model)
    if names is not None:
        heads = [_submodule(model, name) for name in names]
        if all(head is not None and num_rows(head) in sizes for head in heads):
            return [head for head in heads if head is not None]
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(product := product_of(module), nn.Linear)
        and product.out_features in sizes
        and not name.endswith("_fsdp_wrapped_module")  # what wraps it was found before
    }
    _found_names[model] = tuple(found)
    return list(found.values())


def why_not_intercept(head: nn.Module, gathers: bool) -> str | None:
    """Why the calls of ``head`` have to stay as they are, or None.

    Args:
        gathers: whether it has its weight only while it is called.
    """
    if head._backward_hooks or head._backward_pre_hooks:
        return "its head has backward hooks, which need the logits"
    if head.__dict__.get("_hf_tp_plan"):
        return "its head is tensor-parallel"
    return why_not_deferred(head) if gathers else None


def num_rows(head: nn.Module) -> int | None:
    """The number of classes of ``head``, or None if it does not say."""
    features = getattr(head, "out_features", None)
    if isinstance(features, int) and is_partitioned(head):
        return features  # no look at the weight, which would gather it
    weight = own_parameter(head, "weight")
    if isinstance(weight, Tensor) and len(whole_shape(weight)) == 2:
        return int(whole_shape(weight)[0])
    return features if isinstance(features, int) else None


def vocabulary_sizes(config: Any, depth: int = 3) -> Iterator[int]:
    """The sizes of all vocabularies that a configuration and its parts name."""
    for name, value in vars(config).items() if hasattr(config, "__dict__") else ():
        if name.endswith("vocab_size") and isinstance(value, int):
            yield value
        elif depth and hasattr(value, "to_dict"):
            yield from vocabulary_sizes(value, depth - 1)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    if getattr(type(model), "get_output_embeddings", None) is _GENERAL_GETTER:
        head: Any = model._modules.get("lm_head")  # what it returns, after a slow look elsewhere
    else:
        try:
            head = model.get_output_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return None
    if not isinstance(head, nn.Module) or isinstance(head, nn.Embedding):
        return None
    return head


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
