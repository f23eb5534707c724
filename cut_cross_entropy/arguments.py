"""From the arguments of a public function to the problem that the implementations see."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cut_cross_entropy.call_context import is_transformed, refuse_transforms
from cut_cross_entropy.device_support import current_autocast
from cut_cross_entropy.distributed.collectives import group_name
from cut_cross_entropy.distributed.data_parallel import Like, gather, gathered_again
from cut_cross_entropy.distributed.dtensor import refuse_dtensors, resolve
from cut_cross_entropy.distributed.embeddings import gather_tokens, own_tokens, share_tokens
from cut_cross_entropy.distributed.options import (
    DataParallelOptions,
    VocabParallelOptions,
    is_dtensor,
)
from cut_cross_entropy.heads.chunks import HeadProblem
from cut_cross_entropy.heads.compiled import joined
from cut_cross_entropy.heads.head import Head, Product
from cut_cross_entropy.heads.rows import ClassRows, requires_grad
from cut_cross_entropy.problem import Problem
from cut_cross_entropy.validation import (
    check_compute_dtypes,
    check_options,
    check_temperature,
    check_tensors,
)


@dataclass(frozen=True)
class Prepared:
    """A problem, and the way back from its tokens to those of the caller.

    Args:
        problem: of all tokens, flattened.
        targets: in the shape of the caller's, shifted; the last are ignored.
        shift: how many at the end of the last dimension have no target.
        shards: set if the classifier is one shard of the classes.
        world_size: processes that share the classes.
        wholes: DTensors and what was gathered of them.
    """

    problem: Problem
    targets: Tensor
    shift: int
    shards: VocabParallelOptions | None
    world_size: int
    wholes: list[tuple[Any, Tensor]]

    def computing(self) -> AbstractContextManager[None]:
        """Return the context in which to compute results of the problem."""
        return gathered_again(self.wholes) if self.wholes else nullcontext()

    def flatten(self, per_token: Tensor, fill: float) -> Tensor:
        """Return values in the shape of the caller's targets, with any more dimensions, by token.

        They are shifted as the targets are; ``fill`` stands for what is behind the last.
        """
        return _flatten(per_token, self.targets, self.shift, self.shards, fill)

    def per_token(self, values: Tensor) -> Tensor:
        """Return values (N, ...) of the problem's tokens in the shape of the caller's results."""
        if self.shards is not None and self.shards.gather_e:
            values = own_tokens(values, group_name(self.shards.group))
        values = values.reshape((*self.targets.shape, *values.shape[1:]))
        if self.shift:
            dim = self.targets.ndim - 1
            values = values.narrow(dim, 0, values.shape[dim] - self.shift)
        return values.clone()  # callers may change it in place; the backward needs the operator's


def prepare(
    e: Tensor,
    c: Tensor | Head,
    targets: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int,
    softcap: float | None,
    shift: bool | int,
    memory_budget: int,
    temperature: float | Tensor,
    logit_scale: float,
    vocab_parallel_options: VocabParallelOptions | None,
    data_parallel_options: DataParallelOptions | None,
    **others: Any,
) -> Prepared:
    """Check options and tensors, resolve DTensors, gather, shift and flatten.

    Args:
        e, c, targets, bias: as in :func:`linear_cross_entropy`, like the options.
        **others: options that are checked and not part of the problem; see :func:`check_options`.
    """
    head: Head | None = None
    if isinstance(c, Head):
        head = c
        _refuse_beside_head(head, bias, softcap, logit_scale)
        _refuse_head(head, vocab_parallel_options, data_parallel_options)
        bias, softcap, logit_scale = head.bias, head.softcap, head.logit_scale
        c = stand_in(head)
    check_options(
        ignore_index=ignore_index,
        softcap=softcap,
        shift=shift,
        memory_budget=memory_budget,
        logit_scale=logit_scale,
        **others,
    )
    refuse_dtensors(temperature=temperature)
    shift = int(shift)
    if not isinstance(ignore_index, (int, torch.SymInt)):  # of NumPy
        ignore_index = int(ignore_index)
    e, c, targets, bias, shards, data = resolve(
        e,
        c,
        targets,
        bias,
        vocab_parallel=vocab_parallel_options,
        data_parallel=data_parallel_options,
    )
    if shards is not None or data is not None:
        refuse_transforms()
    wholes: list[tuple[Any, Tensor]] = []
    if data is not None:
        dtype = data.param_dtype or _gathered_dtype(e, c)
        whole = gather(c, "c", Like(e.device, dtype), data)
        wholes.append((c, whole))
        c = whole
        if bias is not None and is_dtensor(bias):
            whole = gather(bias, "bias", Like(e.device, bias.dtype), data)
            wholes.append((bias, whole))
            bias = whole
        del whole
    num_classes = None if shards is None else shards.stop - shards.start
    check_tensors(
        e, c, targets, bias, ignore_index=ignore_index, shift=shift, num_classes=num_classes
    )
    check_temperature(temperature, targets)
    products: list[Product] = []
    frozen_columns = 0
    if head is not None:
        products = head.products(e)
        if not isinstance(head.weight, Tensor):
            e = e.to(c.dtype)  # as quantised modules do
        first, *further = products
        if not further and isinstance(first.rows, Tensor) and first.scale is None:
            e, c, products = first.features, first.rows, []  # a matrix after all
        # Frozen ones first; the compiler of PyTorch 2.4 cannot sort.
        trained = [p for p in products if requires_grad(p)]
        products = [p for p in products if not requires_grad(p)] + trained
    compute_dtype = _compute_dtype(e, c, bias)
    if products and torch.compiler.is_compiling():
        e, c, frozen_columns = joined(products, compute_dtype)
        products = []
    wide = torch.promote_types(compute_dtype, torch.float32)

    if shift:
        shift = min(shift, targets.shape[-1])
        # Shifting the targets instead of the embeddings copies N integers, not N x D features;
        # the last tokens of each sequence have no target and are ignored.
        targets = F.pad(targets[..., shift:], (0, shift), value=ignore_index)
    if products:
        tokens = products[0].features.reshape(-1, products[0].features.shape[-1])
    else:
        tokens = e.reshape(-1, e.shape[-1])
    flat_targets, shard = targets.reshape(-1), None
    if shards is not None:
        shard = shards.shard()
        tokens, flat_targets = share_tokens(
            tokens, flat_targets, ignore_index, compute_dtype, shards
        )
    multiplier: Tensor | None = None
    if isinstance(temperature, Tensor):
        # A temperature that is not above 0 gives NaN; on the CPU it was refused.
        inverse = logit_scale / torch.where(temperature > 0, temperature.to(wide), math.nan)
        multiplier = _flatten(inverse.expand(targets.shape), targets, shift, shards, 1.0)
    elif logit_scale / temperature != 1:
        value = logit_scale / float(temperature)
        multiplier = tokens.new_full(flat_targets.shape, value, dtype=wide)
    problem = Problem(
        tokens,
        c,
        flat_targets,
        bias,
        ignore_index=ignore_index,
        # s * softcap(y; t) is softcap(s * y; s * t): see Problem.multiplier
        softcap=None if softcap is None else float(softcap) / abs(logit_scale),
        compute_dtype=compute_dtype,
        memory_budget=memory_budget,
        first_class=0 if shard is None else shard.start,
        group=None if shard is None else shard.group,
        frozen_columns=frozen_columns,
        multiplier=multiplier,
    )
    if products:
        rows = ClassRows(products, compute_dtype)
        place = torch.empty((), dtype=compute_dtype, device=c.device)
        given = vars(problem) | {"c": place.expand(rows.num_classes, rows.width)}
        problem = HeadProblem(**given, rows=rows, anchor=rows.anchor(), products=tuple(products))
    world_size = 1 if shard is None else shard.world_size
    return Prepared(problem, targets, shift, shards, world_size=world_size, wholes=wholes)


def stand_in(head: Tensor | Head) -> Tensor:
    """Return a tensor with the shape, dtype and device of a head's weight: what checks look at."""
    if not isinstance(head, Head):
        return head
    place = torch.empty((), dtype=head.weight.dtype, device=head.weight.device)
    return place.expand(tuple(head.weight.shape))


