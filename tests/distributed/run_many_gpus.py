"""Every set-up of docs/distributed.md on as many GPUs as there are, against one GPU.

    torchrun --nproc-per-node 4 tests/distributed/run_many_gpus.py
    torchrun --nproc-per-node 2 tests/distributed/run_many_gpus.py --device cpu

Prints a row for each set-up, implementation and dtype, and ends with 1 if one is off.
"""

import argparse
import datetime
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist

from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.benchmark.data import make
from cut_cross_entropy.benchmark.leave import leave
from cut_cross_entropy.benchmark.measure import relative_error
from cut_cross_entropy.benchmark.setups import SETUPS
from cut_cross_entropy.benchmark.shapes import Shape

ROUNDING = {torch.bfloat16: 1.7e-3, torch.float32: 1e-6}  # of a gradient, relative
ALLOWED = {torch.bfloat16: 3.0, torch.float32: 30.0}  # roundings; each process rounds its part


def reference(problem):
    """Loss and gradients of all tokens, by full logits in float32 on this process alone."""
    e, c = (x.detach().float().requires_grad_() for x in (problem.e, problem.c))
    loss = linear_cross_entropy(
        e, c, problem.targets, softcap=problem.softcap, impl="chunked", memory_budget=2**30
    )
    loss.backward()
    return loss.detach(), e.grad, c.grad


def errors(step, loss, expected):
    """Relative errors of loss, dE and dC of this process, the worst of all processes."""
    whole_loss, grad_e, grad_c = expected
    world = dist.get_world_size()
    if not step.shared:  # the mean of what the processes have is the whole's
        dist.all_reduce(loss)
        loss /= world
    grad_e = grad_e[step.tokens] * (1 if step.shared else world)
    grad = step.c.grad
    if step.classes is None:
        grad = grad.full_tensor()
    elif grad.shape[0] != grad_c.shape[0]:
        grad_c = grad_c[step.classes]
    found = torch.stack(
        [
            ((loss - whole_loss) / whole_loss).abs().float(),
            torch.tensor(relative_error(step.e.grad, grad_e), device=loss.device),
            torch.tensor(relative_error(grad, grad_c), device=loss.device),
        ]
    )
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--classes", type=int, default=32064)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--only", nargs="*", help="names of set-ups")
    arguments = parser.parse_args()
    rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", rank) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(seconds=120)
    )
    world, failed = dist.get_world_size(), False
    for dtype in (torch.bfloat16, torch.float32):
        tokens = arguments.tokens // world * world
        shape = Shape("checked", arguments.classes, arguments.dim, 30.0)
        problem = make("structured", tokens, shape, dtype, device)
        for tensor in (problem.e, problem.c, problem.targets):
            dist.broadcast(tensor, 0)
        expected = reference(problem)
        impls = ["chunked", "torch_compile"]
        if device.type == "cuda":
            impls += ["cce", "cce_exact"]
        for name, setup in SETUPS.items():
            if (arguments.only and name not in arguments.only) or (name[0] == "H" and world % 2):
                continue
            for impl in impls if name != "tensor-parallel full logits" else ["reference"]:
                try:
                    step = setup(problem, impl)
                    found = errors(step, step.run(), expected)
                    limit = ALLOWED[dtype] * ROUNDING[dtype]
                    # Full logits round the logits themselves; they are here to be compared with.
                    ok = max(found) <= limit or impl in ("torch_compile", "reference")
                    text = "  ".join(f"{x:.1e}" for x in found) + ("" if ok else "  TOO LARGE")
                except Exception:
                    ok, text = False, traceback.format_exc()
                failed |= not ok
                if rank == 0 or not ok:
                    print(f"{world} x {dtype}  {name:32s} {impl:14s} {text}", flush=True)
    dist.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    leave(main())
