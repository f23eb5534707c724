"""The public function and module; ``dispatch`` chooses the implementation."""

from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cut_cross_entropy.constants import DEFAULT_MEMORY_BUDGET, IGNORE_INDEX
from cut_cross_entropy.device_support import current_autocast
from cut_cross_entropy.dispatch import sum_of_losses, token_losses
from cut_cross_entropy.distributed.collectives import group_name
from cut_cross_entropy.distributed.data_parallel import Like, gather, gathered_again
from cut_cross_entropy.distributed.dtensor import check_parallel_options, resolve
from cut_cross_entropy.distributed.embeddings import own_tokens, share_tokens
from cut_cross_entropy.distributed.options import (
    DataParallelOptions,
    VocabParallelOptions,
    is_dtensor,
)
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
from cut_cross_entropy.reductions import mean_of_sum, reduce_tokens
from cut_cross_entropy.transforms import refuse_transforms
from cut_cross_entropy.validation import (
    check_compute_dtypes,
    check_options,
    check_tensors,
    explains_unknown_keywords,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


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


@overload
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | int | None = ...,
    *,
    return_lse: Literal[False] = ...,
    **options: "Unpack[LossOptions]",
) -> Tensor: ...


@overload
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | int | None = ...,
    *,
    return_lse: Literal[True],
    **options: "Unpack[LossOptions]",
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | int | None = ...,
    *,
    return_lse: bool,
    **options: "Unpack[LossOptions]",
) -> Tensor | tuple[Tensor, Tensor]: ...


