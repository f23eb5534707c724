"""What drawn classes tell of the tail, interpreted: draws, masses of tokens, tilts, and dE."""

import math
from dataclasses import replace

import pytest
import torch

from cut_cross_entropy.kernels.filtered import backward, tail, tail_sample
from cut_cross_entropy.kernels.filtered.selection import CHUNK
from cut_cross_entropy.kernels.filtered.tail_sample import DRAWS, TailSample
from cut_cross_entropy.kernels.triton.filtered.selection import DROPPED_UNIT
from cut_cross_entropy.kernels.triton.primitives import BYTE_FLOOR, BYTE_STEPS, FLAT, FORCED
from cut_cross_entropy.problem import AdaptedProblem, Problem
from tests.kernels.sampled import sampled, threshold_for
from tests.kernels.test_interpreted_filtered import recorded, sharp
from tests.support import full_logits, run

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison_empty")]

BLOCK, CLASSES = 128, 1500


def log_to_byte(value):
    byte = BYTE_STEPS.value * (value.log2() - BYTE_FLOOR.value)
    return byte.clamp(0, 254).int()


def tail_problem(num_tokens, softcap=None, rank=0, multiplier=None, bias=False):
    """A problem, its tokens, a threshold over its strips, and what that drops, (N, V) float64."""
    tokens, _ = sampled(num_tokens, torch.ones(num_tokens))
    random = torch.Generator().manual_seed(1)
    e, c = 0.6 * tokens.e, torch.randn(CLASSES, 24, generator=random)
    kind, more, logits = Problem, {}, e.double() @ c.double().T
    if rank:
        low_e, low_c = (0.3 * torch.randn(n, rank, generator=random) for n in (num_tokens, CLASSES))
        kind, more = AdaptedProblem, {"low_e": low_e, "low_c": low_c}
        logits += low_e.double() @ low_c.double().T
        tokens = replace(tokens, low_e=low_e)
    biases = -torch.rand(CLASSES, generator=random) if bias else None
    if bias:
        logits += biases.double()
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if multiplier is not None:
        logits *= multiplier.double()[:, None]
    lse = logits.logsumexp(1)
    tokens = replace(tokens, e=e, lse=(lse / math.log(2)).float(), multiplier=multiplier)
    problem = kind(e, c, tokens.targets, biases, -100, softcap, torch.float32, 2**28, **more)
    p = (logits - lse[:, None]).exp()
    blocks = p.split(BLOCK)
    energy = torch.stack([log_to_byte(part.square().sum(0)) for part in blocks])
    energy[torch.arange(num_tokens) // BLOCK, tokens.targets] = FORCED.value
    mass = torch.stack([log_to_byte(part.sum(0)) for part in blocks])
    value = energy.flatten().sort().values[int(0.8 * energy.numel())]
    threshold = threshold_for(
        num_tokens,
        strips=(energy | (mass << 8)).to(torch.int16),
        weights=torch.zeros(len(blocks), dtype=torch.int32),
        value=value[None].int(),
    )
    light = (energy < value).repeat_interleave(BLOCK, 0)[:num_tokens]
    return problem, tokens, threshold, torch.where(light, p, 0.0)


def watch_draws(monkeypatch):
    """Return a list to which each launch adds its drawn classes; the second one draws them."""
    drawn = []
    original = tail_sample.launch

    def watched(kernel, grid, **arguments):
        original(kernel, grid, **arguments)
        drawn.append(arguments.get("classes_ptr"))

    monkeypatch.setattr(tail_sample, "launch", watched)
    return drawn


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 3.0, "bias": True, "rank": 16},
        {"multiplier": torch.linspace(0.5, 1.5, 200), "bias": True},
    ],
    ids=["plain", "softcap-bias-adapter", "temperature-bias"],
)
def test_estimates_are_near_the_truth(options, monkeypatch):
    """Tilts, by all dropped classes; masses, as the classes that were drawn tell them."""
    monkeypatch.setattr(tail_sample, "DRAWS", 256)
    problem, tokens, threshold, dropped = tail_problem(200, **options)
    drawn = watch_draws(monkeypatch)
    sample = TailSample.of(problem, tokens, threshold)
    features = tokens.e.double()
    if tokens.multiplier is not None:
        features = features * tokens.multiplier.double()[:, None]
    for block, (p, rows, mass) in enumerate(
        zip(dropped.split(BLOCK), features.split(BLOCK), sample.mass.split(BLOCK), strict=True)
    ):
        m, w = p.sum(1), p.sum(0)
        values = rows @ problem.c.double().T
        excess = (p * values).sum() - (m @ values @ w) / w.sum()
        spread = (m * rows.square().sum(1)).sum() - (m @ rows).square().sum() / m.sum()
        assert float(excess) > 0
        tilt = float(sample.tilts[block])
        torch.testing.assert_close(tilt, float(excess / spread), rtol=0.25, atol=0)
        classes = drawn[1][block].long()
        expected = (p[:, classes] / w[classes]).mean(1) * w.sum()
        torch.testing.assert_close(mass.double(), expected, rtol=0.1, atol=1e-12)


def test_classes_are_drawn_by_the_mass_that_is_dropped(monkeypatch):
    """A systematic sample: each class as often as expected, but for less than one draw."""
    problem, tokens, threshold, _ = tail_problem(200)
    drawn = watch_draws(monkeypatch)
    TailSample.of(problem, tokens, threshold)
    strips = threshold.strips.int()
    light = (strips & 255) < threshold.value
    byte = (strips >> 8) & 255
    mass = torch.where(light, ((byte + 0.5) / BYTE_STEPS.value + BYTE_FLOOR.value).exp2(), 0.0)
    for block, classes in enumerate(drawn[1].long()):
        assert light[block, classes].all()
        expected = DRAWS * mass[block] / mass[block].sum()
        counts = torch.bincount(classes, minlength=CLASSES)
        assert ((counts - expected).abs() < 1.1).all()
        assert counts.sum() == DRAWS


