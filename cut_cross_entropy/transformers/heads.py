"""Finds the modules that project onto the vocabulary."""

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from cut_cross_entropy.lazy.sharded_heads import num_rows, product_of

# Where the heads of a model without output embeddings were found last; each call looks there
# again, since adapters and resizing replace the modules, but walking all modules is slow.
_found_names: "WeakKeyDictionary[nn.Module, tuple[str, ...]]" = WeakKeyDictionary()

_GENERAL_GETTER = PreTrainedModel.get_output_embeddings


def find_heads(model: nn.Module) -> list[nn.Module]:
    """The heads of ``model`` as they are now.

    They are its output embeddings; of a model that names none, the linear layers as wide as a
    vocabulary of its configuration, with their adapters.
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
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        layer: Any = product_of(module)
        layer = getattr(layer, "original_module", layer)  # of one that PEFT wraps whole
        layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        is_wide = isinstance(layer, nn.Linear) and layer.out_features in sizes
        # What wraps a layer, or has adapters for it, comes before its parts.
        if is_wide and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    _found_names[model] = tuple(found)
    return list(found.values())


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
