"""Collectives of a vocabulary-parallel call, as operators that PyTorch sees.

Every collective runs inside an operator that is opaque to the compiler, and finds its process group
by name. Legend: R processes of the group, N tokens, V classes.
"""

import functools
import os
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from cut_cross_entropy.validation import FLOAT_DTYPES, check_target_range

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_agreed: "WeakKeyDictionary[ProcessGroup, set[tuple[int, torch.dtype]]]" = WeakKeyDictionary()


def group_name(group: "ProcessGroup | None") -> str:
    """The name by which operators find ``group``; "" is the default group."""
    return "" if group is None else str(group.group_name)


def group_of(name: str) -> "ProcessGroup":
    """The process group of that name.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """
    from torch.distributed import distributed_c10d

    known: Any = distributed_c10d
    found = known._resolve_process_group(name) if name else known._get_default_group()
    return found  # type: ignore[no-any-return]


def world_size(name: str) -> int:
    """Return the number of processes of a group."""
    return int(group_of(name).size())


def gather_shards(tensor: Tensor, name: str) -> Tensor:
    """All-gather: the tensor of every process of the group, stacked in their order."""
    group = group_of(name)
    out = tensor.new_empty((group.size(), *tensor.shape))
    _collective("all_gather")(out.flatten(0, 1) if tensor.ndim else out, tensor.contiguous(), group)
    return out


def sum_own_part(tensor: Tensor, name: str) -> Tensor:
    """Reduce-scatter: of a tensor (R, ...) the sum over the processes of this one's part."""
    group = group_of(name)
    if tensor.is_cuda and torch.distributed.get_backend(group) == "gloo":  # has none there
        total = tensor.clone()
        torch.distributed.all_reduce(total, group=group)
        return total[group.rank()].clone()
    out = tensor.new_empty(tensor.shape[1:])
    _collective("reduce_scatter")(out, tensor.contiguous().flatten(0, 1), group)
    return out


def maximum_over_group(tensor: Tensor, name: str) -> None:
    """All-reduce in place: the largest value of the processes."""
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group_of(name))


@functools.cache
def _collective(what: str) -> Any:
    """A collective on single tensors, whose names newer releases of PyTorch have changed."""
    old = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}[what]
    function = getattr(torch.distributed, f"{what}_single", None) or getattr(torch.distributed, old)
    return lambda out, source, group: function(out, source, group=group)


def combine(logit: Tensor, lse: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Target's logit and log-sum-exp over all classes, from those of each shard, (N,) each.

    The logit is +inf where the target is in another shard, and stays so where it is in none. All
    processes compute the same from the same numbers: the results have the same bits everywhere.
    """
    gathered = gather_shards(torch.stack([logit, lse]), name)
    return gathered[:, 0].amin(0), torch.logsumexp(gathered[:, 1], 0)


@torch.library.custom_op(
    "cut_cross_entropy::combine_shards",
    mutates_args=(),
    schema="(Tensor logit, Tensor lse, str group) -> (Tensor, Tensor)",
)
def combine_shards(logit: Tensor, lse: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """:func:`combine`, differentiable once.

    The gradient is that of this process's numbers and needs no communication: every process
    computes the same loss from the results, and has the same gradient of it.
    """
    return combine(logit, lse, group)


@combine_shards.register_fake
def _(logit: Tensor, lse: Tensor, group: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logit), torch.empty_like(lse)


def _save_combined(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _combine_autograd(ctx: Any, grad_logit: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    refuse_create_graph()
    logit, lse, total = ctx.saved_tensors
    share = torch.where(lse == -torch.inf, 0, torch.exp(lse - total))  # of a shard in the sum
    return torch.where(logit == torch.inf, 0, grad_logit), grad_lse * share, None


combine_shards.register_autograd(_combine_autograd, setup_context=_save_combined)


def refuse_create_graph() -> None:
    """Refuse a backward pass that is to be differentiated again.

    Raises:
        NotImplementedError: it is.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "a loss that several processes compute together has no second derivative "
            "(create_graph=True)"
        )


