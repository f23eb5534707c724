"""DTensors as arguments: their meaning, and the local tensors that stand for them.

A classifier sharded by rows means one of two things. ``parallelize_module`` spreads the *work*:
each process has the same tokens and keeps its classes (vocabulary-parallel, nothing is gathered).
``fully_shard`` spreads the *storage*: each process has tokens of its own and needs all classes
(data-parallel, see ``data_parallel``). The names of the mesh's dimensions say which, or an option
of the call does. A mesh of one dimension without a name is the one that ``fully_shard`` makes; of
several dimensions without names nothing is guessed.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cut_cross_entropy.distributed.options import (
    DataParallelOptions,
    VocabParallelOptions,
    classes_of,
    describe,
    is_dtensor,
)

TENSOR_NAMES = ("tp", "tensor", "tensor_parallel", "vocab", "vocab_parallel")
DATA_NAMES = (
    "dp",
    "data",
    "data_parallel",
    "fsdp",
    "dp_shard",
    "dp_replicate",
    "dp_shard_cp",
    "shard",
    "replicate",
)
"""Names of mesh dimensions and what they mean; those of PyTorch's and torchtitan's examples."""


class Resolved(NamedTuple):
    """Arguments of a call without DTensors, except a data-parallel classifier and bias.

    Args:
        vocab_parallel: set if the classifier is one shard of the classes.
        data_parallel: set if the classifier (and bias) are DTensors that have to be gathered.
    """

    e: Tensor
    c: Tensor
    targets: Tensor
    bias: Tensor | None
    vocab_parallel: VocabParallelOptions | None
    data_parallel: DataParallelOptions | None


def resolve(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    vocab_parallel: VocabParallelOptions | None,
    data_parallel: DataParallelOptions | None,
) -> Resolved:
    """Find out what DTensors mean, and make local what can be.

    Raises:
        TypeError: options of another type.
        ValueError: both options, or options that the sharding contradicts.
        RuntimeError: there are no processes to share a vocabulary with.
        NotImplementedError: a mesh, a placement or a mixture that has no meaning here.
    """
    check_parallel_options(vocab_parallel, data_parallel)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if vocab_parallel is not None and not distributed:
        raise RuntimeError(
            "vocab_parallel_options needs torch.distributed.init_process_group first"
        )
    if is_dtensor(c) and vocab_parallel is None and data_parallel is None:
        if _meaning(c) == "data":
            data_parallel = DataParallelOptions()
        else:
            vocab_parallel = VocabParallelOptions.from_dtensor(c)
    if vocab_parallel is not None:
        c, bias = (_own_rows(x, name, vocab_parallel) for x, name in ((c, "c"), (bias, "bias")))  # type: ignore[assignment]
        if is_dtensor(targets):
            targets = targets.full_tensor()  # type: ignore[attr-defined]
        if is_dtensor(e):
            e, vocab_parallel = _all_tokens(e, vocab_parallel)
        return Resolved(e, c, targets, bias, vocab_parallel=vocab_parallel, data_parallel=None)
    if is_dtensor(bias) and not is_dtensor(c):
        raise NotImplementedError(
            "bias is a DTensor and c is not: pass both as DTensors, or bias.to_local()"
        )
    for name, x in (("e", e), ("targets", targets)):
        if is_dtensor(x):
            raise NotImplementedError(
                f"{name} is a DTensor ({describe(x)}) together with a classifier that is not "
                f"divided by classes: pass the tokens of this process, {name}.to_local()"
            )
    # What fully_shard has gathered already (within the module's forward) is a tensor like others.
    return Resolved(
        e,
        c,
        targets,
        bias,
        vocab_parallel=None,
        data_parallel=data_parallel if is_dtensor(c) else None,
    )


def check_parallel_options(vocab_parallel: object, data_parallel: object) -> None:
    """Check the types of both options, of which at most one may be given.

    Raises:
        TypeError: options of another type.
        ValueError: both options.
    """
    for name, value, wanted in (
        ("vocab_parallel_options", vocab_parallel, VocabParallelOptions),
        ("data_parallel_options", data_parallel, DataParallelOptions),
    ):
        if value is not None and not isinstance(value, wanted):
            raise TypeError(f"{name} must be None or {wanted.__name__}, got {type(value).__name__}")
    if vocab_parallel is not None and data_parallel is not None:
        raise ValueError(
            "vocab_parallel_options and data_parallel_options exclude each other: a classifier is "
            "either divided by classes or gathered"
        )


def refuse_dtensors(**named: object) -> None:
    """Refuse DTensors for what has to be whole on each process: what belongs to tokens or classes.

    Raises:
        NotImplementedError: one of them, by the name of its argument.
    """
    for name, x in named.items():
        if is_dtensor(x):
            raise NotImplementedError(
                f"{name} is a DTensor ({describe(x)}): pass a plain tensor, {name}.full_tensor()"
            )


def _meaning(c: Any) -> str:
    """ "data" or "tensor", by the names of the mesh's dimensions."""
    names = c.device_mesh.mesh_dim_names
    if names is None and c.device_mesh.ndim == 1:  # the default of fully_shard
        return "data"
    if names is not None and all(name in DATA_NAMES for name in names):
        return "data"
    if names is not None and len(names) == 1 and names[0] in TENSOR_NAMES:
        return "tensor"
    if names is not None and any(name in TENSOR_NAMES for name in names):
        raise NotImplementedError(
            f"c is a DTensor on a mesh of several dimensions ({describe(c)}): call from the "
            "forward of the module that fully_shard manages, where c has its tensor-parallel "
            f"dimension alone, or gather the others with c.redistribute first"
        )
    raise NotImplementedError(
        f"c is a DTensor ({describe(c)}), and the mesh does not say what for: name its dimensions "
        f"({', '.join(DATA_NAMES)}: gathered; {', '.join(TENSOR_NAMES)}: divided by classes), or "
        "pass data_parallel_options=DataParallelOptions() or "
        "vocab_parallel_options=VocabParallelOptions.from_dtensor(c)"
    )


