"""Values at the edge, interpreted: no tokens, none valid, nothing finite, overflow."""

import functools
from dataclasses import replace

import pytest
import torch

from cut_cross_entropy import linear_cross_entropy, record_filter, token_logprobs
from tests.kernels.conftest import ROUTES, take_route
from tests.kernels.test_interpreted_filtered import sharp
from tests.support import full_logits, make_problem, run, run_ours
from tests.test_token_logprobs import gradients, leaves

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison_empty")]

GRADIENTS = ("grad_e", "grad_c", "grad_bias")


def small(leading=(9,), classes=130, **options):
    return make_problem(leading, classes, 8, **{"bias": True, **options})


def truth_of(problem, **options):
    return run(full_logits, problem.to(torch.float64), **options)


@pytest.mark.parametrize(("reduction", "shift"), [("mean", 0), ("none", 1)])
def test_all_ignored(any_route, reduction, shift):
    problem = small((2, 5), ignored=1.0)
    results = run_ours(problem, any_route.impl, reduction=reduction, shift=shift, softcap=5.0)
    for name, value in results.named().items():
        assert torch.count_nonzero(value) == 0, name  # NaN counts as not zero
    assert results.grad_c.shape == problem.c.shape


@pytest.mark.parametrize("leading", [(0,), (2, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_empty_batch(any_route, leading, reduction):
    results = run_ours(small(leading), any_route.impl, reduction=reduction)
    assert results.loss.shape == (leading if reduction == "none" else ())
    assert results.lse.shape == leading
    assert results.grad_e.shape == (*leading, 8)
    for name, value in results.named().items():
        assert torch.count_nonzero(value) == 0, name


def test_results_at_ignored_tokens_are_zero(any_route):
    problem = small((24,), ignored=0.4)
    ignored = problem.targets == -100
    results = run_ours(problem, any_route.impl, reduction="none")
    for name in ("loss", "lse", "grad_e"):
        assert torch.count_nonzero(results.named()[name][ignored]) == 0, name
        assert torch.count_nonzero(results.named()[name][~ignored]) > 0, name


@pytest.mark.parametrize(
    ("path", "value", "shift"),
    [
        *((path, torch.nan, 1) for path in ROUTES),
        *(
            (path, value, shift)
            for path in ("exact", "filtered")
            for value, shift in ((torch.nan, 0), (torch.inf, 1), (-torch.inf, 0))
        ),
    ],
)
def test_bad_embeddings_of_ignored_tokens_do_not_leak(path, value, shift, request):
    route = take_route(path, request)
    problem = small((3, 5), ignored=0.4)
    clean = run_ours(problem, route.impl, shift=shift, softcap=5.0)
    without_loss = problem.targets.roll(-shift, dims=-1) == -100
    if shift:
        without_loss[..., -shift:] = True  # the last tokens have no target
    assert without_loss.any()
    problem.e[without_loss] = value
    dirty = run_ours(problem, route.impl, shift=shift, softcap=5.0)
    for name, expected in clean.named().items():
        assert torch.equal(dirty.named()[name], expected), name


def assert_never_plausible(results, truth):
    """Not finite wherever the truth is not; elsewhere right or not finite, never just wrong."""
    for name, exact in truth.named().items():
        got, valid = results.named()[name].double(), torch.isfinite(exact)
        assert not torch.isfinite(got[~valid]).any(), f"{name}: a number where there is none"
        both = valid & torch.isfinite(got)
        torch.testing.assert_close(got[both], exact[both], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(  # 1100: the short pass over frequent classes sees them too
    ("path", "value", "classes"),
    [
        ("exact", torch.nan, 1100),
        ("exact", torch.inf, 130),
        ("dense", torch.nan, 130),
        ("dense", -torch.inf, 1100),
        ("filtered", torch.nan, 130),
        ("filtered", torch.nan, 1100),
        ("filtered", torch.inf, 1100),
        ("filtered", -torch.inf, 130),
        ("full_c", torch.nan, 1100),
        ("full_e", torch.nan, 130),
    ],
)
def test_bad_embedding_is_never_plausible(path, value, classes, request):
    route = take_route(path, request)
    problem = small(classes=classes, ignored=0.0)
    problem.e[4, 3] = value
    results = run_ours(problem, route.impl, reduction="none")
    truth = truth_of(problem, reduction="none")
    assert torch.isfinite(results.loss).sum() == 8, "it stays with its token in the forward"
    assert_never_plausible(results, truth)
    assert torch.isnan(run_ours(problem, route.impl, needed=()).loss)


@pytest.mark.parametrize("tokens", [9, 140])  # one block, which all goes bad; two, one of them good
def test_bad_embedding_with_default_thresholds(tokens):
    problem = small((tokens,), 1100, ignored=0.0)
    problem.e[4, 3] = torch.nan
    results = run_ours(problem, "cce", reduction="none")
    assert_never_plausible(results, truth_of(problem, reduction="none"))


def gradients_with_entropies(problem):
    tensors = leaves(problem, ("e", "c"))
    got = token_logprobs(
        tensors["e"],
        tensors["c"],
        problem.targets,
        bias=problem.bias,
        impl="cce",
        outputs=("entropy",),
    )
    return gradients((got.logprobs - 0.01 * got.entropy).sum(), tensors).values()


def gradients_of_sum(problem, impl="cce", **options):
    results = run_ours(problem, impl, needed=("e", "c"), **options)
    return results.grad_e, results.grad_c


@pytest.mark.parametrize(
    ("compute", "value"),
    [
        (gradients_of_sum, torch.nan),
        (gradients_of_sum, torch.inf),
        (functools.partial(gradients_of_sum, filter_c_grad=False, return_lse=False), torch.nan),
        (gradients_with_entropies, torch.nan),
    ],
    ids=["nan", "inf", "one exact", "entropy"],
)
def test_bad_embedding_keeps_the_strips_of_its_block_alone(compute, value, always_filtered):
    """The other blocks of 128 tokens are filtered as they are without it."""
    problem = sharp(3 * 128)
    problem.targets[:] = problem.targets.clamp_min(0)
    kept = []
    for bad in (False, True):
        if bad:
            problem.e[4, 3] = value
        with record_filter() as records:
            grads = compute(problem)
        kept.append(records[0].strips_kept)
    assert records[0].path == "filtered"
    assert kept[0] < 0.2
    assert kept[1] < kept[0] + 0.4
    grad_e, grad_c = grads
    assert grad_e[4].isnan().all()
    assert grad_e[128:].isfinite().all()
    assert grad_c.isnan().any(1).all()


@pytest.mark.parametrize(
    ("value", "row", "where"),  # rows in the short pass and after it; each pair of values
    [
        (torch.nan, 0, "c"),
        (torch.inf, 0, "bias"),
        (torch.nan, 129, "bias"),
        (torch.inf, 129, "c"),
        (torch.nan, 1099, "bias"),
        (torch.inf, 1099, "c"),
    ],
)
def test_bad_class_is_never_plausible(route, value, row, where):
    problem = small(classes=1100, ignored=0.0)
    (problem.c if where == "c" else problem.bias)[row] = value
    results = run_ours(problem, route.impl, reduction="none")
    assert not torch.isfinite(results.loss).any()
    assert_never_plausible(results, truth_of(problem, reduction="none"))


@pytest.mark.parametrize("wrong", [-1, 130, 2**40, -(2**40)])
def test_targets_out_of_range_are_refused_where_looking_is_free(wrong):
    problem = small(ignored=0.0)
    problem.targets[2] = wrong
    with pytest.raises(ValueError, match=rf"targets must lie in \[0, V\) .* got {wrong} \(1 out"):
        run_ours(problem, "cce")


OUT_OF_RANGE = (-1, 130, 2**40, -(2**40))


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        *((path, [wrong]) for path in ("exact", "filtered") for wrong in OUT_OF_RANGE),
        *((path, OUT_OF_RANGE) for path in ("dense", "full_c", "full_e")),
    ],
    ids=str,
)
def test_targets_out_of_range_are_never_plausible_elsewhere(path, wrong, request, monkeypatch):
    """As on a GPU, where the check would wait for the device."""
    from cut_cross_entropy.kernels import step

    chosen = take_route(path, request)
    monkeypatch.setattr(step, "check_target_range", lambda *_: None)
    problem = small(ignored=0.0)
    clean = run_ours(problem, chosen.impl, reduction="none")
    problem.targets[2 : 2 + len(wrong)] = torch.tensor(wrong)
    results = run_ours(problem, chosen.impl, reduction="none")
    bad, others = slice(2, 2 + len(wrong)), [0, 1, *range(2 + len(wrong), 9)]
    assert torch.isnan(results.loss[bad]).all()
    assert torch.isnan(results.grad_e[bad]).all()
    assert torch.isnan(results.grad_c).any()
    for name in ("loss", "lse", "grad_e"):
        torch.testing.assert_close(results.named()[name][others], clean.named()[name][others])


def test_mean_over_a_target_out_of_range(monkeypatch):
    from cut_cross_entropy.kernels import step

    monkeypatch.setattr(step, "check_target_range", lambda *_: None)
    problem = small(ignored=0.0)
    problem.targets[2] = 130
    assert torch.isnan(run_ours(problem, "cce", reduction="mean").loss)


@pytest.mark.parametrize(
    ("masked", "softcap"),
    [(slice(3, 50), 5.0), (slice(0, 1024), None), (slice(1024, 1100), 5.0)],
    ids=str,
)
def test_classes_masked_by_a_bias_of_minus_infinity(route, masked, softcap):
    """As padded vocabularies are masked. The short pass reads 0 to 1023."""
    problem = small(classes=1100)
    problem.bias[masked] = -torch.inf
    allowed = torch.isfinite(problem.bias).nonzero().flatten()
    problem.targets[:] = allowed[torch.arange(9) * len(allowed) // 9]
    results = run_ours(problem, route.impl, reduction="none", softcap=softcap)
    truth = truth_of(problem, reduction="none", softcap=softcap)
    for name, exact in truth.named().items():
        got = results.named()[name].double()
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


def test_target_masked_by_a_bias_of_minus_infinity(route):
    """An impossible target has an infinite loss, and the gradients of any other."""
    problem = small(ignored=0.0)
    problem.bias[7] = -torch.inf
    problem.targets[:] = torch.arange(9) + 10
    problem.targets[5] = 7
    results = run_ours(problem, route.impl, reduction="none")
    truth = truth_of(problem, reduction="none")
    assert results.loss[5] == torch.inf
    for name, exact in truth.named().items():
        got = results.named()[name].double()
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [130, 1100])  # 1100: the outlier's best class is seen late
@pytest.mark.parametrize("norm", [30.0, 1e4])  # logits around 100 and 30000
def test_outlier_token(route, classes, norm):
    """Sums against a bound from its target overflow, so its block is repaired."""
    problem = make_problem((24,), classes, 8, ignored=0.0)
    direction = problem.c[-1] / problem.c[-1].norm()
    problem.c[-1] = 9 * direction
    problem.e[11] = norm * direction
    problem.targets[11] = (problem.c @ direction).argmin()
    assert route.check(problem, reduction="none").loss[11] > 9 * norm


def test_outliers_in_some_blocks_only(route):
    problem = make_problem((140,), 130, 8, ignored=0.0)
    problem.e[3] *= 300
    route.check(problem, reduction="none")


@pytest.mark.parametrize("height", [0.0, 80.0, 1000.0])
def test_tokens_of_one_certain_class(route, height):
    """p of the target is 1 to the last bit, or all are alike: the loss is never below 0."""
    problem = make_problem((9,), 130, 8, ignored=0.0)
    e = torch.zeros_like(problem.e)
    e[:, 0] = height
    c = torch.zeros_like(problem.c)
    c[17, 0] = 1.0
    problem = replace(problem, e=e, c=c, targets=torch.full((9,), 17))
    results = route.check(problem, reduction="none")
    assert (results.loss >= 0).all()


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loss_is_never_negative(scale, dtype):
    """Targets are the likeliest classes, whose losses are all rounding."""
    problem = make_problem((24,), 300, 24, ignored=0.0)
    problem = replace(problem, e=problem.e * scale).to(dtype)
    targets = (problem.e @ problem.c.T).argmax(1)
    loss = linear_cross_entropy(problem.e, problem.c, targets, impl="cce", reduction="none")
    assert (loss >= 0).all()


@pytest.mark.parametrize("kind", ["one", "few", "rarest"])
def test_targets_that_crowd(route, kind):
    """All tokens in one strip's class; in few; among the last ids."""
    problem = make_problem((60,), 300, 24, ignored=0.0)
    targets = {
        "one": torch.full((60,), 123),
        "few": torch.arange(60) % 3,
        "rarest": 299 - torch.arange(60) % 5,
    }[kind]
    route.check(replace(problem, targets=targets))
