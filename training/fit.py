"""Check that a model, its tokenizer and the data fit together, before the first step."""

from collections.abc import Iterator
from typing import Any

import torch

from training.config import TrainConfig, UsageError
from training.losses import hidden_states
from training.models import in_one_line
from training.rows import LoadedRows

TRIAL = 8
"""Tokens of the trial run of a changed configuration."""


def positions(model: Any) -> int | None:
    """Return the number of positions that the configuration of ``model`` names, or None."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def check_fit(model: Any, config: TrainConfig, data: Any) -> Iterator[str]:
    """Check a loaded model against its settings and data; yield warnings.

    Args:
        model: a causal language model.
        config: settings of the run.
        data: rows to train on.

    Raises:
        UsageError: the model cannot compute with its configuration, or not as many tokens.
    """
    known, longest = positions(model), _longest(data, config)
    tries = config.deepspeed is None  # ZeRO-3 has spread the weights already
    if config.config_override and tries:
        try:
            _compute(model, min(TRIAL, known or TRIAL), training=True)
        except Exception as error:  # whatever the model's code and PyTorch raise
            raise UsageError(
                f"--config-override {' '.join(config.config_override)} gives a model that cannot "
                f"compute: {in_one_line(error)}"
            ) from error
    if known is not None and longest > known:
        if tries:
            try:
                _compute(model, longest, training=False)
            except Exception as error:  # as above: an index out of range, most often
                raise UsageError(
                    f"--sequence-length must be at most the {known} positions of the model, got "
                    f"{config.sequence_length}"
                ) from error
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
    return max(
        int(row["position_ids"].max()) + 1 if "position_ids" in row else len(row["input_ids"])
        for row in data.rows
    )


def _compute(model: Any, length: int, training: bool) -> None:
    """Run ``model`` on ``length`` tokens; no weight and no random number of the run changes."""
    before, device = model.training, next(model.parameters()).device
    model.train(training)
    with torch.random.fork_rng(), torch.set_grad_enabled(training):
        hidden = hidden_states(model, torch.zeros(1, length, dtype=torch.int64, device=device))
        model.get_output_embeddings()(hidden[:, -1:])
    model.train(before)
