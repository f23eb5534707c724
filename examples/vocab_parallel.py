"""``torchrun --nproc-per-node 2 -m examples.vocab_parallel``: each process holds rows of the head.

All processes see the same tokens and split the classes. ``--plain`` keeps the whole head on every
process and computes the logits: the losses are the same.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from cut_cross_entropy import VocabParallelOptions, linear_cross_entropy
from examples import ADDITIONS, build_parser, start_processes
from training.losses import plain_head
from training.models import load_model


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, and return the loss of each step."""
    chosen = build_parser("vocab_parallel", __doc__, "the whole head, with logits").parse_args(
        arguments
    )

    device = start_processes()
    rank = dist.get_rank()
    model, tokenizer = load_model(chosen.model, torch.float32, device)
    head = plain_head(model).detach().clone()  # (V, D), untied from the embeddings
    options = VocabParallelOptions.from_vocab(len(head))
    if not chosen.plain:
        head = head[options.start : options.stop].clone()  # (V / processes, D)
    head.requires_grad_()
    optimizer = torch.optim.AdamW([*model.model.parameters(), head], lr=1e-4)
    losses = []
    for step in range(chosen.steps):
        text = " , ".join(ADDITIONS[step % 10 :: 10])
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
        e = model.model(ids).last_hidden_state  # (1, T, D)
        if chosen.plain:
            loss = F.cross_entropy(F.linear(e, head)[0, :-1], ids[0, 1:])
        else:
            loss = linear_cross_entropy(e, head, ids, shift=True, vocab_parallel_options=options)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if rank == 0:
            print(f"step {step + 1}: loss {losses[-1]:.6f}")
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
