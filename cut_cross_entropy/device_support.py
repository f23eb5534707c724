"""Abilities of this machine; nothing here imports Triton unless it has to.

Triton is probed by importing it, not by package metadata: distributions of it carry other names.
"""

import functools
import importlib
import os

import torch

from cut_cross_entropy.call_context import constant_in_traces

TRITON_FLOOR = (3, 3)
"""Oldest Triton release that the kernels support."""

CAPABILITY_FLOOR = (8, 0)
"""Oldest NVIDIA GPUs that they are built for: Ampere."""

PRODUCTS_PER_CLOCK = {(8, 0): 0.5, (8, 6): 0.125, (8, 9): 0.125, (9, 0): 1.0, (10, 0): 2.0}
"""Products of a multiprocessor per clock by capability, relative to Hopper's (NVIDIA's papers)."""


@functools.cache
def triton_version() -> tuple[int, ...] | None:
    """Version of the Triton that can be imported, or None."""
    try:
        triton = importlib.import_module("triton")
    except Exception:  # a broken install fails in many ways; all mean "not usable"
        return None
    return version_tuple(getattr(triton, "__version__", "0"))


def version_tuple(version: str) -> tuple[int, ...]:
    """``"3.6.0+git1a2b"`` becomes ``(3, 6, 0)``: the leading numeric parts."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = ""
        for character in part:
            if not character.isdigit():
                break
            digits += character
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:  # "0rc1": nothing numeric follows
            break
    return tuple(numbers)


def has_triton() -> bool:
    """Whether Triton can be imported at all."""
    return triton_version() is not None


def has_wide_products(device: torch.device) -> bool:
    """Whether PyTorch multiplies half precision factors into a float32 result there.

    ``out_dtype`` of ``torch.mm`` and ``torch.addmm``; for ROCm it came later.
    """
    since = (2, 8) if torch.version.hip is None else (2, 10)
    return device.type == "cuda" and version_tuple(torch.__version__)[:2] >= since


def current_autocast(device_type: str) -> torch.dtype | None:
    """The dtype of products under autocast, or None where it is off."""
    compiling = torch.compiler.is_compiling()
    if not compiling and not torch._C._is_any_autocast_enabled():
        return None
    # Devices without autocast (meta) refuse the question. Dynamo of torch 2.11 cannot trace the
    # question whether they have one, and what it traces runs on a device that has.
    known = compiling or torch.amp.is_autocast_available(device_type)
    if known and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def autocast_type(device: torch.device) -> str:
    """Return the type to turn autocast off for: meta tensors have none, and refuse the question."""
    return "cpu" if device.type == "meta" else device.type


def triton_is_interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` asks for kernels to run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def kernels_unavailable(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on ``device``, or None if they can."""
    return _why_unavailable(device.type, device.index)


@constant_in_traces
def _why_unavailable(device_type: str, index: int | None) -> str | None:
    version = triton_version()
    if version is None:
        return "Triton cannot be imported"
    if version < TRITON_FLOOR:
        floor = ".".join(map(str, TRITON_FLOOR))
        return f"Triton {'.'.join(map(str, version))} is older than {floor}"
    if device_type == "cpu" and triton_is_interpreted():
        return None
    if device_type != "cuda":
        return f"the kernels need a GPU and the tensors are on {device_type!r}"
    capability = _capability(index)
    if capability is None or capability >= CAPABILITY_FLOOR:
        return None
    needed, found = (".".join(map(str, x)) for x in (CAPABILITY_FLOOR, capability))
    return (
        f"the kernels need an NVIDIA GPU of compute capability {needed}, and this one has {found}"
    )


def relative_throughput(device: torch.device) -> float:
    """Products in half precision per second, relative to an H100 or H200; 0 if nobody knows.

    From the number of multiprocessors and their products per clock.
    """
    return _relative_throughput(device.type, device.index)


@constant_in_traces
def _relative_throughput(device_type: str, index: int | None) -> float:
    capability = _capability(index) if device_type == "cuda" else None
    if capability is None:
        return 0.0
    found = torch.cuda.get_device_properties(index).multi_processor_count
    return found / 132 * PRODUCTS_PER_CLOCK.get(capability, 0.0)


@functools.cache
def _capability(index: int | None) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU.

    None for others, and where there is none, as for tensors that stand for some.
    """
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(index)
