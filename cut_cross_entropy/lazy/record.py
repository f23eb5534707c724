"""The record of one forward whose head is lazy: how its logits were used, and whether by a loss."""

import functools
import sys
import threading
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from cut_cross_entropy.lazy.notices import count_loss, count_traced_loss, warn_once


class LossOptions(Protocol):
    """Options of ``linear_cross_entropy`` for the losses of a forward."""

    @property
    def reduction(self) -> str:
        """``"mean"`` leaves the reduction to the caller of ``F.cross_entropy``."""

    def to_kwargs(self) -> dict[str, Any]:
        """Return the options as keyword arguments, ``reduction`` among them."""


class Uses:
    """Use of the logits of one call of a head."""

    losses = 0  # computed without logits
    read = False  # in full, and the gradient of the result is theirs
    read_without_grad = False  # in full, where no gradient can be recorded
    requires_grad = False


class ForwardRecord:
    """One forward with lazy logits, from its start to the moment it returns.

    Args:
        model: the model that runs.
        options: how to compute its losses.
        labels: of the call, or None if they are not known.

    Attributes:
        means: what made the head lazy, for messages.
        way_out: what to do without it, for messages.
        place: where a loss is computed without logits, for messages; "" for anywhere in the model.
        stays_open: whether its logits are for the caller of the model, to record what a trainer
            does to them and to compute log-probabilities and entropies without them.
    """

    means = "the patch"
    way_out = "Use cce_unpatch for this model"
    place = ""
    suspended = 0  # > 0 while logits are computed: their product is not to be captured
    finished = False
    stays_open = False
    heads_called = 0
    losses = 0
    labels_padded = False
    not_captured: str | None = None
    dispatch_keys: tuple[Any, Any]
    saved_tensors_hooks: Any = None
    frame = 0

    def __init__(
        self,
        model: nn.Module,
        options: LossOptions,
        labels: Tensor | None,
    ) -> None:
        self.model = model
        self.options = options
        self.labels = labels
        self.heads: list[Any] = []  # what stands in for the heads whose calls belong here
        self.calls: list[Uses] = []
        self.grad_enabled = torch.is_grad_enabled()
        # Inside an operator PyTorch leaves out autograd: logits need what is here.
        if not torch.compiler.is_compiling():
            is_usual = not (
                torch.is_inference_mode_enabled()
                or torch._C._len_torch_dispatch_stack()
                or torch._C._are_functorch_transforms_active()
            )
            self.dispatch_keys = _usual_keys() if is_usual else _dispatch_keys()

    def __repr__(self) -> str:
        return f"<ForwardRecord of {self.model_name}, losses without logits: {self.losses}>"

    @property
    def model_name(self) -> str:
        """The class of the model."""
        return type(self.model).__name__

    def new_call(self, requires_grad: bool) -> Uses:
        """Note a call of a head that is captured."""
        uses = Uses()
        uses.requires_grad = requires_grad
        self.calls.append(uses)
        return uses

    def note_loss(self, calls: tuple[Uses, ...]) -> None:
        """Note that a loss was computed without logits; not again where it is recomputed."""
        if self.finished:
            return
        self.losses += 1
        for uses in calls:
            uses.losses += 1
        if torch.compiler.is_compiling():
            count_traced_loss()
        else:
            count_loss(self.model)

    def note_read(self, calls: tuple[Uses, ...], operation: str, with_grad: bool) -> None:
        """Note that logits were computed for ``operation``.

        After the forward that is no surprise, except where a checkpoint does it in the backward.
        """
        if self.finished and not in_recomputation():
            return
        for uses in calls:
            if with_grad:
                uses.read = True
            else:
                uses.read_without_grad = True
        warn_once(
            self.model_name,
            f"read:{operation}",
            f"the logits were computed in full because of {operation!r}, which needs the memory of "
            "the unpatched model",
        )

    def check_at_return(self) -> None:
        """Warn about what did not go as expected.

        Raises:
            RuntimeError: the logits of a call were read only where no gradient is recorded: the
                loss, an autograd.Function perhaps, would have no gradient.
        """
        for uses in self.calls:
            if (
                uses.read_without_grad
                and uses.requires_grad
                and torch.is_grad_enabled()
                and not (uses.losses or uses.read)
            ):
                raise RuntimeError(
                    f"{self.model_name} computed its loss from logits that it read only where no "
                    "gradient is recorded (an autograd.Function, or torch.no_grad), so their "
                    f"gradient would be lost. {self.way_out}"
                )
        if any(uses.losses or uses.read or uses.read_without_grad for uses in self.calls):
            return
        if self.calls:
            warn_once(
                self.model_name,
                "unused",
                f"its loss does not use the logits of its head{self.place}; {self.means} did "
                "nothing",
            )
        else:
            reason = self.not_captured or (
                "no linear head was called"
                if not self.heads_called
                else "its head does not call F.linear itself, as nn.Linear does"
            )
            self.note_idle(reason)

    def note_idle(self, reason: str) -> None:
        """Warn that a head gives full logits."""
        warn_once(
            self.model_name,
            "idle",
            f"{self.means} did nothing: {reason}. The loss is the model's own, from full logits",
        )


