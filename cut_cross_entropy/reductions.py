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
    if targets is None:
        return divided(values.sum(), reduction, num_items_in_batch=max(values.numel(), 1))
    return divided(values.sum(), reduction, targets, ignore_index)


def divided(
    total: Tensor,
    reduction: Reduction,
    targets: Tensor | None = None,
    ignore_index: int = -100,
    *,
    num_items_in_batch: int | Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Divide a sum over all tokens as its reduction demands.

    Args:
        total: the sum.
        reduction: ``"mean"`` or ``"sum"``.
        targets: class ids, to count the tokens that are not ignored.
        ignore_index: target value of ignored tokens.
        num_items_in_batch: divide by it instead, see ``linear_cross_entropy``.
        weights: (N,), 0 where ignored; a mean is divided by their sum.
    """
    if reduction == "sum":
        return total
    if reduction != "mean":
        raise NotImplementedError(f"there is no divisor for reduction={reduction!r} here")
    if isinstance(num_items_in_batch, Tensor):
        # Of one element: it changes neither the shape of a scalar nor its dtype.
        items = num_items_in_batch.reshape(()).to(total.dtype)
        return total / items.where((items != 0) | (total != 0), 1)
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    if weights is not None:
        divisor = weights.sum()
        return total / divisor.where(divisor != 0, 1)
    # All ignored: 0 / 1, not 0 / 0.
    assert targets is not None
    return total / (targets != ignore_index).sum().clamp_min(1)
