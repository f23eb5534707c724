"""The settings of a run, checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cut_cross_entropy.options import ALL_IMPLS
from training.data import BUILTIN
from training.losses import FULL
from training.models import SMOLLM2

LOSSES = (FULL, *ALL_IMPLS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}
"""Dtype of the parameters by the name on the command line; autocast computes in bfloat16."""

SCHEDULES = ("constant", "linear", "cosine")

LATEST = "latest"

SETUP_ERRORS = (ValueError, OSError, ImportError, RuntimeError, NotImplementedError)
"""What wrong input raises before the first step: shown as one line."""

SMALLEST: Mapping[str, int] = {
    "steps": 1,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "sequence_length": 2,
    "shuffle_buffer": 1,
    "warmup_steps": 0,
    "seed": 0,
    "log_interval": 1,
    "checkpoint_interval": 1,
    "keep_checkpoints": 1,
}

FREE = {
    "device",
    "log_interval",
    "checkpoint_interval",
    "keep_checkpoints",
    "gradient_checkpointing",
    "tensorboard",
}
"""Settings that a resumed run may change: they decide no number."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; the options of ``training/train.py`` by the same names.

    Raises:
        ValueError: a value out of range, or two that exclude each other, named with what is
            allowed.
    """

    model: str = SMOLLM2
    tokenizer: str | None = None
    from_scratch: bool = False
    config_override: tuple[str, ...] = ()
    data: str = BUILTIN
    data_split: str = "train"
    data_column: str = "text"
    eval_data: str | None = None
    eval_split: str = "validation"
    eval_fraction: float = 0.0
    packing: bool = True
    isolate_documents: bool = False
    streaming: bool = False
    shuffle_buffer: int = 1000
    loss: str = "auto"
    steps: int = 100
    batch_size: int = 2
    gradient_accumulation: int = 1
    sequence_length: int = 128
    learning_rate: float = 2e-5
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    dtype: str = "float32"
    device: str = "auto"
    deepspeed: str | None = None
    fsdp: bool = False
    seed: int = 0
    log_interval: int = 10
    checkpoint_interval: int = 100
    keep_checkpoints: int = 2
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name, least in SMALLEST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and > 0, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be finite and >= 0, got {self.weight_decay}")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be in [0, 1), got {self.eval_fraction}")
        choices: dict[str, Any] = {"loss": LOSSES, "dtype": DTYPES, "schedule": SCHEDULES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if self.eval_data is not None and self.eval_fraction:
            raise ValueError("eval_data and eval_fraction exclude each other")
        if self.streaming and self.eval_fraction:
            raise ValueError("eval_fraction needs all data in memory: use eval_data with streaming")
        if self.fsdp and self.deepspeed is not None:
            raise ValueError("fsdp and deepspeed exclude each other: both spread the weights")
        if self.isolate_documents and not self.packing:
            raise ValueError("isolate_documents needs packing: rows hold one document without")

    @property
    def evaluates(self) -> bool:
        """Whether there is held-out data."""
        return self.eval_data is not None or self.eval_fraction > 0

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the losses, in JSON's types: a resume must have the same."""
        # The number of steps decides the learning rates only if they fall towards the end.
        free = FREE | ({"steps"} if self.schedule == "constant" else set())
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if name not in free
        }

    def torch_device(self) -> torch.device:
        """The device that ``device`` stands for.

        Raises:
            ValueError: no such device on this machine.
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
            raise ValueError(f"device {self.device!r} cannot be used here: {reason}") from error
        return device
