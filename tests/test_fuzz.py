"""Hypothesis chooses shapes, options and bad input; the truth is plain PyTorch in float64."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cut_cross_entropy import linear_cross_entropy
from tests.support import check, make_problem, run_ours

# Derandomized, so that CI gives the same answer each time; print_blob to repeat a failure.
fuzz = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    print_blob=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# One token, one class, block edges (128 classes), and sizes that divide nothing.
CLASSES = st.sampled_from([2, 3, 127, 128, 129, 255, 257])
LEADING = st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple)


@st.composite
def calls(draw):
    """A problem and options that fit it."""
    leading = draw(LEADING)
    classes = draw(CLASSES)
    ignore_index = draw(st.sampled_from([-100, -1, 0, classes - 1, classes]))
    problem = make_problem(
        leading,
        classes,
        draw(st.integers(1, 9)),
        dtype=draw(st.sampled_from([torch.float64, torch.float32])),
        bias=draw(st.booleans()),
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        ignore_index=ignore_index,
        target_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        seed=draw(st.integers(0, 2**16)),
    )
    options = {
        "ignore_index": ignore_index,
        "softcap": draw(st.none() | st.floats(0.5, 50.0)),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "shift": draw(st.integers(0, leading[-1] - 1)) if leading else 0,
        "needed": draw(st.sets(st.sampled_from(["e", "c", "bias"]))),
        "memory_budget": draw(st.sampled_from([1, 5000, 2**28])),
    }
    return problem, options


@pytest.mark.usefixtures("poison_empty")
@fuzz
@given(calls())
def test_chunked(call):
    problem, options = call
    check(problem, "chunked", **options)


@pytest.mark.usefixtures("poison_empty")
@fuzz
@given(calls())
def test_reference(call):
    problem, options = call
    check(problem, "reference", **options)


# Sizes are dynamic in the compiled function; other dtypes and options would each be compiled anew.
@fuzz
@given(st.integers(2, 40), st.integers(2, 300), st.integers(2, 20), st.integers(0, 2**16))
def test_torch_compile(tokens, classes, dim, seed):
    check(make_problem((tokens,), classes, dim, seed=seed), "torch_compile", lse_weight=0.0)


@fuzz
@given(st.permutations(range(5)), CLASSES, st.sampled_from(["chunked", "reference"]))
def test_order_of_tokens_does_not_matter(order, classes, impl):
    problem = make_problem((5,), classes, dtype=torch.float64)
    shuffled = replace(problem, e=problem.e[order], targets=problem.targets[order])
    before, after = (
        run_ours(p, impl, reduction="none", memory_budget=1, lse_weight=0.0, needed=())
        for p in (problem, shuffled)
    )
    torch.testing.assert_close(after.loss, before.loss[order])
    torch.testing.assert_close(after.lse, before.lse[order])


REFUSALS = (TypeError, ValueError, NotImplementedError)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["mean", "auto", "high", "chunked", "reference"]),
    st.just(object()),
    st.lists(st.integers(), max_size=2),
)
OPTION_NAMES = [
    "ignore_index",
    "softcap",
    "reduction",
    "shift",
    "filter_eps",
    "impl",
    "memory_budget",
]


def loss_or_refusal(*tensors, **options):
    """The loss, or the message of an error of a class that a refusal may have."""
    try:
        return linear_cross_entropy(*tensors, **options)
    except REFUSALS as error:
        return str(error)


@settings(fuzz, max_examples=400)
@given(st.dictionaries(st.sampled_from(OPTION_NAMES), VALUES, min_size=1))
def test_bad_options_are_refused_by_name_or_work(options):
    problem = make_problem((3, 4), 7, 3, ignored=0.0)
    got = loss_or_refusal(problem.e, problem.c, problem.targets, **options)
    if isinstance(got, str):
        assert got.startswith(tuple(options))
    else:
        assert got.isfinite().all()


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
ALL_DTYPES = st.sampled_from(
    [torch.float32, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool]
)


@settings(fuzz, max_examples=400)
@given(
    SHAPES,
    SHAPES,
    SHAPES,
    st.none() | SHAPES,
    ALL_DTYPES,
    ALL_DTYPES,
    ALL_DTYPES,
    st.integers(0, 3),
)
def test_bad_tensors_are_refused_by_name_or_work(e, c, targets, bias, of_e, of_c, of_t, shift):
    tensors = (
        torch.zeros(e, dtype=of_e),
        torch.zeros(c, dtype=of_c),
        torch.zeros(targets, dtype=of_t),
        None if bias is None else torch.zeros(bias, dtype=of_c),
    )
    got = loss_or_refusal(*tensors, shift=shift, impl="chunked")
    if isinstance(got, str):
        named = got.removeprefix("the dtype of ")
        assert named.startswith(("e ", "c ", "targets ", "bias ", "shift "))
    else:  # all zeros: uniform probabilities
        kept = tensors[2][..., shift:].numel()
        expected = math.log(c[0]) if kept else 0.0
        assert got.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@fuzz
@given(st.lists(st.integers(-3, 12), min_size=1, max_size=8), st.sampled_from([-100, -1, 2]))
def test_targets_in_range_or_refused(targets, ignore_index):
    e = torch.ones(len(targets), 2)
    wrong = [t for t in targets if not 0 <= t < 9 and t != ignore_index]
    call = lambda: linear_cross_entropy(
        e, torch.ones(9, 2), torch.tensor(targets), ignore_index=ignore_index, impl="chunked"
    )
    if wrong:
        with pytest.raises(ValueError, match=rf"got {wrong[0]} \({len(wrong)} out of range\)"):
            call()
    else:
        kept = [t for t in targets if t != ignore_index]
        expected = torch.tensor(9.0).log() if kept else torch.tensor(0.0)
        torch.testing.assert_close(call(), expected)
