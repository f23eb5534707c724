"""The operators of ``token_logprobs``: schemas, fakes and autograd around the implementations.

As in ``cut_cross_entropy.operators``. Here are the sums over the classes of each token in bounded
memory, the logits of a few classes, and the mean row of a classifier.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.distributed.collectives import sum_over_group
from cut_cross_entropy.implementations import chunked_outputs, class_logits
from cut_cross_entropy.implementations.blocks import slices
from cut_cross_entropy.operators import fake_gradients, fake_state
from cut_cross_entropy.outputs import (
    NUM_DIFFERENTIABLE,
    Asked,
    OutputGrads,
    SavedOutputs,
    TokenOutputs,
)
from cut_cross_entropy.problem import (
    GRADIENTS_SCHEMA,
    MULTIPLIER,
    NUM_FIELDS,
    Filter,
    Gradients,
    KernelState,
    Needed,
    PerToken,
    Problem,
)
from cut_cross_entropy.transforms import refusal_of_both, transformable

_NUM_FILTER = len(fields(Filter))
_SAVED = ", ".join(f"Tensor {name}" for name in SavedOutputs._fields)
_RESULTS = ", ".join(f"Tensor {name}" for name in TokenOutputs._fields)
_UPSTREAM = ", ".join(f"Tensor? grad_{name}" for name in OutputGrads._fields)
_NUM_SAVED = len(SavedOutputs._fields)
_refuse = refusal_of_both("token_logprobs")


def _single(operator: Any) -> Any:
    """An operator with one result as a function that returns a tuple."""
    return lambda *flat: (operator(*flat),)


@torch.library.custom_op(
    "cut_cross_entropy::token_outputs",
    mutates_args=(),
    schema=f"({Problem.SCHEMA}, Tensor? weights, {Asked.SCHEMA}) -> ({_RESULTS})",
)
def token_outputs(*flat: Any) -> TokenOutputs:
    """Sums over the classes of each token; see ``chunked_outputs.forward``."""
    problem, weights, asked = _parts(flat)
    with torch.autocast(problem.e.device.type, enabled=False):
        return chunked_outputs.forward(problem, asked, weights)


def _parts(flat: tuple[Any, ...]) -> tuple[Problem, Tensor | None, Asked]:
    return Problem(*flat[:NUM_FIELDS]), flat[NUM_FIELDS], Asked(*flat[NUM_FIELDS + 1 :])


@token_outputs.register_fake
def _(*flat: Any) -> TokenOutputs:
    problem, _, asked = _parts(flat)
    num_tokens = problem.targets.shape[0]

    def empty(wanted: bool, dtype: torch.dtype = problem.wide) -> Tensor:
        return problem.e.new_empty(num_tokens if wanted else 0, dtype=dtype)

    return TokenOutputs(
        empty(True),
        empty(True),
        empty(asked.entropy),
        empty(asked.log_sum_sq),
        empty(asked.mean_logit),
        empty(asked.rank, torch.int32),
        empty(asked.max_logit),
        problem.e.new_empty((num_tokens, asked.top_k), dtype=torch.int64),
        problem.e.new_empty((num_tokens, asked.top_k), dtype=problem.wide),
    )


@torch.library.custom_op(
    "cut_cross_entropy::token_outputs_backward",
    mutates_args=(),
    schema=(
        f"({_UPSTREAM}, {_SAVED}, {Problem.SCHEMA}, Tensor? weights, {Needed.SCHEMA}) "
        f"-> ({GRADIENTS_SCHEMA})"
    ),
)
def token_outputs_backward(*flat: Any) -> Gradients:
    """Gradients of the inputs of :func:`token_outputs`; empty where not needed."""
    grads, saved, problem, weights, needed = _backward_parts(flat)
    with torch.autocast(problem.e.device.type, enabled=False):
        return chunked_outputs.backward(grads, saved, problem, weights, needed)


def _backward_parts(
    flat: tuple[Any, ...],
) -> tuple[OutputGrads, SavedOutputs, Problem, Tensor | None, Needed]:
    first = NUM_DIFFERENTIABLE + _NUM_SAVED
    saved = SavedOutputs(*flat[NUM_DIFFERENTIABLE:first])
    problem = Problem(*flat[first : first + NUM_FIELDS])
    return OutputGrads(*flat[:NUM_DIFFERENTIABLE]), saved, problem, flat[-4], Needed(*flat[-3:])


@token_outputs_backward.register_fake
def _(*flat: Any) -> Gradients:
    _, _, problem, _, needed = _backward_parts(flat)
    return fake_gradients(problem, needed)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], *results: Tensor) -> None:
    """Save a problem, further inputs of which the first is a tensor, and results."""
    tensors = (*inputs[:4], inputs[MULTIPLIER], inputs[NUM_FIELDS])
    ctx.options, ctx.further = inputs[4:MULTIPLIER], len(inputs)
    ctx.save_for_backward(*tensors, *results)
    ctx.set_materialize_grads(False)


def _saved_inputs(ctx: Any) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """Return the problem with the tensor that follows it, and the saved results."""
    saved = ctx.saved_tensors  # once: a checkpoint computes them again each time
    return (*saved[:4], *ctx.options, *saved[4:6]), saved[6:]


def _needed(ctx: Any) -> tuple[bool, bool, bool]:
    need_e, need_c, _, need_bias = ctx.needs_input_grad[:4]
    return need_e, need_c, need_bias


def _input_gradients(ctx: Any, found: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Gradients of all inputs of an operator whose first four are those of a problem."""
    e, c, bias = (grad if need else None for grad, need in zip(found, _needed(ctx), strict=True))
    return (e, c, None, bias, *(None for _ in range(ctx.further - 4)))


