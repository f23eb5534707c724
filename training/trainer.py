"""The Trainer of transformers with a choice of losses, measured as it runs."""

import logging
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from training.losses import FullLogits
from training.packing import IGNORED


class Trainer(transformers.Trainer):
    """Train with one of our losses, one process per device.

    Args:
        loss: how the loss is computed.
        options: for ``transformers.Trainer``.
    """

    def __init__(self, loss: FullLogits, **options: Any) -> None:
        loss.prepare(options["model"])
        super().__init__(**options)
        self.loss = loss
        self.pace = Pace(self.args.world_size)
        self.add_callback(self.pace)
        self.remove_callback(transformers.PrinterCallback)
        transformers.utils.logging.disable_progress_bar()

    def create_accelerator_and_postprocess(self) -> None:
        """Set up accelerate; see ``transformers.Trainer``."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            # On CPUs accelerate ignores it, though all that it does works there.
            from accelerate import PartialState
            from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = DistributedType.FSDP
            PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """Compute the loss of one batch; see ``transformers.Trainer``.

        Raises:
            IdlePatchError: it is not computed the way that was asked for.
        """
        self.pace.tokens += inputs["input_ids"].numel()
        with self.loss.guard(model):
            return super().compute_loss(model, inputs, *arguments, **options)

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Record numbers, with the speed and the memory; see ``transformers.Trainer``."""
        if "loss" in logs:
            logs.update(self.pace.measure(self.args.device))
        if "train_runtime" not in logs:  # the sums at the end are not a step's
            super().log(logs, *arguments, **options)

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute the mean loss over all held-out tokens, weighted equally, and its perplexity.

        Returns:
            ``eval_loss``, ``eval_perplexity`` and ``eval_tokens``.
        """
        from tqdm import tqdm

        # Sharded weights are gathered by their wrapper.
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        model: Any = self.model_wrapped if sharded else self.model
        training = model.training
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device="cpu")
        # A loader draws a number; the training is to be the same with and without evaluations.
        with torch.random.fork_rng(devices=[]):
            loader = self.get_eval_dataloader(eval_dataset)
            silent = None if self.is_world_process_zero() else True  # None: a terminal decides
            for batch in tqdm(loader, "held-out data", leave=False, disable=silent):
                total += self._sums(model, self._prepare_inputs(batch))
        model.train(training)
        loss = float(total[0] / total[1])
        metrics: dict[str, float] = {
            "eval_loss": loss,
            "eval_perplexity": math.exp(min(loss, 700.0)),
            "eval_tokens": int(total[1]),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _sums(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the losses and the number of tokens in a batch, of all processes."""
        with self.compute_loss_context_manager():
            losses = self.loss.token_losses(model, inputs)
        counted = inputs["labels"][:, 1:] != IGNORED
        sums = torch.stack([losses.float().sum(1), counted.sum(1)], dim=1)
        # Processes get equally many sequences, if need be some twice; those are dropped here.
        gathered: Tensor = self.accelerator.gather_for_metrics(sums)
        return gathered.double().sum(0).cpu()


class Pace(transformers.TrainerCallback):
    """Measure tokens per second, without evaluations and checkpoints, and the peak memory.

    Args:
        processes: processes that train, each with as many tokens as this one.
    """

    def __init__(self, processes: int) -> None:
        self.processes, self.tokens = processes, 0
        self.since: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Start the clock if it stands."""
        if self.since is None:
            self.since = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Stop the clock."""
        self.since = None

    on_evaluate = on_save

    def measure(self, device: torch.device) -> dict[str, float]:
        """Return the numbers since the last call."""
        now = time.perf_counter()
        seconds = now - (self.since or now)
        found = {"tokens_per_second": round(self.processes * self.tokens / max(seconds, 1e-9), 1)}
        self.tokens, self.since = 0, now
        if (peak := peak_memory(device)) is not None:
            found["peak_memory_mib"] = round(peak / 2**20, 1)
        return found


@contextmanager
def quiet_resume(model: Any) -> Iterator[None]:
    """Drop two warnings of a resume: intervals may change, and tied weights are not missing."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or model._tied_weights_keys or ())

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "missing keys in the checkpoint" in message:
            return not set(re.findall(r"'([^']+)'", message)) <= tied
        return "do not match the ones in the `trainer_state.json`" not in message

    loggers = [logging.getLogger(f"transformers.{name}") for name in ("trainer", "trainer_utils")]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


def peak_memory(device: torch.device) -> int | None:
    """Return the bytes that this process held at most, or None if nothing tells.

    On a CUDA device PyTorch's tensors since the last call, on others the whole process.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
