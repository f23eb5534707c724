"""The errors that a record reports, interpreted, beside those of the whole gradients."""

import dataclasses
import math

import pytest
import torch

from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.filter_report import FilterRecord, record_filter
from cut_cross_entropy.kernels.filtered import backward, measure, passes
from tests.kernels.test_interpreted_filtered import GRADIENTS, errors, recorded, sharp
from tests.support import full_logits, run, run_ours

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison_empty")]

FIELDS = {"grad_e": "error_e", "grad_c": "error_c"}
WITHIN = 0.2  # of the truth; the scatter is in docs/numerics.md


def check_estimates(record, results, problem, within=WITHIN, **options):
    """Compare the estimates with the truth; return that in roundings of bfloat16."""
    truth = dict(zip(GRADIENTS, errors(results, problem, **options), strict=True))
    for name, field in FIELDS.items():
        expected = truth[name] / measure.ROUNDING
        estimate = getattr(record, field)
        assert math.isclose(estimate, expected, rel_tol=within), (field, estimate, expected)
    return truth["grad_e"] / measure.ROUNDING


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"softcap": 30.0}),
        (torch.float16, {"softcap": 30.0}),
        (torch.float16, {"reduction": "none"}),
    ],
    ids=str,
)
def test_estimates_are_near_the_truth(dtype, options, always_filtered, monkeypatch):
    """Of four times as many tokens and classes as are sampled, with a bias."""
    monkeypatch.setattr(measure, "TOKENS", 32)
    problem = sharp(140, dtype=dtype)
    results, (record,) = recorded(problem, filter_eps=2.0**-9, **options)
    assert record.path == "filtered"
    assert check_estimates(record, results, problem, **options) > 0.2


def test_a_wide_tolerance_is_seen(always_filtered):
    problem = sharp(140)
    _, (whole,) = recorded(problem)
    results, (record,) = recorded(problem, filter_eps=200 * 2.0**-12)
    assert whole.error_e < 2
    assert check_estimates(record, results, problem) > 20
    assert record.cosines_c[2] < whole.cosines_c[2]


def test_a_broken_tail_is_seen(monkeypatch, always_filtered):
    """Though the dropped mass, by which tokens are drawn, is as small as ever."""
    monkeypatch.setattr(passes, "update_tails", lambda *args: None)
    problem = sharp(140)
    results, (record,) = recorded(problem)
    assert record.dropped_mass == 0
    check_estimates(record, results, problem)


def test_exact_rows_of_unequal_weights(always_filtered):
    """Weights of most tokens are 0, and the rest differ by a factor of a thousand."""
    problem = sharp(140)
    weights = torch.logspace(-3, 0, 140)
    weights[::3] = 0
    found, records = [], []
    for compute in (linear_cross_entropy, full_logits):
        wide = torch.float64 if compute is full_logits else torch.float32
        e, c = (x.to(wide).requires_grad_() for x in (problem.e, problem.c))
        options = {} if compute is full_logits else {"impl": "cce", "filter_eps": 2.0**-9}
        with record_filter() as new:
            loss = compute(
                e, c, problem.targets, problem.bias.to(wide), reduction="none", **options
            )
            loss = loss[0] if isinstance(loss, tuple) else loss
            found.append(torch.autograd.grad(loss, (e, c), weights.to(loss)))
        records += new
    (record,) = records
    for got, exact, field in zip(*found, FIELDS.values(), strict=True):
        expected = ((got - exact).norm() / exact.norm()).item() / measure.ROUNDING
        assert math.isclose(getattr(record, field), expected, rel_tol=WITHIN), field


def test_temperatures_and_entropies(always_filtered):
    """Gradients of a weighted sum of losses and entropies; the truth by the exact preset."""
    from cut_cross_entropy import token_logprobs

    problem, found = sharp(140), []
    problem.targets[problem.targets < 0] = 5
    for impl in ("cce", "cce_exact"):
        e, c = (x.clone().requires_grad_() for x in (problem.e, problem.c))
        with record_filter() as records:
            outputs = token_logprobs(
                e, c, problem.targets, bias=problem.bias, impl=impl, temperature=0.9,
                outputs=("entropy",),
            )  # fmt: skip
            (outputs.logprobs - 0.1 * outputs.entropy).mean().backward()
        found.append((e.grad, c.grad, records))
    (got_e, got_c, (record,)), (exact_e, exact_c, _) = found
    assert record.path == "filtered"
    for estimate, got, exact in (
        (record.error_e, got_e, exact_e),
        (record.error_c, got_c, exact_c),
    ):
        expected = ((got - exact).norm() / exact.norm()).item() / measure.ROUNDING
        assert expected > 0.05
        assert math.isclose(estimate, expected, rel_tol=WITHIN)


