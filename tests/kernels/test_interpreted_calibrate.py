"""The threshold that follows from the error of a sample, interpreted."""

import math

import pytest
import torch

from cut_cross_entropy import dispatch, linear_cross_entropy, record_filter, token_logprobs
from cut_cross_entropy.kernels.filtered import backward, calibrate, measure
from cut_cross_entropy.kernels.triton.filtered import calibrate as kernels
from cut_cross_entropy.problem import Filter, Problem
from tests.kernels.sampled import check_sums, sampled
from tests.kernels.test_interpreted_filtered import errors, recorded, sharp

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison_empty")]

TARGET = dispatch.MAX_ERROR["auto"]
LIMIT = dispatch.MOST_DROPPED  # which other interpreted tests turn off


@pytest.fixture
def always_calibrated(monkeypatch):
    """Sample small problems too."""
    monkeypatch.setattr(calibrate, "MIN_TOKENS", 0)
    monkeypatch.setattr(calibrate, "MIN_WORK", 0)


@pytest.fixture
def moves(monkeypatch, always_calibrated):
    """Thresholds before and after each calibration."""
    found = []
    original = calibrate.calibrate

    def watched(problem, tokens, mass, threshold, max_error):
        before = int(threshold.value)
        original(problem, tokens, mass, threshold, max_error)
        kept = int(threshold.histogram[:256][int(threshold.value) :].sum())
        assert int(threshold.num_kept) == kept
        found.append((before, int(threshold.value)))

    monkeypatch.setattr(backward, "calibrate", watched)
    return found


@pytest.mark.parametrize("start", [4.0, 160.0])
def test_default_reaches_its_error_from_any_tolerance(start, always_filtered, monkeypatch, moves):
    """In float32, where the tail alone makes an error: 2.7 and 18 roundings by the tolerance."""
    monkeypatch.setattr(dispatch, "FILTER_TOLERANCE", start * dispatch.FILTER_TOLERANCE)
    problem = sharp(300, seed=1)
    results, (record,) = recorded(problem)
    ((before, after),) = moves
    assert record.path == "filtered"
    assert (after < before) == (start > 4)
    error = errors(results, problem)[0] / measure.ROUNDING
    # The sample knows a tail without its tilt, which makes less error than that.
    assert 0.5 * TARGET < error < 1.2 * TARGET


def test_threshold_is_raised_by_a_limited_step(always_filtered, monkeypatch, moves):
    monkeypatch.setattr(dispatch, "FILTER_TOLERANCE", dispatch.FILTER_TOLERANCE / 100)
    recorded(sharp(140))
    ((before, after),) = moves
    assert after == before + kernels.STEP.value


def test_high_keeps_more(always_filtered, always_calibrated, monkeypatch):
    monkeypatch.setattr(dispatch, "FILTER_TOLERANCE", 8 * dispatch.FILTER_TOLERANCE)
    problem = sharp(250, seed=1)
    found = [recorded(problem, filter_eps=eps) for eps in ("auto", "high")]
    (first, second) = (errors(results, problem)[0] for results, _ in found)
    assert 0.35 * first < second < 0.7 * first


def test_a_number_is_a_fixed_tolerance(always_filtered, moves):
    recorded(sharp(), filter_eps=2.0**-12)
    recorded(sharp(), "cce_exact")
    assert not moves


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dropped_mass_is_estimated_where_the_threshold_ends(
    reduction, always_filtered, always_calibrated, monkeypatch
):
    """With a threshold that is lowered, and weighted like the losses."""
    monkeypatch.setattr(dispatch, "FILTER_TOLERANCE", 40 * dispatch.FILTER_TOLERANCE)
    found = []

    class Watched(backward.Counts):
        def __init__(self, kept):
            super().__init__(kept)
            found.append(self)

    monkeypatch.setattr(backward, "Counts", Watched)
    problem = sharp(300, seed=1)
    if reduction == "mean":
        _, (record,) = recorded(problem)
        expected = record.dropped_mass
    else:  # of one block alone, as if the others were not there
        e = problem.e.clone().requires_grad_()
        weights = torch.zeros(300)
        weights[:128] = 1.0
        with record_filter() as records:
            loss = linear_cross_entropy(e, problem.c, problem.targets, impl="cce", reduction="none")
            loss.backward(weights)
        expected = records[0].dropped_mass * 300 / 128
    assert 0.6 * expected < found[-1].dropped_mass < 1.5 * expected, expected


