"""Distil SmolLM2-135M, or another model, into fewer of its layers, with full logits and without.

    python -m experiments.distill
    python -m experiments.distill --beta 0.5 --methods full cce trl full_reordered

The student starts as every third layer of the teacher, with its embeddings and its head. The loss
is the divergence of the student from the teacher, on held-out text too.
"""

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from experiments import comparison, finetune
from experiments.comparison import JUDGED_TOKENS, REORDERED, loss_of, mean
from experiments.finetune import Finetune
from training.arguments import Parser
from training.losses import FULL, FullLogits, divergence, hidden_states

TRL = "trl"
"""Method that is the function of TRL's distillation trainer."""

SMOKE = {**finetune.SMOKE, "every": 2}


def build_parser() -> Parser:
    """Build the command line."""
    parser = finetune.add_arguments(
        comparison.build_parser(
            "distill",
            "Distillation with full logits and without.",
            peers=(TRL,),
            **{**finetune.DEFAULTS, "learning_rate": 1e-3},
            methods=[FULL, "auto", REORDERED],
        )
    )
    add = parser.add_argument
    # With another name than the training script's setting, which has other limits.
    add("--beta", dest="weight", type=float, default=0.0, help="divergence: 0 KL(teacher || "
        "student), 1 the reverse, generalised Jensen-Shannon between them")  # fmt: skip
    add("--every", type=int, default=3, help="the student has one of so many layers")
    return parser


class TRLDivergence(FullLogits):
    """Divergence by the function of TRL's distillation trainer.

    Raises:
        ImportError: TRL is not installed.
    """

    def __init__(self) -> None:
        try:
            from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
        except ImportError as error:
            raise ImportError(f"method {TRL} needs the package trl: {error}") from error
        self.function: Any = ChunkedDivergenceFunction

    def token_divergences(
        self, model: Any, teacher: Any, inputs: Mapping[str, Tensor], beta: float
    ) -> Tensor:
        """See :class:`FullLogits`."""
        ids = inputs["input_ids"]
        e = hidden_states(model, ids)[:, :-1]
        with torch.no_grad():
            e_teacher = hidden_states(teacher, ids)[:, :-1]
        heads = (one.get_output_embeddings().weight for one in (model, teacher))
        sides = (
            (x.flatten(0, 1), head, None) for x, head in zip((e, e_teacher), heads, strict=True)
        )
        values: Tensor = self.function.apply(*next(sides), *next(sides), beta)[0]
        return values.view(e.shape[:2])


class MeanDivergence(FullLogits):
    """Mean divergence of a student from the teacher of an experiment, computed by ``loss``."""

    def __init__(self, loss: FullLogits, experiment: "Distill") -> None:
        self.loss, self.experiment = loss, experiment

    def prepare(self, model: Any) -> None:
        """See :class:`FullLogits`."""
        for one in (model, self.experiment.teacher):
            self.loss.prepare(one)

    def __call__(self, model: Any, input_ids: Tensor) -> Tensor:
        """See :class:`FullLogits`."""
        inputs = {"input_ids": input_ids, "labels": input_ids}
        teacher, beta = self.experiment.teacher, self.experiment.arguments.weight
        return self.loss.token_divergences(model, teacher, inputs, beta).mean()


class Distill(Finetune):
    """A model learns from another with more of the same layers."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        if not 0 <= arguments.weight <= 1:
            raise ValueError(f"--beta must be from 0 to 1, got {arguments.weight}")
        super().__init__(arguments, device)
        decoder, every = self.model.get_decoder(), arguments.every
        layers = decoder.layers
        if not 1 <= every <= len(layers):
            raise ValueError(f"--every must be from 1 to {len(layers)}, got {every}")
        # Autocast would round its weights anew in every step.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.teacher = copy.deepcopy(self.model).to(dtype).eval().requires_grad_(False)
        decoder.layers = layers[::every]
        self.model.config.num_hidden_layers = len(decoder.layers)
        self.keep_start()
        self.label += f"-beta{arguments.weight:g}"
        self.settings |= {
            "student's layers": f"{len(decoder.layers)} of {len(layers)}",
            "beta": arguments.weight,
        }

    def loss_of(self, method: str) -> FullLogits:
        """Return the divergence by ``method``."""
        own = TRLDivergence() if method == TRL else loss_of(method, self.device)
        return MeanDivergence(own, self)

    @torch.no_grad()
    def measure(self, model: Any, batches: Tensor) -> dict[str, Any]:
        """Measure the divergence on the text that was held out, by full logits in float32."""
        model.eval()
        found = []
        for batch in self.held_out.split(max(1, JUDGED_TOKENS // self.held_out.shape[1])):
            sides = []
            for one in (model, self.teacher):
                with torch.autocast(batch.device.type, torch.bfloat16):
                    hidden = hidden_states(one, batch)[:, :-1]
                logits = hidden.float() @ one.get_output_embeddings().weight.float().T
                sides.append(logits.log_softmax(-1))
            found.append(divergence(sides[0], sides[1], self.arguments.weight).cpu())
        model.train()
        return {"held_out_loss": mean(torch.cat(found))}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0 done, 2 wrong input."""
    return comparison.main(build_parser(), SMOKE, Distill, argv)


if __name__ == "__main__":
    sys.exit(main())
