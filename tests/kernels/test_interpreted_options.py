"""Each option of the kernels against plain PyTorch in float64, by every route, interpreted."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.conftest import ROUTES, take_route
from tests.support import make_problem, run_ours, strided
from tests.test_needed_gradients import SUBSETS

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison_empty")]


def one_block(**options):
    """24 tokens; 300 classes are three tiles, one partial; 24 features are not a whole step."""
    return make_problem((3, 8), 300, 24, **options)


def two_blocks(classes=300, **options):
    """138 tokens, about 133 of them valid: the interpreter takes its time for each."""
    return make_problem((3, 46), classes, 24, ignored=0.03, **options)


@pytest.mark.parametrize(
    ("dtype", "bias", "softcap"),  # each pair of values; 5: about 2 deviations, so tanh does bend
    [
        (torch.float32, False, None),
        (torch.float32, True, 5.0),
        (torch.float16, False, 5.0),
        (torch.float16, True, None),
    ],
)
def test_dtype_bias_softcap(route, dtype, bias, softcap):
    route.check(one_block(dtype=dtype, bias=bias), softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_two_blocks(any_route, dtype):
    problem = two_blocks(dtype=dtype, bias=True)
    assert (problem.targets != -100).sum() > 128
    any_route.check(problem, softcap=8.0)


def test_float32_bias_with_half_precision_classifier(route):
    problem = one_block(dtype=torch.float16, bias=True)
    problem = replace(problem, bias=problem.bias.float())
    assert route.check(problem).grad_bias.dtype == torch.float32


@pytest.mark.parametrize("impl", ["cce", "cce_exact"])
def test_autocast(impl, drops_nothing, always_filtered):
    """Gradients come back in the tensors' own dtypes, and are those of the rounded tensors."""
    problem = one_block(bias=True)
    rounded = run_ours(problem.to(torch.float16), impl)
    with torch.autocast("cpu", torch.float16):
        results = run_ours(problem, impl)
    torch.testing.assert_close(results.loss, rounded.loss, rtol=1e-3, atol=1e-3)
    for name, value in results.named().items():
        assert value.dtype == torch.float32, name
        expected = rounded.named()[name].float()
        scale = expected.abs().max().item()
        torch.testing.assert_close(value, expected, rtol=2e-3, atol=2e-3 * scale)


@pytest.mark.parametrize(
    ("reduction", "shift"), [("mean", 1), ("sum", 0), ("none", 0), ("none", True), ("sum", 3)]
)
def test_reduction_and_shift(route, reduction, shift):
    route.check(one_block(), reduction=reduction, shift=shift)


@pytest.mark.parametrize("lse_weight", [0.0, 10.0])  # no gradient of lse; one above that of loss
def test_gradient_of_lse(route, lse_weight):
    route.check(one_block(bias=True), lse_weight=lse_weight)


@pytest.mark.parametrize("ignore_index", [0, 299, -1])
def test_ignore_index(route, ignore_index):
    problem = one_block(ignore_index=ignore_index)
    route.check(problem, ignore_index=ignore_index, reduction="none")


def test_int32_targets(route):
    route.check(one_block(target_dtype=torch.int32), reduction="sum")


@pytest.mark.parametrize(
    ("path", "needed"),
    [
        *(("filtered", names) for names in SUBSETS),
        # The presets with one exact gradient decide by what is needed which path is taken.
        *((path, names) for path in ("full_c", "full_e") for names in SUBSETS[1:-1]),
        *((path, names) for path in ("exact", "dense") for names in (*SUBSETS[1:4], ())),
    ],
    ids=str,
)
def test_needed_gradients(path, needed, request):
    route = take_route(path, request)
    results = route.check(one_block(bias=True), needed=needed)
    present = {name for name in ("e", "c", "bias") if f"grad_{name}" in results.named()}
    assert present == set(needed)


