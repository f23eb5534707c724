"""Fine-tune a model on several GPUs and on one of them, by the same batches.

    torchrun --nproc-per-node 2 -m experiments.several_gpus
    torchrun --nproc-per-node 2 -m experiments.several_gpus --methods full cce cce_fsdp2

``LOSS_fsdp2`` shards weights, gradients and optimizer with FSDP2. ``IMPL_vocab_parallel`` gives
each GPU its rows of the tied embeddings, for the first layer as for the loss, and a copy of the
layers. Either way each GPU has its part of every batch. Methods without such an ending run on the
first GPU alone. Legend: S steps, B sequences, T tokens each, V classes.
"""

import contextlib
import copy
import math
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.nn import functional as F

from cut_cross_entropy import VocabParallelOptions, linear_cross_entropy
from cut_cross_entropy.options import ImplName
from cut_cross_entropy.transformers import cce_unpatch
from experiments import comparison, finetune
from experiments.comparison import REORDERED
from experiments.finetune import Finetune
from training.arguments import Parser
from training.loop import Schedule
from training.losses import FULL, FullLogits, plain_head

FSDP2, DIVIDED = "fsdp2", "vocab_parallel"
SPREAD = {
    **{f"{loss}_{FSDP2}": (loss, FSDP2) for loss in (FULL, "cce", "chunked")},
    **{f"{impl}_{DIVIDED}": (impl, DIVIDED) for impl in ("cce", "chunked")},
}
"""Loss and way of the methods that use all processes."""

SMOKE = finetune.SMOKE
ALONE = {"time_limit": math.inf, "largest": False, "resume": False}
"""Options that processes would decide differently, with the value that they have here."""


def build_parser() -> Parser:
    """Build the command line."""
    parser = comparison.build_parser(
        "several_gpus",
        "Training on several GPUs and on one; see docs/experiments.md.",
        peers=tuple(SPREAD),
        **finetune.DEFAULTS,
        time_limit=math.inf,
        methods=[FULL, "cce", REORDERED, f"{FULL}_{FSDP2}", f"cce_{FSDP2}", f"cce_{DIVIDED}"],
    )
    return finetune.add_arguments(parser)


class DividedClasses(FullLogits):
    """Loss of a model whose tied embeddings have their rows on the processes.

    Args:
        impl: implementation, as ``linear_cross_entropy`` names them.
    """

    def __init__(self, impl: ImplName) -> None:
        self.impl = impl

    def prepare(self, model: Any) -> None:
        """Leave ``model`` the rows of this process; other weights are kept equal.

        Raises:
            ValueError: the embeddings are not tied, their rows cannot be divided evenly, or the
                logits have a bias, a softcap or a scale.
        """
        weight = plain_head(model)  # (V, D)
        embedding, decoder = model.get_input_embeddings(), model.get_decoder()
        if embedding.weight is not weight or len(weight) % dist.get_world_size():
            raise ValueError(
                f"{type(model).__name__} must have tied embeddings and a multiple of "
                f"{dist.get_world_size()} classes, got {len(weight)}"
            )
        self.options = VocabParallelOptions.from_vocab(len(weight), gather_e=True)
        self.mesh = init_device_mesh(weight.device.type, (dist.get_world_size(),))
        rows = weight.detach()[self.options.start : self.options.stop].clone()
        model.get_output_embeddings().weight = nn.Parameter(rows)
        self.scale = getattr(embedding, "embed_scale", 1.0)
        model.set_input_embeddings(nn.Identity())
        self.decoder = nn.parallel.DistributedDataParallel(decoder, gradient_as_bucket_view=True)
        # The loss is the mean over all tokens already.
        self.decoder.register_comm_hook(None, lambda _, bucket: _sums(bucket))

    def __call__(self, model: Any, input_ids: Tensor) -> Tensor:
        """See :class:`FullLogits`; ``input_ids`` (B, T) are those of this process."""
        rows = model.get_output_embeddings().weight  # (V / processes, D)
        # Each process looks up the tokens of all, and gets the sums for its own.
        ids = DTensor.from_local(input_ids, self.mesh, [Shard(0)]).full_tensor()
        ids = ids - self.options.start
        own = (ids >= 0) & (ids < len(rows))
        found = F.embedding(ids.where(own, 0), rows) * own[..., None]
        parts = DTensor.from_local(found, self.mesh, [Partial()])
        embedded = parts.redistribute(placements=[Shard(0)]).to_local()  # (B, T, D)
        e = self.decoder(inputs_embeds=embedded * self.scale, use_cache=False).last_hidden_state
        return linear_cross_entropy(
            e, rows, input_ids, shift=True, impl=self.impl, vocab_parallel_options=self.options
        )