def _flatten(
    values: Tensor,
    targets: Tensor,
    shift: int,
    shards: VocabParallelOptions | None,
    fill: float,
) -> Tensor:
    if shift:
        dim = targets.ndim - 1
        values = values.narrow(dim, shift, values.shape[dim] - shift)
        values = F.pad(values, [0, 0] * (values.ndim - targets.ndim) + [0, shift], value=fill)
    values = values.reshape((targets.numel(), *values.shape[targets.ndim :]))
    if shards is not None and shards.gather_e:
        values = gather_tokens(values, group_name(shards.group))
    return values


def _refuse_beside_head(
    head: Head, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> None:
    """Refuse options that a head has itself.

    Raises:
        ValueError: one was given.
    """
    for name, is_given in (
        ("bias", bias is not None),
        ("softcap", softcap is not None),
        ("logit_scale", logit_scale != 1),
    ):
        if is_given:
            raise ValueError(
                f"{name} must not be given in addition to a Head: pass Head({name}=...) instead"
            )


def _refuse_head(
    head: Head,
    vocab_parallel_options: VocabParallelOptions | None,
    data_parallel_options: DataParallelOptions | None,
) -> None:
    """Refuse what a head cannot be combined with.

    Raises:
        NotImplementedError: classes that are spread over processes, or a transform of
            ``torch.func``.
    """
    parts = [head.weight, head.bias, head.class_scale]
    parts += [x for low in head.low_rank for x in (low.a, low.b, low.magnitude)]
    for name, is_given in (
        ("vocab_parallel_options", vocab_parallel_options is not None),
        ("data_parallel_options", data_parallel_options is not None),
        ("a DTensor", any(is_dtensor(x) for x in parts)),
    ):
        if is_given:
            raise NotImplementedError(
                f"{name} is not supported with a Head, whose parts have to be on every process: "
                "gather them, or merge the adapters and pass the matrix"
            )
    if is_transformed():
        raise NotImplementedError(
            "a Head cannot be transformed by torch.func or differentiated in forward mode: merge "
            "the adapters and pass the matrix"
        )


def _gathered_dtype(e: Tensor, c: Tensor) -> torch.dtype:
    """The dtype to gather a classifier in: that of the product, if it is narrower."""
    autocast = current_autocast(e.device.type)
    if autocast is not None:
        return autocast
    return e.dtype if e.dtype.itemsize < c.dtype.itemsize else c.dtype


def _compute_dtype(e: Tensor, c: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype of the product: that of autocast, which leaves float64 alone, or of the inputs."""
    autocast = current_autocast(e.device.type)
    check_compute_dtypes(e, c, bias, autocast is not None)
    if autocast is not None and torch.float64 not in (e.dtype, c.dtype):
        return autocast
    return torch.promote_types(e.dtype, c.dtype)
