"""Ways to spread the loss over processes, as training code would call it: rows of one table.

``distributed.py`` times them, ``distributed_traffic.py`` knows what they send,
``tests/distributed/run_many_gpus.py`` holds each against one process, and docs/distributed.md
describes them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cut_cross_entropy import VocabParallelOptions, linear_cross_entropy
from cut_cross_entropy.options import ImplName

from .data import Problem


@dataclass(frozen=True)
class Step:
    """One process's part of a training step's output layer.

    Args:
        loss: computes it.
        e, c: what gets gradients: embeddings of this process, and its part of the classifier.
        tokens: which of all tokens ``e`` holds.
        classes: which classes ``c`` holds; None for a DTensor, which knows.
        shared: all processes have the loss of all tokens; else each has that of its own.
        context: what surrounds loss and gradients.
    """

    loss: Callable[[], Tensor]
    e: Tensor
    c: Any
    tokens: slice
    classes: slice | None = None
    shared: bool = True
    context: Callable[[], AbstractContextManager[None]] = nullcontext

    def run(self) -> Tensor:
        """Leave gradients in ``e`` and ``c``; return the loss."""
        self.e.grad = self.c.grad = None
        with self.context():
            loss: Any = self.loss()
            loss.backward()
        whole: Tensor = loss.full_tensor() if hasattr(loss, "full_tensor") else loss
        return whole.detach()


def _own_tokens(problem: Problem) -> slice:
    """Tokens of this process; the same number on each."""
    size = problem.e.shape[0] // dist.get_world_size()
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


def _mesh(problem: Problem, **sizes: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    kind = problem.e.device.type
    return init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def vocab_parallel(problem: Problem, impl: ImplName, own: bool = False) -> Step:
    """Each process has the rows of its classes; with ``own`` tokens of its own as well."""
    options = VocabParallelOptions.from_vocab(problem.c.shape[0], gather_e=own)
    classes = slice(options.start, options.stop)
    tokens = _own_tokens(problem) if own else slice(0, problem.e.shape[0])
    e, c, targets = _leaf(problem.e[tokens]), _leaf(problem.c[classes]), problem.targets[tokens]

    def loss() -> Tensor:
        return linear_cross_entropy(
            e, c, targets, softcap=problem.softcap, impl=impl, vocab_parallel_options=options
        )

    return Step(loss, e, c, tokens, classes)


def tensor_parallel(problem: Problem, impl: ImplName, logits: bool = False) -> Step:
    """The classifier as a DTensor sharded by classes, as ``parallelize_module`` leaves it.

    With ``logits`` what PyTorch has for it: sharded full logits and ``loss_parallel``.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = _mesh(problem, tp=dist.get_world_size())
    e = _leaf(problem.e)
    c = nn.Parameter(distribute_tensor(problem.c.detach(), mesh, [Shard(0)]))

    def loss() -> Tensor:
        if not logits:
            return linear_cross_entropy(e, c, problem.targets, softcap=problem.softcap, impl=impl)
        tokens = DTensor.from_local(e, mesh, [Replicate()], run_check=False)
        return F.cross_entropy(problem.logits(tokens, c), problem.targets)

    context = loss_parallel if logits else nullcontext
    return Step(loss, e, c, slice(0, e.shape[0]), context=context)


class _Head(nn.Module):
    """An output layer that computes the loss in its forward."""

    def __init__(self, problem: Problem, impl: ImplName) -> None:
        super().__init__()
        self.weight = nn.Parameter(problem.c.detach().clone())
        self.softcap, self.impl = problem.softcap, impl

    def forward(self, e: Tensor, targets: Tensor) -> Tensor:
        """The mean loss."""
        loss = linear_cross_entropy(e, self.weight, targets, softcap=self.softcap, impl=self.impl)
        return loss


def fully_sharded(
    problem: Problem, impl: ImplName, inside: bool = False, replicas: int = 1
) -> Step:
    """FSDP2; the loss ``inside`` of the forward of the module that holds the classifier, or
    outside, where the classifier is a DTensor. With ``replicas`` HSDP.
    """
    from torch.distributed.fsdp import fully_shard

    sizes = {"dp_shard": dist.get_world_size() // replicas}
    mesh = _mesh(problem, **({"dp_replicate": replicas} if replicas > 1 else {}), **sizes)
    head = _Head(problem, impl)
    # As within a model, whose root alone keeps its weights from the forward to the backward.
    fully_shard(head, mesh=mesh, reshard_after_forward=True)
    tokens = _own_tokens(problem)
    e, targets = _leaf(problem.e[tokens]), problem.targets[tokens]

    def loss() -> Tensor:
        result: Tensor = head(e, targets) if inside else _Head.forward(head, e, targets)
        return result

    return Step(loss, e, head.weight, tokens, shared=False)


def data_parallel(problem: Problem, impl: ImplName) -> Step:
    """DistributedDataParallel: every process has the whole classifier."""
    ids = [problem.e.device.index] if problem.e.device.type == "cuda" else None
    head = _Head(problem, impl)
    wrapped = nn.parallel.DistributedDataParallel(head, device_ids=ids)
    tokens = _own_tokens(problem)
    e, targets = _leaf(problem.e[tokens]), problem.targets[tokens]
    classes = slice(0, problem.c.shape[0])
    return Step(lambda: wrapped(e, targets), e, head.weight, tokens, classes, shared=False)


def one_gpu(problem: Problem, impl: ImplName, logits: bool = False) -> Step:
    """No processes to share with: all tokens and classes of the problem here.

    With ``logits`` in the operations of :func:`tensor_parallel` with full logits.
    """
    e, c = _leaf(problem.e), _leaf(problem.c)

    def loss() -> Tensor:
        if logits:
            return F.cross_entropy(problem.logits(e, c), problem.targets)
        return linear_cross_entropy(e, c, problem.targets, softcap=problem.softcap, impl=impl)

    return Step(loss, e, c, slice(0, len(e)), slice(0, len(c)))


SETUPS: dict[str, Callable[[Problem, ImplName], Step]] = {
    "vocabulary-parallel": vocab_parallel,
    "vocabulary-parallel, own tokens": partial(vocab_parallel, own=True),
    "tensor-parallel DTensor": tensor_parallel,
    "tensor-parallel full logits": partial(tensor_parallel, logits=True),
    "FSDP2": partial(fully_sharded, inside=True),
    "FSDP2, DTensor": fully_sharded,
    "HSDP, DTensor": partial(fully_sharded, replicas=2),
    "DDP": data_parallel,
}
"""By the name in the tables. Each needs a process group, and HSDP an even number of processes."""

ALONE: dict[str, Callable[[Problem, ImplName], Step]] = {
    "one GPU": one_gpu,
    "one GPU, full logits": partial(one_gpu, logits=True),
}
"""Set-ups of one GPU without the others; they need no process group."""

LOGITS = ("tensor-parallel full logits", "one GPU, full logits")
"""Those that have no implementation to choose."""

OWN_TOKENS = ("vocabulary-parallel, own tokens", "FSDP2", "FSDP2, DTensor", "HSDP, DTensor", "DDP")
"""Those whose processes have tokens of their own."""

OWN_CLASSES = (
    "vocabulary-parallel",
    "vocabulary-parallel, own tokens",
    "tensor-parallel DTensor",
    "tensor-parallel full logits",
)
"""Those whose processes have classes of their own."""
