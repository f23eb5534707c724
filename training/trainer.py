"""The Trainer of transformers with a choice of losses, checkpoints that verify, and interrupts."""

import logging
import math
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from training.callbacks import Checkpoints, Interrupts, Log, Pace
from training.losses import FullLogits
from training.objectives import NextToken
from training.packing import IGNORED


class Trainer(transformers.Trainer):
    """Train with one of our losses, one process per device.

    Args:
        loss: how the loss is computed.
        checkpoints: makes checkpoints of the folders that are saved.
        table: file of the losses.
        callbacks: further callbacks.
        objective: what is minimised.
        options: for ``transformers.Trainer``.
    """

    def __init__(
        self,
        loss: FullLogits,
        checkpoints: Checkpoints,
        table: Path,
        callbacks: list[Any],
        objective: NextToken,
        **options: Any,
    ) -> None:
        loss.prepare(options["model"])
        arguments = options["args"]
        self.loss, self.checkpoints = loss, checkpoints
        self.objective: NextToken = objective
        self.predicts = type(objective) is NextToken
        self.interrupts, self.pace = Interrupts(), Pace(arguments.world_size)
        self.lines = Log(table, active=arguments.process_index == 0)
        ours = [self.interrupts, checkpoints, self.lines, *callbacks, self.pace]
        super().__init__(**options, callbacks=ours, compute_metrics=self._held_out_metrics)
        # Without the number of tokens of all batches, the means of batches are averaged.
        self.model_accepts_loss_kwargs &= objective.is_by_token
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

    def run(self, source: Path | None) -> signal.Signals | None:
        """Train to the last step, or to the first interrupt, and leave a checkpoint there.

        Args:
            source: the checkpoint to resume from.

        Returns:
            The signal that ended it, or None.

        Raises:
            CheckpointError: a checkpoint could not be written.
            FloatingPointError: the loss is no longer finite.
            IdlePatchError: the loss is not computed the way that was asked for.
            ValueError: the data is damaged, where it is read while training.
        """
        try:
            with self.interrupts, quiet_resume(self.model):
                self.train(resume_from_checkpoint=str(source) if source else None)
        # The writers of transformers, safetensors and PyTorch have no common class of errors.
        except Exception as error:
            raise self.checkpoints.failure(self.state.global_step, error) from error
        finally:
            self.lines.close()
        return self.interrupts.received

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """Compute the loss of one batch; see ``transformers.Trainer``.

        Raises:
            IdlePatchError: it is not computed the way that was asked for.
        """
        self.pace.tokens += inputs["input_ids"].numel()
        if not self.predicts:
            items = options.get("num_items_in_batch")
            if items is not None:  # 0 if nothing is learned
                items = torch.as_tensor(items).clamp(min=1)
            loss = self.objective.mean(self.loss, model, inputs, items)
            if items is None or not self.args.average_tokens_across_devices:
                return loss
            # These are the items of all processes, whose gradients are averaged.
            return loss * self.accelerator.num_processes
        with self.loss.guard(model):
            return super().compute_loss(model, inputs, *arguments, **options)

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Record numbers, with the speed and the memory; see ``transformers.Trainer``."""
        if "loss" in logs:
            logs.update(self.pace.measure(self.args.device))
        if "train_runtime" not in logs:  # the sums at the end are not a step's
            super().log(logs, *arguments, **options)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Compute the mean loss and what it is of; their names begin with ``eval_``."""
        # A loader draws a number; the training is to be the same with and without evaluations.
        with torch.random.fork_rng(devices=[]):
            found: dict[str, float] = super().evaluate(*arguments, **options)
        return found

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Tensor, Tensor]:
        """Return the losses of a batch and their labels; see ``transformers.Trainer``.

        It adds those of all processes, which get equally many sequences, and drops what is twice.
        """
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            model = self.model_wrapped  # gathers the weights
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, labels = self.objective(self.loss, model, inputs)
        return None, losses.float(), labels

    def _held_out_metrics(self, found: transformers.EvalPrediction) -> dict[str, float]:
        """Return the mean ``loss`` of all tokens or pairs, their number, and a perplexity."""
        losses: Any = found.predictions[found.label_ids != IGNORED]
        loss = float(losses.mean(dtype="float64"))
        if not self.predicts:
            return {"loss": loss, "items": losses.size}
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": losses.size}


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
