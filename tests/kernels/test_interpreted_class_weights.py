"""Rows of dC of rare classes, interpreted: they have their own weights of the tokens."""

import math
from dataclasses import replace

import pytest
import torch

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.filtered import class_weights, selection
from cut_cross_entropy.kernels.filtered.class_weights import ClassWeights
from cut_cross_entropy.kernels.triton.filtered.selection import GROUPS, LEAST
from cut_cross_entropy.kernels.triton.primitives import FLAT
from cut_cross_entropy.problem import AdaptedProblem, Filter
from cut_cross_entropy.problem import Problem as Call
from tests.kernels.sampled import sampled
from tests.kernels.test_interpreted_filtered import recorded
from tests.support import Problem, full_logits, run

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison_empty")]

CLASSES, LIKELY, FREQUENT = 700, 40, 350


def two_kinds(tokens=128, dtype=torch.float32):
    """Tokens that are sure of a class; a third of them leave little, and that to rare classes."""
    random = torch.Generator().manual_seed(0)
    c = 0.3 * torch.randn(CLASSES, 32, generator=random)
    c[LIKELY:, 2:] *= 0.2
    c[:, :2] = 0
    c[:FREQUENT, 0] = c[FREQUENT:, 1] = 1
    bias = torch.full((CLASSES,), -5.0)
    bias[:LIKELY], bias[FREQUENT:] = 0, -9
    likely = torch.randint(0, LIKELY, (tokens,), generator=random)
    e = 3 * c[likely]
    to_rare = torch.arange(tokens) % 3 == 0
    e[:, 0], e[:, 1] = torch.where(to_rare, 0, 3), torch.where(to_rare, 4, 0)
    return Problem(e, c, likely, bias).to(dtype)


def median_cosine(problem, **options):
    """Return that of the rows of rare classes with the exact ones."""
    results, (record,) = recorded(problem, filter_eps=0.05, **options)
    assert record.path == "filtered"
    exact = run(full_logits, problem.to(torch.float64), **options).grad_c[FREQUENT:]
    rows = results.grad_c[FREQUENT:].double()
    return torch.cosine_similarity(rows, exact, eps=1e-30).median()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"softcap": 30.0, "lse_weight": 0.1}),
        (torch.float16, {"reduction": "sum"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("superblocks", [False, True], ids=["one", "several"])
def test_rare_classes_have_their_own_direction(
    dtype, options, superblocks, always_filtered, monkeypatch, request
):
    """By the weights of the tail it would be that of the tokens that leave most."""
    if superblocks:
        request.getfixturevalue("several_superblocks")
    monkeypatch.setattr(class_weights, "MIN_WORK", 0)
    problem = two_kinds(150 if superblocks else 128, dtype)
    own = median_cosine(problem, **options)
    monkeypatch.setattr(class_weights, "MIN_WORK", math.inf)
    shared = median_cosine(problem, **options)
    assert own > 0.97
    assert shared < own - 0.05


@pytest.mark.parametrize(
    ("dtype", "softcap", "rank"),
    [(torch.float32, None, 0), (torch.float32, 20.0, 16), (torch.float16, None, 0)],
)
def test_weights_are_sums_over_dropped_strips(dtype, softcap, rank, monkeypatch):
    """Of sampled classes, by group; flat tokens have none. Several buffers of tokens."""
    monkeypatch.setattr(class_weights, "MAX_TOKENS", BLOCK_T)
    random = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=random)
    below = lambda first, stop: torch.randint(first, stop, (2, CLASSES), generator=random)
    tokens, _ = sampled(200, torch.rand(200, generator=random))
    target_grad = tokens.target_grad.clone()
    target_grad[50:60] = FLAT.value
    tokens = replace(
        tokens, e=tokens.e.to(dtype), target_grad=target_grad, scale=torch.tensor(16.0)
    )
    c, bias = normal(CLASSES, 24).to(dtype), normal(CLASSES).to(dtype)
    low_e, low_c = normal(200, rank).to(dtype), normal(CLASSES, rank).to(dtype)
    kind, adapter = Call, {}
    if rank:
        tokens, kind = replace(tokens, low_e=low_e), AdaptedProblem
        adapter = {"low_e": low_e, "low_c": low_c}
    problem = kind(tokens.e, c, tokens.targets, bias, -100, softcap, dtype, 2**28, **adapter)
    mass = below(1, 250)
    mass[:, ::20] = 1  # of least mass
    strips = (below(60, 200) | (mass << 8)).to(torch.int16)
    kept = selection.keep_strips(selection.find_threshold(strips, tokens, Filter(0.05)))
    found = ClassWeights.of(problem, tokens, kept)

    logits = tokens.e.double() @ c.double().T + low_e.double() @ low_c.double().T + bias.double()
    slope = torch.ones_like(logits)
    if softcap is not None:
        slope = 1 - (logits / softcap).tanh().square()
        logits = softcap * (logits / softcap).tanh()
    grads = (logits - 12 * math.log(2)).exp() * tokens.a[:, None].double() * slope
    grads[50:60] = 0
    dropped = torch.stack([(kept.masks[0] >> block) & 1 == 0 for block in range(2)])
    assert 0.1 < dropped.double().mean() < 0.9
    values = torch.where(dropped, ((mass + 0.5) / 4 - 55).exp2(), 0.0).double()
    of_sample = torch.zeros(CLASSES, dtype=torch.bool)
    of_sample[selection.sampled_classes(CLASSES)] = True
    least = kept.mean_mass - LEAST.value * kept.mass_deviation
    group = (kept.class_mass >= least).int() + (kept.class_mass >= kept.mean_mass)
    assert found.weights.shape[0] == GROUPS.value - 1
    assert not found.masses[-1].any()
    for i, weights in enumerate(found.weights):
        chosen = of_sample & (group == i)
        assert chosen.sum() > 5
        expected = (grads * (dropped & chosen).repeat_interleave(BLOCK_T, 0)[:200]).sum(1)
        error = (weights.double() - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-3)
        torch.testing.assert_close(
            found.masses[i, :2].double(), (values * chosen).sum(1), rtol=0.01, atol=0
        )


def test_groups_are_sorted_apart():
    """In every order of the classes, those that keep no strip behind the others."""
    random = torch.Generator().manual_seed(0)
    energy = torch.randint(0, 180, (3, 2000), generator=random)
    mass = torch.randint(60, 250, (3, 2000), generator=random)
    mass[:, ::30] = 1
    tokens, _ = sampled(3 * BLOCK_T, torch.ones(3 * BLOCK_T))
    strips = (energy | (mass << 8)).to(torch.int16)
    kept = selection.keep_strips(selection.find_threshold(strips, tokens, Filter(0.01)))
    least = kept.mean_mass - LEAST.value * kept.mass_deviation
    rank = 2 - ((kept.class_mass >= least).int() + (kept.class_mass >= kept.mean_mass).int())
    assert rank.unique().tolist() == [0, 1, 2]
    order = kept.order(100, 1900)[0]
    assert torch.equal(order.sort().values, torch.arange(100, 1900))
    sorted_by = torch.where(kept.masks[0] == 0, 3, 0) + rank
    assert len(sorted_by.unique()) == 6
    assert (sorted_by[order].diff() >= 0).all()
    listed = kept.by_group(100, 1900)
    assert (rank[listed].diff() >= 0).all()
    assert all((listed[rank[listed] == i].diff() > 0).all() for i in range(3))
