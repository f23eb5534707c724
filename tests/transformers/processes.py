"""Runs a test's case in two processes over gloo."""

import os
import pickle
import warnings

import torch
import torch.distributed as dist

from tests.distributed.processes import fork_processes
from tests.transformers.models import batch, llama

WORLD = 2


def run_in_processes(case, tmp_path, *args):
    """``case(rank, *args)`` in two processes with a process group; its results by rank."""
    fork_processes(_process, (case, str(tmp_path), args), WORLD)
    return [pickle.loads((tmp_path / f"result{rank}").read_bytes()) for rank in range(WORLD)]


def _process(rank, case, folder, args):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    warnings.filterwarnings("error", message=".*(patch|logits).*")
    result = case(rank, *args)
    with open(f"{folder}/result{rank}", "wb") as file:
        pickle.dump(result, file)
    dist.barrier()
    dist.destroy_process_group()


def own_batch(rank, step=0):
    """The data of a process."""
    return batch(seed=10 + rank + WORLD * step)


def reference(steps=1, mean_of_steps=False, **changes):
    """Compute in one process with all data the results that the processes must reach together.

    Losses by step and rank, and the gradients of the sum over steps (or their mean) of the mean
    over ranks.
    """
    model = llama(**changes)
    losses = torch.stack(
        [
            torch.stack([model(**own_batch(rank, step)).loss for rank in range(WORLD)])
            for step in range(steps)
        ]
    )
    (losses.mean(1).sum() / (steps if mean_of_steps else 1)).backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters()}
