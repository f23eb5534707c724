"""``lazy_head``: lazy logits for any model, from outside of its code."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from cut_cross_entropy.constants import DEFAULT_MEMORY_BUDGET
from cut_cross_entropy.lazy import intercept
from cut_cross_entropy.lazy.record import ForwardRecord
from cut_cross_entropy.options import (
    LCE_IMPL_DEFAULT,
    FilterEps,
    ImplName,
    LinearCrossEntropyImpl,
    impl_name,
)
from cut_cross_entropy.validation import check_options


@dataclass(frozen=True)
class _Options:
    """Options of the losses in a block: the caller of ``F.cross_entropy`` decides the reduction."""

    kwargs: dict[str, Any]
    reduction: str = "mean"

    def to_kwargs(self) -> dict[str, Any]:
        return dict(self.kwargs)


@contextlib.contextmanager
def lazy_head(
    head: nn.Module,
    *more_heads: nn.Module,
    impl: "ImplName | LinearCrossEntropyImpl" = LCE_IMPL_DEFAULT,
    filter_eps: FilterEps = "auto",
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    filter_mass: float | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Iterator[ForwardRecord]:
    """Compute the losses inside the block without the logits of a head.

    Inside, a call of the head gives a tensor that stands for the logits. What models usually do to
    logits before the loss (slices, views, casts, a scale, a softcap, a bias) is recorded, and
    ``F.cross_entropy``, or ``nn.CrossEntropyLoss``, becomes
    :func:`~cut_cross_entropy.linear_cross_entropy`. Everything else computes the logits, exactly
    as asked, and a :class:`~cut_cross_entropy.lazy.notices.CutCrossEntropyWarning` names the
    operation, once. Logits that leave the block are computed when they are first used.

    Call ``backward`` inside the block or after it. Blocks may be nested, also with patched models
    of ``cut_cross_entropy.transformers``; each thread has its own. A model that ``torch.compile``
    traces as a whole keeps its logits.

    Args:
        head: the module that projects onto the classes: ``nn.Linear``, or a module that calls
            ``F.linear`` with a weight of as many rows as ``head.weight`` has, or as
            ``head.out_features`` says.
        more_heads: of the same model.
        impl: see :func:`~cut_cross_entropy.linear_cross_entropy`, as for the other options.
        filter_eps: threshold of the gradient filter.
        filter_e_grad: whether the filter may apply to the gradient of the embeddings.
        filter_c_grad: whether the filter may apply to the gradient of the classifier.
        filter_mass: share of the probability that the filter may leave out.
        memory_budget: bytes of temporary memory.

    Yields:
        A record whose ``losses`` counts the losses that were computed without logits.

    Raises:
        TypeError: a head that is not a module, or an option of the wrong type.
        ValueError: an option out of range.

    Examples:
        >>> import torch, torch.nn.functional as F
        >>> body, head = torch.nn.Embedding(1000, 16), torch.nn.Linear(16, 1000, bias=False)
        >>> def model(ids, targets):
        ...     logits = head(body(ids))
        ...     logits = 15 * torch.tanh(logits / 15)
        ...     return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        >>> ids, targets = torch.randint(1000, (2, 8)), torch.randint(1000, (2, 8))
        >>> with lazy_head(head) as record:
        ...     loss = model(ids, targets)
        >>> loss.backward()
        >>> record.losses, head.weight.grad.shape
        (1, torch.Size([1000, 16]))
    """
    for module in (head, *more_heads):
        if not isinstance(module, nn.Module):
            raise TypeError(f"head must be a torch.nn.Module, got {type(module).__name__}")
    options: dict[str, Any] = {
        "filter_eps": filter_eps,
        "filter_e_grad": filter_e_grad,
        "filter_c_grad": filter_c_grad,
        "filter_mass": filter_mass,
        "memory_budget": memory_budget,
    }
    check_options(**options)
    record = ForwardRecord(head, _Options({"impl": impl_name(impl), **options}), None)
    record.means, record.way_out = "lazy_head", "Call the model outside of lazy_head"
    record.place = " inside the block"
    # The frame of the caller's block is above this one, and each has an __enter__ between.
    with intercept.intercepted(record, (head, *more_heads), depth=5):
        yield record
    record.check_at_return()