def _sums(bucket: Any) -> Any:
    """Start to sum a bucket of gradients over the processes."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


class SeveralGpus(Finetune):
    """A model that is trained already, by all processes or by the first."""

    def __init__(self, arguments: Namespace, device: torch.device) -> None:
        super().__init__(arguments, device)
        self.processes = dist.get_world_size()
        if arguments.batch_size % self.processes:
            raise ValueError(
                f"--batch-size must be a multiple of {self.processes} processes, got "
                f"{arguments.batch_size}"
            )
        # Its norm would be of the rows of one process.
        self.settings |= {"processes": self.processes, "gradients": "not clipped"}

    def loss_of(self, method: str) -> FullLogits:
        """Return the loss of ``method``."""
        name, way = SPREAD.get(method, (method, ""))
        return DividedClasses(cast(ImplName, name)) if way == DIVIDED else super().loss_of(name)

    def make_model(self, seed: int) -> Any:
        """Return the model as it was at the start, on one device."""
        return super().make_model(seed).to(self.device)

    def train(
        self, model: Any, method: str, batches: Tensor, schedule: Schedule, interval: int
    ) -> dict[str, Any]:
        """Train by all processes or the first; the record is the same on all of them."""
        _, way = SPREAD.get(method, (method, ""))
        schedule = replace(schedule, max_grad_norm=math.inf)
        found: list[dict[str, Any] | None] = [None]
        if way:
            model = self.spread(model, way)
            batches = batches.unflatten(1, (self.processes, -1))[:, dist.get_rank()]
        if way or dist.get_rank() == 0:
            found = [super().train(model, method, batches, schedule, interval)]
        if isinstance(loss := self.losses[method], DividedClasses):
            del loss.decoder  # its memory would count in the next run
        of_all: list[Any] = [None] * self.processes
        dist.all_gather_object(of_all, found[0])
        if not way:
            return cast("dict[str, Any]", of_all[0])
        losses = torch.tensor([each["losses"] for each in of_all]).mean(0)
        return {
            **of_all[0],
            "losses": [round(value, 6) for value in losses.tolist()],
            "ms_per_step": max(each["ms_per_step"] for each in of_all),
            "peak_mib": max(each["peak_mib"] for each in of_all),
        }

    def spread(self, model: Any, way: str) -> Any:
        """Return a copy of ``model`` for all processes; ``model`` itself leaves the device."""
        cce_unpatch(model)
        spread = copy.deepcopy(model)
        model.to("cpu")
        if way == FSDP2:
            for layer in spread.get_decoder().layers:
                fully_shard(layer)
            fully_shard(spread)
        return spread

    def measure(self, model: Any, batches: Tensor) -> dict[str, Any]:
        """Measure the whole model on the text that was held out, the same on all processes."""
        if model is not self.model:
            mesh = init_device_mesh(self.device.type, (self.processes,))
            weights = {name: x.detach() for name, x in model.named_parameters()}
            for name, x in model.named_parameters():
                if x is model.get_output_embeddings().weight and not isinstance(x, DTensor):
                    weights[name] = DTensor.from_local(weights[name], mesh, [Shard(0)])
            whole = {
                n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in weights.items()
            }
            self.model.load_state_dict(whole, strict=False)
            self.model.to(self.device)
        return super().measure(self.model, batches)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line under torchrun; exit code 0 done, 2 wrong input."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    for name, value in ALONE.items():
        if getattr(arguments, name) != value:
            parser.error(f"--{name.replace('_', '-')} is not possible with several processes")
    backend = "gloo"
    if torch.cuda.is_available() and arguments.device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl"
    dist.init_process_group(backend)
    words = list(sys.argv[1:] if argv is None else argv)
    with contextlib.ExitStack() as stack:
        if dist.get_rank():  # the first process writes the record
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            words += ["--out", folder]
            stack.enter_context(contextlib.redirect_stdout(None))
        code = comparison.main(parser, SMOKE, SeveralGpus, words)
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
