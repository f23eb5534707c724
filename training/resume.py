"""Decide what a run resumes from, check that it may, and export the model it leaves."""

import json
import shutil
from pathlib import Path
from typing import Any

from training.callbacks import RUN_FILE
from training.checkpoint import MANIFEST, latest_checkpoint
from training.config import AUTO, LATEST, TrainConfig, UsageError, flag

STATE_FILE = "trainer_state.json"

NOT_EXPORTED = shutil.ignore_patterns(
    "*.pt", "*.pth", "optimizer*", "pytorch_model_fsdp*", "global_step*", "latest",
    "zero_to_fp32.py", "training_args.bin", STATE_FILE, RUN_FILE, MANIFEST,
)  # fmt: skip
"""Files of a checkpoint that do not belong to the model."""


class DoneError(Exception):
    """The checkpoint to resume from is of the last step: nothing is left to do."""


def checkpoint_to_resume(checkpoints: Path, resume: str | None) -> Path | None:
    """Return the checkpoint that ``--resume`` means, or None to start.

    Raises:
        UsageError: there is none, or one that the run would write over.
    """
    newest = latest_checkpoint(checkpoints)
    if resume is None and newest is not None:
        raise UsageError(
            f"--output holds the checkpoint {newest}: pass --resume to go on from it, "
            "or another --output"
        )
    if resume is None or resume == AUTO:
        return newest
    source = newest if resume == LATEST else Path(resume)
    if source is None or not source.is_dir():
        raise UsageError(f"--resume: there is no checkpoint {source or f'in {checkpoints}'}")
    return source


def _state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    return state


def check_resume(run: dict[str, Any], config: TrainConfig, source: Path) -> None:
    """Check that a run may go on from the checkpoint ``source``, and that steps are left to do.

    Args:
        run: what must be as it was when the checkpoint was written.
        config: settings of the run.
        source: the checkpoint.

    Raises:
        DoneError: it is of the last step.
        UsageError: it is of a later one, or other settings or other data decided its losses.
    """
    saved: dict[str, Any] = json.loads((source / RUN_FILE).read_text(encoding="utf-8"))
    for name in run:
        if name not in saved or run[name] == saved[name]:
            continue
        if name == "data_hash":
            raise UsageError(
                f"--data {run['data']!r} gives other tokens than in the run that is resumed"
            )
        what = "the number of processes" if name == "processes" else flag(name)
        raise UsageError(
            f"{what} must be {saved[name]!r}, as in the run that is resumed, got {run[name]!r}"
        )
    done = _state(source)["global_step"]
    if done == config.steps:
        raise DoneError
    if done > config.steps:
        asked = f"--steps {config.steps}"
        if config.epochs is not None:
            asked = f"--epochs {config.epochs:g} ({config.steps} steps)"
        raise UsageError(f"{asked} is below the {done} steps done in {source}")


def export(checkpoint: Path, folder: Path) -> None:
    """Copy the model and its tokenizer out of ``checkpoint``, or of the best before it.

    ``folder`` is replaced when everything is written.
    """
    best = _state(checkpoint).get("best_model_checkpoint")
    if best is not None and (checkpoint.parent / Path(best).name).is_dir():
        checkpoint = checkpoint.parent / Path(best).name
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(checkpoint, unfinished, ignore=NOT_EXPORTED)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
