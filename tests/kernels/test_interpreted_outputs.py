"""Temperature and further sums by the kernels, interpreted, against float64."""

import pytest
import torch

from cut_cross_entropy import dispatch, linear_cross_entropy, token_logprobs
from cut_cross_entropy.kernels import lse
from tests.kernels.entropies import check_entropies
from tests.support import make_problem
from tests.test_token_logprobs import gradients, leaves, objective, plain

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison_empty")]

OUTPUTS = ("lse", "entropy", "log_sum_sq", "rank", "max_logit")
DIFFERENTIABLE = ("logprobs", "lse", "entropy", "log_sum_sq")
SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "softcap, scale and temperature": {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3},
    "negative scale": {"logit_scale": -0.5},
    "temperature per token": {"temperature": torch.linspace(0.5, 1.5, 133)},
}


def call(problem, tensors, impl="cce", **options):
    return token_logprobs(
        tensors["e"],
        tensors["c"],
        problem.targets,
        bias=tensors.get("bias"),
        impl=impl,
        **options,
    )


def compare(problem, names, settings, differentiable=(), needed=("e", "c", "bias"), atol=1e-5):
    """Values to ``atol`` and gradients to 1e-4 of the largest."""
    tensors = leaves(problem, needed)
    exact = leaves(problem.to(torch.float64), needed)
    outputs = tuple(name for name in names if name != "logprobs")
    got = call(problem, tensors, outputs=outputs, **settings)
    expected = plain(exact["e"], exact["c"], problem.targets, bias=exact.get("bias"), **settings)
    for name in {*names, "logprobs"}:
        found = getattr(got, name)
        if name == "rank":
            assert torch.equal(found, expected[name])
        else:
            torch.testing.assert_close(found.double(), expected[name], rtol=1e-5, atol=atol)
    if differentiable:
        found = gradients(objective(vars(got), differentiable), tensors)
        wanted = gradients(objective(expected, differentiable), exact)
        for name, x in wanted.items():
            scale = x.abs().max()
            torch.testing.assert_close(
                found[name] / scale, x / scale, rtol=0, atol=1e-4, check_dtype=False
            )
    return got


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", ["entropy", "all"])
def test_outputs(name, settings, drops_nothing):
    problem = make_problem((133,), 300, 16, bias=True)
    names, differentiable = (OUTPUTS, DIFFERENTIABLE) if name == "all" else ((name,), (name,))
    compare(problem, names, settings, differentiable)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_entropies_of_large_logits(dtype):
    check_entropies("cpu", dtype)


def test_rank_of_ties():
    """Equal logits of an earlier class count, those of a later one and the target do not."""
    c = torch.zeros(300, 16)
    c[[3, 140, 141, 142, 299], 0] = torch.tensor([1.0, 1.0, 2.0, 1.0, -1.0])
    e = torch.zeros(5, 16)
    e[:, 0] = torch.tensor([1.0, 1.0, 1.0, 0.0, -1.0])
    targets = torch.tensor([140, 142, 0, 7, 140])
    got = token_logprobs(e, c, targets, outputs=("rank",), impl="cce")
    assert got.rank.tolist() == [2, 3, 4, 7, 297]


