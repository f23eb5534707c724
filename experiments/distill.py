"""Distil SmolLM2-135M, or another model, into fewer of its layers, with full logits and without.

    python -m experiments.distill
    python -m experiments.distill --beta 0.5 --methods full cce trl full_reordered

The student starts as every third layer of the teacher, with its embeddings and its head. The loss
is the divergence of the student from the teacher, on held-out text too.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from cut_cross_entropy import linear_divergence
from cut_cross_entropy.options import ImplName
from experiments import comparison, finetune
from experiments.comparison import JUDGED_TOKENS, REORDERED, mean
from experiments.finetune import Finetune
from experiments.peers import TRL
from training.arguments import Parser
from training.losses import FULL, Divergence, FullLogits, divergence, hidden_states, make_loss

HeadDivergence = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""Mean divergence of ``e`` (B, T, D) and a head (V, D), those of the teacher, and beta."""

SMOKE = {**finetune.SMOKE, "every": 2}


def build_parser() -> Parser:
    """Build the command line."""
    parser = finetune.add_arguments(
        comparison.build_parser(
            "distill",
            "Distillation with full logits and without.",
            peers=(TRL,),
            **{**finetune.DEFAULTS, "learning_rate": 3e-4},
            methods=[FULL, "auto", REORDERED],
        )
    )
    add = parser.add_argument
    # With another name than the training script's setting, which has other limits.
    add("--beta", dest="weight", type=float, default=0.0, help="divergence: 0 KL(teacher || "
        "student), 1 the reverse, generalised Jensen-Shannon between them")  # fmt: skip
    add("--every", type=int, default=3, help="the student has one of so many layers")
    return parser


def by_trl() -> HeadDivergence:
    """Return the mean divergence by the function of TRL's distillation trainer.

    Raises:
        ImportError: TRL is not installed.
    """
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError as error:
        raise ImportError(f"method {TRL} needs the package trl: {error}") from error
    apply: Any = ChunkedDivergenceFunction.apply
    return lambda e, head, e_teacher, head_teacher, beta: apply(
        e.flatten(0, 1), head, None, e_teacher.flatten(0, 1), head_teacher, None, beta
    )[0].mean()


class MeanDivergence(FullLogits):
    """Mean divergence of a student from the teacher of an experiment.

    Args:
        experiment: has the teacher and the divergence.
        function: computes it from the inputs of the output layers; None: full logits do.
    """

    def __init__(self, experiment: "Distill", function: HeadDivergence | None) -> None:
        self.experiment, self.function = experiment, function

    def __call__(self, model: Any, input_ids: Tensor) -> Tensor:
        """See :class:`FullLogits`."""
        teacher, beta = self.experiment.teacher, self.experiment.arguments.weight
        if self.function is None:
            inputs = {"input_ids": input_ids, "labels": input_ids}
            return self.divergences(model, teacher, inputs, Divergence(beta, "mean"))
        e = hidden_states(model, input_ids)[:, :-1]
        with torch.no_grad():
            e_teacher = hidden_states(teacher, input_ids)[:, :-1]
        head, head_teacher = (x.get_output_embeddings().weight for x in (model, teacher))
        return self.function(e, head, e_teacher, head_teacher, beta)


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
        if method in (FULL, REORDERED):
            return MeanDivergence(self, None)
        if method == TRL:
            return MeanDivergence(self, by_trl())
        make_loss(method, self.device)  # refuses an implementation that cannot run here
        impl = cast(ImplName, method)
        return MeanDivergence(
            self,
            lambda *inputs: (
                linear_divergence(
                    *inputs[:4], beta=inputs[4], reduction="mean", impl=impl
                ).divergence
            ),
        )

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
