"""Chooses the implementation of a call and says what can run where."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cut_cross_entropy.device_support import kernels_unavailable, triton_is_interpreted
from cut_cross_entropy.distributed.collectives import combine_shards
from cut_cross_entropy.distributed.options import Shard
from cut_cross_entropy.implementations import full_logits, reference
from cut_cross_entropy.kernel_operators import cce_losses
from cut_cross_entropy.operators import chunked_losses
from cut_cross_entropy.options import KERNEL_IMPLS, CCEPreset, CCEPresets
from cut_cross_entropy.validation import check_target_range

FILTER_TOLERANCE = 8e-4
"""Root of the dropped energy beside that of the gradient, for ``filter_eps="auto"``.

On SmolLM2-135M's hidden states over real text the errors of dE and dC are 1.66 and 1.30 times that
of rounding an exact gradient to bfloat16 (1.53 and 1.24 without a filter; the limit is 2), and less
on the adversarial data of the tests (docs/engineering_log.md)."""

FULL_IMPLS = {"reference": reference, "torch_compile": full_logits}
"""Implementations of full logits, which PyTorch differentiates."""

AUTO_EPS = 2.0**-12
"""Apple's threshold for bfloat16 under "auto": a float ``filter_eps`` scales with it."""


def choose_impl(impl: str, device: torch.device, compute_dtype: torch.dtype) -> str:
    """The implementation that ``impl`` means for tensors on ``device``.

    An explicit name is returned as it is or refused; only ``"auto"`` chooses. The presets of the
    kernels run float32 and float64 as ``"chunked"``: full precision products are the library's.

    Raises:
        RuntimeError: ``impl`` cannot run there.
    """
    half = compute_dtype in (torch.bfloat16, torch.float16)
    if impl == "auto":
        usable = half and device.type == "cuda" and kernels_unavailable(device) is None
        return "cce" if usable else "chunked"
    if impl not in KERNEL_IMPLS:
        return impl
    unavailable = kernels_unavailable(device)
    if unavailable is None and triton_is_interpreted() and compute_dtype == torch.bfloat16:
        unavailable = "Triton's interpreter computes bfloat16 products wrongly"
    if unavailable is not None:
        raise RuntimeError(
            f"impl={impl!r} cannot run here: {unavailable}. "
            f"On {device.type} use impl='auto', 'chunked', 'torch_compile' or 'reference'"
        )
    if half or (triton_is_interpreted() and compute_dtype == torch.float32):
        return impl
    return "chunked"


def filter_tolerance(filter_eps: float | str | None) -> float:
    """Tolerance of the kernels' filter; 0 is no filter.

    ``"auto"`` is FILTER_TOLERANCE, ``"high"`` half of it, a float stands to it as to AUTO_EPS.
    """
    if filter_eps is None:
        return 0.0
    if filter_eps == "auto":
        return FILTER_TOLERANCE
    if filter_eps == "high":
        return FILTER_TOLERANCE / 2
    return FILTER_TOLERANCE * float(filter_eps) / AUTO_EPS


def token_losses(
    impl: str,
    e: Tensor,  # (N, D)
    c: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    *,
    ignore_index: int,
    softcap: float | None,
    compute_dtype: torch.dtype,
    memory_budget: int,
    kernel_options: CCEPreset,
    filter_mass: float = 1.0,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every token, each (N,), 0 for ignored tokens.

    With a ``shard`` the rows of ``c`` and ``bias`` are its classes; the results are those of all
    classes, and the gradient of ``e`` is the part that its classes have in it.
    """
    impl = choose_impl(impl, e.device, compute_dtype)
    if shard is not None and impl in FULL_IMPLS and c.shape[0] == 0:
        impl = "chunked"  # the sums of full logits need a class; the results are the same
    first_class, group = (0, None) if shard is None else (shard.start, shard.group)
    if impl == "chunked":
        nll, lse = chunked_losses(
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
        return nll, lse
    if impl in KERNEL_IMPLS:
        preset = CCEPresets.build_for_impl(impl, kernel_options)
        inputs = (e, c) if bias is None else (e, c, bias)
        # Each process drops its own strips; the budget is one for all of them, and energies add.
        parts = 1 if shard is None else shard.world_size
        nll, lse, *_ = cce_losses(
            e,
            c,
            targets,
            bias,
            ignore_index,
            softcap,
            compute_dtype,
            memory_budget,
            filter_tolerance(preset["filter_eps"]) / math.sqrt(parts),
            filter_mass / parts,
            preset["filter_e_grad"],
            preset["filter_c_grad"],
            torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
            first_class,
            group,
        )
        return nll, lse
    if shard is None and not torch.compiler.is_compiling():
        check_target_range(targets, c.shape[0], ignore_index)
    full: Callable[..., tuple[Tensor, Tensor]] = FULL_IMPLS[impl].target_logits_and_lse
    kept = targets != ignore_index
    # compute_dtype has its say already; meta tensors have no autocast to turn off.
    with torch.autocast("cpu" if e.is_meta else e.device.type, enabled=False):
        logit, lse = full(
            e,
            c,
            targets - first_class if first_class else targets,
            bias,
            kept,
            softcap=softcap,
            compute_dtype=compute_dtype,
        )
        if group is not None:
            logit, lse = combine_shards(logit, lse, group)
        nll = torch.where(logit == torch.inf, torch.nan, lse - logit)
        return torch.where(kept, nll, 0), torch.where(kept, lse, 0)
