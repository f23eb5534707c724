"""What happened in one forward of a patched model: what was read, and whether a loss was made."""

import threading

import torch
from torch import Tensor, nn

from cut_cross_entropy.transformers.notices import count_loss, count_traced_loss, warn_once
from cut_cross_entropy.transformers.utils import PatchOptions


class ForwardRecord:
    """One forward with labels, from its start to the moment it returns.

    Args:
        model: the model that runs.
        options: of its patch.
        labels: what the caller passed.
    """

    suspended = 0  # > 0 while logits are computed: their product is not to be captured
    finished = False
    heads_called = 0
    captured = 0
    losses = 0
    read_with_grad = False
    read_only_without_grad = False
    not_captured: str | None = None

    def __init__(self, model: nn.Module, options: PatchOptions, labels: Tensor) -> None:
        self.model = model
        self.options = options
        self.labels = labels

    @property
    def model_name(self) -> str:
        """The class of the model."""
        return type(self.model).__name__

    def note_loss(self) -> None:
        """A loss was computed without logits."""
        self.losses += 1
        if torch.compiler.is_compiling():
            count_traced_loss()
        else:
            count_loss(self.model)

    def note_read(self, operation: str, with_grad: bool) -> None:
        """Real logits were made for ``operation``. After the forward that is nobody's concern."""
        if self.finished:
            return
        if with_grad:
            self.read_with_grad = True
        else:
            self.read_only_without_grad = True
        warn_once(
            self.model_name,
            f"read:{operation}",
            f"the logits were computed in full because of {operation!r}. The result is that of the "
            "unpatched model, but so is the memory",
        )

    def check_at_return(self, grad_enabled: bool) -> None:
        """Tell the user what did not go as expected.

        Raises:
            RuntimeError: the logits were read where no gradient is recorded, and nowhere else: the
                loss, an autograd.Function perhaps, would have no gradient.
        """
        if self.losses or self.read_with_grad:
            return
        if self.read_only_without_grad:
            if grad_enabled:
                raise RuntimeError(
                    f"{self.model_name} computed its loss from logits that it read only where no "
                    "gradient is recorded (an autograd.Function, or torch.no_grad), so their "
                    "gradient would be lost. Use cce_unpatch for this model"
                )
        elif self.captured:
            warn_once(
                self.model_name,
                "unused",
                "labels were passed, but its loss does not use the logits of its head; the patch "
                "did nothing",
            )
        else:
            reason = self.not_captured or (
                "no linear head was called" if not self.heads_called else "its head is no product"
            )
            warn_once(
                self.model_name,
                "idle",
                f"the patch did nothing: {reason}. The loss is the model's own, from full logits",
            )


class _Active(threading.local):
    def __init__(self) -> None:
        self.records: list[ForwardRecord] = []


_active = _Active()


def active_record() -> ForwardRecord | None:
    """The innermost patched forward with labels that this thread is in."""
    return _active.records[-1] if _active.records else None


def enter(record: ForwardRecord) -> None:
    """Make ``record`` the active one of this thread."""
    _active.records.append(record)


def leave(record: ForwardRecord) -> None:
    """Undo :func:`enter`."""
    _active.records.remove(record)
    record.finished = True
