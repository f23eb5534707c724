"""Leading shapes, layouts in memory, empty batches, and sizes at the edges of a block."""

from dataclasses import replace

import pytest
import torch

from cut_cross_entropy import linear_cross_entropy
from tests.support import IMPLS, check, full_logits, make_problem, run_ours, strided

pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    pytest.mark.parametrize("impl", IMPLS),
]


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_leading_shape(impl, leading, reduction):
    results = check(make_problem(leading, ignored=0.0), impl, reduction=reduction)
    assert results.lse.shape == leading
    assert results.loss.shape == (leading if reduction == "none" else ())


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize("leading", [(4,), (3, 4), (2, 1, 4)], ids=str)
def test_shift_shortens_the_last_dimension(impl, leading, shift):
    results = check(make_problem(leading), impl, reduction="none", shift=shift)
    assert results.loss.shape == results.lse.shape == (*leading[:-1], 4 - shift)


@pytest.mark.parametrize("shape", [(6,), (3, 2), (1, 6, 1)], ids=str)
def test_targets_of_another_shape_give_results_of_theirs(impl, shape):
    problem = make_problem((2, 3))
    other = replace(problem, targets=problem.targets.reshape(shape))
    expected = run_ours(problem, impl, reduction="none", lse_weight=0.0)
    got = run_ours(other, impl, reduction="none", lse_weight=0.0)
    assert got.loss.shape == got.lse.shape == shape
    assert torch.equal(got.loss.flatten(), expected.loss.flatten())
    assert torch.equal(got.lse.flatten(), expected.lse.flatten())


def test_automatic_shift_equals_shift_by_hand(impl):
    problem = make_problem((3, 5), ignored=0.2)
    by_hand = linear_cross_entropy(
        problem.e[..., :-1, :].flatten(0, -2), problem.c, problem.targets[..., 1:], impl=impl
    )
    automatic = linear_cross_entropy(problem.e, problem.c, problem.targets, shift=True, impl=impl)
    torch.testing.assert_close(automatic, by_hand)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("what", ["e", "c", "targets", "bias", "all"])
def test_non_contiguous_inputs(impl, what, shift):
    problem = strided(make_problem((4, 6), bias=True), what)
    check(problem, impl, shift=shift, reduction="none")


def test_expanded_inputs(impl):
    """Strides of 0: one embedding for all tokens, one row for all classes."""
    problem = make_problem((4,), ignored=0.0)
    check(replace(problem, e=problem.e[:1].expand(4, -1)), impl)
    check(replace(problem, c=problem.c[:1].expand(300, -1)), impl)


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(impl, leading, reduction):
    results = run_ours(make_problem(leading, bias=True), impl, reduction=reduction)
    if reduction == "none":
        assert results.loss.shape == leading
    else:
        assert results.loss.item() == 0
    assert results.lse.shape == leading
    assert results.grad_e.shape == (*leading, 16)
    assert torch.count_nonzero(results.grad_c) == 0
    assert torch.count_nonzero(results.grad_bias) == 0


@pytest.mark.parametrize("classes", [1, 2, 127, 128, 129, 256])  # a block is a multiple of 128
def test_number_of_classes(impl, classes):
    problem = make_problem((5,), classes, bias=True)
    # The gradients of one class cancel to 0 but for those of lse, below the rounding of the rest.
    lse_weight = 0.1 if classes > 1 else 0.0
    check(problem, impl, reduction="sum", memory_budget=1, lse_weight=lse_weight)


@pytest.mark.parametrize("dim", [1, 3, 65])
def test_number_of_features(impl, dim):
    check(make_problem((5,), dim=dim), impl)


def test_one_class_costs_nothing(impl):
    results = run_ours(make_problem((5,), classes=1, ignored=0.0), impl, reduction="none")
    assert torch.equal(results.loss, torch.zeros(5))


def test_inputs_are_not_modified(impl):
    problem = make_problem(bias=True)
    copies = [x.clone() for x in (problem.e, problem.c, problem.targets, problem.bias)]
    run_ours(problem, impl, shift=1, softcap=5.0)
    for before, after in zip(
        copies, (problem.e, problem.c, problem.targets, problem.bias), strict=True
    ):
        assert torch.equal(before, after)


def test_more_tokens_than_one_block_of_the_bounded_implementation(impl):
    """8192 tokens are one block at the most; results must not depend on where it ends."""
    problem = make_problem((8200,), classes=5, dim=2, ignored=0.0)
    results = run_ours(problem, impl, reduction="none")
    loss, _ = full_logits(problem.e, problem.c, problem.targets, reduction="none")
    torch.testing.assert_close(results.loss, loss)
