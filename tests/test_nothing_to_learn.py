"""A batch without a token to learn from: loss 0, gradients 0 that are part of the graph."""

import pytest
import torch

from cut_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from cut_cross_entropy.utils import compute_z_loss
from tests.support import IMPLS, make_problem

ALL = (*IMPLS, "cce", "cce_exact")  # the kernels by Triton's interpreter

SHORT = {
    "one token, shift 1": ((3, 1), 1),
    "one sequence of one token": ((1, 1), True),
    "shift T": ((2, 3), 3),
    "shift beyond T": ((2, 3), 5),
    "shift far beyond T": ((2, 3), 2**40),
    "one axis": ((2,), 2),
    "no tokens": ((0,), 0),
    "no sequences": ((0, 4), 1),
    "empty sequences": ((3, 0), 0),
    "empty sequences, shift 1": ((3, 0), 1),
}


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("leading", "shift"), SHORT.values(), ids=SHORT)
def test_loss_and_gradients_are_zero(impl, reduction, leading, shift):
    problem = make_problem(leading, classes=7, bias=True, ignored=0.0)
    inputs = [x.requires_grad_() for x in (problem.e, problem.c, problem.bias)]
    e, c, bias = inputs
    loss, lse = linear_cross_entropy(
        e, c, problem.targets, bias, shift=shift, reduction=reduction, return_lse=True, impl=impl
    )
    expected = (*leading[:-1], max(leading[-1] - int(shift), 0))
    assert lse.shape == expected
    assert loss.shape == (expected if reduction == "none" else ())
    assert torch.count_nonzero(loss) == 0
    assert loss.requires_grad
    grads = torch.autograd.grad(loss.sum() + lse.sum(), inputs)
    for grad, x in zip(grads, inputs, strict=True):
        assert grad.shape == x.shape
        assert torch.count_nonzero(grad) == 0  # NaN counts as not zero


@pytest.mark.parametrize("impl", ALL)
def test_a_sum_of_nothing_over_the_number_of_labels_has_gradients_of_zero(impl):
    """The loss is 0 / 0; a gradient of NaN would stay in the parameters."""
    problem = make_problem((2, 3), classes=7, bias=True)
    inputs = [x.requires_grad_() for x in (problem.e, problem.c, problem.bias)]
    e, c, bias = inputs
    targets = torch.full_like(problem.targets, -100)
    expected = torch.nn.functional.cross_entropy(
        (e @ c.T + bias).flatten(0, 1), targets.flatten(), reduction="sum"
    )
    actual = linear_cross_entropy(e, c, targets, bias, reduction="sum", impl=impl)
    for loss in (expected, actual):
        loss = loss / (targets != -100).sum()
        assert loss.isnan()
        for grad in torch.autograd.grad(loss, inputs):
            assert torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_a_long_shift_leaves_other_losses_alone(impl):
    """The last shift that leaves something, and the first that does not."""
    problem = make_problem((2, 4), ignored=0.0)
    logits = problem.e[:, 0] @ problem.c.T
    expected = torch.nn.functional.cross_entropy(logits, problem.targets[:, 3])
    for shift, wanted in ((3, expected), (4, torch.zeros(()))):
        loss = LinearCrossEntropy(shift=shift, impl=impl)(problem.e, problem.c, problem.targets)
        torch.testing.assert_close(loss, wanted)


def test_compiled():
    problem = make_problem((2, 3), ignored=0.0)
    step = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    e = problem.e.requires_grad_()
    loss = step(e, problem.c, problem.targets, shift=3)
    loss.backward()
    assert loss.item() == 0
    assert torch.count_nonzero(e.grad) == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_z_loss(reduction):
    problem = make_problem((2, 3), ignored=0.0)
    e = problem.e.requires_grad_()
    _, lse = linear_cross_entropy(e, problem.c, problem.targets, shift=3, return_lse=True)
    z_loss = compute_z_loss(lse, problem.targets, shift=3, reduction=reduction)
    assert z_loss.shape == ((2, 0) if reduction == "none" else ())
    z_loss.sum().backward()
    assert torch.count_nonzero(e.grad) == 0


def test_z_loss_of_one_token_without_a_dimension():
    problem = make_problem((), ignored=0.0)
    _, lse = linear_cross_entropy(problem.e, problem.c, problem.targets, return_lse=True)
    torch.testing.assert_close(compute_z_loss(lse, problem.targets), lse.square())
