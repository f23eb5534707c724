"""DPO by TRL on SmolLM2-135M with TRL's output layer and with ``token_logprobs``.

python -m experiments.dpo
"""

import argparse
import copy
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from experiments import trl_runs
from experiments.trl_runs import Sections

LOGGED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen",
          "logps/rejected", "grad_norm")  # fmt: skip
"""Figures whose distances are reported."""


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = trl_runs.build_parser("dpo", steps=40, batch_size=32)
    parser.add_argument("--sums", type=int, default=16, help="sums a completion")
    return parser


def preferences(count: int, sums: int, seed: int) -> dict[str, list[str]]:
    """Sums that are right, chosen, and the same with some that are off by 1 to 9, rejected."""
    pick = random.Random(seed)
    data: dict[str, list[str]] = {"prompt": [], "chosen": [], "rejected": []}
    for _ in range(count):
        right, wrong = "", ""
        for _ in range(sums):
            a, b = pick.randint(1, 99), pick.randint(1, 99)
            right += f"{a} + {b} = {a + b}\n"
            wrong += f"{a} + {b} = {a + b + pick.choice((0, 0, pick.randint(1, 9)))}\n"
        data["prompt"].append("2 + 3 = 5\n17 + 26 = 43\n")
        data["chosen"].append(right)
        data["rejected"].append(wrong)
    return data


def make_trainer(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, seed: int
) -> DPOTrainer:
    """Make a trainer that prefers right sums; the reference is the model at the start."""
    settings = trl_runs.shared_settings(arguments, seed)
    config = DPOConfig(**settings, gradient_checkpointing=False)
    data = Dataset.from_dict(preferences(256, arguments.sums, seed))
    reference = copy.deepcopy(model)
    return DPOTrainer(model, reference, config, train_dataset=data, processing_class=tokenizer)


def watch(trainer: DPOTrainer, sections: Sections) -> None:
    """Time the reference's log-probabilities."""
    sections.watch(trainer.ref_model, "forward", "reference")


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the command line; return the record."""
    return trl_runs.main(build_parser(), make_trainer, watch, LOGGED, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
