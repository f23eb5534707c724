"""The operators of a sum of losses whose gradients are computed in the forward.

A per-token loss has to wait for the gradient of each token, and its backward computes the logits
again. The gradient of a sum is one number, so the forward can leave gradients that only have to be
multiplied by it: three products instead of four. They are kept in float32 (float64 for float64
inputs) until then, so they are rounded once.

As in ``cut_cross_entropy.operators`` the operators are opaque to the compiler.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cut_cross_entropy.device_support import kernels_unavailable
from cut_cross_entropy.flop_formulas import register_flop_formulas
from cut_cross_entropy.implementations import chunked, chunked_sum
from cut_cross_entropy.problem import (
    GRADIENTS_SCHEMA,
    NO_FILTER,
    NUM_FIELDS,
    Filter,
    Gradients,
    Needed,
    PerToken,
    Problem,
    SumGradients,
)
from cut_cross_entropy.transforms import (
    is_computed_again,
    is_transformed,
    refuse_second_derivative,
    transformable,
)

SCALED_BYTES = 16 * 2**20  # of a copy in float32 that PyTorch makes on a CPU to change the dtype

_WEIGHTS = "Tensor? weights"  # (N,) of dtype Problem.wide, 0 for ignored tokens
_SUMS = ", ".join(f"Tensor sum_{name}" for name in SumGradients._fields)


@dataclass(frozen=True)
class SumOptions:
    """Values that the operators of a sum have to compute and keep.

    Args:
        filter: which of the gradients the kernels filter; off for other implementations.
        needed: the gradients that a backward pass may ask for.
        keep_inputs: whether to save the inputs as well. Nothing reads them, but PyTorch then
            notices that they were modified, and what they depend on when it differentiates twice.
        loss_only: compute no gradient, because this forward will run again before a backward pass.
    """

    filter: Filter
    needed: Needed
    keep_inputs: bool
    loss_only: bool

    SCHEMA: ClassVar[str] = f"{Filter.SCHEMA}, {Needed.SCHEMA}, bool keep_inputs, bool loss_only"

    def flat(self) -> tuple[Any, ...]:
        """All fields in the order of the schema; PyTorch 2.7 cannot trace ``astuple``."""
        return *self.filter.flat(), *self.needed.flat(), self.keep_inputs, self.loss_only

    @classmethod
    def of(cls, flat: Sequence[Any]) -> "SumOptions":
        """Return the options from all values of the schema."""
        *of_filter, need_e, need_c, need_bias, keep_inputs, loss_only = flat
        return cls(Filter(*of_filter), Needed(need_e, need_c, need_bias), keep_inputs, loss_only)


_NUM_OPTIONS = len(SumOptions.SCHEMA.split(", "))
_SCHEMA = f"({Problem.SCHEMA}, {_WEIGHTS}, {SumOptions.SCHEMA}) -> ({_SUMS})"


def _arguments(flat: Sequence[Any]) -> tuple[Problem, Tensor | None, SumOptions]:
    """Return the problem, the weights of the losses and the options of a sum."""
    return Problem(*flat[:NUM_FIELDS]), flat[NUM_FIELDS], SumOptions.of(flat[NUM_FIELDS + 1 :])


@torch.library.custom_op("cut_cross_entropy::chunked_sum", mutates_args=(), schema=_SCHEMA)
def chunked_sums(*flat: Any) -> SumGradients:
    """Sum of the losses with its gradients by the memory-bounded PyTorch implementation."""
    problem, weights, options = _arguments(flat)
    with torch.autocast(problem.e.device.type, enabled=False):
        if options.loss_only:
            return _without_gradients(chunked.forward(problem), weights)
        return chunked_sum.loss_and_gradients(problem, options.needed, weights)


@torch.library.custom_op("cut_cross_entropy::cce_sum", mutates_args=(), schema=_SCHEMA)
def cce_sums(*flat: Any) -> SumGradients:
    """Sum of the losses with its gradients, at least one of them exact, by the kernels."""
    from cut_cross_entropy.kernels import exact_sum, step, warmup
    from cut_cross_entropy.kernels.launch import current_device

    problem, weights, options = _arguments(flat)
    with torch.autocast(problem.e.device.type, enabled=False), current_device(problem.e.device):
        if options.loss_only:
            warmup.compile_ahead(problem, NO_FILTER, training=False)
            state = step.forward(problem, NO_FILTER, training=True)
            return _without_gradients(PerToken(state.nll, state.lse), weights)
        arguments = (problem, options.needed, weights, options.filter)
        warmup.compile_sum_ahead(*arguments)
        return exact_sum.loss_and_gradients(*arguments)


def _without_gradients(results: PerToken, weights: Tensor | None) -> SumGradients:
    losses = results.nll if weights is None else results.nll * weights
    return SumGradients(losses.sum(), *(losses.new_empty(0) for _ in range(3)))


def _fake_sums(*flat: Any) -> SumGradients:
    problem, _, options = _arguments(flat)
    found = options.needed.flat() if not options.loss_only else (False, False, False)
    inputs = (problem.e, problem.c, problem.bias)

    def make(*shape: Any) -> Tensor:
        return torch.empty(shape, dtype=problem.wide, device=problem.e.device)

    return SumGradients(
        make(),
        *(
            make(*x.shape) if x is not None and need else make(0)
            for x, need in zip(inputs, found, strict=True)
        ),
    )


@torch.library.custom_op(
    "cut_cross_entropy::scaled",
    mutates_args=(),
    schema=(
        "(Tensor factor, Tensor? sum_e, Tensor? sum_c, Tensor? sum_bias, Tensor? e, Tensor? c, "
        "Tensor? bias, ScalarType? dtype_e, ScalarType? dtype_c, ScalarType? dtype_bias) "
        f"-> ({GRADIENTS_SCHEMA})"
    ),
)
def scaled_gradients(factor: Tensor, *flat: Any) -> Gradients:
    """Gradients of a sum times that of the sum itself, in their own dtypes.

    ``e``, ``c`` and ``bias`` are not read; a second derivative has to be refused because of them.
    """
    sums, dtypes = flat[:3], flat[6:]
    return Gradients(
        *(
            factor.new_empty(0) if total is None else _scaled(total, factor, dtype)
            for total, dtype in zip(sums, dtypes, strict=True)
        )
    )


def _scaled(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    result = torch.empty(total.shape, dtype=dtype, device=total.device)
    rows = len(total)
    if total.numel() == 0:
        return result
    if total.is_cuda and total.dtype == torch.float32 and not kernels_unavailable(total.device):
        from cut_cross_entropy.kernels import scale
        from cut_cross_entropy.kernels.launch import current_device

        with current_device(total.device):
            scale.scale(total, factor.float(), result)
        return result
    if dtype != total.dtype and not total.is_cuda:
        rows = max(1, SCALED_BYTES * rows // total.nbytes)
    for start in range(0, len(total), rows):
        part = slice(start, start + rows)
        torch.mul(total[part], factor, out=result[part])
    return result


@scaled_gradients.register_fake
def _(factor: Tensor, *flat: Any) -> Gradients:
    sums, dtypes = flat[:3], flat[6:]
    return Gradients(
        *(
            factor.new_empty(0) if total is None else torch.empty_like(total, dtype=dtype)
            for total, dtype in zip(sums, dtypes, strict=True)
        )
    )


scaled_gradients.register_autograd(refuse_second_derivative)
_call_scaled = transformable(scaled_gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    problem, _, options = _arguments(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros as large as the sums
    tensors = (problem.e, problem.c, problem.bias)
    ctx.dtypes = [None if x is None else x.dtype for x in tensors]
    sums = output[1:]
    if options.loss_only:
        # The checkpoint compares what the second forward saves with the first, by shape.
        sums = tuple(
            output[0].detach().expand(x.shape) if x is not None and need else empty
            for x, need, empty in zip(tensors, options.needed.flat(), output[1:], strict=True)
        )
    ctx.ignore_index = problem.ignore_index
    kept = tensors if options.keep_inputs else (None,) * 3
    ctx.save_for_backward(*sums, problem.targets, *kept)


def _backward(ctx: Any, grad_loss: Tensor, *nothing: Any) -> tuple[Any, ...]:
    # Read once: a checkpoint computes them again each time.
    *saved, targets, e, c, bias = ctx.saved_tensors
    # Of a batch without labels a model may ask for 0 / 0, whose gradients are 0 in PyTorch.
    grad_loss = torch.where((targets == ctx.ignore_index).all(), 0.0, grad_loss)
    need_e, need_c, _, need_bias = ctx.needs_input_grad[:4]
    needed = (need_e, need_c, need_bias)
    sums = [total if need else None for total, need in zip(saved, needed, strict=True)]
    grads = multiplied_sums(grad_loss, sums, (e, c, bias), ctx.dtypes)
    grad_e, grad_c, grad_bias = grads
    nothing_else = (None,) * (NUM_FIELDS - 4 + 1 + _NUM_OPTIONS)
    return grad_e, grad_c, None, grad_bias, *nothing_else


def multiplied_sums(
    factor: Tensor,
    sums: list[Tensor | None],
    inputs: tuple[Tensor | None, ...],
    dtypes: list[torch.dtype | None],
) -> list[Tensor | None]:
    """Gradients of e, c and bias: their sums times the gradient of the loss.

    Args:
        factor: gradient of the loss, ().
        sums: in float32 or wider; None for each that is not needed. May be overwritten.
        inputs: e, c and bias, because of which a second derivative has to be refused, or None.
        dtypes: of the results.
    """
    grads: list[Tensor | None] = [None, None, None]
    sums = list(sums)
    for i, (total, dtype) in enumerate(zip(sums, dtypes, strict=True)):
        if total is not None and _may_overwrite(total, factor, dtype):
            grads[i], sums[i] = total.mul_(factor), None
    if any(total is not None for total in sums):
        found = _call_scaled(factor, *sums, *inputs, *dtypes)
        grads = [
            grad if total is None else new
            for grad, total, new in zip(grads, sums, found, strict=True)
        ]
    return grads


def _may_overwrite(total: Tensor, factor: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether this backward is the last to read a sum, which then becomes the gradient."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return (
        keeps_graph is not None  # since PyTorch 2.5
        and type(total) is Tensor  # not within the compiler
        and total.dtype == dtype
        and not torch.is_grad_enabled()
        and not is_transformed()
        and not torch._C._functorch.is_legacy_batchedtensor(factor)  # is_grads_batched=True
        and not keeps_graph()
    )


for operator in (chunked_sums, cce_sums):
    operator.register_fake(_fake_sums)
    operator.register_autograd(_backward, setup_context=_save)


def run_chunked_sum(
    problem: Problem, needed: Needed, weights: Tensor | None, *, keep_inputs: bool
) -> Tensor:
    """Sum of all losses by the memory-bounded PyTorch implementation, (), differentiable.

    Args:
        problem: one for which :func:`chunked_sum.tokens_per_chunk` is not 0.
        needed: the gradients to compute.
        weights: (N,) of dtype :attr:`Problem.wide`, factors of the losses, 0 for ignored tokens;
            None for 1. They have no gradient.
        keep_inputs: see :class:`SumOptions`.
    """
    return _run(chunked_sums, problem, needed, weights, NO_FILTER, keep_inputs)


def run_kernel_sum(
    problem: Problem,
    needed: Needed,
    weights: Tensor | None,
    filter_: Filter,
    *,
    keep_inputs: bool,
) -> Tensor:
    """Sum of all losses by the kernels; as :func:`run_chunked_sum`.

    Args:
        problem: one for which :func:`powers_per_chunk` is not 0.
        needed, weights, keep_inputs: as there.
        filter_: which of the gradients are filtered, not all that are needed.
    """
    return _run(cce_sums, problem, needed, weights, filter_, keep_inputs)


def _run(
    operator: Any,
    problem: Problem,
    needed: Needed,
    weights: Tensor | None,
    filter_: Filter,
    keep_inputs: bool,
) -> Tensor:
    if not torch.compiler.is_compiling():
        register_flop_formulas()
    options = SumOptions(filter_, needed, keep_inputs, loss_only=is_computed_again())
    sums: tuple[Tensor, ...] = operator(*problem.flat(), weights, *options.flat())
    return sums[0]
