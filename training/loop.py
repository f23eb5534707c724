"""Plain training loop, one step per call, with which the demo compares losses."""

import random
import time
from typing import Any, TypedDict

import torch

from training.config import TrainConfig
from training.data import Windows
from training.losses import FullLogits


class StepRecord(TypedDict):
    """Log entry of a step; steps count from 1."""

    step: int
    loss: float
    seconds: float


class StepLoop:
    """Train one model on one device with AdamW.

    Args:
        model: a causal language model of transformers, on its device; ``loss`` prepares it.
        windows: the data.
        loss: how the loss is computed.
        config: settings of the run.

    Raises:
        RuntimeError: the loss cannot be computed with this model.
    """

    def __init__(self, model: Any, windows: Windows, loss: FullLogits, config: TrainConfig) -> None:
        self.model, self.windows, self.loss, self.config = model, windows, loss, config
        self.device: torch.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.log: list[StepRecord] = []
        random.seed(config.seed)
        torch.manual_seed(config.seed)
        loss.prepare(model)
        model.train()

    def train_step(self) -> StepRecord:
        """Do one step; after an error the parameters are as they were.

        Returns:
            Its record, which is in the log too.

        Raises:
            FloatingPointError: the loss is not finite.
            IdlePatchError: the loss does not go the way that was asked for.
        """
        started = time.perf_counter()
        step, size = len(self.log) + 1, self.config.batch_size
        batch = self.windows.batch((step - 1) * size, size).to(self.device)
        for group in self.optimizer.param_groups:
            rise = step / max(1, self.config.warmup_steps)
            group["lr"] = self.config.learning_rate * min(1.0, rise)
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.dtype == "autocast"
        ):
            loss = self.loss(self.model, batch)
        value = float(loss.detach())
        if value - value != 0:  # infinite or NaN
            raise FloatingPointError(f"the loss of step {step} is {value}")
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # or the clock would stop too early

        record = StepRecord(step=step, loss=value, seconds=time.perf_counter() - started)
        self.log.append(record)
        return record
