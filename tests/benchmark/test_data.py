"""Data of the measurements, and the float32 reference that errors are taken from."""

import json
import lzma
from pathlib import Path

import pytest
import torch

from cut_cross_entropy.benchmark.data import KINDS, Problem, ignore, make, read
from cut_cross_entropy.benchmark.measure import exact_gradients, relative_error
from cut_cross_entropy.benchmark.shapes import SHAPES, Shape

TINY = Shape("tiny", 700, 32, softcap=5.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_data(kind):
    first, again = make(kind, 130, TINY, seed=3), make(kind, 130, TINY, seed=3)
    other = make(kind, 130, TINY, seed=4)
    assert first.e.shape == (130, 32)
    assert first.c.shape == (700, 32)
    assert torch.equal(first.e, again.e)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.e, other.e)
    assert first.softcap == 5.0


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_broad_data_have_the_tail_of_a_real_head(softcap):
    """As of Gemma 3 270M, by share of the vocabulary; structured data are far from it."""
    folder = Path(__file__).parents[2] / "docs/measurements"
    real = json.loads((folder / "tails.json").read_text())["problems"]["gemma"]
    shape = Shape("half", 16384, 1024, softcap)
    outside = {}
    for kind in ("broad", "structured"):
        problem = make(kind, 256, shape, torch.float32)
        p = problem.logits(problem.e, problem.c).softmax(1).sort(1, descending=True).values
        outside[kind] = 1 - p.double().cumsum(1).mean(0)
    for rank, expected in zip(real["ranks"], real["outside"], strict=True):
        at = rank * shape.num_classes // real["classes"] - 1
        if 1000 <= rank <= 20000:
            assert 0.5 < outside["broad"][at] / expected < 3
            assert outside["structured"][at] < 0.7 * outside["broad"][at]


def test_shapes_are_named_after_their_keys():
    assert all(name == shape.name and shape.title for name, shape in SHAPES.items())


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.9])
def test_a_share_of_the_targets_is_ignored(fraction):
    problem = make("flat", 200, TINY)
    ignored = ignore(problem, fraction)
    gone = ignored.targets == -100
    assert int(gone.sum()) == round(200 * fraction)
    assert torch.equal(ignored.targets[~gone], problem.targets[~gone])


@pytest.mark.parametrize("fraction", [1.0, -0.1])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"from 0 to below 1, got"):
        ignore(make("flat", 20, TINY), fraction)


def test_saved_hidden_states_are_read_compressed_or_not(tmp_path):
    saved = {"e": torch.ones(3, 2), "c": torch.ones(5, 2), "t": torch.arange(3, dtype=torch.int32)}
    torch.save(saved, tmp_path / "a.pt")
    with lzma.open(tmp_path / "a.pt.xz", "wb") as file:
        torch.save(saved, file)
    for name in ("a.pt", "a.pt.xz"):
        problem = read(tmp_path / name)
        assert problem.targets.dtype == torch.int64
        assert problem.c.shape == (5, 2)


def test_a_file_without_targets_is_refused(tmp_path):
    torch.save({"e": torch.ones(3, 2)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="lacks c, t"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_exact_gradients_are_those_of_full_logits(softcap):
    made = make("flat", 300, Shape("tiny", 500, 24, softcap), torch.float32)
    problem = ignore(made, 0.3)
    e = problem.e.double().requires_grad_()
    c = problem.c.double().requires_grad_()
    logits = e @ c.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = torch.nn.functional.cross_entropy(logits, problem.targets)
    loss.backward()
    exact = exact_gradients(Problem(problem.e, problem.c, problem.targets, softcap), tokens=128)
    assert exact.loss == pytest.approx(loss.item(), abs=1e-5)
    assert relative_error(exact.grad_e, e.grad.float()) < 1e-5
    assert relative_error(exact.grad_c, c.grad.float()) < 1e-5
    assert exact.rounding_e == 0.0  # float32 is its own rounding
