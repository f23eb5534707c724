"""One training step after the other, and the state that makes them repeatable."""

import random
import time
from typing import Any, TypedDict

import torch
from torch import Tensor

from training.config import DTYPES, TrainConfig
from training.data import Windows
from training.losses import Loss


class StepRecord(TypedDict):
    """What the log keeps of a step; steps count from 1."""

    step: int
    loss: float
    seconds: float


class Trainer:
    """AdamW on one model, one step a call.

    Args:
        model: a causal language model of transformers, on its device; ``loss`` prepares it.
        windows: the data.
        loss: how the loss is computed.
        config: settings of the run.

    Raises:
        RuntimeError: the loss cannot be computed with this model.
    """

    def __init__(self, model: Any, windows: Windows, loss: Loss, config: TrainConfig) -> None:
        self.model, self.windows, self.loss, self.config = model, windows, loss, config
        self.device: torch.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.position = 0  # windows consumed
        self.log: list[StepRecord] = []
        random.seed(config.seed)
        torch.manual_seed(config.seed)
        loss.prepare(model)
        model.train()

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.log)

    def train_step(self) -> StepRecord:
        """Do one step; after an error the parameters are as they were.

        Returns:
            Its record, which is in the log too.

        Raises:
            FloatingPointError: the loss is not finite.
            IdlePatchError: the loss does not go the way that was asked for.
        """
        started = time.perf_counter()
        batch = self.windows.batch(self.position, self.config.batch_size).to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.dtype == "autocast"
        ):
            loss = self.loss(self.model, batch)
        value = float(loss.detach())
        if value - value != 0:  # infinite or NaN
            raise FloatingPointError(f"the loss of step {self.step + 1} is {value}")
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # or the clock would stop too early

        self.position += self.config.batch_size
        record = StepRecord(step=self.step + 1, loss=value, seconds=time.perf_counter() - started)
        self.log.append(record)
        return record

    def _learning_rate(self) -> float:
        rise = (self.step + 1) / max(1, self.config.warmup_steps)
        return self.config.learning_rate * min(1.0, rise)

    def state(self) -> dict[str, Any]:
        """All that a later process needs to go on, by parts, as a checkpoint stores them."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": {
                "position": self.position,
                "log": [dict(record) for record in self.log],
                "config": self.config.decisive(),
                "data": self.windows.fingerprint(),
            },
            "rng": self._rng_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            ValueError: it belongs to a run with other settings or data; nothing was loaded.
        """
        progress = state["progress"]
        given = self.config.decisive()
        for name, saved in progress["config"].items():
            if given.get(name) != saved:
                raise ValueError(
                    f"{name} must be {saved!r}, as in the run that is resumed, "
                    f"got {given.get(name)!r}"
                )
        if progress["data"] != self.windows.fingerprint():
            raise ValueError(
                f"data {self.config.data!r} gives other tokens than in the run that is resumed"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.position = progress["position"]
        self.log = list(progress["log"])
        self._set_rng_state(state["rng"])

    def _rng_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"python": random.getstate(), "cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            state[self.device.type] = torch.get_device_module(self.device).get_rng_state()
        return state

    def _set_rng_state(self, state: dict[str, Any]) -> None:
        random.setstate(state["python"])
        torch.set_rng_state(state["cpu"])
        device_state: Tensor | None = state.get(self.device.type)
        if self.device.type != "cpu" and device_state is not None:
            torch.get_device_module(self.device).set_rng_state(device_state)


def parameter_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype that the model is loaded in."""
    return DTYPES[config.dtype]
