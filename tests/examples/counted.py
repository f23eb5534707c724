"""Run examples in several processes; count how often the library computed a loss."""

import contextlib
import functools
import importlib
import io
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist


def counting(function, calls):
    """The function, with a note in ``calls`` of each call."""

    def counted(*args, **options):
        calls.append(1)
        return function(*args, **options)

    return counted


def run_examples(rank, world, folder, model, steps, names) -> None:
    """Run each with ``--plain`` and without it, as one of ``world`` processes.

    ``RANK.json`` in the folder is ``{name: {"plain": [losses, calls, printed], "ours": ...}}``.
    """
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    # The package's function of this name hides the module.
    module = importlib.import_module("cut_cross_entropy.linear_cross_entropy")
    calls = []
    for name in ("token_losses", "sum_of_losses"):
        setattr(module, name, counting(getattr(module, name), calls))
    start_group = dist.init_process_group
    results = {}
    for name in names:
        results[name] = {}
        for way, flag in (("plain", ["--plain"]), ("ours", [])):
            calls.clear()
            dist.init_process_group = functools.partial(
                start_group,
                init_method=f"file://{folder}/{name}-{way}",
                rank=rank,
                world_size=world,
            )
            example = importlib.import_module(f"examples.{name}")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                losses = example.main(["--model", model, "--steps", str(steps), *flag])
            results[name][way] = [losses, len(calls), printed.getvalue()]
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
