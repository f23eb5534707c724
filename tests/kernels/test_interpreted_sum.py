"""Sums of losses with their exact gradients from one pass, interpreted."""

import math

import pytest
import torch

from cut_cross_entropy import budget, dispatch, linear_cross_entropy, record_filter
from cut_cross_entropy.implementations import token_chunks
from cut_cross_entropy.kernels import exact_products, exact_sum, scale, step
from cut_cross_entropy.kernels.powers import choose_segment_tiles
from cut_cross_entropy.problem import Filter, Needed, Problem
from tests.kernels.test_interpreted_filtered import sharp
from tests.sums_in_training import BACKWARD, FORWARD, SUM, USES, check_use, record_passes
from tests.support import (
    check,
    check_sure_token,
    leaves_of,
    make_problem,
    run_ours,
)
from tests.test_sum import compare_with_reference, factors_in

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison_empty")]


@pytest.fixture
def chunks(monkeypatch):
    """Record the number of tokens of every chunk, and which chunks store their powers twice."""
    made = []
    store = exact_sum.store_powers

    def record(chunk, powers):
        store(chunk, powers)
        made.append((powers.shape[0], int(chunk.inputs.flags.sum())))

    monkeypatch.setattr(exact_sum, "store_powers", record)
    return made


@pytest.fixture
def passes(monkeypatch):
    """Record the names of the passes over the logits."""
    return record_passes(monkeypatch, (exact_sum, (SUM,)), (step, (FORWARD, BACKWARD)))


@pytest.fixture
def small_chunks(monkeypatch):
    """Let a chunk be one block of tokens."""
    monkeypatch.setattr(exact_sum, "powers_per_chunk", lambda problem, needed: 128)


@pytest.mark.parametrize(("softcap", "bias"), [(None, True), (5.0, False), (5.0, True)])
def test_several_chunks(softcap, bias, chunks, small_chunks, monkeypatch):
    """And products that are computed in slices of the classes."""
    monkeypatch.setattr(token_chunks, "MAX_ELEMENTS", 256 * 128)
    problem = make_problem((5, 80), 603, 24, bias=bias, ignored=0.1)
    options = {"softcap": softcap, "reduction": "sum" if bias else "mean", "shift": 1}
    check(problem, "cce_exact", return_lse=False, **options)
    assert [rows for rows, _ in chunks] == [128, 128, 128]
    assert not any(repaired for _, repaired in chunks)


