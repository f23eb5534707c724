"""The order of tokens by content, which the kernels compute before the forward."""

import pytest
import torch

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.order import order_by_content


def in_order(e, valid=None, rows=None):
    """Return the positions that the kernels compute in; ``valid`` lists the tokens not ignored."""
    rows = e.shape[0] if rows is None else rows
    valid = torch.arange(e.shape[0]) if valid is None else valid
    origin = torch.full((rows,), rows)
    origin[: len(valid)] = valid
    return order_by_content(e, origin, torch.tensor(len(valid), dtype=torch.int32))


@pytest.mark.parametrize(
    ("valid", "rows"), [(1024, 1024), (1000, 1024), (300, 700), (130, 130), (100, 100), (0, 200)]
)
def test_every_valid_token_has_a_place(valid, rows):
    torch.manual_seed(0)
    positions = torch.randperm(rows)[:valid].sort().values
    found = in_order(torch.randn(rows, 24), positions, rows)
    assert torch.equal(found[:valid].sort().values, positions)
    assert (found[valid:] == rows).all()


@pytest.mark.parametrize("tokens", [1024, 1000])
def test_blocks_hold_tokens_of_like_content(tokens):
    """Eight kinds of token at random places: few kinds share a block then."""
    torch.manual_seed(0)
    kinds = torch.randint(8, (tokens,))
    e = torch.randn(tokens, 48) + 3 * torch.randn(8, 48)[kinds]
    blocks = kinds[in_order(e)[: tokens // BLOCK_T * BLOCK_T]].view(-1, BLOCK_T)
    assert sum(len(block.unique()) for block in blocks) / len(blocks) <= 3.5


def test_the_callers_order_stays_where_it_is_better():
    """Sixteen documents of 128 tokens on 16 topics: no halving finds better blocks."""
    torch.manual_seed(0)
    e = torch.randn(2048, 64) + 3 * torch.randn(16, 64).repeat_interleave(BLOCK_T, 0)
    assert torch.equal(in_order(e), torch.arange(2048))


def test_copies_of_a_text_share_blocks():
    """The same 256 tokens four times, as in packed rows that repeat: copies in one block or two."""
    torch.manual_seed(0)
    found = in_order(torch.randn(256, 48).repeat(4, 1))
    assert torch.equal(found.sort().values, torch.arange(1024))
    blocks = (found % 256).view(-1, BLOCK_T)
    assert sum(len(block.unique()) for block in blocks) <= 256 + 8


def test_equal_tokens_keep_their_order():
    assert torch.equal(in_order(torch.ones(1024, 24)), torch.arange(1024))


def test_tokens_that_are_not_finite_have_a_place():
    torch.manual_seed(0)
    e = torch.randn(300, 24)
    e[5], e[7, 3] = torch.nan, torch.inf
    assert torch.equal(in_order(e).sort().values, torch.arange(300))


def test_the_order_is_the_same_again():
    torch.manual_seed(0)
    e = torch.randn(700, 24)
    assert torch.equal(in_order(e), in_order(e))