@torch.library.custom_op(
    "cut_cross_entropy::sum_over_group",
    mutates_args=("tensor",),
    schema="(Tensor(a!) tensor, str group) -> ()",
)
def sum_over_group(tensor: Tensor, group: str) -> None:
    """All-reduce in place: the sum over the processes."""
    torch.distributed.all_reduce(tensor, group=group_of(group))


@sum_over_group.register_fake
def _(tensor: Tensor, group: str) -> None:
    return None


@torch.library.custom_op(
    "cut_cross_entropy::check_shards",
    mutates_args=(),
    schema=(
        "(Tensor targets, int ignore_index, int start, int stop, int features, ScalarType dtype, "
        "str group, bool gather) -> Tensor"
    ),
)
def check_shards(
    targets: Tensor,  # (N,)
    ignore_index: int,
    start: int,
    stop: int,
    features: int,
    dtype: torch.dtype,
    group: str,
    gather: bool,
) -> Tensor:
    """The targets, with ``gather`` those of all processes: (N,) or (R N,), always new.

    Before, the processes agree that their calls fit together. They exchange six integers. To read
    them a GPU would have to be waited for, so there it happens in the first call of a group with so
    many features of a dtype, and in all calls under ``CCE_DEBUG=1``.

    Raises:
        ValueError: shards with gaps or overlaps, calls that differ in tokens, features, dtype or
            targets, or on a CPU a target out of range: the same error on every process.
    """
    if isinstance(targets, FakeTensor):
        return _fake_targets(targets, group, gather)
    known = _agreed.setdefault(group_of(group), set())
    always = targets.device.type == "cpu" or os.environ.get("CCE_DEBUG", "0") == "1"
    check = always or (features, dtype) not in known
    if check:
        places = torch.arange(1, targets.numel() + 1, device=targets.device)
        numbers = (start, stop, targets.numel(), features, FLOAT_DTYPES.index(dtype), 0)
        header = torch.tensor(numbers, device=targets.device)
        if not gather:
            header[5] = (targets * places).sum()
        headers = gather_shards(header, group).tolist()
        _check_headers(headers)
    shared = gather_shards(targets, group).flatten() if gather else targets.clone()
    if check:
        check_target_range(shared, max(one[1] for one in headers), ignore_index)
        known.add((features, dtype))
    return shared


@check_shards.register_fake
def _(targets: Tensor, *options: Any) -> Tensor:
    group, gather = options[-2:]
    return _fake_targets(targets, group, gather)


def _fake_targets(targets: Tensor, group: str, gather: bool) -> Tensor:
    return targets.new_empty(targets.shape[0] * (world_size(group) if gather else 1))


def _check_headers(headers: list[list[int]]) -> None:
    """Raise the same error on every process unless the calls belong together."""
    shards = sorted((start, stop) for start, stop, *_ in headers if start < stop)
    stops = [0, *(stop for _, stop in shards)]
    if not shards or [start for start, _ in shards] != stops[:-1]:
        listed = ", ".join(f"[{start}, {stop})" for start, stop, *_ in headers)
        raise ValueError(
            "vocab_parallel_options must divide the classes from 0 on without gaps or overlaps, "
            f"got by rank {listed}"
        )
    named = (
        ("e and targets must have as many tokens", 2, str),
        ("e and c must have as many features", 3, str),
        ("e and c must have the same dtype", 4, lambda i: str(FLOAT_DTYPES[i])),
    )
    for must, place, text in named:
        if len({header[place] for header in headers}) > 1:
            listed = ", ".join(text(header[place]) for header in headers)
            raise ValueError(f"{must} on every rank of a vocabulary-parallel call, got {listed}")
    if len({header[5] for header in headers}) > 1:
        raise ValueError(
            "targets must be the same on every rank of a vocabulary-parallel call; for tokens of "
            "its own on each rank use VocabParallelOptions(..., gather_e=True)"
        )
