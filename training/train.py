"""Fine-tune, pretrain or distil a causal language model; see ``--help`` and ``docs/training.md``.

    python training/train.py --loss auto --steps 200 --output out/run
    python training/train.py --loss auto --steps 400 --output out/run --resume
    torchrun --nproc-per-node 8 training/train.py --output out/run

An interrupt (Ctrl-C, SIGTERM) finishes the step, writes a checkpoint and ends with exit code 128
plus the signal's number. On a CPU a resumed run has, bit for bit, the losses of one that was never
interrupted.
"""

import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

if not __package__:  # started by its path: Python then puts this folder first, not the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

if not torch.cuda.is_available():
    # transformers imports DeepSpeed where it is installed, which would announce its choice.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from cut_cross_entropy import linear_divergence
from cut_cross_entropy.benchmark.leave import leave
from cut_cross_entropy.options import ImplName
from training.arguments import build_parser, config_from
from training.callbacks import Checkpoints
from training.checkpoint import CheckpointError, checkpoint_folder, step_of, verify_checkpoint
from training.config import DTYPES, SETUP_ERRORS, TrainConfig, UsageError, check_output
from training.fit import check_fit
from training.header import describe, steps_per_epoch, unanswered
from training.losses import FULL, IdlePatchError, make_loss
from training.models import add_adapters, in_one_line, load_model, vocabulary_size
from training.objectives import DEFAULT_BETA, DPO, Distillation, NextToken, Preferences
from training.packing import collate, collate_pairs
from training.resume import DoneError, check_resume, checkpoint_to_resume, export
from training.rows import LoadedRows, StreamedRows, load_data
from training.trainer import Trainer
from training.trainer_arguments import tensorboard_callback, training_arguments

TRAIN_ERRORS = (CheckpointError, IdlePatchError, FloatingPointError, ValueError, OSError)
"""Errors that may end a run that has begun: shown as one line."""


@dataclass(frozen=True)
class Run:
    """A run that is ready to train."""

    config: TrainConfig
    trainer: Trainer
    source: Path | None
    """The checkpoint to resume from."""
    header: str
    warnings: list[str]


def set_up(config: TrainConfig) -> Run:
    """Load everything a run needs.

    Raises:
        DoneError: the checkpoint to resume from is the last one.
        UsageError, FileNotFoundError, ValueError, RuntimeError, ImportError: wrong input.
    """
    # Cheap checks come first; loading a model takes a while.
    output = Path(config.output)
    check_output(output)
    source = checkpoint_to_resume(output / "checkpoints", config.resume)
    device = config.torch_device()
    try:
        loss = make_loss(config.loss, device)
    except RuntimeError as error:
        raise UsageError(f"--loss {config.loss}: {error}") from error
    if source is not None:
        try:
            verify_checkpoint(source)
        except CheckpointError as error:
            raise UsageError(f"--resume: {error}") from error
        if config.epochs is None:
            check_resume(config.decisive(), config, source)
    # Before the model: with DeepSpeed they decide how its weights are loaded.
    arguments = training_arguments(config, output / "checkpoints", device)
    torch.manual_seed(config.seed)
    model, tokenizer = load_model(
        config.model,
        DTYPES[config.dtype],
        None,
        config.tokenizer,
        from_scratch=config.from_scratch,
        overrides=config.config_override,
        load_in_4bit=config.load_in_4bit,
    )
    if config.gradient_checkpointing:
        # Newer releases of transformers have another name for it.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    if config.lora is not None:  # PEFT adapts itself to recomputed activations
        model = add_adapters(
            model, config.lora, config.lora_alpha, config.lora_targets, config.lora_head
        )
    vocabulary = vocabulary_size(model)
    data, held_out = load_data(config, tokenizer, vocabulary)
    if config.epochs is not None:
        steps = math.ceil(config.epochs * steps_per_epoch(config, data, arguments.world_size))
        config = replace(config, steps=steps)
        arguments.max_steps = steps
    run = {**config.decisive(), "data_hash": data.fingerprint(), "processes": arguments.world_size}
    if source is not None:
        check_resume(run, config, source)
    warnings = list(check_fit(model, config, data))
    callbacks = []
    if config.tensorboard and arguments.process_index == 0:
        done = step_of(source) if source else 0
        callbacks = [tensorboard_callback(output / "tensorboard", done)]
    pad = tokenizer.pad_token_id
    stack = partial(
        collate_pairs if config.objective == DPO else collate,
        pad_id=pad if pad and pad < vocabulary else 0,
    )
    objective = make_objective(config, vocabulary, arguments.device)
    trainer = Trainer(
        loss,
        Checkpoints(output / "checkpoints", run, config.keep_checkpoints),
        output / "losses.csv",
        callbacks,
        objective,
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=held_out,
        data_collator=stack,
        processing_class=tokenizer,
    )
    if isinstance(objective, Preferences):
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "autocast"):
            for part in (data, held_out):
                rows = part.rows if isinstance(part, LoadedRows) else []
                objective.add_references(loss, trainer.model, rows, stack, config.batch_size)
    return Run(config, trainer, source, describe(config, trainer, device), warnings)


def make_objective(config: TrainConfig, vocabulary: int, device: torch.device) -> NextToken:
    """Return the objective, with its teacher on ``device``.

    Raises:
        UsageError: the teacher has other token ids, or no divergence has that implementation.
    """
    beta = DEFAULT_BETA.get(config.objective, 0.0) if config.beta is None else config.beta
    if config.objective == DPO:
        return Preferences(beta)
    if config.teacher is None:
        return NextToken()
    if config.loss != FULL:
        one = torch.ones(1, 1, device=device)
        try:
            linear_divergence(one, one, one, one, impl=cast(ImplName, config.loss))
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"--loss {config.loss}: {error}") from error
    # As autocast would compute it; it has no weights to update.
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    teacher, _ = load_model(config.teacher, dtype, device)
    if (classes := vocabulary_size(teacher)) != vocabulary:
        raise UsageError(f"--teacher has {classes} token ids, --model {vocabulary}")
    return Distillation(teacher.eval().requires_grad_(False), beta)


def run_all(arguments: Any) -> int:
    """Run as the parsed ``arguments`` say; return the exit code."""
    main = int(os.environ.get("RANK", "0")) == 0
    say = print if main else lambda *_, **__: None
    # Any process may be the one that fails: the others only learn that it ended.
    name = "train.py" if main else f"train.py, process {os.environ['RANK']}"

    def fail(message: object, code: int) -> int:
        print(f"{name}: error: {message}", file=sys.stderr)
        return code

    try:
        config = config_from(arguments)
        model, checkpoints = Path(config.output, "model"), Path(config.output, "checkpoints")
        run = set_up(config)
    except DoneError:
        source = checkpoint_to_resume(checkpoints, config.resume)
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
        stopped_by = run.trainer.run(run.source)
        step = run.trainer.state.global_step
        if stopped_by is not None:
            say(f"{stopped_by.name} at step {step}: checkpoint written; go on with --resume")
            return 128 + stopped_by
        if config.export and main:
            export(checkpoint_folder(checkpoints, step), model)
            say(f"model written to {model}")
    except TRAIN_ERRORS as error:
        return fail(error, 1)
    except torch.cuda.OutOfMemoryError as error:
        advice = "a smaller --batch-size (with --gradient-accumulation), --gradient-checkpointing"
        return fail(f"{in_one_line(error)} Try {advice} or --fsdp", 1)
    data = run.trainer.train_dataset
    if isinstance(data, StreamedRows) and (count := data.unanswered()):
        say(f"{unanswered(count)}, in the last pass over the data")
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
