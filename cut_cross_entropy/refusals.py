"""Autograd formulas that refuse a derivative which an implementation does not have."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function


def refusal(message: str) -> Callable[..., Any]:
    """Return the autograd formula, in either mode, of an operator that computes derivatives.

    It raises NotImplementedError with ``message``, always.
    """

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(message)

    return refuse


refuse_second_derivative = refusal(
    "linear_cross_entropy has no second derivative in this implementation; impl='reference' has one"
)


class _Refused(Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    backward = staticmethod(refuse_second_derivative)


def refuse_to_differentiate(
    grads: Sequence[Tensor], inputs: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """``grads`` as functions of ``inputs`` that refuse to be differentiated."""
    return _Refused.apply(len(grads), *grads, *inputs)  # type: ignore[no-any-return]
