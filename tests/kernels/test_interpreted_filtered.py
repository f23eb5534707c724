"""The filter, interpreted: its errors, paths and reports, flat tokens, options."""

import functools
import math
from dataclasses import replace

import pytest
import torch

from cut_cross_entropy import dispatch, linear_cross_entropy
from cut_cross_entropy.filter_report import record_filter
from cut_cross_entropy.kernels import likely_classes, step
from cut_cross_entropy.kernels.filtered import backward, index, passes
from cut_cross_entropy.kernels.filtered import flat as few_flat
from cut_cross_entropy.kernels.filtered.index import Counts
from cut_cross_entropy.kernels.filtered.schedule import STRIP_BYTES
from cut_cross_entropy.kernels.filtered.tail import TokenTails
from cut_cross_entropy.kernels.tokens import SCAN, BackwardTokens
from cut_cross_entropy.kernels.triton.primitives import ABSENT
from cut_cross_entropy.problem import Problem as Call
from tests.support import Problem, full_logits, make_problem, run, run_ours

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison_empty")]

GRADIENTS = ("grad_e", "grad_c", "grad_bias")


def sharp(tokens=40, classes=1100, dim=32, *, flat=(), seed=0, dtype=torch.float32):
    """Tokens that agree on a few likely classes over a faint background, but for the flat ones."""
    problem = make_problem((tokens,), classes, dim, bias=True, ignored=0.1, seed=seed)
    random = torch.Generator().manual_seed(seed)
    likely = torch.randint(0, 40, (tokens, 3), generator=random)
    e = (problem.c[likely] * torch.tensor([1.0, 0.8, 0.5])[:, None]).sum(1)
    e = e * 12 / e.norm(dim=1, keepdim=True)
    e[list(flat)] *= 0.01
    bias = -0.5 - problem.bias.abs()
    bias[list(range(40))] = 0
    targets = torch.where(problem.targets >= 0, likely[:, 0], problem.targets)
    return Problem(e, problem.c, targets, bias).to(dtype)


def recorded(problem, impl="cce", **options):
    with record_filter() as records:
        results = run_ours(problem, impl, **options)
    return results, records


def errors(results, problem, **options):
    """Relative Frobenius errors of the gradients."""
    truth = run(full_logits, problem.to(torch.float64), **options)
    pairs = ((results.named()[name], truth.named()[name]) for name in GRADIENTS)
    return [((got - exact).norm() / exact.norm()).item() for got, exact in pairs]


def test_default_stays_within_the_rounding_of_bfloat16():
    """The promise of the default: twice the error of rounding the exact gradient to bfloat16."""
    problem = sharp()
    results, (record,) = recorded(problem)
    truth = run(full_logits, problem.to(torch.float64))
    assert record.path == "filtered"
    assert 0 < record.strips_kept < 0.45
    assert 0 < record.dropped_mass < 0.1
    assert record.tokens == int((problem.targets >= 0).sum())
    for name in GRADIENTS:
        exact = truth.named()[name]
        rounding = (exact.bfloat16().double() - exact).norm()
        assert (results.named()[name] - exact).norm() <= 2 * rounding, name


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_stricter_filters_keep_more_and_err_less(softcap, always_filtered):
    problem = sharp(20, 600)
    kept, worst, mass = [], [], []
    for filter_eps in (0.1, 2.0**-8, "auto", "high", 1e-12):
        results, (record,) = recorded(problem, filter_eps=filter_eps, softcap=softcap)
        assert record.path == "filtered"
        kept.append(record.strips_kept)
        mass.append(record.dropped_mass)
        worst.append(max(errors(results, problem, softcap=softcap)))
    assert kept == sorted(kept), kept
    assert mass == sorted(mass, reverse=True), mass
    assert worst == sorted(worst, reverse=True), worst
    assert kept[0] < kept[-1]
    assert worst[-1] < 1e-5


