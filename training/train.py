"""Fine-tune or pretrain a causal language model; see ``--help`` and ``docs/training.md``.

    python training/train.py --loss auto --steps 200 --output out/run
    python training/train.py --loss auto --steps 400 --output out/run --resume
    torchrun --nproc-per-node 8 training/train.py --output out/run

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
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: Python then puts this folder first, not the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmark.leave import leave
from training.arguments import build_parser, config_from
from training.callbacks import Console, Interrupts, StopSignals, TensorBoard
from training.checkpoint import CheckpointError, latest_checkpoint, verify_checkpoint
from training.config import DTYPES, LATEST, SETUP_ERRORS, TrainConfig
from training.losses import IdlePatchError, make_loss
from training.models import load_model
from training.packing import collate
from training.rows import load_data
from training.sharding import deepspeed_settings, set_precision
from training.trainer import Trainer, check_same_run

TRAIN_ERRORS = (CheckpointError, IdlePatchError, FloatingPointError, ValueError, OSError)
"""What may end a run that has begun: shown as one line."""


def set_up(config: TrainConfig, output: Path, resume: str | None) -> tuple[Trainer, Path | None]:
    """Load all that a run needs.

    Args:
        config: settings of the run.
        output: folder for what it writes; its checkpoints are in ``checkpoints``.
        resume: None, ``"latest"``, or the folder of a checkpoint.

    Returns:
        The trainer, and the checkpoint to go on from.

    Raises:
        FileExistsError: checkpoints are there and nothing says to resume.
        FileNotFoundError: model, data or checkpoint not found.
        CheckpointError: the checkpoint is damaged.
        ValueError, RuntimeError, ImportError: see the modules that load things.
    """
    # What is cheap to check comes first; loading a model takes a while.
    source = _checkpoint_to_resume(output / "checkpoints", resume)
    device = config.torch_device()
    loss = make_loss(config.loss, device)
    board = [TensorBoard(output / "tensorboard")] if config.tensorboard else []
    if source is not None:
        verify_checkpoint(source)
    # Before the model: with DeepSpeed they decide how its weights are loaded.
    arguments = training_arguments(config, output / "checkpoints", device)
    torch.manual_seed(config.seed)
    model, tokenizer = load_model(
        config.model,
        DTYPES[config.dtype],
        None,
        config.tokenizer,
        config.from_scratch,
        config.config_override,
    )
    if config.gradient_checkpointing:
        # Newer releases of transformers have another name for it.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    data, held_out = load_data(config, tokenizer)
    run = {**config.decisive(), "data_hash": data.fingerprint(), "processes": arguments.world_size}
    if source is not None:
        check_same_run(run, source)
    trainer = Trainer(
        loss,
        run,
        config.keep_checkpoints,
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=held_out,
        data_collator=partial(collate, pad_id=tokenizer.pad_token_id or 0),
        processing_class=tokenizer,
        callbacks=[Console(arguments.process_index == 0)],
    )
    if arguments.process_index == 0:
        for callback in board:
            trainer.add_callback(callback)
    return trainer, source


def training_arguments(config: TrainConfig, folder: Path, device: torch.device) -> Any:
    """The settings in the terms of transformers.

    Raises:
        ImportError: DeepSpeed is asked for and not installed, or transformers is too old for FSDP2.
        ValueError: its configuration cannot be used, or FSDP2 has no processes to spread over.
    """
    from transformers import TrainingArguments

    if config.fsdp and "WORLD_SIZE" not in os.environ:
        raise ValueError("fsdp needs processes: start with torchrun --nproc-per-node 2 or more")
    cpu = device.type == "cpu"
    sharding: dict[str, Any] = {}
    bf16 = config.dtype == "autocast"
    if config.deepspeed is not None:
        sharding["deepspeed"], bf16 = deepspeed_settings(config.deepspeed, config.dtype)
    if config.fsdp:
        sharding = {"fsdp": True, "fsdp_config": {"version": 2}}
    evaluation: dict[str, Any] = {}
    if config.evaluates:
        evaluation = {
            "eval_strategy": "steps",
            "eval_steps": config.checkpoint_interval,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=(
            "constant_with_warmup" if config.schedule == "constant" else config.schedule
        ),
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=bf16,
        use_cpu=cpu and config.deepspeed is None,
        ddp_backend="gloo" if cpu and "WORLD_SIZE" in os.environ else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not cpu,
        seed=config.seed,
        logging_steps=config.log_interval,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.checkpoint_interval,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        **sharding,
        **evaluation,
    )
    if config.fsdp:
        set_precision(arguments, config.dtype)
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process a GPU: never nn.DataParallel
    return arguments


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


def train(trainer: Trainer, source: Path | None) -> signal.Signals | None:
    """Train to the last step, or to the first interrupt, and leave a checkpoint there.

    Returns:
        The signal that ended it, or None.

    Raises:
        CheckpointError: a checkpoint could not be written.
        FloatingPointError: the loss is no longer finite.
        IdlePatchError: the loss does not go the way that was asked for.
        ValueError: the data is damaged, where it is read while training.
    """
    with StopSignals() as stop:
        trainer.add_callback(Interrupts(stop))
        trainer.train(resume_from_checkpoint=str(source) if source else None)
    return stop.received


def write_log(path: Path, history: list[dict[str, Any]]) -> None:
    """Write the losses, held-out losses and learning rates as CSV, in one piece."""
    columns = ["step", "loss", "learning_rate", "grad_norm", "eval_loss", "eval_perplexity"]
    rows: dict[int, dict[str, Any]] = {}
    for entry in history:
        rows.setdefault(entry["step"], {}).update({k: entry[k] for k in columns if k in entry})
    unfinished = path.with_name(f".{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(row for _, row in sorted(rows.items()) if len(row) > 1)
    os.replace(unfinished, path)


def export(trainer: Trainer, folder: Path) -> None:
    """Write the model and its tokenizer to ``folder``, which is replaced when all is written."""
    unfinished = folder.with_name(f".{folder.name}")
    main = trainer.is_world_process_zero()
    if main:
        shutil.rmtree(unfinished, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(unfinished), _internal_call=True)
    trainer.accelerator.wait_for_everyone()
    if main:
        (unfinished / "training_args.bin").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)


def run(arguments: argparse.Namespace) -> int:
    """Do what the parsed ``arguments`` say; the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    main = rank == 0
    say = print if main else lambda *_, **__: None
    # Any process may be the one that fails: the others only learn that it ended.
    failed = "train.py: error" if main else f"train.py, process {rank}: error"
    checkpoints = arguments.output / "checkpoints"
    try:
        trainer, source = set_up(config_from(arguments), arguments.output, arguments.resume)
    except SETUP_ERRORS as error:
        print(f"{failed}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("interrupted before the first step; nothing to save", file=sys.stderr)
        return 128 + signal.SIGINT
    if source is not None:
        say(f"resumed from {source}")
    try:
        stopped_by = train(trainer, source)
        step = trainer.state.global_step
        if main:
            write_log(arguments.output / "losses.csv", trainer.state.log_history)
        if stopped_by is not None:
            say(f"{stopped_by.name} at step {step}: checkpoint written; go on with --resume")
            return 128 + stopped_by
        if arguments.export:
            export(trainer, arguments.output / "model")
            say(f"model written to {arguments.output / 'model'}")
    except TRAIN_ERRORS as error:
        print(f"{failed}: {error}", file=sys.stderr)
        return 1
    say(f"step {step} of {trainer.args.max_steps} done; checkpoints in {checkpoints}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 0 done, 1 failed while training, 2 wrong input."""
    code = run(build_parser().parse_args(argv))
    if code == 0 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return code


if __name__ == "__main__":
    leave(main())
