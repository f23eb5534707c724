"""Fine-tune SmolLM2-135M, or another model, with full logits and without.

python -m experiments.finetune
python -m experiments.finetune --model MODEL.gguf --text FOLDER --methods full liger cce
python -m experiments.finetune --lora 16 --lora-head
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import comparison
from experiments.comparison import Experiment, cut_windows, sha256, tokenize
from experiments.corpus import docstrings, prose
from training.arguments import Parser, add_settings
from training.losses import plain_head
from training.models import add_adapters, load_model

SMOKE = {
    "steps": 3,
    "batch_size": 2,
    "sequence_length": 16,
    "held_out": 2,
    "megabytes": 0.3,
    "seeds": 1,
}
"""Settings of ``--smoke``: all of the code, in seconds on a CPU."""


ADAPTERS = ("lora", "lora_alpha", "lora_head", "load_in_4bit")
"""Settings of the training script that choose what is trained."""

DEFAULTS: dict[str, Any] = {
    "steps": 200,
    "batch_size": 8,
    "sequence_length": 1024,
    "held_out": 48,
    "learning_rate": 1e-4,
    "warmup_steps": 20,
    "megabytes": 12.0,
    "seeds": 3,
}


def build_parser() -> Parser:
    """Build the command line."""
    parser = comparison.build_parser(
        "finetune", "Fine-tuning curves with full logits and without.", **DEFAULTS
    )
    add_settings(parser, ADAPTERS)
    return add_arguments(parser)


def add_arguments(parser: Parser) -> Parser:
    """Add the options that choose a model and a text."""
    add_settings(parser, ("model", "tokenizer"))
    parser.add_argument(
        "--text",
        type=Path,
        help="prose to train on instead of Python's: a .txt or .html file or a folder of them",
    )
    return parser


class Finetune(Experiment):
    """A model that is trained already, on help topics and docstrings or on other prose."""

    weight_decay = 0.01

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        super().__init__(arguments, device)
        text = "help topics and docstrings of Python and of the installed packages"
        if arguments.text is None:
            texts = docstrings(self.roots, self.characters)
        else:
            texts, text = prose(arguments.text), f"prose of {arguments.text.name}"
        given = {name: x for name in ADAPTERS if (x := getattr(arguments, name, None))}
        self.model, tokenizer = load_model(
            arguments.model,
            torch.float32,
            device,
            arguments.tokenizer,
            load_in_4bit="load_in_4bit" in given,
        )
        plain_head(self.model)  # which the held-out loss supposes
        if "lora" in given:
            self.model = add_adapters(
                self.model, given["lora"], given["lora_alpha"], head="lora_head" in given
            )
        else:
            given = {}
        begin = tokenizer.bos_token_id  # if the model's sequences begin with it
        begin = begin if tokenizer("")["input_ids"] == [begin] else None
        windows = cut_windows(tokenize(texts, tokenizer), arguments.sequence_length, begin)
        # The same sequences are held out with every seed.
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
        self.training = windows[order[arguments.held_out :]]
        self.held_out = windows[order[: arguments.held_out]].to(device)
        kinds = [name.split("_")[-1] for name in given if name != "lora_alpha"]
        self.label = "-".join((Path(arguments.model).stem, *kinds))
        self.settings = {"model": Path(arguments.model).name, **given}
        self.data = {"text": text, "tokens": windows.numel(), "sha256": sha256(windows)}
        self.keep_start()

    def keep_start(self) -> None:
        """Keep the weights that are trained as those at the start of every run."""
        self.start = {
            name: value.detach().to("cpu", copy=True)
            for name, value in self.model.named_parameters()
            if value.requires_grad
        }

    def make_model(self, seed: int) -> Any:
        """Return the model as it was at the start."""
        self.model.load_state_dict(self.start, strict=False)
        return self.model


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0 done, 2 wrong input."""
    return comparison.main(build_parser(), SMOKE, Finetune, argv)


if __name__ == "__main__":
    sys.exit(main())
