"""Only the gradients that are needed are computed, and each alone equals itself among all."""

from itertools import combinations

import pytest
import torch

from cut_cross_entropy.implementations import chunked
from cut_cross_entropy.problem import Needed, PerToken, Problem
from tests.support import IMPLS, check, make_problem, run_ours

NAMES = ("e", "c", "bias")
SUBSETS = [subset for size in range(4) for subset in combinations(NAMES, size)]


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("needed", SUBSETS, ids=lambda names: "+".join(names) or "none")
@pytest.mark.parametrize("impl", IMPLS)
def test_subset(impl, needed):
    problem = make_problem(bias=True)
    results = check(problem, impl, needed=needed)
    present = {name for name in NAMES if results.named().get(f"grad_{name}") is not None}
    assert present == set(needed)
    everything = run_ours(problem, impl)
    for name in needed:
        alone, among = (r.named()[f"grad_{name}"] for r in (results, everything))
        torch.testing.assert_close(alone, among)


@pytest.mark.parametrize("needed", SUBSETS, ids=lambda names: "+".join(names) or "none")
def test_chunked_operator_returns_nothing_for_the_rest(needed):
    problem = make_problem((5,), bias=True, ignored=0.0)
    tensors = (problem.e, problem.c, problem.targets, problem.bias)
    call = Problem(*tensors, -100, None, torch.float32, 2**20)
    results = chunked.forward(call)
    upstream = PerToken(torch.ones_like(results.nll), torch.zeros_like(results.lse))
    gradients = chunked.backward(
        upstream, results, call, Needed(*(name in needed for name in NAMES))
    )
    for name, gradient in zip(NAMES, gradients, strict=True):
        shape = getattr(problem, name).shape if name in needed else (0,)
        assert gradient.shape == shape, name


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_inputs_give_a_loss_without_history(impl):
    assert run_ours(make_problem(), impl, needed=()).grad_e is None
    from cut_cross_entropy import linear_cross_entropy

    problem = make_problem()
    loss = linear_cross_entropy(problem.e, problem.c, problem.targets, impl=impl)
    assert not loss.requires_grad
