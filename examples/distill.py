"""``python -m examples.distill``: half of a model's layers learn from the whole, without logits.

The student keeps every second layer and learns the teacher's distributions with
``linear_divergence``. ``--plain`` computes the logits of both: the losses are the same.
"""

import copy

import torch
import torch.nn.functional as F

from cut_cross_entropy import linear_divergence
from examples import ADDITIONS, build_parser
from training.losses import plain_head
from training.models import load_model


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, and return the mean divergence KL(teacher || student) of each step."""
    chosen = build_parser("distill", __doc__, "with logits").parse_args(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher, tokenizer = load_model(chosen.model, torch.float32, device)
    teacher.requires_grad_(False)
    head_teacher = plain_head(teacher)  # (V, D)
    student = copy.deepcopy(teacher).requires_grad_()
    student.model.layers = student.model.layers[::2]
    head = student.lm_head.weight
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    losses = []
    for step in range(chosen.steps):
        text = " , ".join(ADDITIONS[step % 10 :: 10])
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
        e_teacher = teacher.model(ids, use_cache=False).last_hidden_state  # (1, T, D)
        e = student.model(ids, use_cache=False).last_hidden_state
        if chosen.plain:
            log_p = F.linear(e, head).log_softmax(-1).flatten(0, 1)  # (T, V)
            log_q = F.linear(e_teacher, head_teacher).log_softmax(-1).flatten(0, 1)
            loss = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        else:
            result = linear_divergence(e, head, e_teacher, head_teacher, reduction="mean")
            loss = result.divergence
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.6f}")
    return losses


if __name__ == "__main__":
    main()
