"""The largest batch, the parts of the filter, and the rank curve, where the answer is known."""

import pytest
import torch

from cut_cross_entropy.benchmark.data import Problem, make
from cut_cross_entropy.benchmark.shapes import Shape
from research.largest import UNIT, forecast, search
from research.ranks import CUTOFF, curve
from research.simulate import Gradient, pairs, simulate, strips_kept
from research.tails import errors, orders, study


def device(gib_per_token, fixed, memory=float("inf"), calls=None):
    """Stands in for a worker whose peak grows in proportion to the tokens."""

    def ask(tokens, limit):
        gib = fixed + gib_per_token * tokens
        if calls is not None:
            calls.append(tokens)
        if gib > memory:
            return {"fits": False, "gib": None}
        return {"fits": gib <= limit, "gib": gib}

    return ask


@pytest.mark.parametrize("gib_per_token", [1e-2, 3.4e-3, 1e-4])
def test_the_largest_batch_is_found_within_a_twentieth(gib_per_token):
    calls = []
    found = search(device(gib_per_token, 2.3, memory=80, calls=calls), 16.0, 262144)
    truth = (16.0 - 2.3) / gib_per_token
    assert found["tokens"] <= truth
    assert found["tokens"] >= min(truth, 262144) * 0.95 - 2 * UNIT
    assert found["fails"] is None or found["fails"] > truth
    assert len(calls) <= 10


def test_no_batch_beyond_the_largest_allowed_is_run():
    calls = []
    found = search(device(1e-6, 2.0, calls=calls), 16.0, 20000)
    assert found["tokens"] == 20000 == max(calls)
    assert found["forecast"] == pytest.approx(14e6, rel=0.01)


def test_a_method_that_fits_nothing_says_so():
    assert search(device(1.0, 200.0, memory=80), 16.0, 262144)["tokens"] == 0


def test_forecast_is_a_line():
    assert forecast([(1024, 3.0), (2048, 4.0)], 7.0) == 5120


@pytest.fixture(scope="module")
def structured():
    return make("structured", 512, Shape("tiny", 2048, 64), torch.float32)


def test_parts_of_the_filter_in_the_order_of_their_errors(structured):
    rows = {row["part"]: row for row in simulate(structured, tolerance=2e-2)}
    assert rows["no filter"]["error_e"] == 0
    dropped, tail = rows["strips, the rest dropped"], rows["strips and tail"]
    assert 0 < dropped["kept"] < rows["tiles"]["kept"] <= 1
    assert tail["error_e"] < dropped["error_e"]
    assert tail["error_c"] < dropped["error_c"]
    assert rows["tiles, classes by mean logit"]["kept"] <= rows["tiles"]["kept"]
    membership = rows["strips and tail, classes by mask"]
    assert 1 <= membership["pairs"] <= tail["pairs"]


def test_what_is_dropped_stays_within_the_tolerance(structured):
    gradient = Gradient.of(structured)
    kept, energy = strips_kept(gradient, 3e-2)
    allowed = 3e-2**2 * gradient.missed.square().sum()
    assert energy[~kept].sum() <= allowed * 1.0001
    blocks = torch.arange(512) // 128
    assert kept[blocks, gradient.targets].all()


def test_dropping_everything_is_an_error_of_the_whole_gradient(structured):
    gradient = Gradient.of(structured)
    errors = gradient.errors(torch.zeros_like(gradient.p))
    assert errors == {"error_e": 0.0, "error_c": 0.0}
    exact = torch.nn.functional.cross_entropy(
        (e := structured.e.clone().requires_grad_()) @ structured.c.T,
        structured.targets,
        reduction="sum",
    )
    (grad,) = torch.autograd.grad(exact, e)
    torch.testing.assert_close(gradient.grad_e, grad, atol=1e-4, rtol=1e-4)


def test_pairs_beside_the_fewest():
    kept = torch.zeros(2, 512, dtype=torch.bool)
    kept[0, :128] = kept[1, 128:256] = True
    assert pairs(kept, None) == 1.0
    mixed = torch.zeros(2, 256, dtype=torch.bool)
    mixed[0, ::2] = mixed[1, 1::2] = True
    assert pairs(mixed, None) == 2.0


def test_rank_curve_of_a_uniform_distribution():
    e, c = torch.zeros(10, 4), torch.randn(1000, 4)
    found = curve(Problem(e, c, torch.zeros(10, dtype=torch.int64)))
    assert found["ranks"][0] == 1
    assert found["ranks"][-1] == 1000
    assert found["mean"] == pytest.approx([1e-3] * len(found["ranks"]))
    assert found["above_cutoff"] == 1000
    assert found["mass_above_cutoff"] == pytest.approx(1.0)
    assert found["cutoff"] == CUTOFF


def test_curves_of_a_tail_are_those_of_its_probabilities():
    problem = make("broad", 384, Shape("tiny", 2048, 64), torch.float32)
    found = study(problem, with_map=True)
    p = problem.logits(problem.e, problem.c).softmax(1).sort(1, descending=True).values.double()
    expected = [float(1 - p[:, :rank].sum(1).mean()) for rank in found["ranks"]]
    assert found["outside"] == pytest.approx(expected, rel=1e-2, abs=1e-6)
    for name in ("text", "content"):
        dropped = found[name]["dropped"]
        assert dropped == sorted(dropped, reverse=True)
        columns = [int(mask, 16).bit_count() for mask in found[name]["masks"]]
        assert sum(columns) / (3 * 2048) == pytest.approx(found[name]["kept"], abs=1e-4)


def test_gradients_of_a_tail_are_exact_and_dropping_nothing_is_no_error():
    problem = make("broad", 256, Shape("tiny", 1024, 64), torch.float32)
    order = orders(problem.e)["content"]
    assert torch.equal(order.sort().values, torch.arange(256))
    e, c = (x.clone().requires_grad_() for x in (problem.e, problem.c))
    loss = torch.nn.functional.cross_entropy(e @ c.T, problem.targets, reduction="sum")
    loss.backward()
    (grad_e, grad_c), found = errors(problem, order, torch.ones(2, 1024, dtype=torch.bool))
    assert torch.allclose(grad_e, e.grad, atol=1e-3)
    assert torch.allclose(grad_c, c.grad, rtol=1e-4, atol=1e-2)
    assert found["error_e"] == found["error_c"] == 0
    assert found["cosines"] == pytest.approx([1, 1, 1])


def test_the_study_of_a_tail_refuses_a_softcap():
    with pytest.raises(ValueError, match=r"softcap must be None, got 30\.0"):
        study(make("broad", 128, Shape("tiny", 512, 32, 30.0), torch.float32), with_map=False)
