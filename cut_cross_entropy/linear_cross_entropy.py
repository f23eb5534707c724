"""The public function and module; ``dispatch`` chooses the implementation."""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, overload

import torch
from torch import Tensor, nn

from cut_cross_entropy.arguments import prepare
from cut_cross_entropy.constants import DEFAULT_MEMORY_BUDGET, IGNORE_INDEX
from cut_cross_entropy.dispatch import equal_weights, mean_logits, sum_of_losses, token_losses
from cut_cross_entropy.distributed.dtensor import check_parallel_options, refuse_dtensors
from cut_cross_entropy.distributed.options import (
    DataParallelOptions,
    VocabParallelOptions,
)
from cut_cross_entropy.heads.compiled import outside_graphs_with_heads
from cut_cross_entropy.heads.head import Head
from cut_cross_entropy.options import (
    LCE_IMPL_DEFAULT,
    CCEPreset,
    FilterEps,
    ImplName,
    LinearCrossEntropyImpl,
    Reduction,
    impl_name,
)
from cut_cross_entropy.problem import Problem
from cut_cross_entropy.reductions import divided
from cut_cross_entropy.validation import (
    check_class_weights,
    check_num_items,
    check_options,
    check_per_token,
    check_temperature,
    explains_unknown_keywords,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


Bias: TypeAlias = Tensor | int | None
"""Bias of the logits, or ``ignore_index`` in its place."""


class LossOptions(TypedDict, total=False):
    """Options of :func:`linear_cross_entropy` as keywords, all but ``return_lse``."""

    ignore_index: int
    softcap: float | None
    reduction: Reduction
    shift: bool | int
    filter_eps: FilterEps
    accum_e_fp32: bool
    accum_c_fp32: bool
    filter_e_grad: bool
    filter_c_grad: bool
    impl: ImplName | LinearCrossEntropyImpl
    vocab_parallel_options: VocabParallelOptions | None
    filter_mass: float | None
    memory_budget: int
    data_parallel_options: DataParallelOptions | None
    c_grad_chunk_size: int
    recompute: bool
    temperature: float | Tensor
    logit_scale: float
    label_smoothing: float
    class_weights: Tensor | None
    token_weights: Tensor | None
    num_items_in_batch: int | Tensor | None


class LossAlone(LossOptions, total=False):
    """Options with which the loss is the only result."""

    return_lse: Literal[False]


class LossAndLse(LossOptions):
    """Options with which the results are the loss and the log-sum-exp."""

    return_lse: Literal[True]


class LossPerhapsLse(LossOptions):
    """Options of which a type checker cannot tell the results."""

    return_lse: bool


@overload
def linear_cross_entropy(
    e: Tensor, c: Tensor | Head, targets: Tensor, bias: Bias = ..., **options: "Unpack[LossAlone]"
) -> Tensor: ...


@overload
def linear_cross_entropy(
    e: Tensor, c: Tensor | Head, targets: Tensor, bias: Bias = ..., **options: "Unpack[LossAndLse]"
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_cross_entropy(
    e: Tensor,
    c: Tensor | Head,
    targets: Tensor,
    bias: Bias = ...,
    **options: "Unpack[LossPerhapsLse]",
) -> Tensor | tuple[Tensor, Tensor]: ...


@outside_graphs_with_heads
@explains_unknown_keywords
def linear_cross_entropy(
    e: Tensor,
    c: Tensor | Head,
    targets: Tensor,
    bias: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: FilterEps = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: ImplName | LinearCrossEntropyImpl = LCE_IMPL_DEFAULT,
    vocab_parallel_options: VocabParallelOptions | None = None,
    *,
    filter_mass: float | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    data_parallel_options: DataParallelOptions | None = None,
    c_grad_chunk_size: int = 0,
    recompute: bool = False,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of the logits ``e @ c.T + bias`` without storing them.

    The loss and its gradients equal those of ``F.cross_entropy(F.linear(e, c, bias), targets)``
    computed in higher precision. Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary
    Language Models", arXiv 2411.09009.

    Examples:
        >>> hidden = torch.randn(2, 5, 8, requires_grad=True)  # (batch, time, D)
        >>> classifier = torch.randn(11, 8)  # (V, D)
        >>> labels = torch.randint(0, 11, (2, 5))
        >>> linear_cross_entropy(hidden, classifier, labels, shift=True).shape
        torch.Size([])
        >>> linear_cross_entropy(hidden, classifier, labels, shift=True, reduction="none").shape
        torch.Size([2, 4])

    Args:
        e: embeddings, (..., D), float32, bfloat16, float16 or float64; need not be contiguous.
        c: classifier, (V, D), of the dtype of ``e`` (any under autocast); or a
            :class:`~cut_cross_entropy.heads.Head`, which has bias, softcap and scale of its own.
        targets: class ids, int64 or int32, of the leading shape of ``e``; without a shift any
            shape with as many elements.
        bias: (V,), of the dtype of ``c`` or float32. An int in its place is taken as
            ``ignore_index``, as release 25.1 had it.
        ignore_index: target value of tokens without a loss.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        reduction: ``"mean"`` over the tokens that are not ignored, ``"sum"``, or ``"none"``.
        shift: position t predicts target t + shift; True is 1. At least 0; from T on, the size of
            the last dimension of ``targets``, nothing is left to predict.
        return_lse: also return the log-sum-exp of the logits.
        filter_eps: fraction of the gradient that the kernels may skip: None skips nothing,
            ``"auto"`` what the dtype cannot represent, ``"high"`` half of that, a float from 0 to 1
            is scaled so that 2**-12 (Apple's bfloat16 threshold) equals ``"auto"``. Where the first
            two would leave more than 2 % of a token's probability to the tail, in the mean, as with
            young models, nothing is skipped. The PyTorch implementations are exact and ignore it.
        accum_e_fp32: accepted for compatibility; gradients are always accumulated in float32 or
            wider.
        accum_c_fp32: as ``accum_e_fp32``.
        filter_e_grad: whether the filter may apply to the gradient of ``e``.
        filter_c_grad: whether the filter may apply to the gradient of ``c`` and ``bias``.
        impl: ``"auto"`` (on a GPU in half precision ``"cce"``, or ``"cce_exact"`` for small sums,
            else ``"chunked"``), ``"cce"``, ``"cce_exact"``, ``"chunked"``, ``"torch_compile"``,
            ``"reference"``, or a :class:`LinearCrossEntropyImpl`, which has Apple's other names
            too.
        vocab_parallel_options: the classes of this process, whose rows ``c`` and ``bias`` hold,
            when the classes are spread over processes. All get the same loss. See
            docs/distributed.md for this and for DTensors.
        filter_mass: upper bound of the probability, as a mean over tokens, that the filter may
            replace by its tail, in addition to ``filter_eps``. None sets no bound;
            ``record_filter`` reports the value reached. In [0, 1].
        memory_budget: bytes of scratch memory beyond results and accumulators, for
            implementations that bound it; 256 MiB by default.
        data_parallel_options: how to gather ``c`` and ``bias`` that are DTensors sharded by
            ``fully_shard``. By default the names of their mesh's dimensions decide.
        c_grad_chunk_size: accepted for compatibility; ``memory_budget`` bounds scratch memory.
        recompute: compute the logits again in the backward pass. Without, exact implementations
            compute the gradients of a mean or a sum in the forward, which saves a matrix product;
            until the backward pass they take 4 bytes per element of ``e`` and ``c``.
        temperature: above 0; divides the logits, after the softcap. A number, or a tensor that
            broadcasts against ``targets``, with which it is shifted. Has no gradient.
        logit_scale: factor of the logits, bias included, before the softcap.
        label_smoothing: as in ``F.cross_entropy``: the share of the loss that is the mean over all
            classes. In [0, 1].
        class_weights: (V,), as ``weight`` in ``F.cross_entropy``: the loss of a token is multiplied
            by the weight of its target, and the mean divided by the sum of these weights. Has no
            gradient. Where classes are spread over processes, the weights of all of them.
        token_weights: floats that broadcast against ``targets``, with which they are shifted: the
            loss of each token is multiplied by its own, and the mean is divided by the sum of
            these weights (times those of the classes). Differentiable; if they require a gradient,
            the logits are computed again in the backward, as with ``recompute``.
        num_items_in_batch: divides the sum of the losses in place of the mean's own divisor, as
            trainers that accumulate gradients have it.

    Returns:
        The loss: a scalar, or with ``reduction="none"`` the shape of ``targets`` less ``shift`` at
        the end of the last dimension, 0 at ignored tokens. float32, or float64 for float64 inputs.
        Without any token that counts it is 0 and its gradients are 0. With ``return_lse`` a pair:
        the loss, and the log-sum-exp per token in that same shape, 0 at ignored tokens. Both are
        differentiable, once.

    Raises:
        TypeError: an argument or a tensor of the wrong type, layout or dtype.
        ValueError: shapes or devices that do not fit, an option out of range, on the CPU a target
            out of range. (On a GPU the loss is then NaN; ``CCE_DEBUG=1`` raises there too.)
        RuntimeError: an explicit ``impl`` that cannot run here; another process is gone.
        NotImplementedError: DTensors whose sharding has no meaning here; the message says what to
            do instead.
    """
    if isinstance(bias, int) and not isinstance(bias, bool):
        if ignore_index != IGNORE_INDEX:
            raise TypeError(
                f"bias must be a Tensor or None, got int ({bias}) together with {ignore_index=}"
            )
        ignore_index, bias = bias, None
    impl_chosen = impl_name(impl)
    refuse_dtensors(class_weights=class_weights, token_weights=token_weights)
    prepared = prepare(
        e,
        c,
        targets,
        bias,  # type: ignore[arg-type]  # a bool, which check_tensors refuses
        ignore_index=ignore_index,
        softcap=softcap,
        reduction=reduction,
        shift=shift,
        return_lse=return_lse,
        filter_eps=filter_eps,
        accum_e_fp32=accum_e_fp32,
        accum_c_fp32=accum_c_fp32,
        filter_e_grad=filter_e_grad,
        filter_c_grad=filter_c_grad,
        vocab_parallel_options=vocab_parallel_options,
        filter_mass=filter_mass,
        memory_budget=memory_budget,
        data_parallel_options=data_parallel_options,
        c_grad_chunk_size=c_grad_chunk_size,
        recompute=recompute,
        temperature=temperature,
        logit_scale=logit_scale,
        label_smoothing=label_smoothing,
    )
    check_num_items(num_items_in_batch, reduction)
    problem = prepared.problem
    target_weights: Tensor | None = None
    if class_weights is not None:
        first, is_whole = problem.first_class, problem.group is None
        check_class_weights(class_weights, problem.c, first, is_whole)
        target_weights = _weights_of_targets(class_weights, problem)
    if token_weights is not None:
        check_per_token("token_weights", token_weights, targets)
        whole_weights = token_weights.to(problem.wide).expand(targets.shape)
        # An ignored token has no loss, whatever its weight.
        kept = problem.targets != problem.ignore_index
        token_weights = torch.where(kept, prepared.flatten(whole_weights, 0.0), 0)
    # A literal: torch.compile of PyTorch 2.4 cannot follow a call of the class.
    kernel_options: CCEPreset = {
        "filter_eps": filter_eps,
        "accum_e_fp32": accum_e_fp32,
        "accum_c_fp32": accum_c_fp32,
        "filter_e_grad": filter_e_grad,
        "filter_c_grad": filter_c_grad,
    }
    mass = 1.0 if filter_mass is None else float(filter_mass)
    world_size = prepared.world_size
    weights = target_weights
    if token_weights is not None:
        weights = token_weights if target_weights is None else target_weights * token_weights

    def divide(total: Tensor) -> Tensor:
        return divided(
            total,
            reduction,
            problem.targets,
            problem.ignore_index,
            num_items_in_batch=num_items_in_batch,
            weights=weights,
        )

    with prepared.computing():
        if reduction != "none" and not return_lse and not label_smoothing:
            total = sum_of_losses(
                impl_chosen,
                problem,
                kernel_options,
                weights=weights,
                recompute=recompute,
                keep_inputs=not prepared.wholes,  # the backward would gather them again
                filter_mass=mass,
                world_size=world_size,
            )
            return divide(total)
        results = token_losses(
            impl_chosen, problem, kernel_options, filter_mass=mass, world_size=world_size
        )
        losses = results.nll if target_weights is None else results.nll * target_weights
        if label_smoothing:
            smooth = _smooth_losses(results.lse, problem, impl_chosen, class_weights)
            losses = (1 - label_smoothing) * losses + label_smoothing * smooth
    if token_weights is not None:
        losses = losses * token_weights
    loss = prepared.per_token(losses) if reduction == "none" else divide(losses.sum())
    return (loss, prepared.per_token(results.lse)) if return_lse else loss


def _weights_of_targets(class_weights: Tensor, problem: Problem) -> Tensor:
    """Weight of the target of each token, (N,), 0 for ignored tokens."""
    kept = problem.targets != problem.ignore_index
    places = torch.where(kept, problem.targets, 0).long().clamp(0, class_weights.shape[0] - 1)
    return torch.where(kept, class_weights.to(problem.wide)[places], 0)


def _smooth_losses(
    lse: Tensor, problem: Problem, impl: str, class_weights: Tensor | None
) -> Tensor:
    """Mean over the classes of their losses, (N,): one logit of a mean row, and the log-sum-exp."""
    own = equal_weights(problem)
    mean_weight: float | Tensor = 1.0
    if class_weights is not None:
        every = class_weights.to(problem.wide)
        mean_weight = every.mean()
        own = own * every[problem.first_class : problem.first_class + own.shape[0]]
    return lse * mean_weight - mean_logits(impl, problem, own)


@dataclass(eq=False, repr=False)
class LinearCrossEntropy(nn.Module):
    """:func:`linear_cross_entropy` as a module; takes the same options, each an attribute.

    Examples:
        >>> loss_fn = LinearCrossEntropy(reduction="sum", softcap=30.0)
        >>> loss_fn(torch.randn(3, 8), torch.randn(11, 8), torch.tensor([1, 2, -100])).shape
        torch.Size([])

    Raises:
        TypeError: an option of the wrong type, or one that :func:`linear_cross_entropy` lacks.
        ValueError: an option out of range.
    """

    ignore_index: int = IGNORE_INDEX
    softcap: float | None = None
    reduction: Reduction = "mean"
    shift: bool | int = 0
    return_lse: bool = False
    filter_eps: FilterEps = "auto"
    accum_e_fp32: bool = False
    accum_c_fp32: bool = False
    filter_e_grad: bool = True
    filter_c_grad: bool = True
    impl: ImplName | LinearCrossEntropyImpl = LCE_IMPL_DEFAULT
    vocab_parallel_options: VocabParallelOptions | None = None
    filter_mass: float | None = field(default=None, kw_only=True)
    memory_budget: int = field(default=DEFAULT_MEMORY_BUDGET, kw_only=True)
    data_parallel_options: DataParallelOptions | None = field(default=None, kw_only=True)
    c_grad_chunk_size: int = field(default=0, kw_only=True)
    recompute: bool = field(default=False, kw_only=True)
    temperature: float | Tensor = field(default=1.0, kw_only=True)
    logit_scale: float = field(default=1.0, kw_only=True)
    label_smoothing: float = field(default=0.0, kw_only=True)
    class_weights: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__init__()
        options = {option.name: getattr(self, option.name) for option in fields(self)}
        check_temperature(self.temperature, None)
        for name in ("temperature", "class_weights"):
            if isinstance(options.pop(name), Tensor):  # moves with the module
                self.register_buffer(name, self.__dict__.pop(name))
        impl_name(options.pop("impl"))
        check_parallel_options(
            options.pop("vocab_parallel_options"), options.pop("data_parallel_options")
        )
        check_options(**options)

    def forward(
        self,
        e: Tensor,
        c: Tensor | Head,
        targets: Tensor,
        bias: Tensor | None = None,
        *,
        token_weights: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the loss of ``e`` (..., D), ``c`` (V, D) and ``targets`` (...).

        Returns:
            As :func:`linear_cross_entropy`.
        """
        result: Tensor | tuple[Tensor, Tensor]
        result = linear_cross_entropy(
            e,
            c,
            targets,
            bias,
            token_weights=token_weights,
            num_items_in_batch=num_items_in_batch,
            **self._options(),
        )
        return result

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        changed = {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if not isinstance(getattr(self, option.name), Tensor)
            and getattr(self, option.name) != option.default
        }
        return ", ".join(f"{name}={value!r}" for name, value in changed.items())

    def _options(self) -> Any:
        return {name: getattr(self, name) for name in _OPTIONS}


for _name in ("temperature", "class_weights"):
    delattr(LinearCrossEntropy, _name)  # a default of the class would hide the buffer of a module

_OPTIONS = tuple(option.name for option in fields(LinearCrossEntropy))  # torch.compile reads it

# A dataclass writes its own __init__, which is to give the same hints as the function.
LinearCrossEntropy.__init__ = explains_unknown_keywords(LinearCrossEntropy.__init__)  # type: ignore[method-assign]