@pytest.mark.parametrize("name", ["both", "temperature", "negative", "all"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("impl", ["cce_exact", "cce_kahan_full_c"])
def test_known_factors_take_three_products(name, softcap, impl, chunks):
    problem = make_problem((5, 13), 300, 16, bias=True)
    compare_with_reference(
        impl, problem, 1e-4, 2e-6, softcap=softcap, **factors_in(torch.float32, name)
    )
    assert len(chunks) == 1


def test_known_factors_in_several_chunks(chunks, small_chunks):
    """And with bounds that are too low, which a pass with the multiplier repairs."""
    problem = make_problem((300,), 1200, 16, bias=True)
    problem.e[7] = 0.0
    problem.e[:, 3], problem.e[7, 3], problem.c[1100, 3] = 0.0, 1.0, 150.0
    problem.targets[7] = 5
    options = {"token_weights": torch.linspace(0, 1, 300), "temperature": 0.9}
    compare_with_reference("cce_exact", problem, 1e-4, 2e-6, **options)
    assert chunks == [(128, 1), (128, 0)]


@pytest.mark.parametrize("needed", [("e",), ("c",), ("bias",), ("e", "bias")])
def test_only_what_is_needed_is_computed(needed, chunks):
    results = check(make_problem(bias=True), "cce_exact", return_lse=False, needed=needed)
    names = ("e", "c", "bias")
    assert [getattr(results, f"grad_{x}") is not None for x in names] == [
        x in needed for x in names
    ]
    assert len(chunks) == 1


@pytest.fixture
def multiplied(monkeypatch):
    """Record the number of tokens of every product for the gradient of e."""
    rows = []
    multiply = exact_products._multiply

    def record(powers, *others):
        rows.append(powers.shape[0])
        multiply(powers, *others)

    monkeypatch.setattr(exact_products, "_multiply", record)
    return rows


@pytest.mark.parametrize(
    ("tokens", "valid", "rows"), [(400, 129, 256), (400, 128, 128), (399, 390, 399), (5, 3, 5)]
)
def test_ignored_tokens_are_not_multiplied(tokens, valid, rows, multiplied):
    problem = make_problem((tokens,), 150, 16, bias=True, ignored=0.0)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    problem.targets[order[valid:]] = -100
    problem.e[order[valid:]] = torch.nan
    with record_filter() as records:
        ours = run_ours(problem, "cce_exact", return_lse=False)
    problem.e.nan_to_num_()
    expected = run_ours(problem, "reference", return_lse=False)
    for name, exact in expected.named().items():
        torch.testing.assert_close(ours.named()[name], exact, rtol=1e-4, atol=1e-6)
    assert multiplied == [rows]
    assert [(record.path, record.tokens) for record in records] == [("exact", valid)]


@pytest.mark.parametrize(
    ("valid", "rows"), [(0, []), (100, [128]), (200, [256]), (300, [256, 128])]
)
def test_the_first_powers_are_stored_before_the_host_knows_the_tokens(
    valid, rows, chunks, multiplied, monkeypatch
):
    """Ignored tokens change what is multiplied, and nothing else."""
    known = []
    wait = exact_sum.HostCopy.wait
    monkeypatch.setattr(exact_sum, "powers_per_chunk", lambda problem, needed: 256)
    monkeypatch.setattr(
        exact_sum.HostCopy, "wait", lambda self: (known.append(list(chunks)), wait(self))[1]
    )
    problem = make_problem((400,), 150, 16, bias=True, ignored=0.0)
    problem.targets[valid:] = -100
    check(problem, "cce_exact", return_lse=False)
    assert known == [[(256, 0)]]
    assert multiplied == rows


def test_rows_of_a_graph_are_multiplied_whatever_they_hold(multiplied, monkeypatch):
    """The host cannot know which tokens count while a graph is captured."""
    monkeypatch.setattr(exact_sum, "is_captured", lambda tensor: True)
    monkeypatch.setattr(exact_sum, "powers_per_chunk", lambda problem, needed: 256)
    problem = make_problem((600,), 150, 16, bias=True, ignored=0.0)
    problem.targets[100:] = -100
    check(problem, "cce_exact", return_lse=False)
    assert multiplied == [256, 256, 88]


@pytest.mark.parametrize(
    ("impl", "reduction", "products", "budget", "path"),
    [
        ("auto", "mean", 128 * 512 * 16, 2**28, "exact"),
        ("auto", "sum", 128 * 512 * 16 - 1, 2**28, "filtered"),
        (
            "auto",
            "sum",
            128 * 512 * 16,
            (128 + 512) * 16 * 4 - 1,
            "filtered",
        ),  # beyond the budget
        ("auto", "none", 128 * 512 * 16, 2**28, "filtered"),
        ("cce", "mean", 128 * 512 * 16, 2**28, "filtered"),  # was asked for
    ],
)
def test_small_problems_take_no_filter(impl, reduction, products, budget, path, monkeypatch):
    """By their shape, on a device that computes ``products`` while the host launches a filter."""
    monkeypatch.setattr(dispatch, "FEW_PRODUCTS", 2.0)
    monkeypatch.setattr(dispatch, "relative_throughput", lambda device: products / 2)
    choose = dispatch.choose_impl
    monkeypatch.setattr(
        dispatch,
        "choose_impl",
        lambda impl, *others: choose("cce" if impl == "auto" else impl, *others),
    )
    random = torch.Generator().manual_seed(3)
    c = torch.randn(512, 16, generator=random).requires_grad_()
    targets = torch.randint(0, 16, (128,), generator=random)
    e = (14 * c[targets] / c[targets].norm(dim=1, keepdim=True)).detach().requires_grad_()
    with record_filter() as records:
        loss = linear_cross_entropy(
            e, c, targets, impl=impl, reduction=reduction, memory_budget=budget
        )
        loss.sum().backward()
    assert [record.path for record in records] == [path]


@pytest.mark.parametrize("leading", [(0,), (4,)])
def test_no_token_counts(leading):
    problem = make_problem(leading, bias=True, ignored=1.0)
    inputs = leaves_of(problem)
    loss = linear_cross_entropy(*inputs[:2], problem.targets, inputs[2], impl="cce_exact")
    loss.backward()
    assert loss == 0
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in inputs)


@pytest.mark.parametrize("softcap", [None, 400.0])
def test_bounds_that_are_too_low(softcap, chunks, small_chunks):
    """A class behind the frequent ones that is 150 times as likely in nats as all that are seen."""
    problem = make_problem((150,), 1200, 16, bias=True, ignored=0.0)
    problem.e[:, 3], problem.e[7], problem.e[140] = 0.0, 0.0, 0.0
    problem.e[7, 3], problem.e[140, 3] = 1.0, 1.0
    problem.c[1100] = 0.0
    problem.c[1100, 3] = 150.0
    problem.targets[7], problem.targets[140] = 5, 1100  # the second token's target is its bound
    check(problem, "cce_exact", return_lse=False, softcap=softcap)
    assert [repaired for _, repaired in chunks] == [1, 0]


@pytest.mark.parametrize("same", [1, 33, 64, 190, 220])
def test_tokens_of_one_target(same, chunks):
    """Alone, several, and as many as begin, fill and end windows of 64 of the sorted tokens."""
    problem = make_problem((220,), 300, 24, bias=True, ignored=0.0)
    problem.targets[-same:] = 17
    check(problem, "cce_exact", return_lse=False)
    assert len(chunks) == 1


@pytest.mark.parametrize("miss", [1e-3, 1e-6, 1e-9])
def test_gradients_of_sure_tokens(miss):
    """In float32, 1 - p has an error of 6 % at 1e-6."""
    check_sure_token("cce_exact", miss, rtol=1e-3)


@pytest.mark.parametrize("value", [300, -1])
def test_a_target_out_of_range_is_nan(value, monkeypatch):
    monkeypatch.setattr(exact_sum, "check_target_range", lambda *arguments: None)
    problem = make_problem((5,), ignored=0.0)
    problem.targets[2] = value
    results = run_ours(problem, "cce_exact", return_lse=False)
    assert results.loss.isnan()
    assert results.grad_e.isnan().all(1).tolist() == [False, False, True, False, False]
    assert results.grad_c.isnan().all()


@pytest.mark.parametrize("infinite", [math.inf, math.nan])
def test_an_infinite_logit_is_nan(infinite):
    problem = make_problem((5,), bias=True, ignored=0.0)
    problem.bias[int(problem.targets[0])] = infinite
    assert run_ours(problem, "cce_exact", return_lse=False).loss.isnan()


@pytest.mark.parametrize(
    "options",
    [
        {"recompute": True},
        {"memory_budget": 1, "needed": ("e",)},
        {"return_lse": True},
        {"reduction": "none"},
    ],
)
def test_what_computes_the_logits_again(options, chunks):
    check(make_problem(), "cce_exact", **{"return_lse": False, **options})
    assert not chunks


@pytest.mark.parametrize(("softcap", "reduction"), [(None, "mean"), (5.0, "sum")])
def test_float16(softcap, reduction, chunks, small_chunks):
    """In three products, although its range is small for powers relative to a bound."""
    problem = make_problem((3, 80), 303, 24, bias=True, ignored=0.1, dtype=torch.float16)
    options = {"softcap": softcap, "reduction": reduction}
    check(problem, "cce_exact", return_lse=False, **options)
    assert [rows for rows, _ in chunks] == [128, 112]


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_float16_of_any_size(size, chunks):
    """Of embeddings whose products with a token's factor would be subnormal, or infinite."""
    problem = make_problem((150,), 1200, 16, bias=True, ignored=0.0)
    problem.e.mul_(size)
    problem.c.div_(size)
    problem = problem.to(torch.float16).to(torch.float32)
    weights, grads = 1e-6 * torch.linspace(0.5, 1, 150), []
    for impl, dtype in (("cce_exact", torch.float16), ("reference", torch.float32)):
        inputs = leaves_of(problem)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.float16):
            loss = linear_cross_entropy(
                *inputs[:2], problem.targets, inputs[2], impl=impl, token_weights=weights
            )
        grads.append(torch.autograd.grad(1e-6 * loss, inputs))
    for got, expected in zip(*grads, strict=True):
        assert (got - expected).norm() <= 5e-4 * expected.norm()
    assert len(chunks) == 1


