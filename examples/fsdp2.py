"""``torchrun --nproc-per-node 2 -m examples.fsdp2``: FSDP2 with a model patched by ``cce_patch``.

Each process trains on sums of its own. ``--plain`` leaves the model its own loss with logits: the
losses are the same.
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from cut_cross_entropy.transformers import cce_patch
from examples import ADDITIONS, build_parser, start_processes
from training.models import load_model


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, and return the mean loss of all processes in each step."""
    chosen = build_parser("fsdp2", __doc__, "without the patch").parse_args(arguments)

    device = start_processes()
    rank, processes = dist.get_rank(), dist.get_world_size()
    model, tokenizer = load_model(chosen.model, torch.float32, device)
    if not chosen.plain:
        model = cce_patch(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for step in range(chosen.steps):
        text = " , ".join(ADDITIONS[(step * processes + rank) % 10 :: 10])
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
