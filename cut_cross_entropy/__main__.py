"""``python -m cut_cross_entropy``: versions, and the implementations that can run here.

Nothing is computed; the output is meant for bug reports.
"""

import argparse
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from cut_cross_entropy import __version__
from cut_cross_entropy.device_support import kernels_unavailable, triton_is_interpreted
from cut_cross_entropy.dispatch import choose_impl
from cut_cross_entropy.implementations.full_logits import missing_compiler
from cut_cross_entropy.options import KERNEL_IMPLS, LCE_IMPL_DEFAULT, OWN_IMPLS

PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "trl", "deepspeed")


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m cut_cross_entropy", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    parser.parse_args()
    print("\n".join(report()))


def report() -> Iterator[str]:
    """Lines about the installed versions, the devices, and the implementations on each."""
    yield f"cut-cross-entropy  {__version__}"
    yield f"python             {platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        yield f"{name:<18} {installed(name)}"
    yield f"CUDA of torch      {torch.version.cuda or torch.version.hip or 'none'}"
    yield f"default impl       {LCE_IMPL_DEFAULT}"
    for device in devices():
        yield ""
        yield f"{device}: {description(device)}"
        yield f"  auto, in half precision: {choose_impl('auto', device, torch.bfloat16)}"
        for names, reason in implementations(device):
            verdict = "can run" if reason is None else f"cannot run: {reason}"
            yield f"  {', '.join(names)}: {verdict}"


def installed(name: str) -> str:
    """The version of a package, or ``not installed``."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def devices() -> list[torch.device]:
    """The CPU and the accelerators of this machine."""
    found = [torch.device("cpu")]
    found += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def description(device: torch.device) -> str:
    """The name of a device; for an NVIDIA GPU its compute capability and memory too."""
    if device.type != "cuda":
        return platform.processor() or platform.machine()
    properties = torch.cuda.get_device_properties(device)
    capability = f"compute capability {properties.major}.{properties.minor}"
    return f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"


def implementations(device: torch.device) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """Names of implementations, and the reason why they cannot run on ``device``, or None."""
    yield OWN_IMPLS, None
    yield ("torch_compile",), missing_compiler(device.type)
    reason = kernels_unavailable(device)
    if reason is None and device.type == "cpu" and not triton_is_interpreted():
        reason = "the kernels need a GPU"
    yield KERNEL_IMPLS, reason


if __name__ == "__main__":
    main()
