"""Scripts to run from a checkout, each a module of its own, and what their command lines share."""

import argparse

import torch
import torch.distributed as dist

ADDITIONS = [f"{a} + {b} = {a + b}" for a in range(10) for b in range(10)]
"""Texts to learn from."""


def build_parser(name: str, doc: str | None, plain: str) -> argparse.ArgumentParser:
    """Build the command line of the module ``name``.

    Args:
        name: of the script.
        doc: its docstring.
        plain: says what ``--plain`` runs instead of this package.
    """
    parser = argparse.ArgumentParser(prog=f"python -m examples.{name}", description=doc)
    parser.add_argument("--model", default="smollm2", help="'smollm2', a folder or a name")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", default=f"out/{name}", help="folder of a trainer")
    parser.add_argument("--plain", action="store_true", help=plain)
    return parser


def start_processes() -> torch.device:
    """Join the processes that ``torchrun`` started, and return the device of this one."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
