"""One training run that never waits for the GPU between steps, and a judge of its result.

Legend: S steps, B sequences, T tokens each, V classes.
"""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.losses import FULL, hidden_states, make_loss

REORDERED = "full_reordered"
"""Full logits with the sequences of every batch in reverse: the same sums in another order.

Its distance from full logits is what floating point alone does to a run; a method can be held
against it.
"""

ROWS = 4096
"""Tokens whose logits the judge holds at a time."""


@dataclass(frozen=True)
class Schedule:
    """Optimizer of a run: AdamW, a linear rise of the learning rate, then a cosine to a tenth."""

    learning_rate: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of ``step``, from 0, of ``steps``."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


def train(
    model: Any,
    method: str,
    batches: Tensor,  # (S, B, T), int64, on the model's device
    schedule: Schedule,
    autocast: bool,
    judge: Callable[[int], dict[str, Any]],
    judge_interval: int,
) -> dict[str, Any]:
    """Train ``model`` on ``batches``, one a step.

    Args:
        model: a causal language model of transformers with float32 parameters.
        method: ``"full"``, :data:`REORDERED` or an implementation of ``linear_cross_entropy``.
        batches: the data, (S, B, T).
        schedule: optimizer settings.
        autocast: whether the model computes in bfloat16.
        judge: called with the steps done, after every ``judge_interval`` steps and at the end.
        judge_interval: see ``judge``.

    Returns:
        Losses of all steps, what the judge said, milliseconds a step and peak memory.

    Raises:
        RuntimeError: the method cannot run here.
        FloatingPointError: a loss is not finite.
    """
    device = batches.device
    loss_function = make_loss(FULL if method == REORDERED else method, device)
    loss_function.prepare(model)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=schedule.learning_rate,
        betas=schedule.betas,
        weight_decay=schedule.weight_decay,
        fused=device.type == "cuda",
    )
    steps = len(batches)
    losses = torch.zeros(steps, device=device)
    judged: list[dict[str, Any]] = []
    _synchronize(device)
    gc.collect()  # a patched model is part of cycles, and the last run's would count here
    _reset_peak(device)
    peak, busy, timed, since = 0, 0.0, 0, time.perf_counter()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step, steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = loss_function(model, batch.flip(0) if method == REORDERED else batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses[step] = loss.detach()
        done = step + 1
        # The first steps compile kernels and choose their settings.
        if done == min(10, steps - 1):
            _synchronize(device)
            since, timed, busy = time.perf_counter(), 0, 0.0
        else:
            timed += 1
        if done % judge_interval == 0 or done == steps:
            _synchronize(device)
            busy += time.perf_counter() - since
            peak = max(peak, _peak(device))
            judged.append({"step": done, **judge(done)})
            if not torch.isfinite(losses).all():
                raise FloatingPointError(f"a loss of {method} is not finite before step {done}")
            _reset_peak(device)
            since = time.perf_counter()
    return {
        "losses": [round(value, 6) for value in losses.tolist()],
        "judged": judged,
        "ms_per_step": round(1000 * busy / max(1, timed), 3),
        "peak_mib": round(peak / 2**20, 1),
    }


@torch.no_grad()
def token_losses(
    model: Any,
    windows: Tensor,  # (n, T), int64, on the model's device
    batch_size: int,
    autocast: bool,
    classes: Tensor | None = None,  # (V,), bool
) -> tuple[Tensor, float]:
    """Loss of every token but the first of a window, by full logits in float32, for all methods.

    Args:
        model: a causal language model whose head is a plain product.
        windows: token ids, (n, T).
        batch_size: windows at a time.
        autocast: whether the body computes in bfloat16.
        classes: classes whose probability is added up.

    Returns:
        Losses (n, T - 1) on the CPU, and the mean probability of ``classes`` (0 without them).
    """
    training = model.training
    model.eval()
    weight = model.get_output_embeddings().weight.float()
    found, mass = [], torch.zeros((), device=windows.device, dtype=torch.float64)
    for batch in windows.split(batch_size):
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=autocast):
            hidden = hidden_states(model, batch)
        hidden = hidden[:, :-1].float().flatten(0, 1)
        targets = batch[:, 1:].flatten()
        for rows, wanted in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
            logits = rows @ weight.T
            lse = logits.logsumexp(-1)
            found.append((lse - logits.gather(-1, wanted[:, None])[:, 0]).cpu())
            if classes is not None:
                mass += (logits[:, classes].logsumexp(-1) - lse).exp().sum()
    model.train(training)
    count = windows[:, 1:].numel()
    return torch.cat(found).view(len(windows), -1), float(mass) / count


def cut_windows(tokens: Tensor, length: int) -> Tensor:
    """``tokens`` in windows without overlap, (n, ``length``); the rest is left out."""
    count = len(tokens) // length
    return tokens[: count * length].view(count, length)


def draw_batches(windows: Tensor, steps: int, batch_size: int, seed: int) -> Tensor:
    """``steps`` batches (S, B, T) of ``windows``: each window once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    needed = steps * batch_size
    epochs = -(-needed // len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(epochs)])
    return windows[order[:needed]].view(steps, batch_size, -1)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
