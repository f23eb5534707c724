"""The Trainer of transformers with any of our losses and with checkpoints that are complete."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.trainer_callback import ExportableState

from training.checkpoint import (
    CheckpointError,
    abandon_checkpoint,
    begin_checkpoint,
    checkpoint_folder,
    commit_checkpoint,
    partial_folder,
)
from training.losses import Loss
from training.packing import IGNORED

RUN_FILE = "run.json"
"""What of the settings and the data decides the numbers, in each checkpoint."""

STATE_FILE = "trainer_state.json"


class Trainer(transformers.Trainer):
    """Trains with one of our losses; as transformers has it, one process a device.

    Args:
        loss: how the loss is computed.
        run: what a run that goes on from a checkpoint has to have in common with this one.
        keep: newest checkpoints that stay on the disk; the best stays too.
        options: for ``transformers.Trainer``.
    """

    def __init__(self, loss: Loss, run: dict[str, Any], keep: int, **options: Any) -> None:
        loss.prepare(options["model"])
        super().__init__(**options)
        self.loss, self.run, self.keep = loss, run, keep
        self.root = Path(str(self.args.output_dir))
        # Our own callbacks write the console.
        self.remove_callback(transformers.PrinterCallback)
        transformers.utils.logging.disable_progress_bar()

    def create_accelerator_and_postprocess(self) -> None:
        """Set up accelerate; see ``transformers.Trainer``."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            # On CPUs accelerate takes no notice of it, though all that it does works there.
            from accelerate import PartialState
            from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = DistributedType.FSDP
            PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def compute_loss(self, model: Any, *arguments: Any, **options: Any) -> Any:
        """The loss of one batch; see ``transformers.Trainer``.

        Raises:
            IdlePatchError: it does not go the way that was asked for.
        """
        with self.loss.guard(model):
            return super().compute_loss(model, *arguments, **options)

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Note numbers; see ``transformers.Trainer``.

        Raises:
            FloatingPointError: the loss or the gradient is not finite.
        """
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                what = name.replace("grad_norm", "norm of the gradient")
                raise FloatingPointError(
                    f"the {what} of step {self.state.global_step}, or of one since the last "
                    f"line, is {logs[name]}"
                )
        super().log(logs, *arguments, **options)

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss of all held-out tokens, each counting the same, and its perplexity.

        Returns:
            ``eval_loss``, ``eval_perplexity`` and ``eval_tokens``.
        """
        # Those hold the weights in pieces, which their wrapper puts together.
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        model: Any = self.model_wrapped if sharded else self.model
        training = model.training
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device="cpu")
        # A loader draws a number; the training is to be the same with and without evaluations.
        with torch.random.fork_rng(devices=[]):
            for batch in self.get_eval_dataloader(eval_dataset):
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

    def _sums(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Sum of the losses and number of the tokens in a batch, of all processes."""
        with self.compute_loss_context_manager():
            losses = self.loss.token_losses(model, inputs)
        counted = inputs["labels"][:, 1:] != IGNORED
        sums = torch.stack([losses.float().sum(1), counted.sum(1)], dim=1)
        # Processes get equally many sequences, if need be some twice; those are dropped here.
        gathered: Tensor = self.accelerator.gather_for_metrics(sums)
        return gathered.double().sum(0).cpu()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint that is complete or not there.

        Raises:
            CheckpointError: it cannot be written; those that were there still are.
        """
        step, main = self.state.global_step, self.is_world_process_zero()
        best = self._note_best()
        try:
            if main:
                begin_checkpoint(self.root, step)
            self.accelerator.wait_for_everyone()
            partial = str(partial_folder(self.root, step))
            self.save_model(partial, _internal_call=True)
            self._save_optimizer_and_scheduler(partial)
            self._save_scaler(partial)
            self._save_rng_state(partial)
            if main:
                self._save_state(Path(partial))
            self.accelerator.wait_for_everyone()
            if main:
                commit_checkpoint(self.root, step, self.keep, best)
            self.accelerator.wait_for_everyone()
        # The writers of transformers, safetensors and PyTorch have no common class of errors.
        except Exception as error:
            if isinstance(error, CheckpointError):
                raise
            raise abandon_checkpoint(self.root, step, error) from error

    def _note_best(self) -> Path | None:
        """The best checkpoint so far, this one if it is."""
        if not self.state.best_global_step:
            return None
        best = checkpoint_folder(self.root, self.state.best_global_step)
        if best.exists() or self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(best)
        return best

    def _save_state(self, partial: Path) -> None:
        for part in (*self.callback_handler.callbacks, self.control):
            if isinstance(part, ExportableState):
                states: Any = self.state.stateful_callbacks
                states[type(part).__name__] = part.state()
        self.state.save_to_json(str(partial / STATE_FILE))
        (partial / RUN_FILE).write_text(json.dumps(self.run, indent=1), encoding="utf-8")


def check_same_run(run: Mapping[str, Any], folder: Path) -> None:
    """Check that the checkpoint in ``folder`` belongs to a run like ``run``.

    Raises:
        ValueError: other settings or other data decided its numbers.
    """
    saved: dict[str, Any] = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    for name, value in saved.items():
        if name == "data_hash":
            if run[name] != value:
                raise ValueError(
                    f"data {run['data']!r} gives other tokens than in the run that is resumed"
                )
        elif run.get(name) != value:
            raise ValueError(
                f"{name} must be {value!r}, as in the run that is resumed, got {run.get(name)!r}"
            )