def test_tail_stands_for_what_is_dropped(always_filtered):
    """Without it, the gradient of a token would miss its dropped mass in every sum over classes."""
    problem = sharp()
    results, (record,) = recorded(problem, filter_eps=0.1, reduction="sum", lse_weight=0.0)
    truth = run(full_logits, problem.to(torch.float64), reduction="sum", lse_weight=0.0)
    assert record.dropped_mass > 1e-3
    total = truth.grad_bias.abs().sum()
    assert (results.grad_bias.sum() - truth.grad_bias.sum()).abs() < 1e-5 * total


@pytest.fixture
def order(monkeypatch):
    """Record when sums are allocated, strips are listed, and the host waits for their counts."""
    order = []

    def record(owner, name, label):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, **k: (order.append(label), original(*a, **k))[1]
        )

    record(TokenTails, "zeros", "zeros")
    record(index, "_list", "list")
    parts = Counts._parts.func
    counts = functools.cached_property(lambda self: (order.append("wait"), parts(self))[1])
    counts.__set_name__(Counts, "_parts")
    monkeypatch.setattr(Counts, "_parts", counts)
    return order


def test_strips_are_listed_and_sums_allocated_before_the_host_waits(order):
    """For the counts, since the device idles afterwards until the next kernel is launched."""
    run_ours(sharp(), "cce")
    assert order == ["list", "zeros", "wait"]


