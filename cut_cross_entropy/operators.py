"""The operators that PyTorch sees: schemas, fakes and autograd around the implementations.

An implementation with a backward of its own is a pair of ``torch.library`` operators. To the
compiler they are opaque, so ``torch.compile(fullgraph=True)``, activation checkpointing, fake
tensors and functional transforms treat them like any built-in operator. Outputs are per token
(``nll`` and ``lse``), which leaves the reductions to ordinary PyTorch and gives the gradient of the
logits its general form ``a * p - b * onehot``.
"""

from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.implementations import chunked

_INPUTS = (
    "Tensor e, Tensor c, Tensor targets, Tensor? bias, int ignore_index, float? softcap, "
    "ScalarType compute_dtype, int memory_budget"
)
SHARD_OPTIONS = "int first_class=0, str? group=None"
"""Of a classifier that is one shard: its first class, and the processes that hold the others."""


@torch.library.custom_op(
    "cut_cross_entropy::chunked",
    mutates_args=(),
    schema=f"({_INPUTS}, {SHARD_OPTIONS}) -> (Tensor, Tensor)",
)
def chunked_losses(
    e: Tensor,  # (N, D)
    c: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    ignore_index: int,
    softcap: float | None,
    compute_dtype: torch.dtype,
    memory_budget: int,
    first_class: int = 0,
    group: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``nll`` and ``lse``, each (N,), by the memory-bounded PyTorch implementation."""
    with torch.autocast(e.device.type, enabled=False):
        return chunked.forward(
            e,
            c,
            targets,
            bias,
            ignore_index,
            softcap,
            compute_dtype,
            memory_budget,
            first_class,
            group,
        )


@chunked_losses.register_fake
def _(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    compute_dtype: torch.dtype,
    memory_budget: int,
    first_class: int = 0,
    group: str | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(compute_dtype, torch.float32)
    return tuple(torch.empty(targets.shape, dtype=dtype, device=e.device) for _ in range(2))  # type: ignore[return-value]


@torch.library.custom_op(
    "cut_cross_entropy::chunked_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_nll, Tensor grad_lse, Tensor e, Tensor c, Tensor targets, Tensor? bias, "
        "Tensor lse, int ignore_index, float? softcap, ScalarType compute_dtype, "
        f"int memory_budget, bool need_e, bool need_c, bool need_bias, {SHARD_OPTIONS}) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)
def chunked_gradients(
    grad_nll: Tensor,  # (N,)
    grad_lse: Tensor,  # (N,)
    e: Tensor,  # (N, D)
    c: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    lse: Tensor,  # (N,)
    ignore_index: int,
    softcap: float | None,
    compute_dtype: torch.dtype,
    memory_budget: int,
    need_e: bool,
    need_c: bool,
    need_bias: bool,
    first_class: int = 0,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``e``, ``c`` and ``bias``; an empty tensor for each that is not needed."""
    with torch.autocast(e.device.type, enabled=False):
        return chunked.backward(
            grad_nll,
            grad_lse,
            e,
            c,
            targets,
            bias,
            lse,
            ignore_index,
            softcap,
            compute_dtype,
            memory_budget,
            need_e,
            need_c,
            need_bias,
            first_class,
            group,
        )


def fake_gradients(
    e: Tensor, c: Tensor, bias: Tensor | None, need_e: bool, need_c: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward operator returns, without values: an empty tensor for each not needed."""
    needed = ((e, need_e), (c, need_c), (bias, need_bias))
    grads = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x is not None and need
        else e.new_empty(0)
        for x, need in needed
    ]
    return grads[0], grads[1], grads[2]


@chunked_gradients.register_fake
def _(
    grad_nll: Tensor,
    grad_lse: Tensor,
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    softcap: float | None,
    compute_dtype: torch.dtype,
    memory_budget: int,
    need_e: bool,
    need_c: bool,
    need_bias: bool,
    first_class: int = 0,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(e, c, bias, need_e, need_c, need_bias)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    e, c, targets, bias, *settings = inputs
    ctx.settings, ctx.shard = settings[:-2], settings[-2:]
    nll, lse = output
    ctx.save_for_backward(e, c, targets, bias, lse, None if ctx.shard[1] is None else nll)


def _chunked_autograd(ctx: Any, grad_nll: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    e, c, targets, bias, lse, nll = ctx.saved_tensors
    need_e, need_c, _, need_bias = ctx.needs_input_grad[:4]
    if nll is not None:  # a shard alone cannot know that no other holds the target
        grad_nll = torch.where(nll.isnan(), nll, grad_nll)
    settings = (*ctx.settings, need_e, need_c, need_bias, *ctx.shard)
    grad_e, grad_c, grad_bias = chunked_gradients(
        grad_nll, grad_lse, e, c, targets, bias, lse, *settings
    )
    return (
        grad_e if need_e else None,
        grad_c if need_c else None,
        None,
        grad_bias if need_bias else None,
        *(None for _ in (*ctx.settings, *ctx.shard)),
    )


def refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    """The autograd formula of a backward operator: there is none."""
    raise NotImplementedError(
        "linear_cross_entropy has no second derivative in this implementation; "
        "impl='reference' has one"
    )


chunked_losses.register_autograd(_chunked_autograd, setup_context=_save_for_backward)
chunked_gradients.register_autograd(refuse_double_backward)
