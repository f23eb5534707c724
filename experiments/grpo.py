"""GRPO by TRL on SmolLM2-135M with TRL's output layer and with ``token_logprobs``.

python -m experiments.grpo
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from examples.grpo import reward
from experiments import trl_runs
from experiments.trl_runs import Sections

LOGGED = ("loss", "reward", "reward_std", "entropy", "grad_norm", "completions/mean_length")
"""Figures whose distances are reported."""


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = trl_runs.build_parser("grpo", steps=24, batch_size=64)
    parser.add_argument("--tokens", type=int, default=16, help="longest completion")
    return parser


def make_trainer(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, seed: int
) -> GRPOTrainer:
    """Make a trainer that teaches sums of two numbers; a program computes the reward.

    Every set of completions is used twice, so that their log-probabilities are computed before.
    """
    pick = random.Random(seed)
    pairs = [(pick.randint(1, 20), pick.randint(1, 20)) for _ in range(512)]
    prompts = [f"2 + 3 = 5\n7 + 6 = 13\n{a} + {b} =" for a, b in pairs]
    data = Dataset.from_dict({"prompt": prompts, "total": [a + b for a, b in pairs]})
    config = GRPOConfig(
        **trl_runs.shared_settings(arguments, seed),
        max_completion_length=arguments.tokens,
        num_generations=8,
        num_iterations=2,
        temperature=0.9,
    )
    score: Any = reward
    return GRPOTrainer(model, score, config, data, processing_class=tokenizer)


def watch(trainer: GRPOTrainer, sections: Sections) -> None:
    """Time the generation and the log-probabilities of the policy that generated."""
    sections.watch(trainer, "_generate", "generation")
    without_gradients = lambda: not torch.is_grad_enabled()
    name = "_get_per_token_logps_and_entropies"
    sections.watch(trainer, name, "log-probabilities", without_gradients)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the command line; return the record."""
    return trl_runs.main(build_parser(), make_trainer, watch, LOGGED, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
