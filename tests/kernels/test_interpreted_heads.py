"""Heads by Triton's interpreter: each chunk of classes by the kernels."""

import pytest
import torch
import torch.nn.functional as F

from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.heads import Head, LowRank
from tests.support import make_problem


@pytest.mark.parametrize(
    ("impl", "filter_eps", "trains"),
    [("cce", "auto", False), ("cce_exact", None, False), ("cce_exact", None, True)],
)
def test_gradients_of_an_adapted_head(impl, filter_eps, trains):
    """Where the weight is frozen, the columns of its gradient are left out of the products."""
    made = make_problem((140,), classes=400, dim=32, bias=True)
    e, weight, bias = (x.requires_grad_() for x in (made.e, made.c, made.bias))
    weight.requires_grad_(trains)
    torch.manual_seed(1)
    a, b = torch.randn(8, 32, requires_grad=True), torch.randn(400, 8, requires_grad=True)
    leaves = [e, bias, a, b, *([weight] if trains else [])]
    head = Head(weight, bias, low_rank=(LowRank(a, b, 0.1),))
    budget = 2 * 3 * 40 * 4 * 256  # two chunks
    loss = linear_cross_entropy(
        e, head, made.targets, impl=impl, filter_eps=filter_eps, memory_budget=budget
    )
    ours = torch.autograd.grad(loss, leaves)
    truth = [x.detach().double().requires_grad_(x.requires_grad) for x in (e, bias, a, b, weight)]
    x, shift, down, up, matrix = truth
    logits = F.linear(x, matrix + 0.1 * up @ down, shift)
    expected_loss = F.cross_entropy(logits, made.targets)
    expected = torch.autograd.grad(expected_loss, [t for t in truth if t.requires_grad])
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
    for mine, theirs in zip(ours, expected, strict=True):
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert error < (1e-5 if impl == "cce_exact" else 4e-3)