def _save_outputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[NUM_DIFFERENTIABLE:])
    asked = Asked(*inputs[NUM_FIELDS + 1 :])
    ctx.asked = (True, True, asked.entropy, asked.log_sum_sq, asked.mean_logit)
    _save_inputs(ctx, inputs, *output[:_NUM_SAVED])


def _outputs_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    inputs, saved = _saved_inputs(ctx)
    asked = [
        grad if asked else None
        for grad, asked in zip(grads[:NUM_DIFFERENTIABLE], ctx.asked, strict=True)
    ]
    found = _call_outputs_backward(*asked, *saved, *inputs, *_needed(ctx))
    return _input_gradients(ctx, found)


token_outputs.register_autograd(_outputs_autograd, setup_context=_save_outputs)
token_outputs_backward.register_autograd(_refuse)
_call_outputs_backward = transformable(token_outputs_backward, backward=_refuse, jvp=_refuse)
_call_outputs = transformable(
    token_outputs, setup_context=_save_outputs, backward=_outputs_autograd, jvp=_refuse
)


def run_outputs(problem: Problem, asked: Asked, weights: Tensor | None = None) -> TokenOutputs:
    """Sums over the classes by the memory-bounded PyTorch implementation, differentiable.

    Args:
        problem: the inputs.
        asked: the sums to compute.
        weights: (V,) of the logits in their mean, in :attr:`Problem.wide`.
    """
    return TokenOutputs(*_call_outputs(*problem.flat(), weights, *asked.flat()))


_STATE = ", ".join(f"Tensor {name}" for name in KernelState._fields)
_NUM_STATE, _NUM_ASKED = len(KernelState._fields), len(Asked().flat())
_FURTHER = ("entropy", "log_sum_sq", "rank", "max_logit")


@torch.library.custom_op(
    "cut_cross_entropy::cce_outputs",
    mutates_args=(),
    schema=(
        f"({Problem.SCHEMA}, {Asked.SCHEMA}, {Filter.SCHEMA}, bool training) -> "
        f"({_STATE}, {', '.join(f'Tensor {name}' for name in _FURTHER)})"
    ),
)
def kernel_outputs(*flat: Any) -> tuple[Tensor, ...]:
    """Sums over the classes of each token by the kernels, and what their backward needs."""
    from cut_cross_entropy.kernels import step
    from cut_cross_entropy.kernels.launch import current_device

    problem, asked, filter_ = _kernel_parts(flat)
    with torch.autocast(problem.e.device.type, enabled=False), current_device(problem.e.device):
        state, further = step.forward_outputs(problem, filter_, flat[-1], asked)
    return (*state, *further)


