"""Bounds of the log-sum-exp by the classes that are targets in the batch, interpreted."""

import dataclasses
import math

import pytest
import torch

from cut_cross_entropy import dispatch, linear_cross_entropy, record_filter
from cut_cross_entropy.kernels import BLOCK_T, step
from cut_cross_entropy.kernels.filtered import backward
from cut_cross_entropy.kernels.likely_classes import bound_by_likely, list_likely, list_size
from cut_cross_entropy.kernels.lse import PassInputs
from cut_cross_entropy.kernels.triton.primitives import BYTE_FLOOR, BYTE_STEPS, FORCED
from cut_cross_entropy.problem import Filter, Problem

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison_empty")]

LIKELY = 40  # classes that are likely for some tokens, with the highest ids


def rare_ids(num_tokens: int, num_classes: int = 3000, seed: int = 0) -> Problem:
    """Tokens sure of a class with a high id, which half of them do not have as their target."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn((num_classes, 32), generator=generator) * 0.3
    first = num_classes - LIKELY
    sure = first + torch.arange(num_tokens) % LIKELY
    e = 12 * c[sure] + torch.randn((num_tokens, 32), generator=generator)
    targets = torch.where(torch.arange(num_tokens) % 3 == 0, 1100 + torch.arange(num_tokens), sure)
    return Problem(e, c, targets, None, -100, None, torch.float32, 2**28)


@pytest.mark.parametrize(
    ("num_tokens", "num_classes", "size"), [(5000, 3000, 1024), (100, 700, 256), (37, 64, 64)]
)
def test_frequent_targets_come_first_and_first_ids_last(num_tokens, num_classes, size):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, num_classes, (num_tokens,), generator=generator)
    few = torch.rand(num_tokens, generator=generator) < 0.3
    targets = torch.where(few, targets // 50, targets)
    targets[::7] = -1
    listed = list_likely(targets, num_classes, size)
    assert listed.unique().numel() == size
    assert listed.min() >= 0
    assert listed.max() < num_classes
    counts = torch.bincount(targets[targets >= 0], minlength=num_classes)
    level = counts.clamp(max=8).float().log2().floor()  # 8 targets or more, 4, 2, 1, none: -inf
    is_listed = torch.zeros(num_classes, dtype=torch.bool)
    is_listed[listed] = True
    if not is_listed.all():
        assert level[~is_listed].max() <= level[is_listed].min()
    added = listed[counts[listed] == 0]
    assert torch.equal(added, (counts == 0).nonzero()[: len(added), 0])


def test_energies_do_not_depend_on_the_order_of_the_ids():
    """Those of tokens that are sure of other tokens' targets are not overstated."""
    problem = rare_ids(2 * BLOCK_T)
    state = step.forward(problem, Filter(1e-4), training=True)
    energy = state.strips.int() & 255
    p = (problem.e.double() @ problem.c.double().T).softmax(1)[state.origin]
    exact = p.square().view(2, BLOCK_T, -1).sum(1)
    wanted = (BYTE_STEPS.value * (exact.log2() - BYTE_FLOOR.value)).clamp(0, 254).floor().int()
    off = (energy - wanted)[energy != FORCED.value]
    assert off.min() >= -1, "never understated, but for rounding"
    assert off.max() <= 2
    # The first ids alone leave two thirds of the tokens' bounds loose by several octaves.
    first = problem.e.double() @ problem.c[:1024].double().T
    own = (problem.e.double() * problem.c[problem.targets].double()).sum(1)
    lse = (problem.e.double() @ problem.c.double().T).logsumexp(1)
    slack = (lse - torch.maximum(first.logsumexp(1), own)) / math.log(2)
    assert (slack > 4).double().mean() > 0.3


