"""The operators around the Triton kernels; see ``operators`` for what an operator is here.

The kernels are imported when one is first called, so importing this module needs no Triton.
"""

from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.constants import BLOCK_TOKENS
from cut_cross_entropy.operators import SHARD_OPTIONS, fake_gradients, refuse_double_backward

_OPTIONS = (
    "int ignore_index, float? softcap, ScalarType compute_dtype, int memory_budget, "
    "float tolerance, float filter_mass, bool filter_e, bool filter_c, bool training"
)


@torch.library.custom_op(
    "cut_cross_entropy::cce",
    mutates_args=(),
    schema=(
        f"(Tensor e, Tensor c, Tensor targets, Tensor? bias, {_OPTIONS}, {SHARD_OPTIONS}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def cce_losses(
    e: Tensor,  # (N, D)
    c: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    ignore_index: int,
    softcap: float | None,
    compute_dtype: torch.dtype,
    memory_budget: int,
    tolerance: float,
    filter_mass: float,
    filter_e: bool,
    filter_c: bool,
    training: bool,
    first_class: int = 0,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``nll`` and ``lse`` (N,), and what the backward needs of the forward.

    With a ``group`` the rows of ``c`` are the classes from ``first_class`` on.
    """
    from cut_cross_entropy.kernels import ahead, pipeline
    from cut_cross_entropy.kernels.config import launch_device

    with_energy = _with_energy(training, tolerance, filter_e, filter_c)
    with torch.autocast(e.device.type, enabled=False), launch_device(e.device):
        step = ahead.Step(
            e,
            c,
            targets,
            bias,
            ignore_index,
            softcap,
            compute_dtype,
            memory_budget,
            tolerance if with_energy else 0.0,
            filter_mass,
            training,
        )
        ahead.compile_ahead(step)
        return pipeline.forward(
            e,
            c,
            targets,
            bias,
            ignore_index,
            softcap,
            compute_dtype,
            with_energy=with_energy,
            compact=training,
            first_class=first_class,
            group=group,
        )


def _with_energy(training: bool, tolerance: float, filter_e: bool, filter_c: bool) -> bool:
    return training and tolerance > 0 and (filter_e or filter_c)


@cce_losses.register_fake
def _(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    compute_dtype: torch.dtype,
    memory_budget: int,
    tolerance: float,
    filter_mass: float,
    filter_e: bool,
    filter_c: bool,
    training: bool,
    first_class: int = 0,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens = targets.shape[0]
    nll, lse = (e.new_empty(num_tokens, dtype=torch.float32) for _ in range(2))
    if not _with_energy(training, tolerance, filter_e, filter_c):
        spread, shard = (e.new_empty(0, dtype=torch.float32) for _ in range(2))
        return nll, lse, e.new_empty(0, dtype=torch.uint8), spread, shard
    num_blocks = (num_tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    energy = e.new_empty((num_blocks, c.shape[0]), dtype=torch.uint8)
    spread = e.new_empty(num_tokens, dtype=torch.float32)
    return nll, lse, energy, spread, spread.new_empty(0 if group is None else num_tokens)


@torch.library.custom_op(
    "cut_cross_entropy::cce_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_nll, Tensor grad_lse, Tensor e, Tensor c, Tensor targets, Tensor? bias, "
        "Tensor nll, Tensor lse, Tensor energy, Tensor spread, Tensor shard, "
        f"{_OPTIONS}, bool need_e, bool need_c, bool need_bias, {SHARD_OPTIONS}) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)
def cce_gradients(
    grad_nll: Tensor,  # (N,)
    grad_lse: Tensor,  # (N,)
    e: Tensor,  # (N, D)
    c: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    nll: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    energy: Tensor,  # (blocks, V)
    spread: Tensor,  # (N,)
    shard: Tensor,  # (N,) or empty
    ignore_index: int,
    softcap: float | None,
    compute_dtype: torch.dtype,
    memory_budget: int,
    tolerance: float,
    filter_mass: float,
    filter_e: bool,
    filter_c: bool,
    training: bool,
    need_e: bool,
    need_c: bool,
    need_bias: bool,
    first_class: int = 0,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``e``, ``c`` and ``bias``; an empty tensor for each that is not needed."""
    from cut_cross_entropy.kernels import pipeline
    from cut_cross_entropy.kernels.config import launch_device

    with torch.autocast(e.device.type, enabled=False), launch_device(e.device):
        return pipeline.backward(
            grad_nll,
            grad_lse,
            e,
            c,
            targets,
            bias,
            nll,
            lse,
            energy,
            spread,
            shard,
            ignore_index,
            softcap,
            compute_dtype,
            memory_budget,
            tolerance,
            filter_mass,
            filter_e,
            filter_c,
            need_e,
            need_c,
            need_bias,
            first_class,
        )


@cce_gradients.register_fake
def _(
    grad_nll: Tensor,
    grad_lse: Tensor,
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    nll: Tensor,
    lse: Tensor,
    energy: Tensor,
    spread: Tensor,
    shard: Tensor,
    ignore_index: int,
    softcap: float | None,
    compute_dtype: torch.dtype,
    memory_budget: int,
    tolerance: float,
    filter_mass: float,
    filter_e: bool,
    filter_c: bool,
    training: bool,
    need_e: bool,
    need_c: bool,
    need_bias: bool,
    first_class: int = 0,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(e, c, bias, need_e, need_c, need_bias)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    e, c, targets, bias, *settings = inputs
    ctx.settings, ctx.shard = settings[:-2], settings[-2:]
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(e, c, targets, bias, *output)


def _cce_autograd(ctx: Any, grad_nll: Tensor, grad_lse: Tensor, *nothing: Any) -> tuple[Any, ...]:
    need_e, need_c, _, need_bias = ctx.needs_input_grad[:4]
    settings = (*ctx.settings, need_e, need_c, need_bias, *ctx.shard)
    grad_e, grad_c, grad_bias = cce_gradients(grad_nll, grad_lse, *ctx.saved_tensors, *settings)
    return (
        grad_e if need_e else None,
        grad_c if need_c else None,
        None,
        grad_bias if need_bias else None,
        *(None for _ in (*ctx.settings, *ctx.shard)),
    )


cce_losses.register_autograd(_cce_autograd, setup_context=_save_for_backward)
cce_gradients.register_autograd(refuse_double_backward)
