"""Fine-tune or pretrain a causal language model; see ``--help`` and ``docs/training.md``.

    python training/train.py --loss auto --steps 200 --output out/run
    python training/train.py --loss auto --steps 400 --output out/run --resume
    torchrun --nproc-per-node 8 training/train.py --output out/run

An interrupt (Ctrl-C, SIGTERM) finishes the step, writes a checkpoint and ends with exit code 128
plus the signal's number. On a CPU a resumed run has, bit for bit, the losses of one that was never
interrupted.
"""

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: Python then puts this folder first, not the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

if not torch.cuda.is_available():
    # transformers imports DeepSpeed where it is installed, which would announce its choice.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmark.leave import leave
from cut_cross_entropy.dispatch import choose_impl
from training.arguments import build_parser, config_from
from training.callbacks import RUN_FILE, Checkpoints, Interrupts, Log, StopSignals
from training.checkpoint import (
    MANIFEST,
    CheckpointError,
    checkpoint_folder,
    latest_checkpoint,
    step_of,
    verify_checkpoint,
)
from training.config import (
    AUTO,
    DTYPES,
    LATEST,
    SETUP_ERRORS,
    TrainConfig,
    UsageError,
    check_output,
    flag,
)
from training.fit import check_fit, vocabulary_size
from training.losses import FULL, IdlePatchError, make_loss
from training.models import load_model
from training.packing import collate
from training.rows import LoadedRows, load_data
from training.sharding import deepspeed_settings, set_precision
from training.trainer import Trainer, quiet_resume

TRAIN_ERRORS = (CheckpointError, IdlePatchError, FloatingPointError, ValueError, OSError)
"""Errors that may end a run that has begun: shown as one line."""

STATE_FILE = "trainer_state.json"

NOT_EXPORTED = shutil.ignore_patterns(
    "*.pt", "*.pth", "optimizer*", "pytorch_model_fsdp*", "global_step*", "latest",
    "zero_to_fp32.py", "training_args.bin", STATE_FILE, RUN_FILE, MANIFEST,
)  # fmt: skip
"""Files of a checkpoint that do not belong to the model."""


@dataclass(frozen=True)
class Run:
    """A run that is ready to train."""

    config: TrainConfig
    trainer: Trainer
    source: Path | None
    """The checkpoint to resume from."""
    signals: StopSignals
    checkpoints: Checkpoints
    log: Log
    header: str
    warnings: list[str]


class DoneError(Exception):
    """The checkpoint to resume from is of the last step: nothing is left to do."""


