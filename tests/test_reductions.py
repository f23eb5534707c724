"""Reductions over tokens, which the loss and the terms added to it share."""

import pytest
import torch

from cut_cross_entropy import compute_z_loss, linear_cross_entropy
from cut_cross_entropy.reductions import divided, reduce_tokens

VALUES = torch.tensor([[1.0, 0.0], [3.0, 5.0]])
TARGETS = torch.tensor([[4, -7], [0, 2]])


@pytest.mark.parametrize(("reduction", "expected"), [("sum", 9.0), ("mean", 3.0), ("none", VALUES)])
def test_ignored_tokens_do_not_count(reduction, expected):
    actual = reduce_tokens(VALUES, TARGETS, -7, reduction)
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=0)


def test_without_targets_every_token_counts():
    assert reduce_tokens(VALUES, None, -7, "mean") == 2.25


@pytest.mark.parametrize("targets", [None, torch.empty(0, dtype=torch.long)])
def test_mean_of_nothing_is_0(targets):
    assert reduce_tokens(torch.empty(0), targets, -100, "mean") == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_z_loss_reduce_their_tokens_so(reduction):
    e, c, targets = torch.randn(2, 2, 4), torch.randn(5, 4), TARGETS
    losses, lse = linear_cross_entropy(
        e, c, targets, ignore_index=-7, reduction="none", return_lse=True
    )
    pairs = [
        (linear_cross_entropy(e, c, targets, ignore_index=-7, reduction=reduction), losses),
        (compute_z_loss(lse, targets, ignore_index=-7, reduction=reduction), lse.square()),
    ]
    for actual, values in pairs:
        expected = reduce_tokens(values, targets, -7, reduction)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_reduction_without_a_divisor_is_no_sum():
    with pytest.raises(NotImplementedError, match="reduction='median'"):
        divided(VALUES.sum(), "median", TARGETS, -7)
