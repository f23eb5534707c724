"""Run examples under torchrun; rank 0 writes their losses and how often the library computed one.

    torchrun --nproc-per-node 2 -m tests.examples.counted FILE MODEL STEPS EXAMPLE...

Each example runs with ``--plain`` and without it. They share the processes, whose start takes most
of the time.
"""

import functools
import importlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def counting(function, calls):
    """The function, with a note in ``calls`` of each call."""

    def counted(*args, **options):
        calls.append(1)
        return function(*args, **options)

    return counted


def main(file, model, steps, *names) -> None:
    """Write ``{name: {"plain": [losses, calls], "ours": [losses, calls]}}`` as JSON."""
    torch.set_num_threads(1)
    # The package's function of this name hides the module.
    module = importlib.import_module("cut_cross_entropy.linear_cross_entropy")
    calls = []
    for name in ("token_losses", "sum_of_losses"):
        setattr(module, name, counting(getattr(module, name), calls))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    start_group = dist.init_process_group
    results = {}
    for name in names:
        results[name] = {}
        for way, flag in (("plain", ["--plain"]), ("ours", [])):
            calls.clear()
            # A second group on torchrun's own store would wait for ever.
            dist.init_process_group = functools.partial(
                start_group, init_method=f"file://{file}-{name}-{way}", rank=rank, world_size=world
            )
            example = importlib.import_module(f"examples.{name}")
            losses = example.main(["--model", model, "--steps", steps, *flag])
            results[name][way] = [losses, len(calls)]
    if rank == 0:
        Path(file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
