"""Chooses the implementation of a call and says what can run where."""

from collections.abc import Callable

import torch
from torch import Tensor

from cut_cross_entropy.device_support import kernels_unavailable
from cut_cross_entropy.implementations import full_logits, reference
from cut_cross_entropy.operators import chunked_losses
from cut_cross_entropy.options import KERNEL_IMPLS, CCEPreset
from cut_cross_entropy.validation import check_target_range


def choose_impl(impl: str, device: torch.device) -> str:
    """The implementation that ``impl`` means for tensors on ``device``.

    An explicit name is returned as it is or refused; only ``"auto"`` chooses.

    Raises:
        RuntimeError: ``impl`` cannot run there.
    """
    if impl == "auto":
        return "chunked"
    if impl in KERNEL_IMPLS:
        reason = kernels_unavailable(device.type) or "the kernels are not part of this release"
        raise RuntimeError(
            f"impl={impl!r} cannot run here: {reason}. "
            f"On {device.type} use impl='auto', 'chunked', 'torch_compile' or 'reference'"
        )
    return impl


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
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every token, each (N,), 0 for ignored tokens."""
    impl = choose_impl(impl, e.device)
    if impl == "chunked":
        nll, lse = chunked_losses(
            e, c, targets, bias, ignore_index, softcap, compute_dtype, memory_budget
        )
        return nll, lse
    if not torch.compiler.is_compiling():
        check_target_range(targets, c.shape[0], ignore_index)
    full: Callable[..., tuple[Tensor, Tensor]] = (
        reference.token_losses if impl == "reference" else full_logits.token_losses
    )
    # compute_dtype has its say already; meta tensors have no autocast to turn off.
    with torch.autocast("cpu" if e.is_meta else e.device.type, enabled=False):
        return full(
            e,
            c,
            targets,
            bias,
            ignore_index=ignore_index,
            softcap=softcap,
            compute_dtype=compute_dtype,
        )
