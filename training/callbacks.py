"""Actions during training: checkpoints, lines of output, the table of losses, interrupts, speed."""

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


class Interrupts(TrainerCallback):
    """End the run after the step in which a signal came to any process, with a checkpoint.

    Inside a ``with`` the first SIGINT or SIGTERM is remembered; a second one acts at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "Interrupts":
        self._previous = {each: signal.signal(each, self._handle) for each in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for each, handler in self._previous.items():
            signal.signal(each, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Let all processes stop after the same step."""
        if torch.distributed.is_initialized():
            number = torch.tensor(int(self.received or 0), device=args.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.received = signal.Signals(int(number)) if number else None
        if self.received is not None:
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


class Pace(TrainerCallback):
    """Measure tokens per second, without evaluations and checkpoints, and the peak memory.

    Args:
        processes: processes that train, each with as many tokens as this one.
    """

    def __init__(self, processes: int) -> None:
        self.processes, self.tokens = processes, 0
        self.since: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Start the clock if it stands."""
        self.since = self.since or time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Stop the clock."""
        self.since = None

    on_evaluate = on_save

    def measure(self, device: torch.device) -> dict[str, float]:
        """Return the numbers since the last call."""
        now = time.perf_counter()
        seconds = now - (self.since or now)
        found = {"tokens_per_second": round(self.processes * self.tokens / max(seconds, 1e-9), 1)}
        self.tokens, self.since = 0, now
        if (peak := peak_memory(device)) is not None:
            found["peak_memory_mib"] = round(peak / 2**20, 1)
        return found


def peak_memory(device: torch.device) -> int | None:
    """Return the bytes that this process held at most, or None if nothing tells.

    On a CUDA device PyTorch's tensors since the last call, on others the whole process.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Log(TrainerCallback):
    """Print a line and write ``losses.csv`` whenever losses are logged; a bar on a terminal.

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
        # None: no bar where the output is not a terminal.
        off = None if self.active else True
        self.bar = tqdm(total=state.max_steps, initial=self.first, unit="step", disable=off)
        self._write_table(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Move the bar on."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """Write what was logged.

        Raises:
            FloatingPointError: the loss or the gradient is not finite.
        """
        if self.active:
            if "loss" in logs:
                self.bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)
            self.bar.write(self._line(state, logs))
            sys.stdout.flush()
            self._write_table(state)
        self.since, self.last = time.perf_counter(), state.global_step
        for name, what in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
            if not math.isfinite(logs.get(name, 0.0)):
                raise FloatingPointError(
                    f"the {what} of step {state.global_step}, or of one since the last line, is "
                    f"{logs[name]}: try a lower --learning-rate, more --warmup-steps or a smaller "
                    "--max-grad-norm; checkpoints hold only steps before it"
                )

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()

    def _line(self, state: Any, logs: dict[str, Any]) -> str:
        step, now = state.global_step, time.perf_counter()
        if "loss" not in logs:
            line = f"step {step}: held-out loss {logs['eval_loss']:.6f}"
            if "eval_items" in logs:
                return f"{line} of {logs['eval_items']} tokens or pairs"
            return (
                f"{line}, perplexity {logs['eval_perplexity']:.3f} of {logs['eval_tokens']} tokens"
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

    def _write_table(self, state: Any) -> None:
        """Write a row for each step that was logged, in one piece."""
        if not self.active:
            return
        rows: dict[int, dict[str, Any]] = {}
        for entry in state.log_history:
            rows.setdefault(entry["step"], {}).update(entry)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            table.writeheader()
            table.writerows(rows.values())
        unfinished.replace(self.path)
