"""Values that are not finite, large, masked or out of range; determinism; the memory budget."""

import pytest
import torch

from cut_cross_entropy import linear_cross_entropy
from tests.support import (
    IMPLS,
    assert_within_budget,
    check,
    full_logits,
    largest,
    make_problem,
    run,
    run_ours,
)

every_impl = pytest.mark.parametrize("impl", IMPLS)


@every_impl
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_embedding_of_a_kept_token_shows(impl, value):
    problem = make_problem((4,), ignored=0.0)
    problem.e[1, 2] = value
    results = run_ours(problem, impl, reduction="none")
    # An infinite embedding may make the target's logit -inf alone: then the loss is inf.
    assert results.loss.isfinite().tolist() == [True, False, True, True]
    assert results.loss[1].isnan() or value == torch.inf
    assert not results.lse[1].isfinite()
    assert results.grad_e[1].isnan().all()
    assert results.grad_e[[0, 2, 3]].isfinite().all()
    assert results.grad_c.isnan().any()


@every_impl
def test_nan_in_the_classifier_reaches_every_loss(impl):
    problem = make_problem((4,), ignored=0.0)
    problem.c[200, 0] = torch.nan
    assert run_ours(problem, impl, reduction="none").loss.isnan().all()


@every_impl
@pytest.mark.parametrize("masked", [slice(0, 10), slice(0, 128), slice(128, 300), slice(1, 300)])
def test_classes_masked_by_a_bias_of_minus_infinity(impl, masked):
    """Whole blocks of classes may be masked, first or last, and all classes but one."""
    problem = make_problem((6,), bias=True, ignored=0.0)
    allowed = torch.ones(300, dtype=torch.bool)
    allowed[masked] = False
    problem.bias[~allowed] = -torch.inf
    choices = allowed.nonzero().squeeze(1)
    problem.targets.copy_(choices[problem.targets % len(choices)])
    results = check(problem, impl, memory_budget=1)
    assert torch.count_nonzero(results.grad_c[~allowed]) == 0
    assert torch.count_nonzero(results.grad_bias[~allowed]) == 0


@every_impl
def test_a_masked_target_costs_infinity(impl):
    problem = make_problem((3,), bias=True, ignored=0.0)
    problem.bias[problem.targets[1]] = -torch.inf
    problem.targets[[0, 2]] = (problem.targets[1] + 1) % 300
    loss = run_ours(problem, impl, reduction="none").loss
    assert loss.isposinf().tolist() == [False, True, False]


@every_impl
@pytest.mark.parametrize("scale", [1e-4, 30.0, 1e4])  # flat; one sure class; far beyond exp
def test_scale_of_the_logits(impl, scale):
    problem = make_problem()
    problem.c.mul_(scale)
    check(problem, impl, memory_budget=1)


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_probability_exceeds_one(impl, dtype):
    """Confident tokens: the loss is near 0, and rounding must not take it below."""
    problem = make_problem((200,), classes=400, dtype=dtype, ignored=0.0)
    targets = (problem.e.float() @ problem.c.float().T).argmax(1)
    for gain in (1, 2, 8):
        e = problem.e * gain
        loss = linear_cross_entropy(
            e, problem.c, targets, reduction="none", impl=impl, memory_budget=1
        )
        assert (loss >= 0).all()
        assert (loss < 0.5).any()


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_identical_when_repeated(impl, dtype):
    problem = make_problem(dtype=dtype, bias=True)
    first, second = (run_ours(problem, impl, softcap=5.0) for _ in range(2))
    for name, value in first.named().items():
        assert torch.equal(second.named()[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("budget", [1, 10_000, 2**40])  # one token a block, several, everything
def test_memory_budget_changes_blocks_and_not_results(dtype, budget):
    problem = make_problem((40,), bias=True, dtype=dtype)
    check(problem, "chunked", softcap=5.0, memory_budget=budget)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_over_many_tokens_keep_small_gradients_in_half_precision(dtype):
    """1/N of a probability underflows in float16 unless it is scaled or widened."""
    problem = make_problem((3000,), classes=20, dim=4, dtype=dtype, ignored=0.0)
    truth = run(full_logits, problem.to(torch.float64), lse_weight=0.0)
    ours = run_ours(problem, "chunked", lse_weight=0.0)
    for name in ("grad_e", "grad_c"):
        exact, got = truth.named()[name], ours.named()[name].double()
        # One rounding to the result's dtype, subnormal below its smallest normal number.
        info = torch.finfo(dtype)
        allowed = exact.abs() * info.eps + info.tiny * info.eps + 1e-6 * largest(exact)
        assert ((got - exact).abs() <= allowed).all(), name


@every_impl
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("target", [-1, 300, -99, 2**31 - 1])
def test_target_out_of_range(impl, target, dtype, shift):
    problem = make_problem((4,), target_dtype=dtype, ignored=0.0)
    problem.targets[2] = target
    message = (
        rf"targets must lie in \[0, V\) with V = 300, or be ignore_index = -100, "
        rf"got {target} \(1 out of range\)"
    )
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(problem.e, problem.c, problem.targets, shift=shift, impl=impl)


@every_impl
def test_a_target_that_the_shift_drops_is_not_looked_at(impl):
    problem = make_problem((4,), ignored=0.0)
    problem.targets[0] = 300
    loss = linear_cross_entropy(problem.e, problem.c, problem.targets, shift=1, impl=impl)
    assert loss.isfinite()


@pytest.mark.parametrize("impl", IMPLS)
def test_out_of_range_is_nan_where_the_range_is_not_checked(impl, monkeypatch):
    """As on a GPU, where the check would stall: never a plausible number."""
    for module in ("dispatch", "implementations.blocks"):
        monkeypatch.setattr(
            f"cut_cross_entropy.{module}.check_target_range", lambda *arguments: None
        )
    problem = make_problem((4,), ignored=0.0)
    problem.targets[2] = 300
    results = run_ours(problem, impl, reduction="none")
    assert results.loss.isnan().tolist() == [False, False, True, False]
    assert run_ours(problem, impl).loss.isnan()
    for return_lse in (True, False):
        assert run_ours(problem, "chunked", return_lse=return_lse).grad_c.isnan().any()


def test_the_error_budget_sees_an_error():
    """A budget that accepts everything would make every comparison here worthless."""
    problem = make_problem()
    truth = run(full_logits, problem.to(torch.float64))
    plain = run(full_logits, problem)
    none = dict.fromkeys(truth.named(), 0.0)
    assert_within_budget(plain, truth, dict.fromkeys(none, 1e-6), torch.float32, 2.0)
    for name, value in plain.named().items():
        worse = type(plain)(**{**plain.named(), "grad_bias": None, name: value + 1e-4})
        with pytest.raises(AssertionError, match=name):
            assert_within_budget(worse, truth, none, torch.float32, 2.0)


def test_poison_reaches_the_family_of_empty(poison_empty):
    like = torch.zeros(3)
    for tensor in (torch.empty(3), torch.empty_like(like), like.new_empty(3)):
        assert tensor.isnan().all()
    assert torch.empty_strided((2, 2), (1, 2)).isnan().all()
