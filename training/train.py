"""Fine-tune a causal language model; see ``--help``.

    python training/train.py --loss auto --steps 200 --output out/run
    python training/train.py --loss auto --steps 400 --output out/run --resume

An interrupt (Ctrl-C, SIGTERM) finishes the step, writes a checkpoint and ends with exit code 128
plus the signal's number. On a CPU a resumed run has, bit for bit, the losses of one that was never
interrupted.
"""

import argparse
import csv
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

if not __package__:  # started by its path: Python then puts this folder first, not the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from training.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from training.config import LATEST, TrainConfig, build_parser, config_from
from training.data import Windows, load_text, tokenize
from training.losses import IdlePatchError, make_loss
from training.models import load_model
from training.trainer import Trainer, parameter_dtype

SETUP_ERRORS = (ValueError, OSError, ImportError, RuntimeError, NotImplementedError)
"""What wrong input raises before the first step: shown as one line."""


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


def set_up(config: TrainConfig, checkpoints: Path, resume: str | None) -> tuple[Trainer, Any]:
    """Load all that a run needs.

    Args:
        config: settings of the run.
        checkpoints: folder of its checkpoints.
        resume: None, ``"latest"``, or the folder of a checkpoint.

    Returns:
        The trainer, resumed if asked, and the tokenizer.

    Raises:
        FileExistsError: checkpoints are there and nothing says to resume.
        FileNotFoundError: model, data or checkpoint not found.
        CheckpointError: the checkpoint is damaged.
        ValueError, RuntimeError, ImportError: see the modules that load things.
    """
    # What is cheap to check comes first; loading a model takes a while.
    source = _checkpoint_to_resume(checkpoints, resume)
    device = config.torch_device()
    loss = make_loss(config.loss, device)
    text = load_text(config.data, config.data_split, config.data_column)
    state = load_checkpoint(source) if source else None
    model, tokenizer = load_model(config.model, parameter_dtype(config), device)
    windows = Windows(tokenize(text, tokenizer), config.sequence_length, config.seed)
    trainer = Trainer(model, windows, loss, config)
    if state is not None:
        trainer.load_state(state)
        print(f"resumed from {source} at step {trainer.step}")
    return trainer, tokenizer


def _checkpoint_to_resume(checkpoints: Path, resume: str | None) -> Path | None:
    newest = latest_checkpoint(checkpoints)
    if resume is None:
        if newest is not None:
            raise FileExistsError(
                f"output holds the checkpoint {newest}: pass --resume to go on from it, "
                "or another --output"
            )
        return None
    source = newest if resume == LATEST else Path(resume)
    if source is None or not source.is_dir():
        raise FileNotFoundError(f"resume: there is no checkpoint {source or f'in {checkpoints}'}")
    return source


def train(trainer: Trainer, output: Path, checkpoints: Path) -> signal.Signals | None:
    """Train to the last step, or to the first interrupt, and leave a checkpoint there.

    Returns:
        The signal that ended it, or None.

    Raises:
        CheckpointError: a checkpoint could not be written.
        FloatingPointError: the loss is no longer finite.
        IdlePatchError: the loss does not go the way that was asked for.
    """
    from tqdm import tqdm

    config = trainer.config
    saved_step = trainer.step
    with (
        StopSignals() as stop,
        # disable=None: no bar where the output is not a terminal.
        tqdm(total=config.steps, initial=trainer.step, unit="step", disable=None) as bar,
    ):
        while trainer.step < config.steps and stop.received is None:
            record = trainer.train_step()
            bar.update()
            last = trainer.step == config.steps or stop.received is not None
            if last or trainer.step % config.log_interval == 0:
                bar.write(
                    f"step {record['step']}: loss {record['loss']:.6f}, {record['seconds']:.2f} s"
                )
                sys.stdout.flush()
            if last or trainer.step % config.checkpoint_interval == 0:
                save_checkpoint(checkpoints, trainer.step, trainer.state(), config.keep_checkpoints)
                saved_step = trainer.step
        if saved_step != trainer.step:  # a signal between the look above and the loop's condition
            save_checkpoint(checkpoints, trainer.step, trainer.state(), config.keep_checkpoints)
    write_losses(output / "losses.csv", trainer)
    return stop.received


def write_losses(path: Path, trainer: Trainer) -> None:
    """Write the loss of every step as CSV, in one piece."""
    partial = path.with_name(f".{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["step", "loss", "seconds"])
        writer.writeheader()
        writer.writerows(trainer.log)
    os.replace(partial, path)


def export(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model and its tokenizer to ``folder``, which is replaced when all is written."""
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def run(arguments: argparse.Namespace) -> int:
    """Do what the parsed ``arguments`` say; the exit code."""
    checkpoints = arguments.output / "checkpoints"
    try:
        trainer, tokenizer = set_up(config_from(arguments), checkpoints, arguments.resume)
    except SETUP_ERRORS as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before the first step; nothing to save", file=sys.stderr)
        return 128 + signal.SIGINT
    try:
        stopped_by = train(trainer, arguments.output, checkpoints)
        if stopped_by is not None:
            print(
                f"{stopped_by.name} at step {trainer.step}: the checkpoint is written; "
                "go on with --resume"
            )
            return 128 + stopped_by
        if arguments.export:
            export(trainer.model, tokenizer, arguments.output / "model")
            print(f"model written to {arguments.output / 'model'}")
    except (CheckpointError, IdlePatchError, FloatingPointError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    print(f"step {trainer.step} of {trainer.config.steps} done; checkpoints in {checkpoints}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 0 done, 1 failed while training, 2 wrong input."""
    return run(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
