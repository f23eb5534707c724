"""The classes of transformers that a model type stands for."""

import difflib
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Every mapping whose classes project onto a vocabulary. A release lacks some of them.
MAPPING_NAMES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_VISION_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
)
REMOTE_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForVision2Seq",
    "AutoModelForSeq2SeqLM",
)
# Types that no mapping lists still have such a class in their module, or their parent's.
GENERATIVE_ENDINGS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


def takes_labels(cls: type) -> bool:
    """Whether the class has a ``forward`` with an argument ``labels``."""
    return "labels" in inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]


def model_types() -> Iterator[str]:
    """The model types that transformers' mappings of generative classes list, sorted."""
    mappings = [getattr(modeling_auto, name, {}) for name in MAPPING_NAMES]
    yield from sorted({model_type for mapping in mappings for model_type in mapping})


def is_known(model_type: str) -> bool:
    """Whether :func:`classes_of_type` finds a class; imports a module only if it has to."""
    return bool(_class_names(model_type)) or bool(_listed_nowhere(model_type))


def classes_of_type(model_type: str) -> list[type[PreTrainedModel]]:
    """The classes to patch for a model type.

    Args:
        model_type: as ``config.model_type`` has it.

    Returns:
        Classes with a ``forward`` that takes labels, each once.

    Raises:
        RuntimeError: the installed transformers has no such type, or none with a class to patch.
    """
    import transformers

    classes: list[type[PreTrainedModel]] = []
    for name in _class_names(model_type):
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and cls not in classes and takes_labels(cls):
            classes.append(cls)
    classes = classes or _listed_nowhere(model_type)
    if not classes:
        known = sorted(CONFIG_MAPPING.keys())
        close = difflib.get_close_matches(model_type, known, n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise RuntimeError(
            f"model_or_type must be a model, a config or a model type with a language model in "
            f"transformers {transformers.__version__}, "
            f"got the unknown model type {model_type!r}.{hint}"
        )
    return classes


def remote_classes(remote_model_id: str, model_type: str) -> list[type[PreTrainedModel]]:
    """The classes to patch for a repository, which may define them in its own code.

    Args:
        remote_model_id: repository id or folder, as ``from_pretrained`` takes it. Its code runs.
        model_type: of the classes if the repository has no code of its own.

    Raises:
        RuntimeError: neither its configuration nor transformers names a class to patch.
    """
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    config = AutoConfig.from_pretrained(remote_model_id, trust_remote_code=True)
    auto_map: dict[str, Any] = getattr(config, "auto_map", None) or {}
    classes: list[type[PreTrainedModel]] = []
    for auto_class in REMOTE_CLASSES:
        if auto_class in auto_map:
            cls = get_class_from_dynamic_module(auto_map[auto_class], remote_model_id)
            if cls not in classes and takes_labels(cls):
                classes.append(cls)
    if not classes and not any(name in auto_map for name in REMOTE_CLASSES):
        if is_known(model_type):
            return classes_of_type(model_type)
        raise RuntimeError(
            f"remote_model_id must name a repository whose auto_map has one of "
            f"{', '.join(REMOTE_CLASSES)}, or model_or_type a type that transformers knows, got "
            f"{remote_model_id!r} with {sorted(auto_map)} and {model_type!r}"
        )
    if not classes:
        raise RuntimeError(
            f"remote_model_id must name a repository with a model whose forward takes labels, got "
            f"{remote_model_id!r} with {sorted(auto_map)}"
        )
    return classes


def _class_names(model_type: str) -> list[str]:
    names: list[str] = []
    for mapping_name in MAPPING_NAMES:
        entry = getattr(modeling_auto, mapping_name, {}).get(model_type, ())
        names.extend((entry,) if isinstance(entry, str) else entry)
    return names


def _listed_nowhere(model_type: str) -> list[type[PreTrainedModel]]:
    """Generative classes of the modelling module of a type that no auto mapping lists."""
    if model_type not in CONFIG_MAPPING:
        return []
    module_name = configuration_auto.model_type_to_module_name(model_type)
    try:
        module = importlib.import_module(
            f"transformers.models.{module_name}.modeling_{module_name}"
        )
    except ImportError:  # a configuration without a model, or one that lacks a dependency
        return []
    return [
        cls
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if name.endswith(GENERATIVE_ENDINGS)
        and issubclass(cls, PreTrainedModel)
        and cls.__module__ == module.__name__
        and takes_labels(cls)
    ]
