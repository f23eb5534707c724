"""What happens beside the training: output on the console, TensorBoard, interrupts."""

import signal
import sys
import time
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback


class StopSignals:
    """Remembers the first SIGINT or SIGTERM inside a ``with``; a second one acts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        self._previous = {s: signal.signal(s, self._handle) for s in self._signals()}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @staticmethod
    def _signals() -> tuple[signal.Signals, ...]:
        return signal.SIGINT, signal.SIGTERM

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for each in self._signals():
            signal.signal(each, signal.SIG_DFL)


class Interrupts(TrainerCallback):
    """Ends the run after the step in which a signal came to any process, with a checkpoint.

    Args:
        signals: where they are remembered.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """See :class:`TrainerCallback`."""
        if torch.distributed.is_initialized():
            # All processes have to stop after the same step.
            number = torch.tensor(int(self.signals.received or 0), device=args.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            if number:
                self.signals.received = signal.Signals(int(number))
        if self.signals.received is not None:
            control.should_save = control.should_training_stop = True
        if control.should_save:
            # The mean of the losses since the last line is not part of a checkpoint. And what is
            # not finite shows in the log, which comes before the checkpoint.
            control.should_log = True


class Console(TrainerCallback):
    """A progress bar on a terminal, and a line for each look at the losses.

    Args:
        active: whether this process prints.
    """

    def __init__(self, active: bool) -> None:
        self.active = active
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """See :class:`TrainerCallback`."""
        from tqdm import tqdm

        self.since, self.last = time.perf_counter(), state.global_step
        if self.active:
            # disable=None: no bar where the output is not a terminal.
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", disable=None
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """See :class:`TrainerCallback`."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """See :class:`TrainerCallback`."""
        if self.bar is None or not logs:
            return
        if "loss" in logs:
            seconds = time.perf_counter() - self.since
            steps = max(1, state.global_step - self.last)
            self._print(
                f"step {state.global_step}: loss {logs['loss']:.6f}, learning rate "
                f"{logs['learning_rate']:.2e}, {seconds / steps:.2f} s a step"
            )
            self.since, self.last = time.perf_counter(), state.global_step
        elif "eval_loss" in logs:
            self._print(
                f"step {state.global_step}: held-out loss {logs['eval_loss']:.6f}, perplexity "
                f"{logs['eval_perplexity']:.3f} of {logs['eval_tokens']} tokens"
            )
            self.since = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """See :class:`TrainerCallback`."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _print(self, line: str) -> None:
        self.bar.write(line)
        sys.stdout.flush()


class TensorBoard(TrainerCallback):
    """Every number of the log as a curve.

    Args:
        folder: where TensorBoard looks.

    Raises:
        ImportError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Any) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "tensorboard needs the package of that name: pip install tensorboard, or "
                "--no-tensorboard"
            ) from error
        self.folder, self.make = folder, SummaryWriter
        self.writer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """See :class:`TrainerCallback`."""
        # What an interrupted run wrote after its last checkpoint is not shown.
        self.writer = self.make(str(self.folder), purge_step=state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """See :class:`TrainerCallback`."""
        for name, value in (logs or {}).items():
            if self.writer is not None and isinstance(value, int | float):
                part, _, rest = name.partition("eval_")
                tag = f"held_out/{rest}" if rest and not part else f"train/{name}"
                self.writer.add_scalar(tag, value, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """See :class:`TrainerCallback`."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None
