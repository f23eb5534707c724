"""Ways to spread the loss over processes, as training code would call it: rows of one table.

``distributed.py`` times them, ``distributed_traffic.py`` knows what they send,
``tests/distributed/run_many_gpus.py`` holds each against one process, and docs/distributed.md
describes them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
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
        run: computes the loss and leaves gradients in ``e`` and ``c``; returns the loss.
        e, c: what gets gradients: embeddings of this process, and its part of the classifier.
        tokens: which of all tokens ``e`` holds.
        classes: which classes ``c`` holds; None for a DTensor, which knows.
        shared: all processes have the loss of all tokens; else each has that of its own.
    """

    run: Callable[[], Tensor]
    e: Tensor
    c: Any
    tokens: slice
    classes: slice | None
    shared: bool


def _step(
    loss: Callable[[], Tensor],
    e: Tensor,
    c: Any,
    tokens: slice,
    classes: slice | None,
    shared: bool,
) -> Step:
    def run() -> Tensor:
        e.grad = c.grad = None
        result = loss()
        result.backward()
        return result.detach()

    return Step(run, e, c, tokens, classes, shared)


def _own_tokens(problem: Problem) -> slice:
    """Tokens of this process; the same number on each."""
    size = problem.e.shape[0] // dist.get_world_size()
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


def _mesh(problem: Problem, *shape: tuple[str, int]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    names, sizes = zip(*shape, strict=True)
    return init_device_mesh(problem.e.device.type, sizes, mesh_dim_names=names)


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

    return _step(loss, e, c, tokens, classes, shared=True)


def sequence_parallel(problem: Problem, impl: ImplName) -> Step:
    """Vocabulary-parallel, with tokens of its own on each process."""
    return vocab_parallel(problem, impl, own=True)


def tensor_parallel(problem: Problem, impl: ImplName) -> Step:
    """The classifier as a DTensor sharded by classes, as ``parallelize_module`` leaves it."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = _mesh(problem, ("tp", dist.get_world_size()))
    e = _leaf(problem.e)
    c = nn.Parameter(distribute_tensor(problem.c.detach(), mesh, [Shard(0)]))

    def loss() -> Tensor:
        return linear_cross_entropy(e, c, problem.targets, softcap=problem.softcap, impl=impl)

    return _step(loss, e, c, slice(0, e.shape[0]), None, shared=True)


def tensor_parallel_logits(problem: Problem, impl: ImplName) -> Step:
    """What PyTorch has for it: sharded full logits and ``loss_parallel``."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = _mesh(problem, ("tp", dist.get_world_size()))
    e = _leaf(problem.e)
    c = nn.Parameter(distribute_tensor(problem.c.detach(), mesh, [Shard(0)]))

    def run() -> Tensor:
        e.grad = c.grad = None
        with loss_parallel():
            tokens = DTensor.from_local(e, mesh, [Replicate()], run_check=False)
            logits = F.linear(tokens, c).float()
            if problem.softcap is not None:
                logits = problem.softcap * torch.tanh(logits / problem.softcap)
            loss: Any = F.cross_entropy(logits, problem.targets)
            loss.backward()
        return loss.detach().full_tensor()  # type: ignore[no-any-return]

    return Step(run, e, c, slice(0, e.shape[0]), None, shared=True)


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


def _fully_sharded(problem: Problem, impl: ImplName, mesh: Any, inside: bool) -> Step:
    from torch.distributed.fsdp import fully_shard

    head = _Head(problem, impl)
    # As within a model, whose root alone keeps its weights from the forward to the backward.
    fully_shard(head, mesh=mesh, reshard_after_forward=True)
    tokens = _own_tokens(problem)
    e, targets = _leaf(problem.e[tokens]), problem.targets[tokens]

    def loss() -> Tensor:
        # Outside of the module's forward the weight is a DTensor, and the call gathers it.
        result = head(e, targets) if inside else _Head.forward(head, e, targets)
        assert isinstance(result, Tensor)
        return result

    return _step(loss, e, head.weight, tokens, None, shared=False)


def fsdp(problem: Problem, impl: ImplName) -> Step:
    """FSDP2, the loss in the forward of the module that holds the classifier."""
    mesh = _mesh(problem, ("dp_shard", dist.get_world_size()))
    return _fully_sharded(problem, impl, mesh, inside=True)


def fsdp_outside(problem: Problem, impl: ImplName) -> Step:
    """FSDP2, the loss outside of that forward, where the classifier is a DTensor."""
    mesh = _mesh(problem, ("dp_shard", dist.get_world_size()))
    return _fully_sharded(problem, impl, mesh, inside=False)


def hsdp(problem: Problem, impl: ImplName) -> Step:
    """The same, sharded over half of the processes and replicated over two halves."""
    mesh = _mesh(problem, ("dp_replicate", 2), ("dp_shard", dist.get_world_size() // 2))
    return _fully_sharded(problem, impl, mesh, inside=False)


def data_parallel(problem: Problem, impl: ImplName) -> Step:
    """DistributedDataParallel: every process has the whole classifier."""
    ids = [problem.e.device.index] if problem.e.device.type == "cuda" else None
    head = _Head(problem, impl)
    wrapped = nn.parallel.DistributedDataParallel(head, device_ids=ids)
    tokens = _own_tokens(problem)
    e, targets = _leaf(problem.e[tokens]), problem.targets[tokens]
    classes = slice(0, problem.c.shape[0])
    return _step(lambda: wrapped(e, targets), e, head.weight, tokens, classes, shared=False)


def one_gpu(problem: Problem, impl: ImplName) -> Step:
    """No processes to share with: all tokens and classes of the problem here."""
    e, c = _leaf(problem.e), _leaf(problem.c)

    def loss() -> Tensor:
        return linear_cross_entropy(e, c, problem.targets, softcap=problem.softcap, impl=impl)

    return _step(loss, e, c, slice(0, len(e)), slice(0, len(c)), shared=True)


def one_gpu_logits(problem: Problem, impl: ImplName) -> Step:
    """The same with full logits, in the operations of :func:`tensor_parallel_logits`."""
    e, c = _leaf(problem.e), _leaf(problem.c)

    def loss() -> Tensor:
        logits = F.linear(e, c).float()
        if problem.softcap is not None:
            logits = problem.softcap * torch.tanh(logits / problem.softcap)
        return F.cross_entropy(logits, problem.targets)

    return _step(loss, e, c, slice(0, len(e)), slice(0, len(c)), shared=True)


SETUPS: dict[str, Callable[[Problem, ImplName], Step]] = {
    "vocabulary-parallel": vocab_parallel,
    "vocabulary-parallel, own tokens": sequence_parallel,
    "tensor-parallel DTensor": tensor_parallel,
    "tensor-parallel full logits": tensor_parallel_logits,
    "FSDP2": fsdp,
    "FSDP2, DTensor": fsdp_outside,
    "HSDP, DTensor": hsdp,
    "DDP": data_parallel,
}
"""By the name in the tables. Each needs a process group, and HSDP an even number of processes."""

ALONE: dict[str, Callable[[Problem, ImplName], Step]] = {
    "one GPU": one_gpu,
    "one GPU, full logits": one_gpu_logits,
}
"""What one GPU does without the others; needs no process group."""

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