def test_float16_and_a_bound_that_is_too_low(chunks, small_chunks):
    """A class with 2^30 times the probability of all that are seen: its power does not fit."""
    problem = make_problem((150,), 1200, 16, bias=True, ignored=0.0)
    problem.e[:, 3], problem.e[7], problem.e[7, 3] = 0.0, 0.0, 1.0
    problem.c[1100] = 0.0
    problem.c[1100, 3], problem.targets[7] = 21.0, 5
    check(problem.to(torch.float16), "cce_exact", return_lse=False)
    assert [repaired for _, repaired in chunks] == [1, 0]


def test_a_filter_needs_the_logits_again(chunks):
    for options in (
        {"impl": "cce"},
        {"impl": "cce_kahan_full_c", "needed": ("e",)},
        {"impl": "cce_kahan_full_e", "needed": ("c", "bias")},
        {"impl": "cce", "filter_c_grad": False, "needed": ("e",)},
    ):
        run_ours(make_problem(bias=True), return_lse=False, **options)
    assert not chunks


@pytest.mark.parametrize(
    "options",
    [
        {"impl": "cce", "filter_eps": None},
        {"impl": "cce_kahan_full_c", "needed": ("bias",)},
        {"impl": "cce_kahan_full_e", "needed": ("e",)},
        {"impl": "auto", "filter_e_grad": False},
        {"impl": "cce_kahan_full_c", "softcap": 5.0, "temperature": 0.5},
        {"impl": "cce_kahan_full_c"},
        {"impl": "cce", "filter_e_grad": False},
    ],
)
def test_nothing_is_filtered(options, chunks, monkeypatch):
    """Not what is not needed, nor of small problems or with a tail that nobody knows."""
    choose = lambda impl, *others: "cce" if impl == "auto" else impl
    monkeypatch.setattr(dispatch, "choose_impl", choose)
    monkeypatch.setattr(dispatch, "relative_throughput", lambda device: 1.0)
    problem = make_problem(bias=True)
    ours = run_ours(problem, return_lse=False, **options)
    assert len(chunks) == 1
    options = {**options, "impl": "reference"}
    monkeypatch.undo()
    exact = run_ours(problem, return_lse=False, **options)
    for name, value in ours.named().items():
        torch.testing.assert_close(value, exact.named()[name], rtol=1e-4, atol=1e-6)