def test_strips_have_no_part_of_flat_tokens():
    """Their masses would hide those that the other tokens of the block give rare classes."""
    problem = rare_ids(2 * BLOCK_T)
    flat = torch.arange(2 * BLOCK_T) % 16 == 5
    problem.e[flat] *= 0.02
    state = step.forward(problem, Filter(1e-4), training=True)
    is_flat = flat[state.origin]
    groups = math.log2(backward.FLAT_SUPPORT)
    assert (state.support[is_flat] > groups).all()
    assert (state.support[~is_flat] < groups).all()
    energy, mass = state.strips.int() & 255, (state.strips.int() >> 8) & 255
    p = (problem.e.double() @ problem.c.double().T).softmax(1)[state.origin]
    p[is_flat] = 0
    for found, power in ((energy, 2), (mass, 1)):
        exact = p.pow(power).view(2, BLOCK_T, -1).sum(1)
        wanted = (BYTE_STEPS.value * (exact.log2() - BYTE_FLOOR.value)).clamp(0, 254).floor()
        off = (found - wanted)[energy != FORCED.value]
        assert off.min() >= -1
        assert off.max() <= 2


def test_classes_of_a_shard_set_no_token_apart():
    """All are sure of classes of another shard, whose background here is flat."""
    problem = rare_ids(BLOCK_T)
    c = problem.c * torch.where(torch.arange(3000) < 2000, 0.1, 1)[:, None]
    lse = (problem.e.double() @ c.double().T).logsumexp(1) / math.log(2)
    shard = dataclasses.replace(problem, c=c[:2000], group="shards")
    flags = torch.zeros(1, dtype=torch.int32)
    inputs = PassInputs(
        shard.e, shard.c, bias=None, softcap=None, bound=torch.zeros(BLOCK_T), flags=flags
    )
    bound = torch.empty(BLOCK_T)
    bound_by_likely(inputs, shard, torch.where(shard.targets < 2000, shard.targets, -1), bound)
    assert (bound > 0).all()
    assert (bound < lse + 0.01).all()


def test_a_block_of_flat_tokens_alone():
    problem = rare_ids(3 * BLOCK_T)
    problem.e[: BLOCK_T + 40] *= 0.02
    found, exact = (
        torch.autograd.grad(linear_cross_entropy(e, c, problem.targets, impl=impl), (e, c))
        for impl in ("cce", "cce_exact")
        for e, c in [(problem.e.clone().requires_grad_(), problem.c.clone().requires_grad_())]
    )
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours - theirs).norm() < 5e-3 * theirs.norm()


def test_listed_rows_are_within_the_budget():
    problem = rare_ids(BLOCK_T)
    assert list_size(problem) == 1024
    small = dataclasses.replace(problem, memory_budget=8 * 512 * 32 * 4)
    assert list_size(small) == 512
    none = dataclasses.replace(problem, memory_budget=1)
    assert list_size(none) == 0
    found = [step.forward(x, Filter(1e-4), training=True).nll for x in (problem, none)]
    assert torch.equal(*found)


def test_the_loss_of_a_token_does_not_depend_on_other_targets():
    problem = rare_ids(2 * BLOCK_T)
    losses = []
    for others in (problem.targets[BLOCK_T:], torch.arange(5, BLOCK_T + 5)):
        e = problem.e.clone().requires_grad_()
        targets = torch.cat([problem.targets[:BLOCK_T], others])
        loss = linear_cross_entropy(e, problem.c, targets, reduction="none", impl="cce")
        losses.append(loss.detach()[:BLOCK_T])
    assert torch.equal(*losses)


@pytest.mark.parametrize("exact", ["filter_e_grad", "filter_c_grad"])
def test_energies_of_stored_powers_are_those_of_probabilities(exact, always_filtered, monkeypatch):
    """As many strips are kept whichever ids the likely classes have."""
    monkeypatch.setattr(dispatch, "FEW_PRODUCTS_BY_HALF", 0.0)
    monkeypatch.setattr(dispatch, "FILTER_TOLERANCE", 1e-2)
    problem, kept = rare_ids(2 * BLOCK_T), []
    for c, targets in (
        (problem.c, problem.targets),
        (problem.c.flip(0), len(problem.c) - 1 - problem.targets),
    ):
        e = problem.e.clone().requires_grad_()
        with record_filter() as records:
            loss = linear_cross_entropy(
                e, c.clone().requires_grad_(), targets, impl="cce", **{exact: False}
            )
            loss.backward()
        assert records[0].path == "filtered"
        kept.append(records[0].strips_kept)
    assert kept[0] == pytest.approx(kept[1], rel=0.02)
