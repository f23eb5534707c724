"""A captured step with the filter: replays on new data are what eager steps compute."""

from dataclasses import replace

import pytest
import torch

from cut_cross_entropy import dispatch
from cut_cross_entropy.filter_report import record_filter
from cut_cross_entropy.kernels import step
from cut_cross_entropy.kernels.filtered import (
    backward,
    calibrate,
    captured,
    class_weights,
    tail_sample,
)
from cut_cross_entropy.problem import Filter, Needed, PerToken, Problem
from tests.kernels.replay import Replay
from tests.kernels.test_interpreted_filtered import sharp as sharp_of
from tests.support import make_problem

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison_empty")]

FILTER = Filter(dispatch.FILTER_TOLERANCE)
BOTH = Needed(e=True, c=True, bias=False)


def sharp(tokens=140, **options):
    return sharp_of(tokens, classes=600, dim=48, **options)


class Step:
    """Forward and backward of a mean, as functions of what a problem's tensors hold."""

    def __init__(self, data, needed=BOTH, filter_=FILTER, **options):
        tensors = (data.e.clone(), data.c.clone(), data.targets.clone())
        bias = None if data.bias is None else data.bias.clone()
        settings = {"ignore_index": -100, "softcap": None, "compute_dtype": data.e.dtype}
        settings |= {"memory_budget": 2**28, **options}
        self.problem = Problem(*tensors, bias, **settings)
        self.upstream = torch.ones(len(data.e))
        self.needed, self.filter = needed, filter_

    def fill(self, data, upstream=1.0):
        for mine, new in zip(
            (self.problem.e, self.problem.c, self.problem.targets, self.problem.bias),
            (data.e, data.c, data.targets, data.bias),
            strict=True,
        ):
            if mine is not None:
                mine.copy_(new)
        self.upstream.copy_(torch.as_tensor(upstream).expand_as(self.upstream))

    def __call__(self):
        saved = step.forward(self.problem, self.filter, training=True)
        upstream = PerToken(self.upstream * 0.5, torch.zeros_like(self.upstream))
        grads = step.backward(upstream, saved, self.problem, self.filter, self.needed)
        return saved.nll, *grads

    def eager(self):
        """Return the results of an eager step, and the path that it took."""
        with record_filter() as records:
            results = self()
        return results, records[0].path


@pytest.fixture
def capture(monkeypatch):
    """Return a function that captures a step, which reads values of a CPU's targets else."""
    monkeypatch.setattr(backward, "DENSE_FRACTION", 1.8)  # halved: there are few features
    monkeypatch.setattr(step, "check_target_range", lambda *_: None)
    return lambda function: Replay(function, monkeypatch)


def ignoring(data, tokens):
    targets = data.targets.clone()
    targets[tokens] = -100
    return replace(data, targets=targets)


def flat_data(data, seed=3):
    """Return data of the same shapes that no filter reduces."""
    tokens, dim = data.e.shape
    other = make_problem((tokens,), len(data.c), dim, bias=data.bias is not None, seed=seed)
    return other.to(data.e.dtype)


def check(graph, one, path, exactly=(True, True, True)):
    """Compare a replay with an eager step: bit for bit, or within the rounding of its sums."""
    expected, taken = one.eager()
    assert taken == path
    for got, want, same in zip(graph()[:3], expected[:3], exactly, strict=True):
        if same:
            assert torch.equal(got, want)
        else:
            scale = want.abs().max().item() if want.numel() else 0.0
            unit = {torch.float32: 2e-6, torch.float16: 2**-10}[want.dtype]
            torch.testing.assert_close(got, want, rtol=unit, atol=unit * scale)


SAME, CLOSE = (True, True, True), (True, False, False)


@pytest.mark.parametrize(
    ("superblocks", "dtype"),
    [(False, torch.float32), (False, torch.float16), (True, torch.float16)],
)
def test_replays_on_new_data(superblocks, dtype, capture, request):
    """The device goes to the dense path and back; ignored tokens, flat ones, nothing to keep."""
    if superblocks:
        request.getfixturevalue("several_superblocks")
    first, flat = sharp(140, dtype=dtype), (3, 50, 51)
    one = Step(first, softcap=20.0)
    graph = capture(one)
    check(graph, one, "filtered")
    one.fill(flat_data(first))
    check(graph, one, "dense", CLOSE)
    one.fill(sharp(140, seed=1, dtype=dtype))
    check(graph, one, "filtered")
    one.fill(sharp(140, flat=flat, dtype=dtype))
    check(graph, one, "filtered", CLOSE)
    one.fill(ignoring(first, slice(20, None)))
    check(graph, one, "filtered")
    one.fill(ignoring(flat_data(first), slice(20, None)))
    check(graph, one, "dense", CLOSE)
    one.fill(first, upstream=torch.arange(140.0) % 3)
    check(graph, one, "filtered")
    one.fill(ignoring(first, slice(None)))
    check(graph, one, "filtered")
    assert not any(grad.any() for grad in graph()[1:3])
    one.fill(first, upstream=0.0)
    check(graph, one, "filtered")
    assert not any(grad.any() for grad in graph()[1:3])


