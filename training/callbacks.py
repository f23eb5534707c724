"""Actions during training: checkpoints, lines of output, the table of losses, interrupts."""

import csv
import json
import math
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from training.checkpoint import (
    abandon_checkpoint,
    checkpoint_folder,
    clear_step,
    commit_checkpoint,
    is_complete,
)

RUN_FILE = "run.json"
"""Settings and data that decide the numbers, in each checkpoint."""

COLUMNS = (
    "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_mib",
    "eval_loss", "eval_perplexity",
)  # fmt: skip
"""Columns of ``losses.csv``."""


class StopSignals:
    """Remember the first SIGINT or SIGTERM inside a ``with``; a second one acts at once."""

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
    """End the run after the step in which a signal came to any process, with a checkpoint.

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


class Checkpoints(TrainerCallback):
    """Turn each folder that the Trainer saves into a checkpoint, or remove it.

    Args:
        root: folder of the checkpoints.
        run: what a run that resumes from one must have in common with this one.
        keep: newest checkpoints to keep; the best stays too.
    """

    def __init__(self, root: Path, run: dict[str, Any], keep: int) -> None:
        self.root, self.run, self.keep = root, run, keep
        self.step: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Let the intervals of this run hold, not those of the one that is resumed."""
        state.logging_steps, state.save_steps = int(args.logging_steps), int(args.save_steps)
        if args.eval_steps:
            state.eval_steps = int(args.eval_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Make room for a checkpoint that is due."""
        if control.should_save:
            # The mean of the losses since the last line is not part of a checkpoint. And a loss
            # that is not finite shows in the log, which comes before the checkpoint.
            control.should_log = True
            self.step = state.global_step
            if args.process_index == 0:
                clear_step(self.root, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Write the manifest, when all processes have written their files."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if args.process_index == 0:
            folder = checkpoint_folder(self.root, state.global_step)
            (folder / RUN_FILE).write_text(json.dumps(self.run, indent=1), encoding="utf-8")
            best = state.best_model_checkpoint
            commit_checkpoint(
                self.root, state.global_step, self.keep, None if best is None else Path(best)
            )

    def failure(self, step: int, error: Exception) -> Exception:
        """Return the error to raise for one that ended ``step``; remove an incomplete folder."""
        folder = checkpoint_folder(self.root, step)
        if self.step == step and folder.exists() and not is_complete(folder):
            return abandon_checkpoint(self.root, step, error)
        return error


class Log(TrainerCallback):
    """Print a line and extend ``losses.csv`` at each look at the losses; a bar on a terminal.

    Args:
        path: the table.
        active: whether this process writes; all of them check that losses are finite.
    """

    def __init__(self, path: Path, active: bool) -> None:
        self.path, self.active = path, active
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Begin the table, with the rows up to the checkpoint that is resumed."""
        from tqdm import tqdm

        self.began, self.first = time.perf_counter(), state.global_step
        self.since, self.last = self.began, self.first
        if not self.active:
            return
        # disable=None: no bar where the output is not a terminal.
        self.bar = tqdm(total=state.max_steps, initial=self.first, unit="step", disable=None)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("w", newline="", encoding="utf-8")
        self.table = csv.DictWriter(self.file, COLUMNS, extrasaction="ignore")
        self.table.writeheader()
        self.row: dict[str, Any] = {}
        self.start = 0
        for entry in state.log_history:
            self._write_row(entry)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """See :class:`TrainerCallback`."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """Write what was logged.

        Raises:
            FloatingPointError: the loss or the gradient is not finite.
        """
        if self.bar is not None:
            if "loss" in logs:
                self.bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)
            self.bar.write(self._line(state, logs))
            sys.stdout.flush()
            self._write_row({**logs, "step": state.global_step})
        self.since, self.last = time.perf_counter(), state.global_step
        for name, what in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
            if not math.isfinite(logs.get(name, 0.0)):
                raise FloatingPointError(
                    f"the {what} of step {state.global_step}, or of one since the last line, is "
                    f"{logs[name]}: try a lower --learning-rate, more --warmup-steps or a smaller "
                    "--max-grad-norm; checkpoints hold only steps before it"
                )

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """See :class:`TrainerCallback`."""
        self.close()

    def close(self) -> None:
        """End the bar and the table."""
        if self.bar is not None:
            self.bar.close()
            self.file.close()
            self.bar = None

    def _line(self, state: Any, logs: dict[str, Any]) -> str:
        step, now = state.global_step, time.perf_counter()
        if "loss" not in logs:
            return (
                f"step {step}: held-out loss {logs['eval_loss']:.6f}, perplexity "
                f"{logs['eval_perplexity']:.3f} of {logs['eval_tokens']} tokens"
            )
        seconds = (now - self.since) / max(1, step - self.last)
        left = (now - self.began) / max(1, step - self.first) * (state.max_steps - step)
        peak = logs.get("peak_memory_mib")
        return (
            f"step {step}: loss {logs['loss']:.6f}, learning rate {logs['learning_rate']:.2e}, "
            f"{seconds:.2f} s/step, {logs['tokens_per_second']:.0f} tokens/s, "
            + (f"peak memory {peak / 1024:.2f} GiB, " if peak else "")
            + f"epoch {logs.get('epoch', 0.0):.2f}, {timedelta(seconds=round(left))} left"
        )

    def _write_row(self, entry: dict[str, Any]) -> None:
        """Append a row, or complete the last one if it is of the same step."""
        if self.row.get("step") == entry["step"]:
            self.file.seek(self.start)
            self.file.truncate()
            entry = {**self.row, **entry}
        self.start, self.row = self.file.tell(), entry
        self.table.writerow(entry)
        self.file.flush()