@pytest.mark.parametrize(
    ("name", "needed"),  # every setting, and every gradient alone
    [
        *((name, ("e", "c", "bias")) for name in SETTINGS),
        ("plain", ("e",)),
        ("softcap, scale and temperature", ("c",)),
        ("temperature", ("bias",)),
    ],
)
def test_candidates(name, needed):
    """More than one block of candidates, with repeated ids, absent ones and ignored tokens."""
    settings = dict(SETTINGS[name])
    tokens = 133 if name == "temperature per token" else 20
    problem = make_problem((tokens,), 300, 48, bias=True)
    ids = torch.randint(-1, 300, (tokens, 19), generator=torch.Generator().manual_seed(3))
    ids[:, 4] = 7
    ids[5] = -1
    results = {}
    for name, impl, made in (
        ("got", "cce", problem),
        ("again", "cce", problem),
        ("exact", "reference", problem.to(torch.float64)),
    ):
        tensors = leaves(made, needed)
        found = token_logprobs(
            tensors["e"],
            tensors["c"],
            made.targets,
            bias=tensors.get("bias"),
            candidates=ids,
            impl=impl,
            **settings,
        ).candidate_logprobs
        results[name] = (found, gradients(found.square().sum(), tensors))
    found, grads = results["got"]
    exact, exact_grads = results["exact"]
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    for name, x in exact_grads.items():
        scale = x.abs().max()
        torch.testing.assert_close((grads[name] / scale).double(), x / scale, rtol=0, atol=1e-5)
        assert torch.equal(grads[name], results["again"][1][name])


def test_candidates_of_an_ignored_token_that_is_nan():
    problem = make_problem((20,), 50, 16)
    problem.e[3], problem.targets[3] = torch.nan, -100
    tensors = leaves(problem)
    got = call(problem, tensors, candidates=torch.arange(20)[:, None])
    grads = gradients(got.candidate_logprobs.sum(), tensors)
    assert got.candidate_logprobs.isfinite().all()
    assert got.candidate_logprobs[3] == 0
    assert all(x.isfinite().all() for x in grads.values())


@pytest.mark.parametrize("needed", [("e",), ("c",), ("bias",), ("e", "c")])
def test_needed_gradients(needed, drops_nothing):
    problem = make_problem((133,), 300, 16, bias=True)
    compare(problem, OUTPUTS, {"temperature": 0.7}, DIFFERENTIABLE, needed)


