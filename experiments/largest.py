"""Search for the largest batch with which a training step fits into the memory of a GPU."""

import gc
import time
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.benchmark.measure import synchronize
from training.loop import Schedule, train_steps
from training.losses import FullLogits
from training.models import in_one_line

PRECISION = 16
"""The search ends when the largest batch is known to within one part in so many."""


def largest_batch(
    model: Any,
    loss: FullLogits,
    windows: Tensor,  # (n, T), int64, on the model's device
    schedule: Schedule,
    start: int,
    autocast: bool = True,
) -> dict[str, Any]:
    """Double the batch from ``start`` sequences until it does not fit, then bisect.

    A batch fits if a step after the first need not free cached memory, which takes longer than the
    step does.

    Args:
        model: is trained meanwhile.
        loss: how the loss is computed.
        windows: sequences, used again where a batch needs more.
        schedule: options of the optimizer.
        start: sequences of the first batch that is tried.
        autocast: whether the model computes in bfloat16.

    Returns:
        ``"sequences"`` and ``"tokens"`` of the largest batch that fits (0 if none does), its
        ``"ms_per_step"`` and ``"peak_mib"``, and ``"stopped_by"``: the error of a larger one.
    """
    found: dict[str, Any] = {"sequences": 0, "tokens": 0}
    fits, fails, size = 0, None, start
    while fails is None or fails - fits > max(1, fits // PRECISION):
        rows = windows[torch.arange(2 * size, device=windows.device) % len(windows)]
        result = _two_steps(model, loss, rows.view(2, size, -1), schedule, autocast)
        if "stopped_by" in result:
            fails, found["stopped_by"] = size, result["stopped_by"]
        else:
            fits = size
            found |= {"sequences": size, "tokens": size * windows.shape[1], **result}
        size = 2 * fits if fails is None else (fits + fails) // 2
    return found


def _two_steps(
    model: Any,
    loss: FullLogits,
    batches: Tensor,  # (2, B, T)
    schedule: Schedule,
    autocast: bool,
) -> dict[str, Any]:
    """Train two steps, since the optimizer's state appears with the first; time the second."""
    device = batches.device
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        steps = train_steps(model, loss, batches, schedule, autocast)
        next(steps)
        synchronize(device)
        freed, began = _times_freed(device), time.perf_counter()
        next(steps)
        synchronize(device)
        took = time.perf_counter() - began
    except RuntimeError as error:  # of PyTorch's allocator, of Triton, of a kernel's limits
        return {"stopped_by": in_one_line(error, 120)}
    finally:
        model.zero_grad(set_to_none=True)
    if _times_freed(device) > freed:
        return {"stopped_by": "the allocator had to free memory in the second step"}
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"ms_per_step": round(1000 * took, 1), "peak_mib": round(peak / 2**20, 1)}


def _times_freed(device: torch.device) -> int:
    """Return how often the allocator has freed its cache for want of memory."""
    on_gpu = device.type == "cuda"
    return int(torch.cuda.memory_stats(device)["num_alloc_retries"]) if on_gpu else 0
