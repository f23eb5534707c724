"""``python -m examples.trainer``: Hugging Face's Trainer with a model patched by ``cce_patch``.

``--plain`` leaves the model its own loss with logits: the losses are the same.
"""

import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from cut_cross_entropy.transformers import cce_patch
from examples import ADDITIONS, build_parser
from training.models import load_model


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, and return the loss of each step."""
    chosen = build_parser("trainer", __doc__, "without the patch").parse_args(arguments)

    model, tokenizer = load_model(chosen.model, torch.float32, None)
    if not chosen.plain:
        model = cce_patch(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    data = [tokenizer(text) for text in ADDITIONS]
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