def _dispatch_keys() -> tuple[Any, Any]:
    """Return what the dispatcher includes and excludes now, whatever the tensors."""
    return torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


_usual_keys = functools.cache(_dispatch_keys)  # they take a while; autocast is restored apart


class _Active(threading.local):
    def __init__(self) -> None:
        self.records: list[ForwardRecord] = []
        self.ended: list[ForwardRecord] = []


_active = _Active()


def active_record(head: Any = None) -> ForwardRecord | None:
    """Return the innermost forward with lazy logits that this thread is in.

    Args:
        head: what stands in for a head: the innermost forward that it belongs to.
    """
    for record in reversed(_active.records):
        if head is None or head in record.heads:
            return record
    return None


def enter(record: ForwardRecord, depth: int = 1) -> None:
    """Make ``record`` the active one of this thread.

    Args:
        depth: number of the frame above this one that is there until :func:`leave`.
    """
    record.saved_tensors_hooks = saved_tensors_hooks()
    record.frame = id(sys._getframe(depth))
    _active.records.append(record)


def leave(record: ForwardRecord) -> None:
    """Undo :func:`enter`.

    A forward inside another is finished with the outer one, which may still use its logits.
    """
    _active.records.remove(record)
    _active.ended.append(record)
    if not _active.records:
        for ended in _active.ended:
            ended.finished = not ended.stays_open
        _active.ended.clear()


def in_recomputation() -> bool:
    """Return whether a checkpoint repeats a part of a forward in the backward."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return False
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


def inside_checkpoint(record: ForwardRecord) -> bool:
    """Return whether a checkpoint, or an autograd.Function, has begun in the forward of ``record``.

    Its backward runs the head again, or differentiates by itself, where the record is not active.
    """
    if torch.is_grad_enabled() == record.grad_enabled and (
        saved_tensors_hooks() == record.saved_tensors_hooks
    ):
        return False
    return runs_in_function(record, "torch.utils.checkpoint")


def runs_in_function(record: ForwardRecord, module: str | None = None) -> bool:
    """Return whether the forward of ``record`` is in that of an ``autograd.Function``.

    Args:
        module: or in a function of this module.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and id(frame) != record.frame:
        if module is not None and frame.f_globals.get("__name__") == module:
            return True
        code = frame.f_code
        if code.co_name in ("forward", "<lambda>") and code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, FunctionCtx):
                return True
        frame = frame.f_back
    return False


def saved_tensors_hooks() -> Any:
    """Return the innermost hooks on saved tensors, which checkpoints install, or None."""
    return None if _top_hooks is None else _top_hooks(False)


_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
