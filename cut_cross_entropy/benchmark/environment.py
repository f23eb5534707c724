"""Origin of figures: device, versions, commit."""

import os
import platform
import subprocess
from pathlib import Path

import torch

from cut_cross_entropy import __version__
from cut_cross_entropy.device_support import triton_version


def commit_of_checkout() -> str:
    """Short hash, from COMMIT where there is no history; ``"unknown"`` without either."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    root = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def processor() -> str:
    """Name of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"


def environment(commit: str | None = None) -> dict[str, str]:
    """Opening of every file of measurements."""
    on_gpu = torch.cuda.is_available()
    where = {
        "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "torch": torch.__version__,
        "triton": ".".join(map(str, triton_version() or ())) or "none",
        "python": platform.python_version(),
        "cut_cross_entropy": __version__,
        "commit": commit or commit_of_checkout(),
    }
    if on_gpu:
        where["cuda"] = str(torch.version.cuda)
        where["memory_gib"] = f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f}"
    return where


def in_words(found: dict[str, str]) -> str:
    """Name the device and the versions of a file of measurements."""
    text = "{device}, PyTorch {torch}, Triton {triton}".format_map(found)
    return f"{text}, Python {found['python']}" if "python" in found else text