@pytest.mark.parametrize("samples", [True, False], ids=["calibrated", "not calibrated"])
def test_a_tail_that_would_stand_for_much_is_computed(
    samples, always_filtered, request, monkeypatch
):
    if samples:
        request.getfixturevalue("always_calibrated")
    problem = sharp(200, seed=1)
    _, (free,) = recorded(problem)
    assert free.path == "filtered"
    monkeypatch.setattr(dispatch, "MOST_DROPPED", free.dropped_mass * 3)
    assert recorded(problem)[1][0].path == "filtered"
    monkeypatch.setattr(dispatch, "MOST_DROPPED", free.dropped_mass / 3)
    for needed in (("e", "c"), ("e",), ("c",)):
        results, (limited,) = recorded(problem, needed=needed)
        assert limited.path == "dense"
    results, _ = recorded(problem)
    assert max(errors(results, problem)) < 1e-4
    # A tolerance that was asked for is kept.
    _, (asked,) = recorded(problem, filter_eps=2.0**-9)
    assert asked.path == "filtered"


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_limit_counts_the_factors_of_an_entropy(share, always_filtered, monkeypatch):
    """Also where the log-sum-exp's gradient cancels that of the sum of a token's probabilities."""
    monkeypatch.setattr(dispatch, "FILTER_TOLERANCE", 20 * dispatch.FILTER_TOLERANCE)
    problem = sharp(140, seed=1)

    def record():
        e = problem.e.clone().requires_grad_()
        with record_filter() as records:
            found = token_logprobs(
                e, problem.c, problem.targets, outputs=("lse", "entropy"), impl="cce"
            )
            (found.entropy + share * found.entropy.detach() * found.lse).sum().backward()
        return records[0]

    free = record()
    assert free.path == "filtered"
    assert free.dropped_mass > 1e-5
    for factor, path in ((1 / 4, "dense"), (4, "filtered")):
        monkeypatch.setattr(dispatch, "MOST_DROPPED", factor * free.dropped_mass)
        assert record().path == path


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("eps", ["auto", "high", 2.0**-12, None])
def test_a_number_has_no_limit_and_processes_share_it(eps, processes, monkeypatch):
    monkeypatch.setattr(dispatch, "MOST_DROPPED", LIMIT)
    options = {"filter_eps": eps, "filter_e_grad": True, "filter_c_grad": True}
    found = dispatch._filter("cce", options, 1.0, processes)
    assert found.most_dropped == (LIMIT / processes if isinstance(eps, str) else 1.0)


def test_the_default_limit_leaves_the_filter_on(always_filtered, monkeypatch):
    """With as much dropped as trained models do."""
    monkeypatch.setattr(dispatch, "MOST_DROPPED", LIMIT)
    _, (record,) = recorded(sharp(200))
    assert (LIMIT, record.path) == (0.02, "filtered")


def test_mass_is_still_a_limit(always_filtered, monkeypatch, moves):
    monkeypatch.setattr(dispatch, "FILTER_TOLERANCE", 20 * dispatch.FILTER_TOLERANCE)
    _, (free,) = recorded(sharp(140, seed=1))
    _, (limited,) = recorded(sharp(140, seed=1), filter_mass=free.dropped_mass / 3)
    assert 0 < limited.dropped_mass <= free.dropped_mass / 3
    assert limited.strips_kept > free.strips_kept


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_no_estimate_leaves_the_threshold(value, moves):
    """Of tokens without a gradient, or with one that is no number."""
    problem = sharp()
    e = problem.e.clone().requires_grad_()
    loss = linear_cross_entropy(e, problem.c, problem.targets, impl="cce", reduction="none")
    loss.backward(torch.full_like(loss, value))
    ((before, after),) = moves
    assert before == after or value != 0