def test_a_list_that_was_too_short_is_made_again(order, monkeypatch):
    problem = sharp(300)
    results = run_ours(problem, "cce")
    monkeypatch.setattr(passes, "STRIP_BYTES", 2**28 // 40)
    again = run_ours(problem, "cce")
    assert order == ["list", "zeros", "wait", "list", "zeros", "wait", "list"]
    for name, value in results.named().items():
        assert torch.equal(value, again.named()[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strips_beyond_the_budget_are_stored_in_rows_of_grad_c(dtype, monkeypatch):
    """Instead of being computed twice; the gradients are those of a budget that fits all."""
    made, computed = [], []
    schedule, strips = passes.make_schedule, passes.strip_gradients
    spy = lambda *args: made.append(schedule(*args)) or made[-1]
    monkeypatch.setattr(passes, "make_schedule", spy)
    spy_of_strips = lambda *args, **options: computed.append(1) or strips(*args, **options)
    monkeypatch.setattr(passes, "strip_gradients", spy_of_strips)
    monkeypatch.setattr(likely_classes, "list_size", lambda problem: 1024)  # not of the budget
    problem = sharp(300, 5000, dtype=dtype)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    targets = torch.where(problem.targets >= 0, order.argsort()[problem.targets], problem.targets)
    problem = Problem(problem.e, problem.c[order], targets, problem.bias[order])
    whole, (record,) = recorded(problem)
    assert (record.path, made[0].first_borrowed) == ("filtered", None)
    num_strips = round(record.strips_kept * 3 * 5000)
    results = run_ours(problem, "cce", memory_budget=num_strips * STRIP_BYTES - 1)
    assert made[1].first_borrowed is not None
    assert made[1].store_once
    assert len(computed) == 2, "once for each call"
    for name, value in whole.named().items():
        error = (results.named()[name] - value).double().norm()
        assert error < (1e-6 if dtype == torch.float32 else 1e-4) * value.double().norm(), name


def test_no_filter_reports_the_exact_path():
    for impl, options in (
        ("cce", {"filter_eps": None}),
        ("cce", {"filter_eps": 0}),
        ("cce", {"filter_e_grad": False, "filter_c_grad": False}),
        ("cce_exact", {}),
        ("cce_kahan_full_c_full_e", {}),
        ("cce_kahan_full", {}),
    ):
        results, (record,) = recorded(sharp(9), impl, **options)
        assert (record.path, record.strips_kept, record.dropped_mass) == ("exact", 1.0, 0.0)
        assert max(errors(results, sharp(9))) < 1e-5, (impl, options)


def test_flat_data_takes_the_dense_path():
    problem = make_problem((9,), 1100, 8, bias=True)
    problem = Problem(0.01 * problem.e, problem.c, problem.targets, 0.01 * problem.bias)
    results, (record,) = recorded(problem)
    assert (record.path, record.strips_kept, record.dropped_mass) == ("dense", 1.0, 0.0)
    assert max(errors(results, problem)) < 1e-5


@pytest.mark.parametrize("flat", [(0,), (3, 17, 31)], ids=str)
def test_flat_tokens_among_sharp_ones_are_exact(flat, monkeypatch):
    """A few flat tokens would spoil the tail of all, so they are treated alone."""
    monkeypatch.setattr(backward, "FLAT_SUPPORT", 100)
    # Among 1100 classes a flat token has 1e-3 in each: more than the default would drop.
    monkeypatch.setattr(dispatch, "FILTER_TOLERANCE", 0.02)
    problem = sharp(flat=flat)
    problem.targets[list(flat)] = 7
    results, (record,) = recorded(problem)
    assert (record.path, record.flat_tokens) == ("filtered", len(flat))
    truth = run(full_logits, problem.to(torch.float64))
    for token in flat:
        error = (results.grad_e[token] - truth.grad_e[token]).norm() / truth.grad_e[token].norm()
        assert error < 1e-5
    assert 1e-5 < max(errors(results, problem)) < 0.02


@pytest.mark.parametrize("superblocks", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_few_flat_tokens_are_added_where_rows_are_written(superblocks, dtype, monkeypatch, request):
    """Instead of reading dC again; both ways give the same gradients."""
    if superblocks:
        request.getfixturevalue("several_superblocks")
    monkeypatch.setattr(backward, "FLAT_SUPPORT", 100)
    monkeypatch.setattr(dispatch, "FILTER_TOLERANCE", 0.02)
    problem = sharp(150, flat=(3, 17, 131), dtype=dtype)
    separate = []
    original = backward.exact_gradients
    spy = lambda *args, **options: separate.append(1) or original(*args, **options)
    monkeypatch.setattr(backward, "exact_gradients", spy)
    found = []
    for most in (few_flat.MOST, 0):
        monkeypatch.setattr(few_flat, "MOST", most)
        results, (record,) = recorded(problem)
        assert (record.path, record.flat_tokens) == ("filtered", 3)
        assert len(separate) == len(found), "only the second way"
        found.append(results)
    for name in GRADIENTS:
        few, many = (results.named()[name].double() for results in found)
        assert (few - many).norm() < (1e-6 if dtype == torch.float32 else 1e-3) * many.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_few_flat_tokens_take_their_share_of_the_budget(dtype):
    """Gradients are stored for whole steps of tokens, also where fewer would fit."""
    e, c, targets, bias = (getattr(sharp(dtype=dtype), x) for x in ("e", "c", "targets", "bias"))
    problem = Call(e, c, targets, bias, -100, None, compute_dtype=dtype, memory_budget=0)
    size = few_flat.flat_bytes(problem, 1)
    for share, most in ((size - 1, 0), (size, 16), (3 * size - 1, 32), (2**40, few_flat.MOST)):
        budget = few_flat.BUDGET_SHARE * share
        assert few_flat.most_flat(replace(problem, memory_budget=budget)) == most


def test_flat_tokens_are_marked_absent():
    """In one launch, with values of all others as they are, NaN included."""
    size = 2 * SCAN + 3
    lse, a, b = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    a[::5] = math.nan
    target_grad = torch.arange(size).remainder(4).float() + ABSENT.value
    rows = torch.zeros(size, 1), torch.zeros(size, dtype=torch.int64), torch.arange(size)
    scale = torch.ones(())
    tokens = BackwardTokens(*rows, lse, a, b, target_grad, scale, None, None)
    found, wanted = tokens.without_flat(), tokens.without(tokens.is_flat)
    assert tokens.is_flat.sum() == (size + 2) // 4
    for name in ("lse", "a", "b"):
        got, exact = getattr(found, name), getattr(wanted, name)
        torch.testing.assert_close(got, exact, rtol=0, atol=0, equal_nan=True)
    assert found.e is tokens.e


def test_the_strips_of_flat_tokens_are_not_overstated(monkeypatch):
    """Their bound would be that of the frequent classes alone, and all strips of a block kept."""
    monkeypatch.setattr(backward, "FLAT_SUPPORT", 100)
    monkeypatch.setattr(dispatch, "FILTER_TOLERANCE", 0.02)
    monkeypatch.setattr(step, "_num_frequent", lambda problem: 128)
    few, none = (sharp(classes=4096, flat=flat) for flat in ((3, 17, 31), ()))
    results, (record,) = recorded(few)
    _, (without,) = recorded(none)
    assert (record.path, record.flat_tokens) == ("filtered", 3)
    assert record.strips_kept < 1.5 * without.strips_kept
    assert max(errors(results, few)) < 0.02


def test_tokens_spread_over_the_frequent_classes_alone(monkeypatch):
    """Their bound is above the log-sum-exp, so their strips are understated: all are computed."""
    monkeypatch.setattr(backward, "DENSE_FRACTION", math.inf)
    monkeypatch.setattr(backward, "FLAT_FRACTION", 1.0)
    monkeypatch.setattr(step, "_num_frequent", lambda problem: 128)
    problem = sharp(classes=4096, flat=range(0, 40, 3))
    problem.bias[128:] = -30
    results, (record,) = recorded(problem)
    assert record.flat_tokens >= 12
    assert max(errors(results, problem)) < 2 * 0.00166


def test_mostly_flat_tokens_take_the_dense_path(monkeypatch):
    monkeypatch.setattr(backward, "FLAT_SUPPORT", 100)
    monkeypatch.setattr(backward, "DENSE_FRACTION", math.inf)
    _, (record,) = recorded(sharp(9, flat=range(6)))
    assert record.path == "dense"


@pytest.mark.parametrize(
    ("impl", "exact", "filtered"),
    [
        ("cce_kahan_full_c", ("grad_c", "grad_bias"), ("grad_e",)),
        ("cce_kahan_full_e", ("grad_e",), ("grad_c", "grad_bias")),
    ],
)
def test_presets_filter_one_gradient_and_not_the_other(impl, exact, filtered, monkeypatch):
    """With a filter so coarse that what it touches is visibly off."""
    monkeypatch.setattr(dispatch, "FILTER_TOLERANCE", 0.05)
    problem = sharp()
    results, (record,) = recorded(problem, impl)
    by_name = dict(zip(GRADIENTS, errors(results, problem), strict=True))
    assert record.path == "filtered"
    assert all(by_name[name] < 1e-5 for name in exact), by_name
    assert all(by_name[name] > 1e-4 for name in filtered), by_name


@pytest.mark.parametrize("needed", [("c",), ("e",), ("bias",)], ids="+".join)
def test_alone_or_among_others_a_gradient_is_the_same(needed):
    everything, _ = recorded(sharp(20))
    alone, (record,) = recorded(sharp(20), needed=needed)
    assert record.path == "filtered"
    name = f"grad_{needed[0]}"
    torch.testing.assert_close(alone.named()[name], everything.named()[name])


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        ("cce", torch.float32),
        ("cce", torch.float16),
        ("cce_exact", torch.float16),
        ("cce_kahan_full_c", torch.float32),
    ],
)
def test_bit_identical_from_run_to_run(impl, dtype):
    first, second = (run_ours(sharp(12, dtype=dtype), impl, softcap=30.0) for _ in range(2))
    for name, value in first.named().items():
        assert torch.equal(second.named()[name], value), name


def test_half_precision_does_not_underflow():
    """Gradients of 1e-6 would be subnormal; they are scaled inside and returned as they are."""
    problem = sharp(12, dtype=torch.float16)
    e, c = problem.e.requires_grad_(), problem.c.requires_grad_()
    loss = linear_cross_entropy(e, c, problem.targets, problem.bias, impl="cce", reduction="sum")
    # The loss is divided after the operator, so its own gradients are as small as this.
    small, large = (
        torch.autograd.grad(loss, (e, c), torch.tensor(x), retain_graph=True) for x in (2.0**-10, 1)
    )
    for of_small, of_large in zip(small, large, strict=True):
        expected = of_large.double() / 1024
        atol = 2.0**-24  # the smallest number of float16: the result itself cannot be finer
        torch.testing.assert_close(of_small.double(), expected, rtol=2e-3, atol=atol)


def test_a_factor_of_all_losses_is_not_rounded():
    """Halfway between two numbers of float16, it would be, to the same side at every target."""
    problem = sharp(dtype=torch.float16)
    factor = torch.tensor(1 + 2.0**-11)
    grads = []
    for impl in ("cce", "reference"):
        inputs = problem if impl == "cce" else problem.to(torch.float64)
        e = inputs.e.clone().requires_grad_()
        loss = linear_cross_entropy(
            e, inputs.c, inputs.targets, inputs.bias, impl=impl, reduction="sum"
        )
        grads.append(torch.autograd.grad(loss, e, factor.to(loss))[0].double())
    got, exact = grads
    assert abs((got * exact).sum() / exact.square().sum() - 1) < 1e-4


@pytest.mark.parametrize("scale", [1, 30])  # 30: the changed tokens overflow their first bound
def test_a_token_does_not_depend_on_the_others(scale):
    """Its loss is the same to the last bit when other tokens change, in its block and elsewhere."""
    problem = sharp(132, classes=300)
    problem.targets[problem.targets < 0] = 5
    before = run_ours(problem, "cce", reduction="none", needed=())
    changed = problem.e.clone()
    changed[1::2] = scale * changed[1::2].flip(0)
    other = Problem(changed, problem.c, problem.targets, problem.bias)
    after = run_ours(other, "cce", reduction="none", needed=())
    for name in ("loss", "lse"):
        assert torch.equal(before.named()[name][::2], after.named()[name][::2]), name


def test_recording_nests_and_stops():
    problem = sharp(9)
    with record_filter() as outer:
        run_ours(problem, "cce")
        with record_filter() as inner:
            run_ours(problem, "cce_exact")
        run_ours(problem, "cce", needed=())  # no backward
    run_ours(problem, "cce")
    assert [record.path for record in outer] == ["filtered", "exact"]
    assert [record.path for record in inner] == ["exact"]


def test_recording_when_one_gradient_is_filtered_and_not_asked_for():
    """The backward is exact then, and says so."""
    _, records = recorded(sharp(9), "cce_kahan_full_c", needed=("c",))
    assert [record.path for record in records] == ["exact"]


@pytest.mark.parametrize(
    ("filter_eps", "tolerance"),
    [(None, 0.0), (0, 0.0), ("auto", 1.0), ("high", 0.5), (2.0**-12, 1.0), (2.0**-11, 2.0)],
)
def test_dial(filter_eps, tolerance):
    scaled = dispatch.filter_tolerance(filter_eps)
    assert math.isclose(scaled, tolerance * dispatch.FILTER_TOLERANCE)


def test_mass_that_may_be_dropped(always_filtered):
    """The second dial holds whatever the first allows, and 0 drops nothing that matters."""
    kept, dropped = [], []
    for limit in (None, 0.1, 1e-3, 0.0):
        _, (record,) = recorded(sharp(), filter_mass=limit, filter_eps=0.2)
        assert record.dropped_mass <= (1.0 if limit is None else limit) + 1e-6
        kept.append(record.strips_kept)
        dropped.append(record.dropped_mass)
    assert kept == sorted(kept), kept
    assert dropped[0] > 0.05, "the first dial alone drops more than 1e-2"
    assert dropped[0] > dropped[-2], dropped
