"""Fine-tune SmolLM2-135M, or another model, with full logits and without.

python -m experiments.finetune
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import comparison
from experiments.comparison import Experiment, cut_windows, sha256, tokenize
from experiments.corpus import docstrings
from training.arguments import Parser, add_settings
from training.models import load_model

SMOKE = {
    "steps": 3,
    "batch_size": 2,
    "sequence_length": 16,
    "held_out": 2,
    "megabytes": 0.3,
    "seeds": 1,
}
"""Settings of ``--smoke``: all of the code, in seconds on a CPU."""


def build_parser() -> Parser:
    """Build the command line."""
    parser = comparison.build_parser(
        "finetune",
        "Fine-tuning curves with full logits and without.",
        steps=200,
        batch_size=8,
        sequence_length=1024,
        held_out=48,
        learning_rate=1e-4,
        warmup_steps=20,
        megabytes=12.0,
        seeds=3,
    )
    add_settings(parser, ("model",))
    return parser


class Finetune(Experiment):
    """A model that is trained already, on help topics and docstrings."""

    weight_decay = 0.01

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        super().__init__(arguments, device)
        texts = docstrings(self.roots, self.characters)
        self.model, tokenizer = load_model(arguments.model, torch.float32, device)
        windows = cut_windows(tokenize(texts, tokenizer), arguments.sequence_length)
        # The same sequences are held out with every seed.
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
        self.training = windows[order[arguments.held_out :]]
        self.held_out = windows[order[: arguments.held_out]].to(device)
        self.settings = {"model": Path(arguments.model).name}
        self.data = {
            "text": "help topics and docstrings of Python and of the installed packages",
            "tokens": windows.numel(),
            "sha256": sha256(windows),
        }
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}

    def make_model(self, seed: int) -> Any:
        """Return the model as it was loaded."""
        self.model.load_state_dict(self.start)
        return self.model


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0 done, 2 wrong input."""
    return comparison.main(build_parser(), SMOKE, Finetune, argv)


if __name__ == "__main__":
    sys.exit(main())
