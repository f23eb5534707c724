"""Times loss and gradients of the ways to spread them over GPUs.

    torchrun --nproc-per-node 4 -m benchmark.distributed --data llama3-8b gemma2 --tokens 8192 32768
    torchrun --nproc-per-node 2 -m benchmark.distributed --device cpu --data small --tokens 64

``--tokens`` are those that a process would have without any sharing: where all processes have the
same tokens (vocabulary- and tensor-parallel) that is as many, where each has its own (sequence
parallel, FSDP2, DDP) as many on each. Times are the slowest process's median.
"""

import argparse
import datetime
import json
import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmark.data import Problem, make
from benchmark.measure import timed
from benchmark.setups import SETUPS
from benchmark.shapes import SHAPES, SMALL

OWN_TOKENS = ("vocabulary-parallel, own tokens", "FSDP2", "FSDP2, DTensor", "HSDP, DTensor", "DDP")


def measure(name: str, problem: Problem, impl: str, repetitions: int) -> dict[str, Any]:
    """Milliseconds and peak MiB of one set-up on this process."""
    device = problem.e.device
    step = SETUPS[name](problem, impl)
    step.run()
    dist.barrier()
    memory = 0.0
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step.run()
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    times = timed(step.run, device, repetitions)
    found = torch.tensor([statistics.median(times), memory], device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return {"setup": name, "impl": impl, "ms": float(found[0]), "peak_mib": float(found[1])}


def measure_links(device: torch.device) -> dict[str, float]:
    """Bus bandwidth in GB/s of the collectives, at 256 MiB a process (1 MiB on a CPU)."""
    world = dist.get_world_size()
    count = (2**27 if device.type == "cuda" else 2**19) // world * world
    whole = torch.ones(count, dtype=torch.bfloat16, device=device)
    part = torch.empty(count // world, dtype=torch.bfloat16, device=device)
    from cut_cross_entropy.distributed.exchange import gather_shards, sum_own_part

    runs = {
        "all_reduce": (lambda: dist.all_reduce(whole), 2),
        "all_gather": (lambda: gather_shards(part, ""), 1),
        "reduce_scatter": (lambda: sum_own_part(whole.view(world, -1), ""), 1),
    }
    result = {}
    for name, (run, passes) in runs.items():
        run()
        milliseconds = statistics.median(timed(run, device, 10))
        result[name] = passes * (world - 1) / world * whole.nbytes / milliseconds / 1e6
    return result


def main() -> None:
    """Measure and print; ``--json`` writes the rows as well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["llama3-8b", "gemma2"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192])
    parser.add_argument("--impl", nargs="+", default=["cce", "cce_exact"])
    parser.add_argument("--setups", nargs="+", default=list(SETUPS), choices=list(SETUPS))
    parser.add_argument("--kind", default="structured")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", rank) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=180))
    world = dist.get_world_size()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rows: list[dict[str, Any]] = []
    links = measure_links(device)
    if rank == 0:
        shown = ", ".join(f"{kind} {speed:.3g} GB/s" for kind, speed in links.items())
        print(f"{world} x {name}, PyTorch {torch.__version__}, {backend}: {shown}")
    for data in arguments.data:
        shape = SMALL if data == "small" else SHAPES[data]
        for tokens in arguments.tokens:
            problem = make(arguments.kind, tokens, shape, dtype, device)
            for tensor in (problem.e, problem.c, problem.targets):
                dist.broadcast(tensor, 0)
            for setup in arguments.setups:
                if setup.startswith("HSDP") and world % 2:
                    continue
                # Set-ups take the tokens of all processes; those with own tokens their part.
                times = world if setup in OWN_TOKENS else 1
                given = replace(
                    problem, e=problem.e.repeat(times, 1), targets=problem.targets.repeat(times)
                )
                full = setup == "tensor-parallel full logits"
                for impl in ["reference"] if full else arguments.impl:
                    try:
                        row = measure(setup, given, impl, arguments.repetitions)
                    except torch.OutOfMemoryError:
                        row = {"setup": setup, "impl": impl, "ms": None, "peak_mib": None}
                    row = {"data": data, "tokens": tokens, "processes": world, **row}
                    rows.append(row)
                    if rank == 0:
                        print(json.dumps(row), flush=True)
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
    if rank == 0 and arguments.json:
        record = {"device": name, "torch": torch.__version__, "links": links, "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
