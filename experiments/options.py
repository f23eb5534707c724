"""What the command lines of the experiments share."""

import argparse
from pathlib import Path

import torch

from cut_cross_entropy.options import ALL_IMPLS
from experiments.loop import REORDERED
from training.losses import FULL

MEASUREMENTS = Path("docs/measurements/experiments")
"""Where the files that the report reads are kept."""

CPU_METHODS = [FULL, "chunked", REORDERED]
"""What runs without a GPU."""


def add_common_arguments(parser: argparse.ArgumentParser, methods: list[str]) -> None:
    """Add the options that every experiment has; ``methods`` run on a GPU unless named."""
    add = parser.add_argument
    add("--out", type=Path, default=MEASUREMENTS, help="folder of the JSON file")
    add(
        "--methods",
        nargs="+",
        choices=[FULL, REORDERED, *ALL_IMPLS],
        metavar="METHOD",
        help=f"what computes the loss, in this order: {FULL}, {REORDERED} (the same with every "
        f"batch reversed) or an implementation; unless given: {' '.join(methods)} on a GPU, "
        f"{' '.join(CPU_METHODS)} without one",
    )
    parser.set_defaults(gpu_methods=methods)
    add("--device", default="auto", help="cpu, cuda; auto takes a GPU if there is one")
    add("--device-label", help="name of the device in the file's name; unless given, its own name")
    add("--commit", help="commit of the code, where neither COMMIT nor git says it")
    add("--first-seed", type=int, default=0, help="first seed; the others follow")
    add("--time-limit", type=float, default=600.0, help="seconds after which no run starts")
    add("--roots", type=Path, nargs="+", help="folders of the text; unless given, Python's own")
    add(
        "--autocast",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute in bfloat16; the parameters are float32 either way",
    )
    add("--smoke", action="store_true", help="tiny settings that test the code in seconds")


def chosen_device(name: str) -> torch.device:
    """The device that ``name`` stands for."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def chosen_methods(arguments: argparse.Namespace, device: torch.device) -> list[str]:
    """The methods asked for, or those that run on ``device``."""
    if arguments.methods:
        return list(arguments.methods)
    return list(arguments.gpu_methods) if device.type == "cuda" else CPU_METHODS


def file_name(experiment: str, label: str | None, device: torch.device) -> str:
    """Name of the JSON file: the experiment and a short name of the device."""
    if label is None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        label = name.lower().removeprefix("nvidia ").split()[0]
    return f"{experiment}_{label}.json"