def set_up(config: TrainConfig) -> Run:
    """Load everything a run needs.

    Raises:
        DoneError: the checkpoint to resume from is the last one.
        CheckpointError: it is damaged.
        UsageError, FileNotFoundError, ValueError, RuntimeError, ImportError: wrong input.
    """
    # Cheap checks come first; loading a model takes a while.
    output = Path(config.output)
    check_output(output)
    source = _checkpoint_to_resume(output / "checkpoints", config.resume)
    device = config.torch_device()
    try:
        loss = make_loss(config.loss, device)
    except RuntimeError as error:
        raise UsageError(f"--loss {config.loss}: {error}") from error
    if source is not None:
        verify_checkpoint(source)
        if config.epochs is None:
            _check_same_run(config.decisive(), source)
            _check_steps(config, source)
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
    vocabulary = vocabulary_size(model)
    data, held_out = load_data(config, tokenizer, vocabulary)
    if config.epochs is not None:
        steps = math.ceil(config.epochs * _steps_per_epoch(config, data, arguments.world_size))
        config = replace(config, steps=steps)
        arguments.max_steps = steps
        if source is not None:
            _check_same_run(config.decisive(), source)
            _check_steps(config, source)
    run = {**config.decisive(), "data_hash": data.fingerprint(), "processes": arguments.world_size}
    if source is not None:
        _check_same_run(run, source)
    warnings = list(check_fit(model, config, data))
    main = arguments.process_index == 0
    signals = StopSignals()
    checkpoints = Checkpoints(output / "checkpoints", run, config.keep_checkpoints)
    log = Log(output / "losses.csv", main)
    callbacks: list[Any] = [Interrupts(signals), checkpoints, log]
    if config.tensorboard and main:
        callbacks.append(_tensorboard(output / "tensorboard", source))
    pad = tokenizer.pad_token_id
    trainer = Trainer(
        loss,
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=held_out,
        data_collator=partial(collate, pad_id=pad if pad and pad < vocabulary else 0),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    header = describe(config, trainer, device)
    return Run(config, trainer, source, signals, checkpoints, log, header, warnings)


def describe(config: TrainConfig, trainer: Trainer, device: torch.device) -> str:
    """Describe the run in a few lines: model, computation, data, steps."""
    model, data, held_out = trainer.model, trainer.train_dataset, trainer.eval_dataset
    assert model is not None
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    dtype = torch.bfloat16 if config.dtype == "autocast" else DTYPES[config.dtype]
    loss = "full logits"
    if config.loss != FULL:
        chosen = choose_impl(config.loss, device, dtype)
        loss = f"linear_cross_entropy, impl={config.loss!r}"
        loss += "" if chosen == config.loss else f" (here {chosen!r})"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    processes = trainer.args.world_size
    sequences = config.batch_size * config.gradient_accumulation * processes
    epochs = ""
    if isinstance(data, LoadedRows):
        epochs = f" = {config.steps / _steps_per_epoch(config, data, processes):.2f} epochs"
    return "\n".join(
        [
            f"model:  {config.model}, {type(model).__name__}, {parameters:,} parameters",
            f"device: {name}, {processes} process{'es' * (processes > 1)}, dtype {config.dtype}",
            f"loss:   {loss}; each line has the mean since the line before",
            f"data:   {config.data}, {_size(data)}"
            + (f"; held out: {_size(held_out)}" if held_out is not None else ""),
            f"steps:  {config.steps} of {sequences} sequences{epochs}, learning rate "
            f"{config.learning_rate:g} ({config.schedule}, warm-up {config.warmup_steps} steps)",
        ]
    )


def _size(data: Any) -> str:
    if not isinstance(data, LoadedRows):
        return "read while training"
    tokens = sum(len(row["input_ids"]) for row in data.rows)
    return f"{len(data):,} sequences, {tokens:,} tokens"


def _steps_per_epoch(config: TrainConfig, data: Any, processes: int) -> int:
    batches = math.ceil(len(data) / (config.batch_size * processes))
    return math.ceil(batches / config.gradient_accumulation)


def _tensorboard(folder: Path, source: Path | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "--tensorboard needs a package: pip install tensorboard, or pass --no-tensorboard"
        ) from error
    from transformers.integrations.integration_utils import TensorBoardCallback

    # Curves that an interrupted run wrote after its last checkpoint are not shown.
    done = 0 if source is None else step_of(source)
    return TensorBoardCallback(SummaryWriter(str(folder), purge_step=done + 1))


def training_arguments(config: TrainConfig, folder: Path, device: torch.device) -> Any:
    """Translate the settings into those of transformers.

    Raises:
        ImportError: DeepSpeed is asked for and not installed, or transformers is too old for FSDP2.
        ValueError: its configuration cannot be used, or FSDP2 has no processes to spread over.
    """
    from transformers import TrainingArguments

    if config.fsdp and "WORLD_SIZE" not in os.environ:
        raise UsageError("--fsdp needs processes: start with torchrun --nproc-per-node 2 or more")
    cpu = device.type == "cpu"
    more: dict[str, Any] = {}
    bf16 = config.dtype == "autocast"
    if config.deepspeed is not None:
        more["deepspeed"], bf16 = deepspeed_settings(config.deepspeed, config.dtype)
    if config.fsdp:
        more = {"fsdp": True, "fsdp_config": {"version": 2}}
    if config.evaluates:
        more |= {
            "eval_strategy": "steps",
            "eval_steps": config.checkpoint_interval,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    same = ["learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "seed"]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        lr_scheduler_type=(
            "constant_with_warmup" if config.schedule == "constant" else config.schedule
        ),
        bf16=bf16,
        use_cpu=cpu and config.deepspeed is None,
        ddp_backend="gloo" if cpu and "WORLD_SIZE" in os.environ else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not cpu,
        logging_steps=config.log_interval,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.checkpoint_interval,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        **{name: getattr(config, name) for name in same},
        **more,
    )
    if config.fsdp:
        set_precision(arguments, config.dtype)
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process a GPU: never nn.DataParallel
    return arguments


def _checkpoint_to_resume(checkpoints: Path, resume: str | None) -> Path | None:
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


def _check_steps(config: TrainConfig, source: Path) -> None:
    done = _state(source)["global_step"]
    if done == config.steps:
        raise DoneError
    if done > config.steps:
        asked = f"--steps {config.steps}"
        if config.epochs is not None:
            asked = f"--epochs {config.epochs:g} ({config.steps} steps)"
        raise UsageError(f"{asked} is below the {done} steps done in {source}")


def _check_same_run(run: dict[str, Any], folder: Path) -> None:
    """Check the settings in ``run`` against those of the checkpoint in ``folder``.

    Raises:
        UsageError: other settings or other data decided its losses.
    """
    saved: dict[str, Any] = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
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


def train(run: Run) -> signal.Signals | None:
    """Train to the last step, or to the first interrupt, and leave a checkpoint there.

    Returns:
        The signal that ended it, or None.

    Raises:
        CheckpointError: a checkpoint could not be written.
        FloatingPointError: the loss is no longer finite.
        IdlePatchError: the loss is not computed the way that was asked for.
        ValueError: the data is damaged, where it is read while training.
    """
    source = str(run.source) if run.source else None
    try:
        with run.signals, quiet_resume(run.trainer.model):
            run.trainer.train(resume_from_checkpoint=source)
    # The writers of transformers, safetensors and PyTorch have no common class of errors.
    except Exception as error:
        raise run.checkpoints.failure(run.trainer.state.global_step, error) from error
    finally:
        run.log.close()
    return run.signals.received


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


def run_all(arguments: Any) -> int:
    """Run as the parsed ``arguments`` say; return the exit code."""
    main = int(os.environ.get("RANK", "0")) == 0
    say = print if main else lambda *_, **__: None
    # Any process may be the one that fails: the others only learn that it ended.
    name = "train.py" if main else f"train.py, process {os.environ['RANK']}"

    def fail(error: BaseException, code: int) -> int:
        print(f"{name}: error: {error}", file=sys.stderr)
        return code

    try:
        config = config_from(arguments)
        model, checkpoints = Path(config.output, "model"), Path(config.output, "checkpoints")
        run = set_up(config)
    except DoneError:
        source = _checkpoint_to_resume(checkpoints, config.resume)
        assert source is not None
        say(f"step {step_of(source)} is done already: nothing to do")
        if config.export and main and not model.exists():
            export(source, model)
            say(f"model written to {model}")
        return 0
    except SETUP_ERRORS as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        say("interrupted before the first step; nothing to save", file=sys.stderr)
        return 128 + signal.SIGINT
    if main:
        for warning in run.warnings:
            print(f"{name}: warning: {warning}", file=sys.stderr)
    say(run.header, flush=True)
    if run.source is not None:
        say(f"resumed from {run.source}")
    try:
        stopped_by = train(run)
        step = run.trainer.state.global_step
        if stopped_by is not None:
            say(f"{stopped_by.name} at step {step}: checkpoint written; go on with --resume")
            return 128 + stopped_by
        if config.export and main:
            export(checkpoint_folder(checkpoints, step), model)
            say(f"model written to {model}")
    except TRAIN_ERRORS as error:
        return fail(error, 1)
    say(f"step {step} of {run.config.steps} done; checkpoints in {checkpoints}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0 done, 1 failed while training, 2 wrong input."""
    code = run_all(build_parser().parse_args(argv))
    if code == 0 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return code


if __name__ == "__main__":
    leave(main())