def test_cosines_of_rows(always_filtered):
    """At most as many classes as are sampled, so that the percentiles are those of all rows."""
    problem = sharp(140, classes=measure.CLASSES)
    results, (record,) = recorded(problem, filter_eps=0.1)
    exact = run(full_logits, problem.to(torch.float64)).grad_c
    cosines = torch.cosine_similarity(results.grad_c.double(), exact, eps=1e-30).sort().values
    assert record.cosines_c[1] < 0.99
    for percentile, estimate in zip(measure.PERCENTILES, record.cosines_c, strict=True):
        expected = cosines[measure.CLASSES * percentile // 100].item()
        assert math.isclose(estimate, expected, abs_tol=1e-5)


def test_several_superblocks(several_superblocks, always_filtered):
    problem = sharp(200)
    results, (record,) = recorded(problem, filter_eps=2.0**-9)
    check_estimates(record, results, problem)


def test_flat_tokens_are_measured_too(monkeypatch):
    monkeypatch.setattr(backward, "FLAT_SUPPORT", 100)
    problem = sharp(140, flat=(3, 17, 31))
    problem.targets[[3, 17, 31]] = 7
    results, (record,) = recorded(problem, filter_eps=25 * 2.0**-12)
    assert (record.path, record.flat_tokens) == ("filtered", 3)
    check_estimates(record, results, problem)


@pytest.mark.parametrize(
    ("impl", "needed", "fields"),
    [
        ("cce", ("e",), {"error_e"}),
        ("cce", ("c",), {"error_c", "cosines_c"}),
        ("cce", ("bias",), set()),
        ("cce_kahan_full_c", ("e", "c"), {"error_e"}),
        ("cce_kahan_full_e", ("e", "c"), {"error_c", "cosines_c"}),
        ("cce_exact", ("e", "c"), set()),
    ],
)
def test_only_what_the_filter_computed_is_measured(impl, needed, fields):
    _, records = recorded(sharp(), impl, needed=needed, reduction="none")
    (record,) = records
    named = ("error_e", "error_c", "cosines_c")
    assert {name for name in named if getattr(record, name) is not None} == fields


def test_dense_path_has_no_error_of_the_filter(never_filtered):
    _, (record,) = recorded(sharp(9))
    assert (record.path, record.error_e, record.error_c, record.cosines_c) == (
        "dense", None, None, None,
    )  # fmt: skip


def test_tokens_without_a_gradient():
    problem = sharp()
    e = problem.e.clone().requires_grad_()
    with record_filter() as records:
        loss = linear_cross_entropy(e, problem.c, problem.targets, impl="cce", reduction="none")
        loss.backward(torch.zeros_like(loss))
    assert records[0].error_e == 0
    assert torch.equal(e.grad, torch.zeros_like(e))


def test_nan_is_reported(always_filtered):
    problem = sharp()
    problem.e[0] = math.nan
    problem.targets[0] = 5
    _, (record,) = recorded(problem)
    assert record.path == "filtered"
    assert math.isnan(record.error_e)
    assert math.isnan(record.error_c)


def test_recording_changes_no_gradient():
    problem = sharp()
    plain = run_ours(problem, "cce")
    results, (first,) = recorded(problem)
    _, (second,) = recorded(problem)
    for name, value in plain.named().items():
        assert torch.equal(results.named()[name], value), name
    assert first == second, "a record is a function of the inputs"


def test_values_are_read_when_they_are_asked_for(monkeypatch):
    waits, read = [], backward._read

    def wait(*args, **options):
        waits.append(1)
        return read(*args, **options)

    monkeypatch.setattr(backward, "_read", wait)
    _, (record,) = recorded(sharp())
    assert (record.path, record.tokens > 0, waits) == ("filtered", True, [])
    assert record.error_e > 0
    assert record.dropped_mass > 0
    assert waits == [1], "once for all of them"
    assert dataclasses.asdict(record)["error_c"] == record.error_c
    assert "error_e=0." in repr(record)
    with pytest.raises(AttributeError, match="no attribute 'errors'"):
        record.errors  # noqa: B018


def test_a_record_made_by_hand_is_complete():
    record = FilterRecord("exact", 1.0, 0.0, 0, 7)
    assert (record.error_e, record.error_c, record.cosines_c) == (None, None, None)


def test_the_sample_is_unbiased():
    """Averaged over all offsets the estimate of a sum is the sum, whatever the risk."""
    random = torch.Generator().manual_seed(0)
    values, risk = torch.rand((2, 200), generator=random, dtype=torch.float64)
    risk[7] = 40  # is drawn more than once
    offsets = (torch.arange(500) + 0.5) / 500
    sums = []
    for offset in offsets.tolist():
        rows, factors = measure.sample_by_risk(risk, 16, offset)
        sums.append((factors * values[rows]).sum())
    mean = torch.stack(sums).mean()
    assert math.isclose(mean, values.sum(), rel_tol=0.01)
    assert torch.stack(sums).std() > 0.05 * mean


def test_an_ideal_risk_leaves_no_scatter():
    values = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.5, 0.0])
    rows, factors = measure.sample_by_risk(values, 4)
    assert math.isclose((factors * values[rows]).sum(), 4.5, rel_tol=1e-6)
    assert (values[rows] > 0).all()


@pytest.mark.parametrize("risk", [[0.0, 0.0, 0.0], [1.0, math.nan, 1.0]], ids=str)
def test_a_risk_without_a_sum_draws_nothing_that_counts(risk):
    rows, factors = measure.sample_by_risk(torch.tensor(risk), 4)
    assert ((rows >= 0) & (rows < 3)).all()
    assert (factors == 0).all()