# 1100 classes are two chunks of the selection and more than the short pass reads. 1 byte holds one
# block, or one chunk, per pass; 10^5 bytes hold a few of them.
def test_memory_budget_forces_several_passes(any_route):
    any_route.check(two_blocks(1100, bias=True), memory_budget=1, softcap=8.0)


def test_memory_budget_of_a_few_blocks(request):
    take_route("filtered", request).check(
        two_blocks(1100, bias=True), memory_budget=10**5, softcap=8.0
    )


@pytest.mark.parametrize("needed", [("c", "bias"), ("e",)], ids="+".join)
def test_several_passes_for_some_gradients(route, needed):
    route.check(two_blocks(1100, bias=True), memory_budget=1, needed=needed, softcap=8.0)


@pytest.mark.parametrize("tokens", [1, 128, 129])  # a block is 128
def test_number_of_tokens(route, tokens):
    route.check(make_problem((tokens,), 130, 8, ignored=0.0))


@pytest.mark.parametrize("classes", [1, 2, 127, 128, 129, 1024, 1025])
def test_number_of_classes(route, classes):
    route.check(make_problem((9,), classes, 8, bias=True), reduction="sum")


@pytest.mark.parametrize("dim", [1, 32, 33, 130])  # a step is 32, a tile of results 64
def test_number_of_features(route, dim):
    route.check(make_problem((9,), 130, dim))


@pytest.mark.parametrize(
    ("leading", "reduction"), [((), "none"), ((1,), "mean"), ((2, 3, 2), "none")], ids=str
)
def test_leading_shape(route, leading, reduction):
    results = route.check(make_problem(leading, 130, 8, ignored=0.0), reduction=reduction)
    assert results.lse.shape == leading


@pytest.mark.parametrize(
    ("what", "shift"), [("e", 1), ("c", 0), ("targets", 1), ("bias", 0), ("all", 0), ("all", 1)]
)
def test_non_contiguous_inputs(route, what, shift):
    problem = strided(make_problem((3, 5), 130, 24, bias=True), what)
    route.check(problem, shift=shift, reduction="none")


def test_expanded_inputs(route):
    """Strides of 0: one embedding for all tokens, one row for all classes."""
    problem = make_problem((9,), 130, 8, ignored=0.0)
    route.check(replace(problem, e=problem.e[:1].expand(9, -1)))
    route.check(replace(problem, c=problem.c[:1].expand(130, -1)))


def test_partial_sums_with_four_more_bits(several_superblocks, request, monkeypatch):
    """As for bfloat16, which the interpreter cannot multiply; an odd number of features."""
    from cut_cross_entropy.kernels.filtered import partial_sums

    request.getfixturevalue("drops_nothing")
    request.getfixturevalue("always_filtered")
    monkeypatch.setattr(partial_sums, "choose_low_bits", lambda out, num_superblocks: 4)
    problem = make_problem((133,), 1100, 9, bias=True, ignored=0.0).to(torch.float16)
    ROUTES["filtered"].check(problem)


@pytest.mark.parametrize("budget", [2**28, 1])
@pytest.mark.parametrize("path", ["filtered", "full_c", "full_e"])
def test_several_superblocks(path, budget, several_superblocks, request):
    request.getfixturevalue("drops_nothing")
    request.getfixturevalue("always_filtered")
    ROUTES[path].check(two_blocks(bias=True), memory_budget=budget)


@pytest.fixture
def passes(monkeypatch):
    """Record the rectangles of strips that are computed, and the ranges of classes."""
    from cut_cross_entropy.kernels.filtered import passes

    rectangles, ranges = [], []
    store, write = passes._store, passes._write_classes

    def record_rectangle(work, rectangle, *borrowed):
        rectangles.append((rectangle.blocks, rectangle.chunks))
        return store(work, rectangle, *borrowed)

    def record_range(work, class_pass, stored_once):
        ranges.append(class_pass.chunks)
        write(work, class_pass, stored_once)

    monkeypatch.setattr(passes, "_store", record_rectangle)
    monkeypatch.setattr(passes, "_write_classes", record_range)
    return rectangles, ranges


