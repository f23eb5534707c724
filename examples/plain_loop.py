"""``python -m examples.plain_loop``: a training loop in PyTorch whose loss needs no logits.

``--plain`` computes the logits and PyTorch's cross-entropy: the losses are the same.
"""

import torch
import torch.nn.functional as F

from cut_cross_entropy import linear_cross_entropy
from examples import ADDITIONS, build_parser
from training.losses import plain_head
from training.models import load_model


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, and return the loss of each step."""
    chosen = build_parser("plain_loop", __doc__, "with logits").parse_args(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(chosen.model, torch.float32, device)
    head = plain_head(model)  # (V, D); refuses a head with a bias, a softcap or a scale
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for step in range(chosen.steps):
        text = " , ".join(ADDITIONS[step % 10 :: 10])
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
        hidden = model.model(ids).last_hidden_state  # (1, T, D): all layers but the head
        if chosen.plain:
            logits = F.linear(hidden, head)  # (1, T, V)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        else:
            loss = linear_cross_entropy(hidden, head, ids, shift=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.6f}")
    return losses


if __name__ == "__main__":
    main()
