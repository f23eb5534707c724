"""Autocast chooses the dtype of the product; parameters get gradients in their own."""

import pytest
import torch

from cut_cross_entropy import linear_cross_entropy
from tests.support import (
    IMPLS,
    assert_within_budget,
    budget_factor,
    full_logits,
    largest,
    make_problem,
    run,
    run_ours,
)

pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    pytest.mark.parametrize("impl", IMPLS),
]

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_float32_parameters(impl, half, bias):
    problem = make_problem(bias=bias)
    truth = run(full_logits, problem.to(torch.float64), reduction="none")
    with torch.autocast("cpu", dtype=half):
        ours = run_ours(problem, impl, reduction="none")
        plain = run(full_logits, problem, reduction="none")
    errors = {name: largest(plain.named()[name] - exact) for name, exact in truth.named().items()}
    # The inputs are rounded for ours and plain alike: ours is no better there than plain.
    assert_within_budget(ours, truth, errors, torch.float32, 2 * budget_factor(impl, half))
    assert errors["loss"] > 1e-4, "autocast had no effect on plain PyTorch"
    assert {value.dtype for value in ours.named().values()} == {torch.float32}


def test_autocast_rounds_the_product(impl):
    problem = make_problem(ignored=0.0)
    exact = run_ours(problem, impl, reduction="none").loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = run_ours(problem, impl, reduction="none").loss
    assert 1e-4 < largest(exact - rounded) < 0.2


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
)
def test_mixed_parameters(impl, dtypes):
    """Embeddings of an autocast layer and a float32 classifier, and the reverse."""
    problem = make_problem(bias=True)
    e, c = (x.to(d).requires_grad_() for x, d in zip((problem.e, problem.c), dtypes, strict=True))
    bias = problem.bias.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_cross_entropy(e, c, problem.targets, bias, impl=impl).backward()
    assert [x.grad.dtype for x in (e, c, bias)] == [*dtypes, torch.float32]
    assert all(x.grad.isfinite().all() for x in (e, c, bias))


def test_float64_is_left_alone(impl):
    problem = make_problem(dtype=torch.float64)
    expected = run_ours(problem, impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run_ours(problem, impl)
    for name, value in expected.named().items():
        torch.testing.assert_close(got.named()[name], value, msg=name)


def test_disabled_autocast_changes_nothing(impl):
    problem = make_problem()
    expected = run_ours(problem, impl)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        got = run_ours(problem, impl)
    assert torch.equal(got.loss, expected.loss)


def test_backward_outside_the_context(impl):
    """As training loops have it: autocast around the forward only."""
    problem = make_problem()
    e, c = problem.e.requires_grad_(), problem.c.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(e, c, problem.targets, impl=impl)
    loss.backward()
    outside = (e.grad, c.grad)
    e.grad = c.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_cross_entropy(e, c, problem.targets, impl=impl).backward()
    # Inside, PyTorch may round the products of backward to bfloat16 as well.
    for grad, alone in ((e.grad, outside[0]), (c.grad, outside[1])):
        torch.testing.assert_close(grad, alone, rtol=2**-7, atol=2**-7 * largest(alone))
