"""Tokens without a loss: nothing they hold may reach a result."""

import pytest
import torch

from tests.support import IMPLS, make_problem, run_ours

pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    pytest.mark.parametrize("impl", IMPLS),
]


def test_results_at_ignored_tokens_are_zero(impl):
    problem = make_problem()
    ignored = problem.targets == -100
    assert 0 < ignored.sum() < ignored.numel()
    results = run_ours(problem, impl, reduction="none")
    for name in ("loss", "lse", "grad_e"):
        assert torch.count_nonzero(results.named()[name][ignored]) == 0, name
        assert torch.count_nonzero(results.named()[name][~ignored]) > 0, name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 1])
def test_all_ignored(impl, reduction, dtype, shift):
    problem = make_problem(dtype=dtype, bias=True, ignored=1.0)
    results = run_ours(problem, impl, reduction=reduction, shift=shift, softcap=5.0)
    for name, value in results.named().items():
        assert torch.count_nonzero(value) == 0, name  # NaN counts as not zero
    assert results.grad_c.shape == problem.c.shape


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bad_embeddings_of_ignored_tokens_do_not_leak(impl, value, shift, softcap):
    problem = make_problem(bias=True)
    clean = run_ours(problem, impl, shift=shift, softcap=softcap)
    without_loss = problem.targets.roll(-shift, dims=-1) == -100
    if shift:
        without_loss[..., -shift:] = True  # the last tokens have no target
    problem.e[without_loss] = value
    dirty = run_ours(problem, impl, shift=shift, softcap=softcap)
    for name, expected in clean.named().items():
        assert torch.equal(dirty.named()[name], expected), name


def test_mean_divides_by_the_tokens_that_count(impl):
    problem = make_problem()
    kept = int((problem.targets != -100).sum())
    total, mean = (run_ours(problem, impl, reduction=r).loss for r in ("sum", "mean"))
    torch.testing.assert_close(mean, total / kept)


def test_default_ignore_index_may_be_a_class_elsewhere(impl):
    """With ignore_index=3, -100 is just a target out of range."""
    problem = make_problem(ignored=0.3)
    with pytest.raises(ValueError, match=r"ignore_index = 3, got -100"):
        run_ours(problem, impl, ignore_index=3)