ALL = (0, 2)  # blocks of 128 tokens, or chunks of 1024 classes
EACH = [((0, 1), ALL), ((1, 2), ALL)]
FIRST, SECOND = ([((block, block + 1), (chunk, chunk + 1)) for block in (0, 1)] for chunk in (0, 1))


@pytest.mark.parametrize(
    ("dtype", "budget", "strip_bytes", "made", "ranges"),
    [
        # All strips at once; 2200 of 264 bytes.
        (torch.float32, 2**28, None, [(ALL, ALL)], [ALL]),
        (torch.float16, 2**28, None, [(ALL, ALL)], [ALL]),
        # The same, and the lower bits of the sums of one chunk at a time.
        (torch.float16, 2 * 8 * 1024, 1, [(ALL, ALL)], [(0, 1), (1, 2)]),
        # Those of a superblock at once, for its tokens and for all classes.
        (torch.float32, 400_000, None, EACH, [ALL]),
        (torch.float16, 400_000, None, EACH, [ALL]),
        # Fewer: once for the tokens, once for the classes. Sums in dC itself, or a chunk's.
        (torch.float32, 11_000, None, [*EACH, FIRST[0], SECOND[0], FIRST[1], SECOND[1]], [ALL]),
        (torch.float16, 11_000, None, [*EACH, *FIRST, *SECOND], [(0, 1), (1, 2)]),
    ],
)  # fmt: skip
def test_passes_of_several_superblocks(
    dtype, budget, strip_bytes, made, ranges, several_superblocks, passes, request, monkeypatch
):
    from cut_cross_entropy.kernels.filtered import schedule

    if strip_bytes is not None:
        monkeypatch.setattr(schedule, "STRIP_BYTES", strip_bytes)
    request.getfixturevalue("drops_nothing")
    request.getfixturevalue("always_filtered")
    problem = make_problem((133,), 1100, 8, bias=True, ignored=0.0).to(dtype)
    ROUTES["filtered"].check(problem, memory_budget=budget)
    assert passes == (made, ranges)


@pytest.mark.parametrize(
    ("dtype", "budget", "strip_bytes", "made", "ranges"),
    [
        # Two superblocks fit, three do not; 2304 strips each, for the tokens too.
        (torch.float32, 1_500_000, 264, [((0, 2), (0, 3)), ((2, 3), (0, 3))], [(0, 3)]),
        # Two ranges of sums; strips for the first are made for all classes and serve the tokens.
        (
            torch.float16,
            25_000,
            2,
            [((0, 1), (0, 3)), ((1, 2), (0, 3)), ((2, 3), (0, 3)), ((0, 3), (2, 3))],
            [(0, 2), (2, 3)],
        ),
        # They do not fit for all classes; of the smaller range all superblocks do.
        (
            torch.float16,
            25_184,
            4,
            [
                ((0, 2), (0, 3)),
                ((2, 3), (0, 3)),
                ((0, 1), (0, 2)),
                ((1, 2), (0, 2)),
                ((2, 3), (0, 2)),
                ((0, 3), (2, 3)),
            ],
            [(0, 2), (2, 3)],
        ),
    ],
)
def test_passes_of_as_many_superblocks_as_fit(
    dtype, budget, strip_bytes, made, ranges, several_superblocks, passes, request, monkeypatch
):
    from cut_cross_entropy.kernels.filtered import schedule

    monkeypatch.setattr(schedule, "STRIP_BYTES", strip_bytes)
    request.getfixturevalue("drops_nothing")
    request.getfixturevalue("always_filtered")
    problem = make_problem((7, 37), 2304, 8, bias=True, ignored=0.0).to(dtype)
    ROUTES["filtered"].check(problem, memory_budget=budget)
    assert passes == (made, ranges)