@pytest.fixture
def shapes_of_products(monkeypatch):
    """Record the shape of every product of the exact gradients."""
    made = []
    for name in ("store_product", "add_product"):
        multiply = getattr(exact_products, name)
        monkeypatch.setattr(
            exact_products,
            name,
            lambda total, *others, multiply=multiply: (
                made.append(tuple(total.shape)),
                multiply(total, *others),
            ),
        )
    return made


@pytest.mark.parametrize(
    ("impl", "options", "exact", "filtered"),
    [
        ("cce_kahan_full_c", {"reduction": "sum"}, ("grad_c", "grad_bias"), "grad_e"),
        (
            "cce_kahan_full_e",
            {"token_weights": torch.linspace(0.5, 1, 140)},
            ("grad_e",),
            "grad_c",
        ),
    ],
    ids=["e", "c"],
)
def test_one_exact_gradient_and_one_filtered(
    impl, options, exact, filtered, chunks, small_chunks, shapes_of_products, monkeypatch
):
    """The pass over the logits serves both: no more is dropped, nor kept, than without it."""
    monkeypatch.setattr(dispatch, "FILTER_TOLERANCE", 0.02)
    problem = sharp(140)
    ours = run_ours(problem, impl, return_lse=False, **options).named()
    assert [rows for rows, _ in chunks] == [128, 12]
    # Products for dC have as many rows as classes, 1,100 in two slices, those for dE as tokens.
    rows = [shape[0] for shape in shapes_of_products if shape[1] == problem.e.shape[1]]
    assert rows == ([1024, 76, 1024, 76] if filtered == "grad_e" else [128, 128, 12, 12])
    both = run_ours(problem, "cce", return_lse=False, **options).named()
    truth = run_ours(problem, "reference", return_lse=False, **options).named()

    def error(results, name):
        return float((results[name] - truth[name]).norm() / truth[name].norm())

    assert all(error(ours, name) < 1e-5 for name in exact)
    assert error(ours, filtered) > 1e-4
    assert error(ours, filtered) == pytest.approx(error(both, filtered), rel=0.05)