def _kernel_parts(flat: tuple[Any, ...]) -> tuple[Problem, Asked, Filter]:
    """Return the parts of the arguments of :func:`kernel_outputs`."""
    stop = NUM_FIELDS + _NUM_ASKED
    return (
        Problem(*flat[:NUM_FIELDS]),
        Asked(*flat[NUM_FIELDS:stop]),
        Filter(*flat[stop : stop + _NUM_FILTER]),
    )


@kernel_outputs.register_fake
def _(*flat: Any) -> tuple[Tensor, ...]:
    problem, asked, filter_ = _kernel_parts(flat)
    state = fake_state(problem, filter_, flat[-1])
    lse, nothing = state.lse, state.lse.new_empty(0)
    return (
        *state,
        torch.empty_like(lse) if asked.entropy else nothing,
        torch.empty_like(lse) if asked.log_sum_sq else nothing.clone(),
        (torch.empty_like(lse) if asked.rank else nothing).int(),
        torch.empty_like(lse) if asked.max_logit else nothing.clone(),
    )


@torch.library.custom_op(
    "cut_cross_entropy::cce_outputs_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad_nll, Tensor grad_lse, Tensor? eta, Tensor? q, {_STATE}, {Problem.SCHEMA}, "
        f"{Filter.SCHEMA}, {Needed.SCHEMA}) -> ({GRADIENTS_SCHEMA})"
    ),
)
def kernel_outputs_backward(
    grad_nll: Tensor, grad_lse: Tensor, eta: Tensor | None, q: Tensor | None, *flat: Any
) -> Gradients:
    """Gradients of the inputs of :func:`kernel_outputs`; empty where not needed."""
    from cut_cross_entropy.kernels import step
    from cut_cross_entropy.kernels.launch import current_device

    state = KernelState(*flat[:_NUM_STATE])
    problem = Problem(*flat[_NUM_STATE : _NUM_STATE + NUM_FIELDS])
    filter_, needed = Filter(*flat[-3 - _NUM_FILTER : -3]), Needed(*flat[-3:])
    upstream = PerToken(grad_nll, grad_lse)
    with torch.autocast(problem.e.device.type, enabled=False), current_device(problem.e.device):
        return step.backward(upstream, state, problem, filter_, needed, eta, q)


@kernel_outputs_backward.register_fake
def _(
    grad_nll: Tensor, grad_lse: Tensor, eta: Tensor | None, q: Tensor | None, *flat: Any
) -> Gradients:
    problem = Problem(*flat[_NUM_STATE : _NUM_STATE + NUM_FIELDS])
    return fake_gradients(problem, Needed(*flat[-3:]))


def _save_kernel_outputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Gradients have the results nll, lse, entropy and log_sum_sq.
    ctx.mark_non_differentiable(*output[2:_NUM_STATE], *output[_NUM_STATE + 2 :])
    tensors = (*inputs[:4], inputs[MULTIPLIER])
    ctx.options, ctx.further = inputs[4:MULTIPLIER], len(inputs)
    ctx.filter = inputs[NUM_FIELDS + _NUM_ASKED : -1]
    ctx.save_for_backward(*tensors, *output[: _NUM_STATE + 2])
    ctx.set_materialize_grads(False)


def _kernel_outputs_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: a checkpoint computes them again each time
    flat = (*saved[:4], *ctx.options, saved[4])
    state, (entropy, log_sum_sq) = saved[5 : 5 + _NUM_STATE], saved[5 + _NUM_STATE :]
    nll, lse, g_entropy, g_squares = (*grads[:2], *grads[_NUM_STATE : _NUM_STATE + 2])
    zero = torch.zeros_like(state[1])
    nll, lse = (zero if x is None else x for x in (nll, lse))
    eta = q = None
    if g_entropy is not None and entropy.numel() == zero.numel():
        eta = -g_entropy
        lse = lse + eta * entropy
    if g_squares is not None and log_sum_sq.numel() == zero.numel():
        lse = lse - 2 * g_squares
        q = 2 * g_squares * torch.exp(-log_sum_sq)
    found = _call_kernel_backward(nll, lse, eta, q, *state, *flat, *ctx.filter, *_needed(ctx))
    return _input_gradients(ctx, found)