@explains_unknown_keywords
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
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
        c: classifier, (V, D), of the dtype of ``e`` (any under autocast).
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
            is scaled so that 2**-12 (Apple's bfloat16 threshold) equals ``"auto"``. The PyTorch
            implementations are exact and ignore it.
        accum_e_fp32: accepted for compatibility; gradients are always accumulated in float32 or
            wider.
        accum_c_fp32: as ``accum_e_fp32``.
        filter_e_grad: whether the filter may apply to the gradient of ``e``.
        filter_c_grad: whether the filter may apply to the gradient of ``c`` and ``bias``.
        impl: ``"auto"`` (``"cce"`` on a GPU in half precision, else ``"chunked"``), ``"cce"``,
            ``"cce_exact"``, ``"chunked"``, ``"torch_compile"``, ``"reference"``, or a
            :class:`LinearCrossEntropyImpl`, which has Apple's other names too.
        vocab_parallel_options: the classes of this process, whose rows ``c`` and ``bias`` hold,
            when the classes are spread over processes. All get the same loss. See
            docs/distributed.md for this and for DTensors.
        filter_mass: upper bound of the probability, as a mean over tokens, that the filter may
            replace by its rank-one tail, in addition to ``filter_eps``. None sets no bound;
            ``record_filter`` reports the value reached. In [0, 1].
        memory_budget: bytes of scratch memory beyond results and accumulators, for
            implementations that bound it; 256 MiB by default.
        data_parallel_options: how to gather ``c`` and ``bias`` that are DTensors sharded by
            ``fully_shard``. By default the names of their mesh's dimensions decide.
        c_grad_chunk_size: accepted for compatibility; ``memory_budget`` bounds scratch memory.
        recompute: compute the logits again in the backward pass. Without, exact implementations
            compute the gradients of a mean or a sum in the forward, which saves a matrix product;
            until the backward pass they take 4 bytes per element of ``e`` and ``c``.

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
    check_options(
        ignore_index=ignore_index,
        softcap=softcap,
        reduction=reduction,
        shift=shift,
        memory_budget=memory_budget,
        filter_eps=filter_eps,
        filter_mass=filter_mass,
        c_grad_chunk_size=c_grad_chunk_size,
        return_lse=return_lse,
        accum_e_fp32=accum_e_fp32,
        accum_c_fp32=accum_c_fp32,
        filter_e_grad=filter_e_grad,
        filter_c_grad=filter_c_grad,
        recompute=recompute,
    )
    shift = int(shift)
    e, c, targets, bias, shards, data = resolve(
        e,
        c,
        targets,
        bias,  # type: ignore[arg-type]  # a bool, which check_tensors refuses
        vocab_parallel_options,
        data_parallel_options,
    )
    if shards is not None or data is not None:
        refuse_transforms()
    wholes: list[tuple[Any, Tensor]] = []
    if data is not None:
        dtype = data.param_dtype or _gathered_dtype(e, c)
        whole = gather(c, "c", Like(e.device, dtype), data)
        wholes.append((c, whole))
        c = whole
        if bias is not None and is_dtensor(bias):
            whole = gather(bias, "bias", Like(e.device, bias.dtype), data)
            wholes.append((bias, whole))
            bias = whole
        del whole
    num_classes = None if shards is None else shards.stop - shards.start
    check_tensors(e, c, targets, bias, ignore_index, shift, num_classes)
    compute_dtype = _compute_dtype(e, c, bias)

    if shift:
        shift = min(shift, targets.shape[-1])
        # Shifting the targets instead of the embeddings copies N integers, not N x D features;
        # the last tokens of each sequence have no target and are ignored.
        targets = F.pad(targets[..., shift:], (0, shift), value=ignore_index)
    tokens, flat_targets, shard = e.reshape(-1, e.shape[-1]), targets.reshape(-1), None
    if shards is not None:
        shard = shards.shard()
        tokens, flat_targets = share_tokens(
            tokens, flat_targets, ignore_index, compute_dtype, shards
        )
    # A literal: torch.compile of PyTorch 2.4 cannot follow a call of the class.
    kernel_options: CCEPreset = {
        "filter_eps": filter_eps,
        "accum_e_fp32": accum_e_fp32,
        "accum_c_fp32": accum_c_fp32,
        "filter_e_grad": filter_e_grad,
        "filter_c_grad": filter_c_grad,
    }
    problem = Problem(
        tokens,
        c,
        flat_targets,
        bias,
        ignore_index=ignore_index,
        softcap=None if softcap is None else float(softcap),
        compute_dtype=compute_dtype,
        memory_budget=memory_budget,
        first_class=0 if shard is None else shard.start,
        group=None if shard is None else shard.group,
    )
    mass = 1.0 if filter_mass is None else float(filter_mass)
    world_size = 1 if shard is None else shard.world_size
    with gathered_again(wholes) if wholes else nullcontext():
        if reduction != "none" and not return_lse:
            loss = sum_of_losses(
                impl_chosen,
                problem,
                kernel_options,
                recompute=recompute,
                keep_inputs=not wholes,  # the backward would gather them again
                filter_mass=mass,
                world_size=world_size,
            )
            return mean_of_sum(loss, flat_targets, ignore_index) if reduction == "mean" else loss
        nll, lse = token_losses(
            impl_chosen, problem, kernel_options, filter_mass=mass, world_size=world_size
        )

    if reduction == "none":
        loss = _per_token(nll, targets, shift, shards)
    else:
        loss = reduce_tokens(nll, flat_targets, ignore_index, reduction)
    return (loss, _per_token(lse, targets, shift, shards)) if return_lse else loss


def _per_token(
    values: Tensor, targets: Tensor, shift: int, shards: VocabParallelOptions | None
) -> Tensor:
    if shards is not None and shards.gather_e:
        values = own_tokens(values, group_name(shards.group))
    values = values.reshape(targets.shape)
    if shift:
        values = values[..., :-shift]
    return values.clone()  # callers may change it in place; the backward needs the operator's own


def _gathered_dtype(e: Tensor, c: Tensor) -> torch.dtype:
    """The dtype to gather a classifier in: that of the product, if it is narrower."""
    autocast = current_autocast(e.device.type)
    if autocast is not None:
        return autocast
    return e.dtype if e.dtype.itemsize < c.dtype.itemsize else c.dtype


def _compute_dtype(e: Tensor, c: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype of the product: that of autocast, which leaves float64 alone, or of the inputs."""
    autocast = current_autocast(e.device.type)
    check_compute_dtypes(e, c, bias, autocast is not None)
    if autocast is not None and torch.float64 not in (e.dtype, c.dtype):
        return autocast
    return torch.promote_types(e.dtype, c.dtype)


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

    def __post_init__(self) -> None:
        super().__init__()
        options = {option.name: getattr(self, option.name) for option in fields(self)}
        impl_name(options.pop("impl"))
        check_parallel_options(
            options.pop("vocab_parallel_options"), options.pop("data_parallel_options")
        )
        check_options(**options)

    def forward(
        self, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the loss of ``e`` (..., D), ``c`` (V, D) and ``targets`` (...).

        Returns:
            As :func:`linear_cross_entropy`.
        """
        result: Tensor | tuple[Tensor, Tensor]
        result = linear_cross_entropy(e, c, targets, bias, **self._options())
        return result

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        changed = {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if getattr(self, option.name) != option.default
        }
        return ", ".join(f"{name}={value!r}" for name, value in changed.items())

    def _options(self) -> Any:
        return {name: getattr(self, name) for name in _OPTIONS}


_OPTIONS = tuple(option.name for option in fields(LinearCrossEntropy))  # torch.compile reads it

# A dataclass writes its own __init__, which is to give the same hints as the function.
LinearCrossEntropy.__init__ = explains_unknown_keywords(LinearCrossEntropy.__init__)  # type: ignore[method-assign]