@pytest.mark.parametrize("impl", ["cce", "cce_exact"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_temperature_of_the_loss(settings, impl, always_filtered, drops_nothing):
    """The filtered path computes logits again and has to multiply them, too."""
    from cut_cross_entropy.filter_report import record_filter

    problem = make_problem((133,), 300, 16, bias=True)
    results = []
    for which, made in ((impl, problem), ("reference", problem.to(torch.float64))):
        tensors = leaves(made)
        with record_filter() as records:
            loss = linear_cross_entropy(
                tensors["e"],
                tensors["c"],
                made.targets,
                tensors["bias"],
                impl=which,
                label_smoothing=0.1,
                reduction="sum",
                **settings,
            )
            results.append((loss, *torch.autograd.grad(loss, list(tensors.values()))))
        if which == "cce":
            # The tail of a capped logit has no multiplier.
            capped = settings.get("softcap") is not None
            assert {record.path for record in records} == {"exact" if capped else "filtered"}
    for got, expected in zip(*results, strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close((got / scale).double(), expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bonus", [0.0, 0.01, 1.0, None])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_filter_holds_its_tolerance_with_entropies(
    softcap, bonus, always_filtered, monkeypatch
):
    """With weights of reinforcement learning and an entropy bonus, up to the entropy alone."""
    from cut_cross_entropy.filter_report import record_filter

    monkeypatch.setattr(dispatch, "FILTER_TOLERANCE", 2e-2)  # so that few tokens drop strips
    random = torch.Generator().manual_seed(0)
    problem = make_problem((128,), 1500, 16, bias=True, ignored=0.1)
    problem = type(problem)(2.5 * problem.e, problem.c, problem.targets, problem.bias)
    weights = torch.randn(128, generator=random) * (torch.rand(128, generator=random) < 0.5)
    results = []
    for impl, made in (("cce", problem), ("reference", problem.to(torch.float64))):
        tensors = leaves(made)
        with record_filter() as records:
            got = call(made, tensors, impl, outputs=("entropy",), softcap=softcap)
            total = got.entropy.sum()
            if bonus is not None:
                total = (got.logprobs * weights).sum() + bonus * total
            results.append(gradients(total, tensors))
        if impl == "cce":
            (record,) = records
            assert record.path == "filtered"
            # Of an entropy alone the norm is not known: its lower bound keeps what is not zero.
            assert record.strips_kept < 0.9 or bonus is None
    for name, exact in results[1].items():
        error = (results[0][name] - exact).norm() / exact.norm()
        assert error < 2e-2, f"{name}: {error:.2e} with {record.strips_kept:.2f} kept"


def test_a_loose_bound_is_repaired_with_its_further_sums(monkeypatch):
    """Sums that overflow relative to their first bound are computed again, all of them."""
    from cut_cross_entropy.kernels import step

    monkeypatch.setattr(step, "_num_frequent", lambda problem: 0)
    problem = make_problem((133,), 300, 16, ignored=0.0)
    e, c = problem.e.clone(), problem.c.clone()
    c[200] = 0
    c[200, 0], e[:, 0] = 40.0, torch.linspace(0.0, 4.0, 133)
    problem.targets[:] = 7
    repaired = []
    pass_ = step.vocabulary_pass

    def spy(inputs, *args, **options):
        if options.get("repair") is not None:
            repaired.append(int(inputs.flags.sum()))
        return pass_(inputs, *args, **options)

    monkeypatch.setattr(step, "vocabulary_pass", spy)
    made = type(problem)(e, c, problem.targets)
    compare(made, OUTPUTS, {}, atol=5e-5)  # logits of 160
    assert repaired
    assert repaired[0] > 0


def test_a_token_has_the_same_bits_in_any_batch():
    """By whole blocks: where in a block a token is matters to the interpreter's products alone."""
    problem = make_problem((300,), 700, 16, ignored=0.0)
    whole = call(problem, leaves(problem, ()), outputs=OUTPUTS, temperature=0.7)
    for some in (slice(0, 1), slice(128, 140), slice(128, 300), slice(256, 300)):
        part = type(problem)(problem.e[some], problem.c, problem.targets[some])
        got = call(part, leaves(part, ()), outputs=OUTPUTS, temperature=0.7)
        for name in ("logprobs", *OUTPUTS):
            assert torch.equal(getattr(got, name), getattr(whole, name)[some]), name


def test_what_is_not_asked_for_is_compiled_away(monkeypatch):
    launched = []
    launch = lse.launch
    monkeypatch.setattr(
        lse, "launch", lambda kernel, grid, **a: (launched.append(a), launch(kernel, grid, **a))
    )
    problem = make_problem((20,), 300, 16)
    call(problem, leaves(problem, ()))
    passes = [a for a in launched if "entropy_ptr" in a]
    assert passes
    for name in ("multiplier", "entropy", "p_squares", "rank", "highest"):
        assert all(a[f"{name}_ptr"] is None for a in passes)


@pytest.mark.parametrize("asked", [{"top_k": 2}, {"outputs": ("mean_logit",), "softcap": 3.0}])
def test_kernels_refuse_by_name_what_they_lack(asked):
    problem = make_problem((5,))
    with pytest.raises(RuntimeError, match="impl='cce' does not compute the"):
        call(problem, leaves(problem, ()), **asked)
    assert call(problem, leaves(problem, ()), impl="auto", **asked).mask.any()


def test_ignored_and_not_a_number():
    problem = make_problem((140,))
    e = problem.e.clone()
    e[problem.targets == -100] = torch.nan
    broken = int((problem.targets != -100).nonzero()[3])
    e[broken] = torch.nan
    made = type(problem)(e, problem.c, problem.targets)
    got = call(made, leaves(made, ()), outputs=OUTPUTS)
    for name in ("logprobs", "lse", "entropy", "log_sum_sq", "max_logit"):
        x = getattr(got, name)
        assert x.isnan().nonzero().flatten().tolist() == [broken], name
        assert not x[problem.targets == -100].any()
    assert got.rank[broken] == -1
    assert (got.rank == -1).sum() == 1