kernel_outputs.register_autograd(_kernel_outputs_autograd, setup_context=_save_kernel_outputs)
kernel_outputs_backward.register_autograd(_refuse)
_call_kernel_backward = transformable(kernel_outputs_backward, backward=_refuse, jvp=_refuse)
_call_kernel_outputs = transformable(
    kernel_outputs,
    setup_context=_save_kernel_outputs,
    backward=_kernel_outputs_autograd,
    jvp=_refuse,
)


def run_kernel_outputs(problem: Problem, asked: Asked, filter_: Filter) -> TokenOutputs:
    """Sums over the classes by the kernels, differentiable.

    Args:
        problem: the inputs, without a group.
        asked: the sums to compute; neither a mean logit nor the likeliest classes.
        filter_: which part of the gradient may be skipped.
    """
    training = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (problem.e, problem.c, problem.bias)
    )
    results = _call_kernel_outputs(*problem.flat(), *asked.flat(), *filter_.flat(), training)
    nll, lse, *_ = results
    entropy, log_sum_sq, rank, max_logit = results[_NUM_STATE:]
    no_class = lse.new_empty((lse.shape[0], 0))
    return TokenOutputs(
        nll,
        lse,
        entropy,
        log_sum_sq,
        lse.new_empty(0),
        rank,
        max_logit,
        no_class.long(),
        no_class,
    )


@torch.library.custom_op(
    "cut_cross_entropy::class_logits",
    mutates_args=(),
    schema=f"({Problem.SCHEMA}, Tensor ids) -> Tensor",
)
def logits_of_classes(*flat: Any) -> Tensor:
    """Logits of a few classes of each token; see ``class_logits.forward``."""
    problem = Problem(*flat[:NUM_FIELDS])
    with torch.autocast(problem.e.device.type, enabled=False):
        return class_logits.forward(problem, flat[NUM_FIELDS])


@logits_of_classes.register_fake
def _(*flat: Any) -> Tensor:
    problem = Problem(*flat[:NUM_FIELDS])
    return problem.e.new_empty(flat[NUM_FIELDS].shape, dtype=problem.wide)


@torch.library.custom_op(
    "cut_cross_entropy::class_logits_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {Problem.SCHEMA}, Tensor ids, {Needed.SCHEMA}) -> ({GRADIENTS_SCHEMA})",
)
def class_logits_backward(grad: Tensor, *flat: Any) -> Gradients:
    """Gradients of the inputs of :func:`logits_of_classes`; empty where not needed."""
    problem, ids, needed = Problem(*flat[:NUM_FIELDS]), flat[NUM_FIELDS], Needed(*flat[-3:])
    with torch.autocast(problem.e.device.type, enabled=False):
        return class_logits.backward(grad, problem, ids, needed)


@class_logits_backward.register_fake
def _(grad: Tensor, *flat: Any) -> Gradients:
    return fake_gradients(Problem(*flat[:NUM_FIELDS]), Needed(*flat[-3:]))