def test_weights_enter_the_estimate(always_filtered, always_calibrated, monkeypatch):
    """Most of the upstream gradient on a few tokens: their error counts. A sample scatters."""
    monkeypatch.setattr(dispatch, "FILTER_TOLERANCE", 8 * dispatch.FILTER_TOLERANCE)
    weights = torch.full((250,), 1e-3)
    weights[::7] = 1.0
    errors = []
    for seed in (1, 2, 3):
        problem = sharp(250, seed=seed)
        grads = []
        for impl in ("cce", "reference"):
            e = problem.e.clone().requires_grad_()
            loss = linear_cross_entropy(
                e, problem.c, problem.targets, problem.bias, impl=impl, reduction="none"
            )
            (grad,) = torch.autograd.grad(loss, e, weights)
            grads.append(grad)
        error = (grads[0] - grads[1]).norm() / grads[1].norm()
        errors.append(float(error) / measure.ROUNDING)
    assert max(errors) < 1.4 * TARGET
    assert sum(errors) / len(errors) > 0.4 * TARGET


def test_a_step_is_a_function_of_its_inputs(always_filtered, always_calibrated):
    problem = sharp(140)
    first, second = (recorded(problem)[0].named() for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_tokens_are_drawn_by_risk():
    weights = torch.rand(5000, generator=torch.Generator().manual_seed(1))
    weights[100] = 400  # is drawn more than once
    tokens, mass = sampled(5000, weights)
    tokens.target_grad[:50] = -1.0  # no filtered gradient
    rows, factors, _ = calibrate.draw_tokens(tokens, mass)
    assert (factors[kernels.SAMPLES.value :] == 0).all()
    rows, factors = rows[: kernels.SAMPLES.value], factors[: kernels.SAMPLES.value]
    weights = torch.where(torch.arange(5000) < 50, 0.0, weights).double()
    share = lambda x: x / x.sum()
    risk = share(weights * mass) + kernels.EVENLY.value * share(weights)
    expected, _ = measure.sample_by_risk(risk, kernels.SAMPLES.value)
    assert (rows == expected).double().mean() > 0.95, "but for rounding"
    assert (rows == 100).sum() > 5
    assert rows.min() >= 50
    expected = risk.sum() / (kernels.SAMPLES.value * risk[rows])
    torch.testing.assert_close(factors.double(), expected, rtol=0.02, atol=0)


def test_no_risk_draws_nothing_that_counts():
    tokens, mass = sampled(200, torch.zeros(200))
    rows, factors, _ = calibrate.draw_tokens(tokens, mass)
    assert ((rows >= 0) & (rows < 200)).all()
    assert (factors == 0).all()


def test_only_large_problems_are_calibrated():
    like = lambda *size: torch.empty(size, dtype=torch.bfloat16, device="meta")
    problem = lambda n, v, d: Problem(
        like(n, d), like(v, d), like(n), None, -100, None, torch.bfloat16, 2**28
    )
    filter_ = Filter(1e-4, max_error=1.0)
    assert calibrate.calibrates(problem(8192, 256000, 2304), filter_)
    assert not calibrate.calibrates(problem(8192, 256000, 2304), Filter(1e-4))
    assert not calibrate.calibrates(problem(8192, 49152, 576), filter_)
    assert not calibrate.calibrates(problem(2048, 256000, 4096), filter_)


@pytest.mark.parametrize(("softcap", "low_rank"), [(None, 0), (3.0, 0), (3.0, 16)])
def test_sums_of_dropped_gradients(softcap, low_rank, monkeypatch):
    """In several chunks of classes."""
    monkeypatch.setattr(calibrate, "PROGRAMS", 2)
    monkeypatch.setattr(calibrate, "CHUNK_BYTES", 1)
    check_sums("cpu", torch.float32, softcap, tolerance=1e-4, low_rank=low_rank)
