"""The operators of ``token_logprobs``: sums over the classes of each token other than its loss.

Here are the sums in bounded memory and by the kernels, the logits of a few classes, and the mean
row of a classifier.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cut_cross_entropy.call_context import is_transformed
from cut_cross_entropy.device_support import autocast_type
from cut_cross_entropy.distributed.collectives import sum_over_group
from cut_cross_entropy.implementations import chunked_outputs, class_logits
from cut_cross_entropy.implementations.blocks import slices
from cut_cross_entropy.operators.declaration import (
    Arguments,
    by_inputs,
    constant,
    differentiable,
    needed_gradients,
    operator,
    schema,
)
from cut_cross_entropy.operators.losses import (
    FILTER,
    GRADIENTS,
    NEEDED,
    fake_gradients,
    fake_state,
    is_training,
)
from cut_cross_entropy.operators.transforms import transformable
from cut_cross_entropy.outputs import (
    NUM_DIFFERENTIABLE,
    Asked,
    OutputGrads,
    SavedOutputs,
    TokenOutputs,
)
from cut_cross_entropy.problem import (
    Filter,
    Gradients,
    KernelState,
    Needed,
    PerToken,
    Problem,
)
from cut_cross_entropy.refusals import refusal

_WEIGHTS = "Tensor? weights"  # (V,) of the logits in their mean
_refuse = refusal(
    "token_logprobs has no second and no forward-mode derivative in this implementation, nor has "
    "label_smoothing with a softcap; impl='reference' has both"
)


def _single(operator: Any) -> Any:
    """An operator with one result as a function that returns a tuple."""
    return lambda *flat: (operator(*flat),)


def _fake_outputs(problem: Problem, weights: Tensor | None, asked: Asked) -> TokenOutputs:
    num_tokens = problem.targets.shape[0]

    def empty(wanted: bool, dtype: torch.dtype = problem.wide) -> Tensor:
        return problem.e.new_empty(num_tokens if wanted else 0, dtype=dtype)

    return TokenOutputs(
        empty(True),
        empty(True),
        empty(asked.entropy),
        empty(asked.log_sum_sq),
        mean_logit=empty(asked.mean_logit),
        rank=empty(asked.rank, torch.int32),
        max_logit=empty(asked.max_logit),
        top_ids=problem.e.new_empty((num_tokens, asked.top_k), dtype=torch.int64),
        top_logits=problem.e.new_empty((num_tokens, asked.top_k), dtype=problem.wide),
    )


_OUTPUTS = Arguments(Problem, _WEIGHTS, Asked)


@operator("token_outputs", _OUTPUTS, TokenOutputs, _fake_outputs)
def token_outputs(problem: Problem, weights: Tensor | None, asked: Asked) -> TokenOutputs:
    """Sums over the classes of each token; see ``chunked_outputs.forward``."""
    return chunked_outputs.forward(problem, asked, weights)


@operator(
    "token_outputs_backward",
    Arguments(("grad_", OutputGrads), SavedOutputs, Problem, _WEIGHTS, NEEDED),
    GRADIENTS,
    lambda grads, saved, problem, weights, needed: fake_gradients(problem, needed),
)
def token_outputs_backward(grads: OutputGrads, saved: SavedOutputs, *inputs: Any) -> Gradients:
    """Gradients of the inputs of :func:`token_outputs`; empty where not needed."""
    return chunked_outputs.backward(grads, saved, *inputs)


def _save_outputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[NUM_DIFFERENTIABLE:])
    _OUTPUTS.save(ctx, inputs, output[: len(SavedOutputs._fields)])


def _outputs_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    inputs, saved = _OUTPUTS.saved(ctx)
    problem, weights, asked = _OUTPUTS.unpack(inputs)
    wanted = (True, True, asked.entropy, asked.log_sum_sq, asked.mean_logit)
    upstream = [
        grad if is_wanted else None
        for grad, is_wanted in zip(grads[:NUM_DIFFERENTIABLE], wanted, strict=True)
    ]
    found = _call_outputs_backward(
        *upstream, *saved, *problem.flat(), weights, *needed_gradients(ctx)
    )
    return by_inputs(ctx, found)


_call_outputs_backward = constant(token_outputs_backward, _refuse)
_call_outputs = differentiable(
    token_outputs, save=_save_outputs, backward=_outputs_autograd, jvp=_refuse
)


def run_outputs(problem: Problem, asked: Asked, weights: Tensor | None = None) -> TokenOutputs:
    """Sums over the classes by the memory-bounded PyTorch implementation, differentiable.

    Args:
        problem: the inputs.
        asked: the sums to compute.
        weights: (V,) of the logits in their mean, in :attr:`Problem.wide`.
    """
    return TokenOutputs(*_call_outputs(*problem.flat(), weights, *asked.flat()))


class _Further(NamedTuple):
    """The sums that the kernels return after their state, (N,); empty where not asked for."""

    entropy: Tensor
    log_sum_sq: Tensor
    rank: Tensor
    max_logit: Tensor


class _Slopes(NamedTuple):
    """Further factors of the gradient of the logits, (N,); see ``kernels.step.backward``."""

    eta: Tensor | None
    q: Tensor | None


_NUM_STATE = len(KernelState._fields)
_KERNELS = Arguments(Problem, Asked, FILTER, "bool training")


def _fake_kernel_outputs(
    problem: Problem, asked: Asked, filter_: Filter, training: bool
) -> tuple[Tensor, ...]:
    state = fake_state(problem, filter_, training)
    lse, nothing = state.lse, state.lse.new_empty(0)
    return (
        *state,
        torch.empty_like(lse) if asked.entropy else nothing,
        torch.empty_like(lse) if asked.log_sum_sq else nothing.clone(),
        (torch.empty_like(lse) if asked.rank else nothing).int(),
        torch.empty_like(lse) if asked.max_logit else nothing.clone(),
    )


@operator(
    "cce_outputs",
    _KERNELS,
    f"({', '.join((*schema(KernelState), *schema(_Further)))})",
    _fake_kernel_outputs,
)
def kernel_outputs(
    problem: Problem, asked: Asked, filter_: Filter, training: bool
) -> tuple[Tensor, ...]:
    """Sums over the classes of each token by the kernels, and what their backward needs."""
    from cut_cross_entropy.kernels import step
    from cut_cross_entropy.kernels.entropy_and_rank import no_further_sums
    from cut_cross_entropy.kernels.launch import current_device

    with current_device(problem.e.device):
        state, further = step.forward_outputs(problem, filter_, training, asked)
    return (*state, *(further or no_further_sums(state.lse)))


@operator(
    "cce_outputs_backward",
    Arguments(("grad_", PerToken), _Slopes, KernelState, Problem, FILTER, NEEDED),
    GRADIENTS,
    lambda upstream, slopes, state, problem, filter_, needed: fake_gradients(problem, needed),
)
def kernel_outputs_backward(
    upstream: PerToken,
    slopes: _Slopes,
    state: KernelState,
    problem: Problem,
    filter_: Filter,
    needed: Needed,
) -> Gradients:
    """Gradients of the inputs of :func:`kernel_outputs`; empty where not needed."""
    from cut_cross_entropy.kernels import step
    from cut_cross_entropy.kernels.launch import current_device

    with current_device(problem.e.device):
        return step.backward(upstream, state, problem, filter_, needed, *slopes)


def _save_kernel_outputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Gradients have the results nll, lse, entropy and log_sum_sq.
    ctx.mark_non_differentiable(*output[2:_NUM_STATE], *output[_NUM_STATE + 2 :])
    _KERNELS.save(ctx, inputs, output[: _NUM_STATE + 2])


def _kernel_outputs_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    inputs, saved = _KERNELS.saved(ctx)
    problem, _, filter_, _ = _KERNELS.unpack(inputs)
    state, (entropy, log_sum_sq) = saved[:_NUM_STATE], saved[_NUM_STATE:]
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
    flat = (*problem.flat(), *filter_.flat(), *needed_gradients(ctx))
    return by_inputs(ctx, _call_kernel_backward(nll, lse, eta, q, *state, *flat))


_call_kernel_backward = constant(kernel_outputs_backward, _refuse)
_call_kernel_outputs = differentiable(
    kernel_outputs, save=_save_kernel_outputs, backward=_kernel_outputs_autograd, jvp=_refuse
)


def run_kernel_outputs(problem: Problem, asked: Asked, filter_: Filter) -> TokenOutputs:
    """Sums over the classes by the kernels, differentiable.

    Args:
        problem: the inputs, without a group.
        asked: the sums to compute; neither a mean logit nor the likeliest classes.
        filter_: which part of the gradient may be skipped.
    """
    options = (*asked.flat(), *filter_.flat(), is_training(problem))
    results = _call_kernel_outputs(*problem.flat(), *options)
    nll, lse, *_ = results
    entropy, log_sum_sq, rank, max_logit = results[_NUM_STATE:]
    no_class = lse.new_empty((lse.shape[0], 0))
    return TokenOutputs(
        nll,
        lse,
        entropy,
        log_sum_sq,
        mean_logit=lse.new_empty(0),
        rank=rank,
        max_logit=max_logit,
        top_ids=no_class.long(),
        top_logits=no_class,
    )


_CLASSES = Arguments(Problem, "Tensor ids")


@operator(
    "class_logits",
    _CLASSES,
    "Tensor",
    lambda problem, ids: problem.e.new_empty(ids.shape, dtype=problem.wide),
)
def logits_of_classes(problem: Problem, ids: Tensor) -> Tensor:
    """Logits of a few classes of each token; see ``class_logits.forward``."""
    return class_logits.forward(problem, ids)


@operator(
    "class_logits_backward",
    Arguments("Tensor grad", Problem, "Tensor ids", NEEDED),
    GRADIENTS,
    lambda grad, problem, ids, needed: fake_gradients(problem, needed),
)
def class_logits_backward(grad: Tensor, problem: Problem, ids: Tensor, needed: Needed) -> Gradients:
    """Gradients of the inputs of :func:`logits_of_classes`; empty where not needed."""
    return class_logits.backward(grad, problem, ids, needed)


def _save_class_logits(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _CLASSES.save(ctx, inputs, ())


def _class_logits_autograd(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * len(ctx.inputs)
    inputs, _ = _CLASSES.saved(ctx)
    return by_inputs(ctx, _call_class_logits_backward(grad, *inputs, *needed_gradients(ctx)))


logits_of_classes.register_autograd(_class_logits_autograd, setup_context=_save_class_logits)
_call_class_logits = transformable(
    _single(logits_of_classes),
    setup_context=_save_class_logits,
    backward=_class_logits_autograd,
    jvp=_refuse,
)
_call_class_logits_backward = constant(class_logits_backward, _refuse)


def run_class_logits(problem: Problem, ids: Tensor) -> Tensor:
    """Logits of the classes ``ids`` (N, K), differentiable; see ``class_logits.forward``."""
    return _call_class_logits(*problem.flat(), ids)[0]


@operator(
    "mean_row",
    Arguments("Tensor c", "Tensor weights", "ScalarType dtype", "int memory_budget"),
    "Tensor",
    lambda c, weights, dtype, memory_budget: weights.new_empty(c.shape[1]),
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


@operator(
    "mean_row_backward",
    Arguments("Tensor grad", "Tensor weights", "ScalarType dtype"),
    "Tensor",
    lambda grad, weights, dtype: grad.new_empty((weights.shape[0], grad.shape[0]), dtype=dtype),
)
def outer_product(grad: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """``weights * grad`` (V, D) of (V,) and (D,), rounded once."""
    out = torch.empty((weights.shape[0], grad.shape[0]), dtype=dtype, device=grad.device)
    return torch.mul(weights[:, None], grad, out=out)


def _save_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    c, weights, *ctx.options = inputs
    ctx.dtype = c.dtype
    ctx.save_for_backward(weights)
    if is_transformed():
        ctx.save_for_forward(weights)


def _mean_row_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (weights,) = ctx.saved_tensors
    (grad_c,) = _call_outer_product(grad, weights, ctx.dtype)
    return grad_c, None, None, None


def _mean_row_tangent(ctx: Any, of_c: Tensor | None, *others: Any) -> tuple[Tensor | None]:
    """Linear in c; weights have no derivative."""
    (weights,) = ctx.saved_tensors
    return (None if of_c is None else _call_mean_row(of_c, weights, *ctx.options)[0],)


weighted_sum_of_rows.register_autograd(_mean_row_autograd, setup_context=_save_weights)
outer_product.register_autograd(_refuse)
_call_outer_product = transformable(_single(outer_product), backward=_refuse, jvp=_refuse)
_call_mean_row = transformable(
    _single(weighted_sum_of_rows),
    setup_context=_save_weights,
    backward=_mean_row_autograd,
    jvp=_mean_row_tangent,
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
    with torch.autocast(autocast_type(problem.e.device), enabled=False):
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


@operator(
    "sum_shards",
    Arguments("Tensor part", "str group"),
    "Tensor",
    lambda part, group: torch.empty_like(part),
)
def sum_shards(part: Tensor, group: str) -> Tensor:
    """Sum over the processes of a group, each of which computes the same from it.

    The gradient is that of this process's part and needs no communication.
    """
    total = part.clone()
    sum_over_group(total, group)
    return total


sum_shards.register_autograd(lambda ctx, grad: (grad, None))
