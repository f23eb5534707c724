"""Full logits under ``torch.compile``: ``impl="torch_compile"``.

The product runs in the compute dtype and the rest is fused by the compiler, so the logits exist
once in that dtype. Fast where the vocabulary is small beside the hidden size. Shape legend:
``cut_cross_entropy.implementations``.
"""

import functools
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from cut_cross_entropy.device_support import has_triton

MAX_VARIANTS = 128
"""Compilations of one function: dtypes, bias, softcap, needed gradients and layouts multiply."""


def target_logits_and_lse(
    e: Tensor,  # (N, D)
    c: Tensor,  # (V, D)
    targets: Tensor,  # (N,) counted from the first row of c
    bias: Tensor | None,  # (V,)
    kept: Tensor,  # (N,) bool
    *,
    softcap: float | None,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Logit of the target and log-sum-exp of every token, (N,) each.

    The logit is +inf where the target is no row of ``c``. Tokens that are not kept mean nothing.

    Raises:
        RuntimeError: ``torch.compile`` has no compiler to work with on this machine.
    """
    wide = torch.promote_types(compute_dtype, torch.float32)
    # Casts stay outside the compiled function: what they save for backward is the parameter
    # itself, and autograd returns the gradient in the parameter's own dtype.
    e, c = e.to(compute_dtype), c.to(compute_dtype)
    if bias is not None:
        bias = bias.to(wide)
    if torch.compiler.is_compiling():
        return _logits_and_lse(e, c, targets, bias, kept, softcap)
    missing = missing_compiler(e.device.type)
    if missing is not None:
        raise RuntimeError(
            f"impl='torch_compile' cannot run on {e.device.type} here: {missing}. "
            "Use impl='chunked', which needs no compiler"
        )
    from torch._dynamo import config  # here: it takes a second and imports Triton

    # PyTorch refuses a ninth compilation of a function, which ordinary use of the options reaches.
    with config.patch(cache_size_limit=MAX_VARIANTS):
        return _compiled()(e, c, targets, bias, kept, softcap)


def missing_compiler(device_type: str) -> str | None:
    """What ``torch.compile`` lacks on this machine for ``device_type``, or None."""
    if device_type == "cpu":
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++", "cl"]
        if not any(shutil.which(name) for name in names):
            return f"no C++ compiler was found (looked for {', '.join(names)})"
    elif device_type in ("cuda", "xpu") and not has_triton():
        return "Triton cannot be imported"
    return None


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_logits_and_lse, fullgraph=True, dynamic=True)


def _logits_and_lse(
    e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None, kept: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    here = (targets >= 0) & (targets < c.shape[0])

    # An ignored token contributes nothing, whatever its embedding holds (0 * NaN is NaN).
    logits = torch.where(kept[:, None], e, 0) @ c.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)

    safe = torch.where(here, targets, 0).long()
    logit = logits.gather(1, safe[:, None]).squeeze(1)
    return torch.where(here, logit, torch.inf), torch.logsumexp(logits, dim=1)
