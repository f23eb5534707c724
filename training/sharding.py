"""Set the precision of a run for FSDP2 and DeepSpeed."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

from cut_cross_entropy.device_support import version_tuple

AUTOCAST_SINCE = (0, 17, 2)
"""The release of DeepSpeed whose ZeRO knows ``torch_autocast``; earlier ones ignore it."""


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
    if own and (version := _deepspeed_version()) is not None and version < AUTOCAST_SINCE:
        needed = ".".join(map(str, AUTOCAST_SINCE))
        raise ImportError(
            f"--deepspeed: torch_autocast in {file!r} needs DeepSpeed {needed} or newer, got "
            + ".".join(map(str, version))
        )
    return settings, dtype == "autocast" and not own


def _deepspeed_version() -> tuple[int, ...] | None:
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return None  # transformers says so
    return version_tuple(version)


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