@pytest.mark.parametrize("softcap", [None, 100.0])
def test_strips_from_stored_powers(softcap, monkeypatch):
    """Sums of squares and of probabilities of 128 tokens, to a byte's step of a quarter octave."""
    monkeypatch.setattr(exact_sum, "too_flat", lambda *_: False)
    data = sharp(300, classes=300, dim=24)
    settings = {"ignore_index": -100, "softcap": softcap, "compute_dtype": torch.float32}
    problem = Problem(data.e, data.c, data.targets, None, **settings, memory_budget=2**28)
    one = Filter(dispatch.FILTER_TOLERANCE, c=False)
    _, found = exact_sum._one_pass(problem, Needed(True, True, False), None, one)
    order = found.tokens.origin[found.tokens.origin < 300]  # the valid ones come first
    blocks = torch.arange(len(order)) // 128
    logits = data.e[order].double() @ data.c.double().T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    p, strips = logits.softmax(1), found.sums.strips.int()
    is_forced = torch.zeros(strips.shape, dtype=torch.bool)
    is_forced[blocks, data.targets[order]] = True
    assert ((strips & 255)[is_forced] == 255).all()
    for shift, terms in ((0, p * p), (8, p)):
        sums = torch.zeros(strips.shape, dtype=torch.float64).index_add_(0, blocks, terms)
        steps = (4 * (sums.log2() + 55) - ((strips >> shift) & 255))[~is_forced & (sums > 2**-54)]
        assert len(steps) > 300
        allowed = 0.1 if softcap is None else 0.5  # the slope is that of nearly the same logit
        assert -allowed <= steps.min() <= steps.max() <= 1 + allowed


@pytest.mark.parametrize("impl", ["cce_kahan_full_c", "cce_kahan_full_e"])
@pytest.mark.parametrize("seen", [True, False])
def test_one_gradient_filtered_of_data_too_flat_for_it(impl, seen, chunks, monkeypatch):
    """The first chunk shows it, and then no logits are computed again."""
    again, exact_gradients = [], step.exact_gradients
    monkeypatch.setattr(
        step, "exact_gradients", lambda *args: (again.append(args), exact_gradients(*args))[1]
    )
    if not seen:
        monkeypatch.setattr(exact_sum, "too_flat", lambda *args: False)
    problem = make_problem((150,), 600, 16, bias=True, ignored=0.1)
    with record_filter() as records:
        check(problem, impl, return_lse=False, softcap=5.0)
    assert [record.path for record in records] == ["dense"]
    assert len(chunks) == 1
    assert len(again) == (0 if seen else 1)


@pytest.mark.parametrize("weight", [1.0, 64 / 253])
def test_strips_beside_an_exact_gradient_have_a_scale(weight, monkeypatch):
    """With it the common factor of the tokens is 1, which no dtype rounds."""
    seen, original = [], exact_sum.gradients_of_tokens
    monkeypatch.setattr(
        exact_sum, "gradients_of_tokens", lambda *args: (seen.append(args[1]), original(*args))[1]
    )
    problem = sharp(40)
    e, c = problem.e.half().requires_grad_(), problem.c.half().requires_grad_()
    weights = torch.full((40,), weight)
    linear_cross_entropy(
        e, c, problem.targets, impl="cce_kahan_full_c", token_weights=weights
    ).backward()
    (tokens,) = seen
    assert float(tokens.scale * tokens.b.max()) == pytest.approx(1, rel=1e-6)


def test_a_graph_is_captured_without_the_filter(chunks, monkeypatch):
    """The filter reads its counts, which a graph cannot."""
    monkeypatch.setattr(exact_sum, "is_captured", lambda tensor: True)
    with record_filter() as records:
        check(sharp(40), "cce_kahan_full_c", return_lse=False)
    assert not records
    assert len(chunks) == 1


PATHS = {"cce_exact": "exact", "cce_kahan_full_c": "filtered"}


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("name", USES)
def test_in_a_training_loop(name, impl, passes):
    problem = sharp(40, classes=400)
    assert check_use(name, impl, problem) == passes
    if name == "hooked":  # once; what is recorded keeps tensors, which some uses look for
        with record_filter() as records:
            check_use(name, impl, problem)
        assert [record.path for record in records] == [PATHS[impl]]


