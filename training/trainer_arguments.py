"""Translate the settings of a run into those of transformers, DeepSpeed and FSDP2."""

import importlib.metadata
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cut_cross_entropy.device_support import version_tuple
from training.config import TrainConfig, UsageError

AUTOCAST_SINCE = (0, 17, 2)
"""The release of DeepSpeed whose ZeRO knows ``torch_autocast``; earlier ones ignore it."""


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


def deepspeed_settings(file: str, dtype: str) -> tuple[dict[str, Any], bool]:
    """Read the configuration of DeepSpeed in ``file``; tell if it leaves bfloat16 to the Trainer.

    A ``torch_autocast`` that is enabled ``"auto"`` is enabled for ``dtype`` ``"autocast"``:
    the optimizer's weights are float32 from the start then, as on one GPU. With ``bf16``,
    DeepSpeed's own mode, they begin rounded to bfloat16, and the first small updates round away.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no object in JSON.
        ImportError: DeepSpeed is too old for ``torch_autocast``.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"--deepspeed: there is no file {file!r}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--deepspeed: {file!r} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"--deepspeed: {file!r} must hold an object, got {type(settings).__name__}"
        )
    autocast = settings.get("torch_autocast")
    if isinstance(autocast, dict) and autocast.get("enabled") == "auto":
        autocast["enabled"] = dtype == "autocast"
    own = isinstance(autocast, dict) and bool(autocast.get("enabled"))
    with suppress(importlib.metadata.PackageNotFoundError):  # transformers says so
        version = version_tuple(importlib.metadata.version("deepspeed"))
        if own and version < AUTOCAST_SINCE:
            needed, got = (".".join(map(str, each)) for each in (AUTOCAST_SINCE, version))
            raise ImportError(
                f"--deepspeed: torch_autocast in {file!r} needs DeepSpeed {needed} or newer, got "
                + got
            )
    return settings, dtype == "autocast" and not own


def set_precision(arguments: Any, dtype: str) -> None:
    """Set the dtypes of FSDP2, under which accelerate does not enable autocast.

    For ``"autocast"`` float32 weights are gathered, and computed with, in bfloat16. Left to itself
    accelerate would round the loss and the sums of the gradients to bfloat16 as well.

    Raises:
        ImportError: transformers is too old to be told.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if getattr(arguments, "fsdp_plugin_args", None) is None:
        raise ImportError("--fsdp needs transformers 5 or newer")
    policy = MixedPrecisionPolicy()
    if dtype == "autocast":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    arguments.fsdp_plugin_args["mixed_precision_policy"] = policy


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
