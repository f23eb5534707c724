"""Warnings, each given once, and the number of losses computed without logits."""

import sys
import warnings
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from cut_cross_entropy.call_context import constant_in_traces


class CutCrossEntropyWarning(UserWarning):
    """A model with lazy logits does something in another way than its user may expect."""


_LIBRARIES = frozenset(
    {"cut_cross_entropy", "torch", "transformers", "accelerate", "peft", "trl", "deepspeed"}
)
_given: set[tuple[str, str]] = set()
_counts: "WeakKeyDictionary[nn.Module, list[int]]" = WeakKeyDictionary()
_total = 0


@constant_in_traces
def warn_once(model_name: str, key: str, message: str) -> None:
    """Warn about ``key`` of this kind of model, the first time only.

    In compiled code it runs while the model is traced, like every Python side effect here.
    """
    if (model_name, key) in _given:
        return
    _given.add((model_name, key))
    warnings.warn(f"{model_name}: {message}", CutCrossEntropyWarning, _callers_level())


def _callers_level() -> int:
    """Return the ``stacklevel`` of the innermost line that is not a library's."""
    level = 1
    frame: Any = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _LIBRARIES:
            return level
        level, frame = level + 1, frame.f_back
    return 2


def count_loss(model: nn.Module) -> None:
    """Note that the patch computed a loss of ``model``."""
    global _total
    _total += 1
    count = _counts.get(model)
    if count is None:
        count = _counts[model] = [0]
    count[0] += 1


@constant_in_traces
def count_traced_loss() -> None:
    """Note a loss in compiled code, once per trace: a count per step would recompile each step."""
    global _total
    _total += 1


def call_count(model: nn.Module | None = None) -> int:
    """Return how many losses the patch has computed in this process.

    A compiled model adds 1 to the total each time it is traced, not each step.

    Args:
        model: count the losses of this model only, or of the one in this wrapper (PEFT, DDP).
            Compiled code counts in the total alone.

    Returns:
        The number of losses; 0 means that the patch was never active.

    Raises:
        TypeError: something else than a model.
    """
    if model is None:
        return _total
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be None or a model, got {model!r}; losses of a model type are not counted"
        )
    return sum(_counts[part][0] for part in model.modules() if part in _counts)