def test_a_capture_of_flat_data_replays_filtered(capture):
    first = sharp(140)
    one = Step(flat_data(first))
    graph = capture(one)
    check(graph, one, "dense", CLOSE)
    one.fill(first)
    check(graph, one, "filtered")


def test_a_threshold_that_a_sample_sets(capture, monkeypatch):
    """The sample is drawn anew in each replay."""
    monkeypatch.setattr(calibrate, "MIN_TOKENS", 0)
    monkeypatch.setattr(calibrate, "MIN_WORK", 0)
    first = sharp(140)
    one = Step(first, filter_=replace(FILTER, max_error=1.0))
    graph = capture(one)
    check(graph, one, "filtered")
    one.fill(sharp(140, seed=1))
    check(graph, one, "filtered")
    one.fill(ignoring(first, slice(20, None)))
    check(graph, one, "filtered")
    one.fill(ignoring(first, slice(None)))
    check(graph, one, "filtered")


@pytest.mark.parametrize("is_calibrated", [True, False])
def test_a_tail_that_would_stand_for_much_is_computed(is_calibrated, capture, monkeypatch):
    """By an estimate that stays on the device."""
    if is_calibrated:
        monkeypatch.setattr(calibrate, "MIN_TOKENS", 0)
        monkeypatch.setattr(calibrate, "MIN_WORK", 0)
    for limit, path, exactly in ((1e-6, "dense", CLOSE), (0.02, "filtered", SAME)):
        one = Step(sharp(140), filter_=replace(FILTER, max_error=1.0, most_dropped=limit))
        check(capture(one), one, path, exactly)


def test_rare_classes_with_weights_of_their_own(capture, monkeypatch):
    monkeypatch.setattr(class_weights, "MIN_WORK", 0)
    first = sharp(140)
    one = Step(first)
    graph = capture(one)
    check(graph, one, "filtered")
    one.fill(ignoring(first, slice(20, None)))
    check(graph, one, "filtered")


def test_more_strips_than_have_memory_take_the_dense_path(capture):
    """An eager step computes them in passes; the results differ by what the filter drops."""
    one = Step(sharp(140), memory_budget=2**12)
    graph = capture(one)
    expected, path = one.eager()
    assert path == "filtered"
    exact = step.backward(
        PerToken(one.upstream * 0.5, torch.zeros_like(one.upstream)),
        step.forward(one.problem, FILTER, training=True),
        one.problem,
        Filter(0.0),
        BOTH,
    )
    for got, want, filtered in zip(graph()[1:3], exact, expected[1:3], strict=False):
        assert (got - want).norm() < 1e-6 * want.norm()
        assert (got - filtered).norm() > 1e-5 * want.norm()


@pytest.mark.parametrize("needed", [Needed(True, False, False), Needed(False, True, False)])
def test_one_gradient(needed, capture, monkeypatch):
    """Classes are drawn for dE alone."""
    first = sharp(140)
    one = Step(first, needed)
    launches = []
    launch = tail_sample.launch
    monkeypatch.setattr(
        tail_sample, "launch", lambda *args, **more: (launches.append(args), launch(*args, **more))
    )
    graph = capture(one)
    assert bool(launches) == needed.e
    check(graph, one, "filtered")
    one.fill(flat_data(first))
    check(graph, one, "dense", CLOSE)


def test_frozen_columns_and_a_temperature(capture):
    first = sharp(140)
    one = Step(first, frozen_columns=16, multiplier=torch.full((140,), 1.25))
    graph = capture(one)
    check(graph, one, "filtered")
    one.fill(flat_data(first))
    check(graph, one, "dense", CLOSE)


@pytest.mark.parametrize("why", ["bias", "tokens"])
def test_what_the_filter_of_a_graph_does_not_compute_is_exact(why, capture, monkeypatch):
    first = sharp(140)
    needed = replace(BOTH, bias=why == "bias")
    if why == "tokens":
        monkeypatch.setattr(captured, "MAX_TOKENS", 128)
    one = Step(first, needed)
    graph = capture(one)
    monkeypatch.setattr(backward, "DENSE_FRACTION", -1.0)
    check(graph, one, "dense", CLOSE)
    one.fill(sharp(140, seed=1))
    check(graph, one, "dense", CLOSE)


def test_nothing_is_recorded_of_a_captured_pass(capture):
    with record_filter() as records:
        capture(Step(sharp(40)))
    assert not records
