"""Traffic of the processes of a set-up in a step: counted by arithmetic, and run by itself.

The sizes are those of the table in docs/distributed.md; a test holds them against the collectives
that a step really runs. Legend: R processes, N tokens of each, V classes, D features.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from cut_cross_entropy.distributed import collectives as operators

from .measure import quartiles, synchronize, timed
from .setups import OWN_CLASSES, OWN_TOKENS

FILTERED = ("cce", "cce_kahan", "cce_kahan_full_c", "cce_kahan_full_e")
"""Implementations whose filter needs two more numbers a token."""


IN_FORWARD = ("chunked", "cce_exact")
"""Implementations that compute the gradients of a mean in the forward, if the budget allows it."""


@dataclass(frozen=True)
class Collective:
    """One collective over all processes.

    Args:
        kind: ``"all_reduce"``, ``"all_gather"`` or ``"reduce_scatter"``.
        count: numbers of the whole: what is summed, gathered to, or scattered.
        dtype: of the numbers.
    """

    kind: str
    count: int
    dtype: torch.dtype

    def sent(self, processes: int) -> float:
        """Bytes that a process sends in a ring."""
        passes = 2 if self.kind == "all_reduce" else 1
        return passes * (processes - 1) / processes * self.count * self.dtype.itemsize


def collectives(
    setup: str, tokens: int, classes: int, dim: int, impl: str, dtype: torch.dtype, processes: int
) -> list[Collective] | None:
    """Those of a step, loss and gradients, in their order; None where they are not known.

    Args:
        setup: a name in ``benchmark.setups.SETUPS``.
        tokens, classes, dim: N, V and D.
        impl: implementation of the loss.
        dtype: of embeddings and weights.
        processes: R; one alone sends nothing.
    """
    if processes == 1:
        return []
    everyone = tokens * processes
    weights = classes * dim
    if setup in ("FSDP2", "FSDP2, DTensor"):
        gather = Collective("all_gather", weights, dtype)
        once = setup == "FSDP2, DTensor" and impl in IN_FORWARD
        gathers = [gather] if once else [gather, gather]
        return [*gathers, Collective("reduce_scatter", weights, dtype)]
    if setup == "DDP":
        return [Collective("all_reduce", weights, dtype)]
    if setup == "tensor-parallel full logits":
        # The maximum, the sum of powers, and the target's logit of every token.
        number = Collective("all_reduce", tokens, torch.float32)
        return [number, number, number, Collective("all_reduce", tokens * dim, dtype)]
    if setup not in OWN_CLASSES:
        return None
    own = setup in OWN_TOKENS
    seen = everyone if own else tokens  # by the kernels of a process
    filtered = impl in FILTERED
    result = []
    if impl in IN_FORWARD:  # the size of a chunk; the sums of several are gathered one by one
        result.append(Collective("all_reduce", 2, torch.int64))
    if own:
        result.append(Collective("all_gather", everyone, torch.int64))
        result.append(Collective("all_gather", everyone * dim, dtype))
    if filtered:
        result.append(Collective("all_reduce", seen, torch.float32))
    numbers = (3 if filtered else 2) * seen * processes
    result.append(Collective("all_gather", numbers, torch.float32))
    kind = "reduce_scatter" if own else "all_reduce"
    return [*result, Collective(kind, seen * dim, dtype)]


def back_to_back(found: list[Collective], device: torch.device) -> Callable[[], None]:
    """A function that runs these collectives and nothing else, on memory of its own."""
    runs = [_run_of(one, device) for one in found]

    def run() -> None:
        for one in runs:
            one()

    return run


def _run_of(one: Collective, device: torch.device) -> Callable[[], object]:
    world = dist.get_world_size()
    share = -(-one.count // world)  # a ring cuts what does not divide evenly into padded parts
    if one.kind == "all_gather":
        part = torch.zeros(share, dtype=one.dtype, device=device)
        return functools.partial(operators.gather_shards, part, "")
    whole = torch.zeros(world, share, dtype=one.dtype, device=device)
    if one.kind == "reduce_scatter":
        return functools.partial(operators.sum_own_part, whole, "")
    return functools.partial(dist.all_reduce, whole)


class Replay:
    """Runs a step of vocabulary parallelism again without its communication.

    In the first run the result of every collective is kept. In later ones it is copied to where
    the collective would have put it, so that the kernels do the same work on the same numbers.

    Args:
        run: the step; all its collectives go through torch.distributed's functions.
    """

    names = (
        "all_reduce",
        "all_gather_into_tensor",
        "all_gather_single",
        "reduce_scatter_tensor",
        "reduce_scatter_single",
    )

    def __init__(self, run: Callable[[], Any]) -> None:
        self.step = run
        self.kept: list[Tensor] = []
        self.next = 0
        with self._instead(self._keep):
            self.first = run()

    def run(self) -> Any:
        """The step without communication."""
        self.next = 0
        with self._instead(self._give):
            return self.step()

    def _keep(self, function: Callable[..., Any], out: Tensor, *rest: Any, **options: Any) -> None:
        function(out, *rest, **options)
        self.kept.append(out.clone())

    def _give(self, function: Callable[..., Any], out: Tensor, *rest: Any, **options: Any) -> None:
        out.copy_(self.kept[self.next])
        self.next += 1

    @contextmanager
    def _instead(self, replacement: Callable[..., None]) -> Iterator[None]:
        names = [name for name in self.names if hasattr(dist, name)]
        instead: dict[str, Any] = {
            name: functools.partial(replacement, getattr(dist, name)) for name in names
        }
        try:
            with mock.patch.multiple(dist, **instead):
                operators._collective.cache_clear()
                yield
        finally:
            operators._collective.cache_clear()


def slowest(value: float) -> float:
    """The largest of all processes."""
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def timed_together(
    run: Callable[[], object], device: torch.device, repetitions: int
) -> list[float]:
    """Quartiles in milliseconds of repetitions that all processes begin together, the median that
    of the slowest process.
    """
    synchronize(device)
    dist.barrier()
    first, median, third = quartiles(timed(lambda _: run(), device, repetitions))
    return [first, slowest(median), third]


def measure_links(device: torch.device) -> dict[str, float]:
    """Bus bandwidth in GB/s of the collectives, at 256 MiB a process (1 MiB on a CPU)."""
    world = dist.get_world_size()
    count = (2**27 if device.type == "cuda" else 2**19) // world * world
    result = {}
    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        one = Collective(kind, count, torch.bfloat16)
        _, milliseconds, _ = timed_together(back_to_back([one], device), device, 10)
        result[kind] = one.sent(world) / milliseconds / 1e6
    return result
