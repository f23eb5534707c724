"""Gradients of divergences from the classes that matter, interpreted, against those from all."""

import pytest
import torch

from cut_cross_entropy import budget, linear_divergence
from cut_cross_entropy import divergence_dispatch as front
from cut_cross_entropy.kernels import divergence_columns as columns
from cut_cross_entropy.kernels import divergence_sum
from cut_cross_entropy.kernels.divergence_logits import StoredLogits

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison_empty")]

TOKENS, CLASSES, DIM = 40, 700, 8
EPS = 2.0**-10
TOLERANCE = front.FILTER_SHARE * front.filter_tolerance(EPS)


@pytest.fixture(autouse=True)
def few_classes(monkeypatch):
    """Groups and multiples that suit a small problem."""
    monkeypatch.setattr(budget, "MIN_PAIRS", 1)
    monkeypatch.setattr(budget, "MIN_PAIRS_WITHOUT_C", 1)
    monkeypatch.setattr(columns, "LEAST_PRODUCTS", 0)
    monkeypatch.setattr(columns, "FILTER_DIRECTIONS", 4)
    monkeypatch.setattr(columns, "MULTIPLE", 4)
    monkeypatch.setattr(columns, "LEAST_ROWS", 4)
    # Half precision too, although it is copied in float32 on the CPU.
    monkeypatch.setattr(divergence_sum, "filters_divergence", lambda _, tolerance: tolerance > 0)


@pytest.fixture
def kept(monkeypatch):
    """Numbers of kept classes, None for all, of each chunk."""
    numbers = []
    wait = columns.number_to_keep

    def record(num_dropped, num_classes):
        numbers.append(wait(num_dropped, num_classes))
        return numbers[-1]

    monkeypatch.setattr(columns, "number_to_keep", record)
    return numbers


def choose(energies, tolerance):
    """Ids of the classes to keep; None for all."""
    order, num_dropped = columns.rank_classes(energies, tolerance)
    number = columns.number_to_keep(num_dropped, len(energies))
    return None if number is None else order[len(energies) - number :].sort().values


def problem(dtype=torch.float32, decay=16.0):
    """A student, its noisy teacher and a bias, whose classes become rarer."""
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=generator)
    e, c = make(TOKENS, DIM), 0.4 * make(CLASSES, DIM) + 0.5 * make(DIM)
    bias = torch.linspace(0, -decay, CLASSES)
    tensors = {
        "e": e,
        "c": c,
        "bias": bias,
        "e_teacher": e + 0.3 * make(TOKENS, DIM),
        "c_teacher": c + 0.1 * make(CLASSES, DIM),
    }
    return {name: x.to(dtype) for name, x in tensors.items()}


def gradients(tensors, beta, filter_eps, needed=("e", "c", "bias"), **options):
    """Loss and gradients of a sum."""
    leaves = {
        name: x.clone().requires_grad_(name in needed and "teacher" not in name)
        for name, x in tensors.items()
    }
    found = linear_divergence(
        leaves["e"], leaves["c"], leaves["e_teacher"], leaves["c_teacher"], beta=beta,
        student_bias=leaves["bias"], teacher_bias=tensors["bias"], reduction="sum", impl="cce",
        filter_eps=filter_eps, **options,
    ).divergence  # fmt: skip
    return found, torch.autograd.grad(found, [leaves[name] for name in needed])


