"""Reductions of values per token to a loss."""

from torch import Tensor

from cut_cross_entropy.options import Reduction


def reduce_tokens(
    values: Tensor,
    targets: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
) -> Tensor:
    """Reduce values per token, which are 0 at ignored tokens.

    Args:
        values: losses or another term per token, any shape.
        targets: class ids, as many as ``values``; None ignores no token.
        ignore_index: target value of ignored tokens.
        reduction: ``"mean"`` over the tokens that are not ignored, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, 0 without any token that counts; with ``"none"`` the values themselves.
    """
    if reduction == "none":
        return values
    total = values.sum()
    if reduction == "sum":
        return total
    if targets is None:
        return total / max(values.numel(), 1)
    return mean_of_sum(total, targets, ignore_index)


def mean_of_sum(
    total: Tensor, targets: Tensor, ignore_index: int, weights: Tensor | None = None
) -> Tensor:
    """Divide a sum by the number of tokens that are not ignored, or by the sum of their weights.

    ``weights`` (N,) are 0 where ignored.
    """
    # All ignored: 0 / 1, not 0 / 0.
    if weights is None:
        return total / (targets != ignore_index).sum().clamp_min(1)
    divisor = weights.sum()
    return total / divisor.where(divisor != 0, 1)
