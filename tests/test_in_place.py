"""Results and inputs that the caller changes in place before the backward."""

import pytest
import torch

from cut_cross_entropy import linear_cross_entropy
from tests.support import make_problem


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("shift", [0, 1])
def test_results_per_token_may_be_changed_in_place(impl, shift):
    def grads(in_place):
        problem = make_problem((2, 5), 7, 3, dtype=torch.float64)
        inputs = [problem.e.requires_grad_(), problem.c.requires_grad_()]
        loss, lse = linear_cross_entropy(
            *inputs, problem.targets, reduction="none", shift=shift, return_lse=True, impl=impl
        )
        factor = torch.linspace(0.5, 2, loss.shape[-1], dtype=torch.float64)
        if in_place:
            loss *= factor
            loss[0] = 0
            lse.mul_(0.5)
        else:
            loss = loss * factor * torch.tensor([[0.0], [1.0]], dtype=torch.float64)
            lse = lse * 0.5
        return torch.autograd.grad(loss.sum() + lse.square().sum(), inputs)

    torch.testing.assert_close(grads(True), grads(False))


@pytest.mark.parametrize("impl", ["chunked", "reference", "torch_compile"])
@pytest.mark.parametrize("retain", [False, True])
def test_inputs_that_were_changed_in_place_are_refused(impl, retain):
    problem = make_problem((5,))
    inputs = (problem.e.requires_grad_(), problem.c.requires_grad_())
    loss = linear_cross_entropy(*inputs, problem.targets, impl=impl)
    with torch.no_grad():
        problem.c.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(retain_graph=retain)