def relative(mine, other):
    return float((mine.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("most", "options"),
    [
        (100, {}),
        (16, {"student_softcap": 25.0, "temperature": torch.linspace(0.7, 1.5, TOKENS)}),
        (16, {"mask": torch.arange(TOKENS) % 3 > 0}),
    ],
    ids=["one chunk", "softcap and temperatures", "ignored tokens"],
)
def test_gradients_from_some_classes(beta, most, options, kept, monkeypatch):
    for module in (front, divergence_sum):
        monkeypatch.setattr(module, "divergence_tokens_per_chunk", lambda *_: most)
    monkeypatch.setattr(columns, "ROWS", 8)
    tensors = problem()
    loss, exact = gradients(tensors, beta, None, **options)
    assert not kept
    filtered, found = gradients(tensors, beta, EPS, **options)
    counted = int(options["mask"].sum()) if "mask" in options else TOKENS
    assert len(kept) == -(-counted // most)
    assert all(0 < number < columns.MOST_KEPT * CLASSES for number in kept)
    assert torch.equal(filtered, loss)
    for mine, other, allowed in zip(found, exact, (20, 2, 0), strict=True):
        error = relative(mine, other)
        assert error <= allowed * TOLERANCE
        assert (error > 0) == (allowed > 0)
    assert (found[1].norm(dim=1) > 0).all()  # no row of dC is 0


@pytest.mark.parametrize("last", [1.0, 100.0], ids=["more classes", "all classes"])
def test_a_chunk_needs_more_classes_than_the_one_before(last, kept, monkeypatch):
    """Products of the missing ones follow, so that no more is dropped than of any other chunk."""
    for module in (front, divergence_sum):
        monkeypatch.setattr(module, "divergence_tokens_per_chunk", lambda *_: 8)
    temperature = torch.ones(TOKENS)
    temperature[:8], temperature[16:24], temperature[32:] = 0.3, 0.4, last
    tensors = problem()
    _, exact = gradients(tensors, 0.0, None, temperature=temperature)
    _, found = gradients(tensors, 0.0, EPS, temperature=temperature)
    first, second, third, fourth, fifth = kept
    assert first * 1.2 < third * 1.1 < second
    assert third * 1.2 < fourth
    assert (fifth is None) == (last > 1)
    for mine, other, allowed in zip(found, exact, (20, 2, 1e-3), strict=True):
        assert relative(mine, other) <= allowed * TOLERANCE


@pytest.mark.parametrize("needed", ["e", "c"])
def test_one_gradient(needed, kept):
    tensors = problem(torch.float16, decay=30.0)
    _, (exact,) = gradients(tensors, 0.0, None, (needed,))
    _, (found,) = gradients(tensors, 0.0, EPS, (needed,))
    assert kept[0] < CLASSES
    assert relative(found, exact) <= 1e-3 + 20 * TOLERANCE


@pytest.mark.parametrize(("needed", "share"), [("e", 0.5), ("c", 0.75)])
def test_directions_make_the_error_smaller(needed, share, kept, monkeypatch):
    tensors = problem()
    _, (exact,) = gradients(tensors, 0.0, None, (needed,))
    _, (found,) = gradients(tensors, 0.0, EPS, (needed,))
    monkeypatch.setattr(columns, "directions", lambda _, rows: torch.zeros(4, rows.shape[1]))
    _, (without,) = gradients(tensors, 0.0, EPS, (needed,))
    assert kept[0] == kept[1]
    assert relative(found, exact) < share * relative(without, exact)


def test_directions_are_found_while_the_first_chunk_is_computed(kept, monkeypatch):
    """Their small kernels would leave the device idle before it."""
    steps = []
    find, write = columns.directions, StoredLogits.write_gradients
    monkeypatch.setattr(columns, "directions", lambda *x: steps.append("directions") or find(*x))
    monkeypatch.setattr(
        StoredLogits, "write_gradients", lambda *x, **y: steps.append("gradients") or write(*x, **y)
    )
    for module in (front, divergence_sum):
        monkeypatch.setattr(module, "divergence_tokens_per_chunk", lambda *_: 16)
    gradients(problem(), 0.0, EPS)
    assert len(kept) == 3
    assert steps == ["gradients", "directions", "directions", "gradients", "gradients"]


def test_all_directions_lose_nothing(kept, monkeypatch):
    """As many directions as features stand for whatever is dropped."""
    monkeypatch.setattr(columns, "FILTER_DIRECTIONS", DIM)
    tensors = problem()
    _, exact = gradients(tensors, 0.0, None)
    _, found = gradients(tensors, 0.0, 2.0**-6)
    assert kept[0] < 0.3 * CLASSES
    for mine, other in zip(found, exact, strict=True):
        assert relative(mine, other) < 1e-4
    rows = torch.nn.functional.cosine_similarity(found[1].double(), exact[1].double(), eps=1e-30)
    assert rows.min() > 1 - 1e-6


@pytest.mark.parametrize("case", ["flat", "no room", "float32", "small"])
def test_all_classes_give_the_same_bits(case, kept, monkeypatch):
    """Nothing to drop, nowhere to store it, a dtype that represents everything, few products."""
    tensors = problem(decay=0.0 if case == "flat" else 16.0)
    for module in (front, divergence_sum):
        monkeypatch.setattr(module, "divergence_tokens_per_chunk", lambda *_: 16)
    if case == "small":
        monkeypatch.setattr(columns, "LEAST_PRODUCTS", 2 * 16 * CLASSES * DIM + 1)
    if case == "no room":
        monkeypatch.setattr(columns, "LEAST_ROWS", 10**9)
        monkeypatch.setattr(columns, "MULTIPLE", 2**14)
    _, exact = gradients(tensors, 0.5, None)
    _, found = gradients(tensors, 0.5, "auto" if case == "float32" else EPS)
    # A chunk that keeps all ends the search.
    assert kept == {"flat": [None], "no room": [None]}.get(case, [])
    for mine, other in zip(found, exact, strict=True):
        assert torch.equal(mine, other)


def test_weights_of_zero_drop_every_class(kept):
    tensors = problem()
    _, found = gradients(tensors, 0.0, EPS, token_weights=torch.zeros(TOKENS))
    assert kept == [0]
    for mine in found:
        assert not mine.any()


def test_tiny_weights_keep_the_same_classes(kept):
    """The squares of their logit gradients are below the range of float32."""
    tensors, tiny = problem(), torch.full((TOKENS,), 2.0**-80)
    _, found = gradients(tensors, 0.0, EPS)
    _, scaled = gradients(tensors, 0.0, EPS, token_weights=tiny)
    assert kept[0] == kept[1] > 0
    for mine, other in zip(scaled, found, strict=True):
        assert relative(mine.double() * 2.0**80, other) < 1e-6


@pytest.mark.parametrize("tolerance", [1e-3, 0.03, 0.5])
def test_least_energies_are_dropped(tolerance):
    generator = torch.Generator().manual_seed(0)
    energies = torch.exp(4 * torch.randn(500, generator=generator)) * 1e-30
    ids = choose(energies, tolerance)
    assert torch.equal(ids, ids.unique())
    dropped = torch.ones(500, dtype=torch.bool)
    dropped[ids] = False
    share = lambda x: float(x.double().sum() / energies.double().sum())
    assert share(energies[dropped]) <= tolerance**2
    assert energies[dropped].max() <= energies[ids].min()
    # A multiple of classes is kept: without as many more of the least, too much would be dropped.
    more = energies[ids].sort().values[: columns.MULTIPLE]
    assert share(torch.cat([energies[dropped], more])) > tolerance**2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_energies_that_are_no_numbers_keep_all(value):
    energies = torch.full((100,), 1e-9)
    energies[3] = 1
    assert choose(energies, 0.1) is not None
    energies[7] = value
    assert choose(energies, 0.1) is None


def test_auto_follows_the_dtype(monkeypatch):
    """Tolerances relative to the rounding error of the gradients' dtype."""
    tolerances = []
    rank = columns.rank_classes
    monkeypatch.setattr(columns, "rank_classes", lambda *x: tolerances.append(x[1]) or rank(*x))
    for filter_eps in ("auto", "high", 2.0**-12):
        gradients(problem(torch.float16), 0.0, filter_eps, ("e",))
    auto = front.FILTER_SHARE * front.filter_tolerance("auto")
    assert tolerances == [auto / 8, auto / 16, auto]


def test_refused():
    with pytest.raises(ValueError, match="filter_eps must be"):
        gradients(problem(), 0.0, 2.0)
    with pytest.raises(ValueError, match="filter_eps must be"):
        gradients(problem(), 0.0, "low")
