"""``python -m examples.sft``: TRL's supervised fine-tuning, with losses from ``adapters.trl()``.

``--plain`` leaves TRL its own output layer: the losses are the same. Needs TRL.
"""

from contextlib import nullcontext

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from cut_cross_entropy import adapters
from examples import ADDITIONS, build_parser
from training.models import load_model


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, and return the loss of each step."""
    chosen = build_parser("sft", __doc__, "without the adapter").parse_args(arguments)

    model, tokenizer = load_model(chosen.model, torch.float32, None)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = SFTConfig(
        output_dir=chosen.output, max_steps=chosen.steps, per_device_train_batch_size=8,
        learning_rate=1e-4, logging_steps=1, save_strategy="no", report_to=[], bf16=False,
        disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    data = Dataset.from_dict({"text": ADDITIONS})
    trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    with nullcontext() if chosen.plain else adapters.trl() as adapter:
        trainer.train()  # prints the loss of each step
    print("TRL's output layer" if adapter is None else f"token_logprobs: {adapter.calls} calls")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
