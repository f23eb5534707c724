"""Check that a model, its tokenizer and the data fit together, before the first step."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from training.config import TrainConfig, UsageError
from training.losses import hidden_states
from training.models import in_one_line
from training.packing import Row
from training.rows import LoadedRows

TRIAL = 8
"""Tokens of the trial run of a changed configuration."""


def check_fit(model: Any, config: TrainConfig, data: Any) -> Iterator[str]:
    """Check a loaded model against its settings and data; yield warnings.

    Args:
        model: a causal language model.
        config: settings of the run.
        data: rows to train on.

    Raises:
        UsageError: the model cannot compute with its configuration, or not as many tokens.
    """
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    longest, short = _longest(data, config), int(min(TRIAL, known))
    tries = config.deepspeed is None  # ZeRO-3 has spread the weights already
    if config.config_override and tries:
        what = f"--config-override {' '.join(config.config_override)} gives a model that cannot"
        _compute(model, short, True, lambda reason: f"{what} compute: {reason}")
    if longest > known:
        what = f"--sequence-length must be at most the {known} positions of the model, got"
        if tries:  # an index out of range, most often
            _compute(model, longest, False, lambda _: f"{what} {config.sequence_length}")
        yield (
            f"--sequence-length {config.sequence_length} exceeds the {known} positions that the "
            "model was made for"
        )
    if config.warmup_steps >= config.steps:
        yield (
            f"--warmup-steps {config.warmup_steps} is not below the number of steps, "
            f"{config.steps}: the learning rate never reaches {config.learning_rate:g}"
        )


def _longest(data: Any, config: TrainConfig) -> int:
    """Return the number of positions that a row needs, or of a stream may need."""
    if not isinstance(data, LoadedRows):
        return config.sequence_length

    def positions(row: Row) -> int:
        if "lengths" in row:  # a pair
            return int(row["lengths"].max())
        return int(row["position_ids"].max()) + 1 if "position_ids" in row else len(row["labels"])

    return max(map(positions, data.rows))


def _compute(model: Any, length: int, training: bool, message: Callable[[str], str]) -> None:
    """Run ``model`` on ``length`` tokens; no weight and no random number of the run changes.

    Raises:
        UsageError: with ``message`` of the reason, if the model cannot compute.
    """
    before, device = model.training, next(model.parameters()).device
    model.train(training)
    try:
        with torch.random.fork_rng(), torch.set_grad_enabled(training):
            hidden = hidden_states(model, torch.zeros(1, length, dtype=torch.int64, device=device))
            model.get_output_embeddings()(hidden[:, -1:])
    except Exception as error:  # whatever the model's code and PyTorch raise
        raise UsageError(message(in_one_line(error))) from error
    model.train(before)
