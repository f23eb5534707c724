"""The strips that the filter keeps: thresholds, upstream gradients, and rows of rare classes."""

from types import SimpleNamespace

import pytest
import torch

from cut_cross_entropy.kernels import BLOCK_T, SUPERBLOCK
from cut_cross_entropy.kernels.filtered import selection
from cut_cross_entropy.kernels.triton.primitives import FORCED
from cut_cross_entropy.problem import Filter

BLOCKS, CLASSES = 4, 1500


def strips_of(energy, mass):
    """Return the int16 of strips from their bytes."""
    return (energy | (mass << 8)).to(torch.int16)


def kept(strips, upstream, tolerance=0.005):
    """Return which strips are kept, (blocks, V), for gradients of the loss of each token (N,)."""
    tokens = SimpleNamespace(a=upstream, b=upstream, eta=None, target_grad=upstream.abs())
    threshold = selection.find_threshold(strips, tokens, Filter(tolerance))
    masks = selection.keep_strips(threshold).masks
    blocks = range(strips.shape[0])
    return torch.stack([((masks[b // SUPERBLOCK] >> b % SUPERBLOCK) & 1).bool() for b in blocks])


@pytest.fixture
def strips():
    """Energies from 2^-35 to 2^-10, with one target in each block."""
    generator = torch.Generator().manual_seed(0)
    energy = torch.randint(80, 180, (BLOCKS, CLASSES), generator=generator)
    energy[:, 7] = FORCED.value
    return strips_of(energy, energy // 2 + 118)  # masses of four times the root of the energy


def test_strips_over_a_threshold_are_kept_and_those_of_targets(strips, monkeypatch):
    monkeypatch.setattr(selection, "ROW_STRIPS", 0.0)
    found = kept(strips, torch.ones(BLOCKS * BLOCK_T))
    energy = strips & 255
    assert found[:, 7].all()
    assert 0.01 < found.float().mean() < 0.9
    assert energy[found].min() > energy[~found].max()
    # The tolerance holds: energies against the squared gradients at the targets.
    dropped = (((energy[~found] + 1) / 4.0 - 55).exp2()).sum()
    assert dropped <= 0.005**2 * BLOCKS * BLOCK_T * 2 ** (1 / 8)


def test_a_common_factor_of_the_gradients_changes_nothing(strips):
    upstream = torch.rand(BLOCKS * BLOCK_T)
    assert torch.equal(kept(strips, upstream), kept(strips, upstream * 2.0**-20))


def test_blocks_without_a_gradient_keep_nothing(strips):
    upstream = torch.ones(BLOCKS * BLOCK_T)
    upstream[BLOCK_T : 2 * BLOCK_T] = 0
    found = kept(strips, upstream)
    assert not found[1].any()
    assert found[0].any()


def test_blocks_of_small_gradients_keep_less(strips, monkeypatch):
    """A weight of 1/4 is four octaves of energy, 16 steps of the byte."""
    monkeypatch.setattr(selection, "ROW_STRIPS", 0.0)
    upstream = torch.ones(BLOCKS * BLOCK_T)
    upstream[:BLOCK_T] = 1 / 4
    found, energy = kept(strips, upstream, 0.001), strips & 255
    bounds = [energy[block][found[block] & (energy[block] != 255)].min() for block in (0, 1)]
    assert abs(int(bounds[0] - bounds[1]) - 16) <= 1


def test_one_token_counts_for_its_block(strips):
    """The largest gradient of a block is its weight, so that no token's energy is understated."""
    upstream = torch.full((BLOCKS * BLOCK_T,), 2.0**-10)
    upstream[::BLOCK_T] = 1.0
    assert kept(strips, upstream).sum() >= kept(strips, torch.ones(BLOCKS * BLOCK_T)).sum()


def test_gradients_that_are_not_finite_keep_everything(strips):
    upstream = torch.ones(BLOCKS * BLOCK_T)
    upstream[3] = torch.nan
    assert kept(strips, upstream).float().mean() > 0.99


def test_strips_that_decide_a_rare_class_are_kept(strips, monkeypatch):
    """Those with the largest share of their class's mass, and at most as many as allowed."""
    energy, mass = strips & 255, (strips >> 8) & 255
    rare = slice(200, 210)
    energy[:, rare], mass[:, rare] = 20, 1  # 2^-50 each
    energy[2, rare], mass[2, rare] = 84, 151  # the root of 2^-34, and as much mass
    upstream = torch.ones(BLOCKS * BLOCK_T)
    changed = strips_of(energy, mass)
    found = kept(changed, upstream)
    monkeypatch.setattr(selection, "ROW_STRIPS", 0.0)
    without = kept(changed, upstream)
    assert not without[2, rare].any()
    assert found[2, rare].all()
    assert without.sum() <= found.sum() <= 1.08 * without.sum()


@pytest.mark.parametrize("blocks", [64, 512])
def test_shares_are_smaller_in_more_blocks(blocks):
    """A thirty-second of a class's mass is twice an even part of 64 blocks, and 16 times of 512."""
    generator = torch.Generator().manual_seed(0)
    energy = torch.randint(80, 180, (blocks, CLASSES), generator=generator)
    energy[:, 7] = FORCED.value
    mass = energy // 2 + 118
    rare = slice(200, 210)
    energy[:, rare], mass[:, rare] = 20, 1  # 2^-50 each
    few = slice(0, blocks, blocks // 32)
    energy[few, rare], mass[few, rare] = 84, 151  # a share of 1 / 32
    found = kept(strips_of(energy, mass), torch.ones(blocks * BLOCK_T))
    assert found[few, rare].all() if blocks == 512 else not found[few, rare].any()
    assert not found[1::2, rare].any()
