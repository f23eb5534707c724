"""Describe a run before its first step."""

import math
from typing import Any

import torch

from cut_cross_entropy.dispatch import choose_impl
from training.config import DTYPES, TrainConfig
from training.losses import FULL
from training.objectives import CROSS_ENTROPY
from training.rows import LoadedRows


def describe(config: TrainConfig, trainer: Any, device: torch.device) -> str:
    """Describe the run in a few lines: model, computation, data, steps."""
    model, data, held_out = trainer.model, trainer.train_dataset, trainer.eval_dataset
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    adapters = ""
    if config.lora is not None:
        trained, parameters = model.get_nb_trainable_parameters()  # knows packed weights
        adapters = f", {trained:,} of them trained in adapters of rank {config.lora}"
    dtype = torch.bfloat16 if config.dtype == "autocast" else DTYPES[config.dtype]
    objective = "" if config.objective == CROSS_ENTROPY else f"{config.objective}, "
    loss = "full logits"
    if config.loss != FULL:
        chosen = choose_impl(config.loss, device, dtype)
        loss = f"linear_cross_entropy, impl={config.loss!r}"
        loss += "" if chosen == config.loss else f" (here {chosen!r})"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    processes = trainer.args.world_size
    sequences = config.batch_size * config.gradient_accumulation * processes
    epochs = ""
    if isinstance(data, LoadedRows):
        epochs = f" = {config.steps / steps_per_epoch(config, data, processes):.2f} epochs"
    return "\n".join(
        [
            f"model:  {config.model}, {type(model).__name__}, {parameters:,} parameters" + adapters,
            f"device: {name}, {processes} process{'es' * (processes > 1)}, dtype {config.dtype}",
            f"loss:   {objective}{loss}; each line has the mean since the line before",
            f"data:   {config.data}, {_size(data)}"
            + (f"; held out: {_size(held_out)}" if held_out is not None else ""),
            f"steps:  {config.steps} of {sequences} sequences{epochs}, learning rate "
            f"{config.learning_rate:g} ({config.schedule}, warm-up {config.warmup_steps} steps)",
        ]
    )


def _size(data: Any) -> str:
    if not isinstance(data, LoadedRows):
        return "read while training"
    tokens = sum(len(row["input_ids"]) for row in data.rows)
    size = f"{len(data):,} sequences, {tokens:,} tokens"
    return f"{size}; {unanswered(data.unanswered)}" if data.unanswered else size


def unanswered(count: int) -> str:
    """Say how many conversations teach nothing."""
    return f"conversations without an assistant's message, not learned: {count:,}"


def steps_per_epoch(config: TrainConfig, data: Any, processes: int) -> int:
    """Return the optimizer steps in one pass over ``data``."""
    batches = math.ceil(len(data) / (config.batch_size * processes))
    return math.ceil(batches / config.gradient_accumulation)
