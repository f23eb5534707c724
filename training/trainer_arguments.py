"""Translate the settings of a run into those of transformers."""

import os
from pathlib import Path
from typing import Any

import torch

from training.config import TrainConfig, UsageError
from training.sharding import deepspeed_settings, set_precision


def training_arguments(config: TrainConfig, folder: Path, device: torch.device) -> Any:
    """Translate the settings into those of transformers.

    Raises:
        ImportError: DeepSpeed is asked for and not installed, or transformers is too old for FSDP2.
        ValueError: its configuration cannot be used, or FSDP2 has no processes to spread over.
    """
    from transformers import TrainingArguments

    if config.fsdp and "WORLD_SIZE" not in os.environ:
        raise UsageError("--fsdp needs processes: start with torchrun --nproc-per-node 2 or more")
    if device.index:
        raise UsageError(f"--device {device}: choose one of several GPUs by CUDA_VISIBLE_DEVICES")
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
        eval_accumulation_steps=16,  # losses of single tokens, on their way to the CPU
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


def tensorboard_callback(folder: Path, done: int) -> Any:
    """Return the callback that writes curves to ``folder``, without those after step ``done``.

    Raises:
        ImportError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "--tensorboard needs a package: pip install tensorboard, or pass --no-tensorboard"
        ) from error
    from transformers.integrations.integration_utils import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder), purge_step=done + 1))
