"""``torchrun --nproc-per-node 2 -m examples.fsdp2``: FSDP2 with a model patched by ``cce_patch``.

Each process trains on sums of its own. ``--plain`` leaves the model its own loss with logits: the
losses are the same.
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from cut_cross_entropy.transformers import cce_patch
from training.models import load_model


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, and return the mean loss of all processes in each step."""
    parser = argparse.ArgumentParser(prog="examples.fsdp2", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="'smollm2', a folder or a name")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--plain", action="store_true", help="without the patch")
    chosen = parser.parse_args(arguments)

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    model, tokenizer = load_model(chosen.model, torch.float32, device)
    if not chosen.plain:
        model = cce_patch(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    lines = [f"{a} + {b} = {a + b}" for a in range(10) for b in range(10)]
    losses = []
    for step in range(chosen.steps):
        text = " , ".join(lines[(step * processes + rank) % 10 :: 10])
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()  # the gradients are means over the processes
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / processes)
        if rank == 0:
            print(f"step {step + 1}: loss {losses[-1]:.6f}")
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