def test_compiled(chunks):
    torch._dynamo.reset()
    problem = make_problem(bias=True)

    def model(e, c, targets, bias):
        return linear_cross_entropy(torch.sin(e), c, targets, bias, impl="cce_exact")

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ours, expected = leaves_of(problem), leaves_of(problem)
    for function, (e, c, bias) in ((compiled, ours), (model, expected)):
        function(e, c, problem.targets, bias).backward()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(ours, expected, strict=True))
    assert len(chunks) == 2
    torch._dynamo.reset()


def test_weights_of_the_bias_s_sum_in_half_precision():
    """Three terms of bfloat16 have the 24 bits of a float32."""
    generator = torch.Generator().manual_seed(0)
    powers = torch.rand(150, 70, generator=generator).bfloat16()
    factor = torch.rand(150, generator=generator) * 1e-6
    expected = powers.double().T @ factor.double()
    found = exact_products._weighted_sum(powers, factor, None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    in_units = exact_products._weighted_sum(powers.half(), factor, torch.tensor(2.0**33))
    torch.testing.assert_close(in_units.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [(3, 5000), (1,), (8192,)])
def test_scale(size, dtype):
    total = torch.randn(size, generator=torch.Generator().manual_seed(0))
    out = torch.full(size, torch.nan, dtype=dtype)
    scale.scale(total, torch.tensor(-3.0), out)
    assert torch.equal(out, (total * -3).to(dtype))


@pytest.mark.parametrize("num_classes", [1, 7, 300, 1024, 1027, 5000])
def test_slices_of_products(num_classes, monkeypatch):
    monkeypatch.setattr(token_chunks, "MAX_ELEMENTS", 600 * 8)
    slices = list(token_chunks.class_slices(num_classes, 8))
    covered = [i for part in slices for i in range(part.start, part.stop)]
    assert covered == list(range(num_classes))
    assert all((part.stop - part.start) % 8 == 0 for part in slices[:-1])
    assert all(part.stop - part.start <= 512 for part in slices)
    assert num_classes % 8 == 0 or slices[-1].stop - slices[-1].start < 256


@pytest.mark.parametrize(
    ("blocks", "tiles", "expected"),
    [
        (8, 594, 38),  # 16 segments: 128 programs
        (14, 594, 33),  # 18 segments: 252 programs, two turns of 128
        (2, 594, 13),  # as many segments as there may be
        (1, 3, 1),
    ],
)
def test_segments_keep_a_gpu_busy(blocks, tiles, expected):
    assert choose_segment_tiles(blocks, tiles) == expected


def problem_of_size(num_classes, dim, dtype=torch.bfloat16, memory_budget=2**28):
    from cut_cross_entropy.problem import Problem

    e, c = (torch.empty(n, dim, dtype=dtype, device="meta") for n in (1, num_classes))
    return Problem(e, c, e, None, -100, None, torch.bfloat16, memory_budget)


@pytest.mark.parametrize(
    ("num_classes", "dim", "dtype", "with_c", "without_c"),
    [
        (256000, 2304, torch.bfloat16, 2688, 384),
        (128256, 4096, torch.bfloat16, 4608, 896),
        (151936, 1024, torch.bfloat16, 1792, 768),
        (128256, 4096, torch.float32, 4608, 896),  # autocast: a copy of c takes half of dC's bytes
        (262144, 640, torch.bfloat16, 1024, 384),
        (2**20, 512, torch.bfloat16, 0, 0),
    ],
)
def test_tokens_of_a_chunk(num_classes, dim, dtype, with_c, without_c):
    problem = problem_of_size(num_classes, dim, dtype)
    assert budget.powers_per_chunk(problem, Needed(True, True, False)) == with_c
    assert budget.powers_per_chunk(problem, Needed(True, False, False)) == without_c


def test_a_chunk_is_bounded_in_elements():
    problem = problem_of_size(256000, 2304, memory_budget=2**40)
    rows = budget.powers_per_chunk(problem, Needed(True, True, False))
    assert 2**29 < rows * 256000 <= 2**30
