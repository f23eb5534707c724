"""Options of a patch, and the loss as a function for model code that calls it directly."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
import transformers
from torch import Tensor

from cut_cross_entropy.constants import DEFAULT_MEMORY_BUDGET
from cut_cross_entropy.lazy.notices import warn_once
from cut_cross_entropy.linear_cross_entropy import linear_cross_entropy
from cut_cross_entropy.options import (
    LCE_IMPL_DEFAULT,
    FilterEps,
    ImplName,
    LinearCrossEntropyImpl,
    Reduction,
    impl_name,
)
from cut_cross_entropy.validation import check_options

TransformersModelT = TypeVar("TransformersModelT", bound=transformers.PreTrainedModel)
"""A model of transformers; what goes in as one class comes back as the same class."""


@dataclass(frozen=True)
class PatchOptions:
    """Options of the loss of a patched model.

    Args:
        impl: an implementation of ``linear_cross_entropy``, by name or enum member.
        reduction: ``"mean"`` lets the model ask for what it needs (a mean, or a sum that it divides
            by ``num_items_in_batch``). ``"sum"`` and ``"none"`` replace what the model asks for.
        filter_eps: see ``linear_cross_entropy``, and so for the next four.
        accum_e_fp32: accepted for compatibility.
        accum_c_fp32: accepted for compatibility.
        filter_e_grad: whether the filter may apply to the gradient of the embeddings.
        filter_c_grad: whether the filter may apply to the gradient of the classifier.
        train_only: leave calls in evaluation mode alone.
        memory_budget: see ``linear_cross_entropy``; by keyword only, like the next.
        filter_mass: see ``linear_cross_entropy``.
        recompute: see ``linear_cross_entropy``.
        lazy_logits: whether calls without labels return lazy logits.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an unknown implementation or reduction, or another option out of range.
    """

    impl: ImplName | LinearCrossEntropyImpl = LCE_IMPL_DEFAULT
    reduction: Reduction = "mean"
    filter_eps: FilterEps = "auto"
    accum_e_fp32: bool = False
    accum_c_fp32: bool = False
    filter_e_grad: bool = True
    filter_c_grad: bool = True
    train_only: bool = False
    memory_budget: int = field(default=DEFAULT_MEMORY_BUDGET, kw_only=True)
    filter_mass: float | None = field(default=None, kw_only=True)
    recompute: bool = field(default=False, kw_only=True)
    lazy_logits: bool = field(default=False, kw_only=True)
    _kwargs: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "impl", impl_name(self.impl))
        kwargs = asdict(self)
        if not isinstance(kwargs.pop("lazy_logits"), bool):
            raise TypeError(f"lazy_logits must be True or False, got {self.lazy_logits!r}")
        check_options(**{name: value for name, value in kwargs.items() if name != "impl"})
        del kwargs["train_only"]
        for option in fields(self):  # functions of other releases do not know those by keyword
            if option.kw_only and option.name in kwargs and kwargs[option.name] == option.default:
                del kwargs[option.name]
        object.__setattr__(self, "_kwargs", kwargs)  # every loss asks for it

    def to_kwargs(self) -> dict[str, Any]:
        """Return the options that ``linear_cross_entropy`` takes: all but ``train_only``."""
        return dict(self._kwargs)

    def use_lce(self, labels: Tensor | None, training: bool) -> bool:
        """Whether a call with these labels in this mode gets the patched loss."""
        return labels is not None and (training or not self.train_only)


def apply_lce(
    e: Tensor,  # (B, T, D)
    c: Tensor,  # (V, D)
    labels: Tensor,  # (B, T)
    opts: PatchOptions,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    **loss_kwargs: Any,
) -> Tensor:
    """Next-token loss of a causal language model, for code that has the embeddings at hand.

    Args:
        e: embeddings of the tokens.
        c: weight of the head.
        labels: class ids; position t is trained to predict ``labels[:, t + 1]``.
        opts: how to compute the loss.
        bias: bias of the head.
        softcap: see ``linear_cross_entropy``.
        loss_kwargs: further arguments of a trainer. ``num_items_in_batch`` divides the sum when
            ``opts.reduction`` is ``"mean"``; ``shift_labels`` are labels that are shifted already,
            ``ignore_index`` the label of tokens without a loss; others are ignored.

    Returns:
        The loss: a scalar, or per token with ``reduction="none"``. 0 if ``num_items_in_batch`` is
        0, with a warning where that can be seen without waiting for a GPU.

    Raises:
        TypeError, ValueError: as ``linear_cross_entropy``.
    """
    kwargs = opts.to_kwargs()
    num_items = None
    if kwargs["reduction"] == "mean":
        num_items = divisor(loss_kwargs.get("num_items_in_batch"))
    if num_items is not None:
        kwargs["reduction"] = "sum"
    if "ignore_index" in loss_kwargs:
        kwargs["ignore_index"] = loss_kwargs["ignore_index"]
    shift_labels = loss_kwargs.get("shift_labels")
    targets = labels if shift_labels is None else shift_labels
    loss = linear_cross_entropy(
        e,
        c,
        targets.to(e.device),
        bias=bias,
        softcap=softcap,
        shift=shift_labels is None,
        **kwargs,
    )
    assert isinstance(loss, Tensor)  # return_lse was not asked for
    if num_items is None:
        return loss
    return loss / (num_items.to(loss.device) if torch.is_tensor(num_items) else num_items)


ORIGINAL_APPLY_LCE = apply_lce
"""The :func:`apply_lce` of this module, to tell whether it has been replaced."""

_SMALLEST = torch.finfo(torch.float32).tiny


def divisor(num_items: Any) -> Any:
    """``num_items_in_batch`` as a divisor: a step without any label has the loss 0 / tiny = 0.

    A sum of losses that is not 0 stays as far from a plausible mean as it is when divided by 0.

    Args:
        num_items: a number, a tensor of one element, or None.

    Returns:
        The same, but never 0.
    """
    if num_items is None:
        return None
    if not isinstance(num_items, Tensor):
        if num_items == 0:
            _warn_that_nothing_is_learned()
        return max(num_items, _SMALLEST)
    # On a GPU the look would wait for the device.
    readable = num_items.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and bool((num_items == 0).all()):
        _warn_that_nothing_is_learned()
    return num_items.clamp_min(_SMALLEST)


def _warn_that_nothing_is_learned() -> None:
    warn_once(
        "num_items_in_batch",
        "zero",
        "a step has no token with a label, so its loss is 0 and nothing is learned from it. Are "
        "all labels ignored or the answers cut off?",
    )