def _save_class_logits(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save_inputs(ctx, inputs)


def _class_logits_autograd(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return tuple(None for _ in range(ctx.further))
    inputs, _ = _saved_inputs(ctx)
    found = _call_class_logits_backward(grad, *inputs, *_needed(ctx))
    return _input_gradients(ctx, found)


logits_of_classes.register_autograd(_class_logits_autograd, setup_context=_save_class_logits)
_call_class_logits = transformable(
    _single(logits_of_classes),
    setup_context=_save_class_logits,
    backward=_class_logits_autograd,
    jvp=_refuse,
)
class_logits_backward.register_autograd(_refuse)
_call_class_logits_backward = transformable(class_logits_backward, backward=_refuse, jvp=_refuse)


def run_class_logits(problem: Problem, ids: Tensor) -> Tensor:
    """Logits of the classes ``ids`` (N, K), differentiable; see ``class_logits.forward``."""
    return _call_class_logits(*problem.flat(), ids)[0]


@torch.library.custom_op(
    "cut_cross_entropy::mean_row",
    mutates_args=(),
    schema="(Tensor c, Tensor weights, ScalarType dtype, int memory_budget) -> Tensor",
)
def weighted_sum_of_rows(
    c: Tensor, weights: Tensor, dtype: torch.dtype, memory_budget: int
) -> Tensor:
    """``weights @ c`` (D,) in the dtype of the weights (V,), of c rounded to ``dtype``."""
    total = weights.new_zeros(c.shape[1])
    rows = max(1, memory_budget // (2 * c.shape[1] * weights.element_size()))
    for some in slices(c.shape[0], rows):
        total += weights[some] @ c[some].to(dtype).to(weights.dtype)
    return total


@weighted_sum_of_rows.register_fake
def _(c: Tensor, weights: Tensor, dtype: torch.dtype, memory_budget: int) -> Tensor:
    return weights.new_empty(c.shape[1])


@torch.library.custom_op(
    "cut_cross_entropy::mean_row_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor weights, ScalarType dtype) -> Tensor",
)
def outer_product(grad: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """``weights * grad`` (V, D) of (V,) and (D,), rounded once."""
    out = torch.empty((weights.shape[0], grad.shape[0]), dtype=dtype, device=grad.device)
    return torch.mul(weights[:, None], grad, out=out)


@outer_product.register_fake
def _(grad: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty((weights.shape[0], grad.shape[0]), dtype=dtype)


def _save_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(inputs[1])


def _mean_row_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (weights,) = ctx.saved_tensors
    (grad_c,) = _call_outer_product(grad, weights, ctx.dtype)
    return grad_c, None, None, None


weighted_sum_of_rows.register_autograd(_mean_row_autograd, setup_context=_save_weights)
outer_product.register_autograd(_refuse)
_call_outer_product = transformable(_single(outer_product), backward=_refuse, jvp=_refuse)
_call_mean_row = transformable(
    _single(weighted_sum_of_rows),
    setup_context=_save_weights,
    backward=_mean_row_autograd,
    jvp=_refuse,
)


def mean_logits_of_rank_one(problem: Problem, weights: Tensor) -> Tensor:
    """Weighted mean of the logits of each token, (N,), without a walk; 0 for ignored tokens.

    Without a softcap it is the logit of one row, the mean of those of c, and its gradient has rank
    one.

    Args:
        problem: without a softcap.
        weights: (V,) in :attr:`Problem.wide`, of the classes in the mean.
    """
    wide, dtype = problem.wide, problem.compute_dtype
    row = _call_mean_row(problem.c, weights, dtype, problem.memory_budget)[0]
    kept = problem.targets != problem.ignore_index
    with torch.autocast(problem.e.device.type, enabled=False):
        # An ignored token contributes nothing, whatever its embedding holds (0 * NaN is NaN).
        e = torch.where(kept[:, None], problem.e, 0).to(dtype).to(wide)
        mean = (e * row).sum(1)
        if problem.bias is not None:
            mean = mean + (problem.bias.to(wide) * weights).sum()
        if problem.multiplier is not None:
            mean = mean * problem.multiplier
        if problem.group is not None:
            mean = sum_shards(mean, problem.group)
        return torch.where(kept, mean, 0)


@torch.library.custom_op(
    "cut_cross_entropy::sum_shards",
    mutates_args=(),
    schema="(Tensor part, str group) -> Tensor",
)
def sum_shards(part: Tensor, group: str) -> Tensor:
    """Sum over the processes of a group, each of which computes the same from it.

    The gradient is that of this process's part and needs no communication.
    """
    total = part.clone()
    sum_over_group(total, group)
    return total


@sum_shards.register_fake
def _(part: Tensor, group: str) -> Tensor:
    return torch.empty_like(part)


sum_shards.register_autograd(lambda ctx, grad: (grad, None))
