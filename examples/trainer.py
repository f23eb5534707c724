"""``python -m examples.trainer``: Hugging Face's Trainer with a model patched by ``cce_patch``.

``--plain`` leaves the model its own loss with logits: the losses are the same.
"""

import argparse

import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from cut_cross_entropy.transformers import cce_patch
from training.models import load_model


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, and return the loss of each step."""
    parser = argparse.ArgumentParser(prog="python -m examples.trainer", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="'smollm2', a folder or a name")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", default="out/trainer")
    parser.add_argument("--plain", action="store_true", help="without the patch")
    chosen = parser.parse_args(arguments)

    model, tokenizer = load_model(chosen.model, torch.float32, None)
    if not chosen.plain:
        model = cce_patch(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    data = [tokenizer(f"{a} + {b} = {a + b}") for a in range(10) for b in range(10)]
    config = TrainingArguments(
        output_dir=chosen.output, max_steps=chosen.steps, per_device_train_batch_size=8,
        learning_rate=1e-4, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, config, collate, data)
    trainer.train()  # prints the loss of each step
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
