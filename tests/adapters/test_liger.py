"""Liger's scaled cross-entropy, computed by ours: against its own function on the CPU."""

import pytest
import torch
from liger_kernel import ops

from cut_cross_entropy import adapters
from tests.adapters.parity import assert_same, problem, step

LIGER = ops.LigerFusedLinearScaledCrossEntropyFunction


@pytest.mark.parametrize("selected", [None, [3, 140, 3, 0]])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_are_those_of_liger(selected, entropy, temperature):
    hidden, weight, targets = problem()
    targets[[2, 5]] = -1
    ids = None if selected is None else torch.tensor(selected)
    options = (targets, temperature, -1, 1, entropy, ids)
    theirs = step(lambda h, w: LIGER.apply(h, w, *options), hidden, weight)
    with adapters.liger() as adapter:
        function = ops.LigerFusedLinearScaledCrossEntropyFunction
        assert function is not LIGER
        ours = step(lambda h, w: function.apply(h, w, *options), hidden, weight)
    assert adapter.calls == 1
    assert ops.LigerFusedLinearScaledCrossEntropyFunction is LIGER
    assert_same(ours, theirs)
    assert all(x[[2, 5]].count_nonzero() == 0 for x in ours[0])


def test_the_entropy_is_not_rounded():
    hidden, weight, targets = problem(dtype=torch.bfloat16)
    options = (targets, 1.0, -100, 1, True)
    with adapters.liger():
        nll, entropy = ops.LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden, weight, *options
        )
    assert nll.dtype == entropy.dtype == torch.float32
    logprobs = (hidden.double() @ weight.double().T).log_softmax(1)
    exact = -(logprobs.exp() * logprobs).sum(1)
    assert float((entropy - exact).abs().max()) < 1e-5