def test_a_draw_between_two_chunks_is_of_a_class_that_is_dropped(monkeypatch):
    """Chunks of equal masses, so that draws fall where one begins: with a class that is kept."""
    tokens, _ = sampled(1, torch.ones(1))
    energy = torch.full((1, CHUNK), 80)
    energy[0, 0] = FORCED.value
    random = torch.Generator().manual_seed(3)  # sums that round
    mass = torch.randint(120, 220, (1, CHUNK), generator=random)
    strips = (energy | (mass << 8)).to(torch.int16).repeat(1, 2 * DRAWS)
    threshold = threshold_for(1, strips=strips)
    c = torch.zeros(strips.shape[1], tokens.e.shape[1])
    problem = Problem(tokens.e, c, tokens.targets, None, -100, None, torch.float32, 2**28)
    drawn = watch_draws(monkeypatch)
    TailSample.of(problem, tokens, threshold)
    assert (drawn[1] % CHUNK > 0).all()


@pytest.mark.parametrize("octaves", [0, 2])
def test_dropped_mass_is_known_however_much_the_strips_overstate(octaves):
    """They are relative to a lower bound of the log-sum-exp. Its mean is weighted."""
    problem, tokens, threshold, dropped = tail_problem(300)
    more = octaves * int(BYTE_STEPS.value)
    threshold = replace(threshold, strips=threshold.strips + (more << 8))
    weights = torch.linspace(0, 1, 300)
    tokens = replace(tokens, a=weights, b=weights / 2)
    sample = TailSample.of(problem, tokens, threshold)
    expected = dropped.sum(1)
    for found, mass in zip(sample.mass.split(BLOCK), expected.split(BLOCK), strict=True):
        torch.testing.assert_close(float(found.sum()), float(mass.sum()), rtol=0.15, atol=0)
    sample.write_dropped(tokens, threshold)
    mean = float(threshold.statistics[-3]) / DROPPED_UNIT.value
    torch.testing.assert_close(
        mean, float((weights * expected).sum() / weights.sum()), rtol=0.1, atol=0
    )
    sample.write_dropped(replace(tokens, a=0 * weights, b=0 * weights), threshold)
    assert threshold.statistics[-3] == 0


def test_tokens_that_do_not_count_change_nothing():
    """Flat ones, those with NaN, and rows behind the last."""
    problem, tokens, threshold, _ = tail_problem(130)
    few = slice(0, 127)
    e = tokens.e.clone()
    e[127] = torch.nan
    lse = tokens.lse.clone()
    lse[127] = torch.nan
    flat = tokens.target_grad.clone()
    flat[127] = FLAT.value
    found = [
        TailSample.of(problem, one, threshold)
        for one in (
            replace(tokens, e=e, lse=lse),
            replace(tokens, target_grad=flat),
        )
    ]
    for sample in found:
        assert sample.mass[127] == 0
        assert sample.mass[few].isfinite().all()
        assert sample.tilts[0] > 0
    assert torch.equal(found[0].tilts, found[1].tilts)
    assert torch.equal(found[0].mass, found[1].mass)
    assert found[0].tilts[1] >= 0, "two tokens"


def test_nothing_dropped_is_no_tilt():
    problem, tokens, threshold, _ = tail_problem(130)
    all_kept = replace(threshold, value=torch.ones(1, dtype=torch.int32))
    sample = TailSample.of(problem, tokens, all_kept)
    assert torch.equal(sample.tilts, torch.zeros(2))
    assert torch.equal(sample.mass, torch.zeros(130))


@pytest.mark.parametrize("reason", [None, "threshold", "limit"])
@pytest.mark.parametrize("needed", ["e", "c"])
def test_classes_are_drawn_only_for_de_a_threshold_or_a_limit(
    needed, reason, always_filtered, monkeypatch
):
    """Nor is c read for the centres of the tail."""
    if reason == "limit":
        monkeypatch.setattr("cut_cross_entropy.dispatch.MOST_DROPPED", 0.99)
    drawn, summed = watch_draws(monkeypatch), []
    original = tail.sum_rows
    monkeypatch.setattr(tail, "sum_rows", lambda *some: summed.append(1) or original(*some))
    monkeypatch.setattr(backward, "calibrates", lambda *_: reason == "threshold")
    _, (record,) = recorded(sharp(40), needed=(needed,))
    assert record.path == "filtered"
    assert bool(drawn) == (needed == "e" or reason is not None)
    assert bool(summed) == (needed == "e")


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_gradient_of_the_length_is_not_biased(always_filtered, monkeypatch, softcap):
    """``e . dE``, whose error without the tilt has the same sign at every token."""
    monkeypatch.setattr("cut_cross_entropy.dispatch.FILTER_TOLERANCE", 8 * 8e-4)
    problem = sharp(300, seed=1)
    truth = run(full_logits, problem.to(torch.float64), softcap=softcap).grad_e
    original = TailSample.of

    def untilted(*arguments):
        sample = original(*arguments)
        return replace(sample, tilts=torch.zeros_like(sample.tilts))

    def bias():
        results, (record,) = recorded(problem, softcap=softcap)
        assert record.path == "filtered"
        wrong = results.grad_e.double() - truth
        return float((wrong * problem.e.double()).sum()), float(wrong.norm())

    tilted, error = bias()
    monkeypatch.setattr(backward.TailSample, "of", staticmethod(untilted))
    without, error_without = bias()
    assert without < 0
    assert abs(tilted) < 0.35 * abs(without)
    assert error < error_without
