"""Full logits under ``torch.compile``: ``impl="torch_compile"``.

The product runs in the compute dtype and the rest is fused by the compiler, so the logits exist
once in that dtype. Fast where the vocabulary is small compared with the hidden size. Shape
legend: ``cut_cross_entropy.implementations``.
"""

import functools
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function

from cut_cross_entropy.call_context import is_transformed
from cut_cross_entropy.device_support import has_triton
from cut_cross_entropy.problem import Problem
from cut_cross_entropy.refusals import refuse_to_differentiate

MAX_VARIANTS = 128
"""Compilations of one function: dtypes, bias, softcap, needed gradients and layouts multiply."""


def target_logits_and_lse(problem: Problem) -> tuple[Tensor, Tensor]:
    """Logit of the target and log-sum-exp of every token, (N,) each.

    The logit is +inf where the target is not a row of ``c``. Values of tokens that are not kept
    are undefined.

    Raises:
        RuntimeError: ``torch.compile`` has no compiler to work with on this machine.
    """
    # Casts stay outside the compiled function: what they save for backward is the parameter
    # itself, and autograd returns the gradient in the parameter's own dtype.
    e, c = (x.to(problem.compute_dtype) for x in (problem.e, problem.c))
    bias = None if problem.bias is None else problem.bias.to(problem.wide)
    kept = problem.targets != problem.ignore_index
    inputs = (e, c, problem.local_targets, bias, kept, problem.multiplier, problem.softcap)
    # Within a compiled function it is part of that; compiled code has no rules for transforms, and
    # would read values where there are none.
    if torch.compiler.is_compiling() or is_transformed() or e.is_meta or isinstance(e, FakeTensor):
        return _logits_and_lse(*inputs)
    missing = missing_compiler(e.device.type)
    if missing is not None:
        raise RuntimeError(
            f"impl='torch_compile' cannot run on {e.device.type} here: {missing}. "
            "Use impl='chunked', which needs no compiler"
        )
    if hasattr(torch._C._autograd, "_get_current_graph_task_keep_graph"):
        return _Compiled.apply(*inputs)  # type: ignore[no-any-return]
    return _run_compiled(*inputs)  # PyTorch 2.4 donates no buffers


class _Compiled(Function):
    """The compiled function, with a backward pass that can be repeated.

    Compiled backward passes overwrite what the forward saved for them ("donated buffers"), which
    halves their memory, and PyTorch refuses to retain the graph then. A pass that retains it
    computes the logits again instead.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        if not any(ctx.needs_input_grad):
            return _run_compiled(*inputs)
        leaves, results = _differentiable(inputs, ctx.needs_input_grad)
        for leaf in leaves:  # what the backward needs of them is saved, where hooks may move it
            leaf.data = leaf.new_empty(0)
        ctx.graph = leaves, results
        ctx.inputs = [None if isinstance(x, Tensor) else (x,) for x in inputs]
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        return tuple(x.detach() for x in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        leaves, results = ctx.graph
        retained = torch._C._autograd._get_current_graph_task_keep_graph()
        # Reading them refuses inputs that were modified in place since the forward.
        saved = ctx.saved_tensors if retained or torch.is_grad_enabled() else ()
        if retained:
            tensors = iter(saved)
            inputs = [next(tensors) if x is None else x[0] for x in ctx.inputs]
            leaves, results = _differentiable(inputs, ctx.needs_input_grad)
        found = torch.autograd.grad(results, leaves, grads)
        if torch.is_grad_enabled():
            found = refuse_to_differentiate(found, (*grads, *saved))
        remaining = iter(found)
        return tuple(next(remaining) if need else None for need in ctx.needs_input_grad)


def _differentiable(
    inputs: Sequence[Any], needed: Sequence[bool]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Results with a graph of their own, and the leaves of those that are ``needed``."""
    leaves = [x.detach().requires_grad_() for x, need in zip(inputs, needed, strict=True) if need]
    with torch.enable_grad(), torch.autocast(leaves[0].device.type, enabled=False):
        # Views: autograd would save the leaves themselves, whatever happens to their memory.
        views = iter([leaf.view_as(leaf) for leaf in leaves])
        args = [next(views) if need else x for x, need in zip(inputs, needed, strict=True)]
        return leaves, _run_compiled(*args)


def _run_compiled(*inputs: Any) -> tuple[Tensor, Tensor]:
    from torch._dynamo import config  # here: it takes a second and imports Triton

    # PyTorch refuses a ninth compilation of a function, which ordinary use of the options reaches.
    with config.patch(cache_size_limit=MAX_VARIANTS):
        return _compiled()(*inputs)


def missing_compiler(device_type: str) -> str | None:
    """Name what ``torch.compile`` lacks on this machine for ``device_type``, or return None."""
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
    e: Tensor,
    c: Tensor,
    targets: Tensor,  # counted from the first row of c
    bias: Tensor | None,
    kept: Tensor,  # (N,) bool
    multiplier: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    here = (targets >= 0) & (targets < c.shape[0])

    # An ignored token contributes nothing, whatever its embedding holds (0 * NaN is NaN).
    logits = torch.where(kept[:, None], e, 0) @ c.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if multiplier is not None:
        logits = logits * multiplier[:, None]

    safe = torch.where(here, targets, 0).long()
    logit = logits.gather(1, safe[:, None]).squeeze(1)
    return torch.where(here, logit, torch.inf), torch.logsumexp(logits, dim=1)