def _own_rows(x: Any, name: str, options: VocabParallelOptions) -> Tensor | None:
    """The rows of this process; a plain tensor holds nothing else."""
    if not is_dtensor(x):
        return x  # type: ignore[no-any-return]
    start, stop, _ = classes_of(x)
    if (start, stop) != (options.start, options.stop):
        raise ValueError(
            f"{name} has the rows [{start}, {stop}) on this process, and vocab_parallel_options "
            f"the classes [{options.start}, {options.stop})"
        )
    return x.to_local()  # type: ignore[no-any-return]


def _all_tokens(e: Any, options: VocabParallelOptions) -> tuple[Tensor, VocabParallelOptions]:
    """``e`` with all tokens, and who sums its gradient: DTensor's own backward or the call."""
    from torch.distributed.tensor import Partial, Replicate

    mesh, (placement, *_) = e.device_mesh, e.placements
    group = options.group or torch.distributed.group.WORLD
    if mesh.ndim != 1 or mesh.get_group() != group:
        raise NotImplementedError(
            f"e is a DTensor ({describe(e)}) on another mesh than the classes: pass the tokens "
            "that all processes of vocab_parallel_options.group have in common, e.to_local()"
        )
    if options.gather_e:
        raise ValueError(
            "gather_e is for plain tensors: a DTensor e says itself how its tokens are sharded"
        )
    if placement.is_shard(e.ndim - 1):
        raise NotImplementedError(
            f"e is a DTensor sharded by features ({describe(e)}): redistribute it to Replicate() "
            "or to a sharding by tokens"
        )
    whole = e.redistribute(placements=[Replicate()])
    if options.reduce_e_grad and not placement.is_shard():
        return whole.to_local(), options
    # Sharded tokens need the sum of their own gradient only: a reduce-scatter by DTensor.
    return whole.to_local(grad_placements=[Partial()]), replace(options, reduce_e_grad=False)
