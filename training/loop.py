"""Plain training loop on one device, with which the demo and the experiments compare losses.

Legend: S steps, B sequences, T tokens each.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.losses import FullLogits


@dataclass(frozen=True)
class Schedule:
    """Options of AdamW, and its learning rate: a linear rise, then half a cosine.

    Args:
        learning_rate: highest learning rate.
        warmup_steps: steps of the rise.
        weight_decay: weight decay.
        final: learning rate after the last step, relative to the highest.
        max_grad_norm: norm that gradients are clipped to.
        betas: of AdamW.
    """

    learning_rate: float
    warmup_steps: int = 0
    weight_decay: float = 0.0
    final: float = 1.0
    max_grad_norm: float = math.inf
    betas: tuple[float, float] = (0.9, 0.999)

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of ``step``, counted from 0, of ``steps``."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        falls = (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * (self.final + (1 - self.final) * falls)


def train_steps(
    model: Any,
    loss: FullLogits,
    batches: Tensor,  # (S, B, T), int64, on the model's device
    schedule: Schedule,
    autocast: bool = False,
) -> Iterator[Tensor]:
    """Train ``model`` on one batch after the other, without waiting for the device.

    Args:
        model: a causal language model of transformers, on its device; ``loss`` prepares it.
        loss: how the loss is computed.
        batches: the data.
        schedule: options of the optimizer.
        autocast: whether the model computes in bfloat16.

    Yields:
        The loss (a scalar without a graph) of each step, after its update.

    Raises:
        RuntimeError: the loss cannot be computed with this model.
        IdlePatchError: the loss is not computed the way that was asked for; nothing is updated.
    """
    loss.prepare(model)
    model.train()
    optimizer = torch.optim.AdamW(
        [each for each in model.parameters() if each.requires_grad],
        betas=schedule.betas,
        weight_decay=schedule.weight_decay,
        fused=batches.is_cuda,
    )
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step, len(batches))
        with torch.autocast(batches.device.type, torch.bfloat16, enabled=autocast):
            value = loss(model, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield value.detach()


def draw_batches(windows: Tensor, steps: int, batch_size: int, seed: int) -> Tensor:
    """Draw batches (S, B, T) of ``windows`` (n, T): each of them once before any comes again."""
    needed = steps * batch_size
    order: list[Tensor] = []
    for epoch in range(-(-needed // len(windows))):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order.append(torch.randperm(len(windows), generator=generator))
    return windows[torch.cat(order)[:needed]].view(steps, batch_size, -1)
