"""Heads read off modules."""

import accelerate
import pytest
import torch
from torch import nn

from cut_cross_entropy.heads import UnknownHeadError, head_of
from cut_cross_entropy.heads.quantised import ChosenRows


def test_rows_that_choose_classes():
    rows = ChosenRows((6, 2), torch.float32, torch.device("cpu"), ids=torch.tensor([4, 1]))
    expected = torch.tensor([[0.0, 1], [0, 0], [0, 0], [1, 0]])
    assert torch.equal(rows.rows(1, 5), expected)


def test_a_linear_layer():
    layer = nn.Linear(8, 11)
    head = head_of(layer, logit_scale=0.5, softcap=4.0)
    assert head.weight is layer.weight
    assert head.bias is layer.bias
    assert (head.logit_scale, head.softcap) == (0.5, 4.0)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Rounded(torch.Tensor):
    pass


def test_what_is_not_known():
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got Tensor"):
        head_of(torch.zeros(3, 2))
    with pytest.raises(UnknownHeadError, match=r"not a linear layer \(Doubled\): pass a Head"):
        head_of(Doubled(3, 4))
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 3).as_subclass(Rounded))
    with pytest.raises(UnknownHeadError, match="tensor subclass"):
        head_of(layer)


def test_a_forward_that_stands_in_for_the_layers_own():
    layer = nn.Linear(3, 4)
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    with pytest.raises(UnknownHeadError, match=r"forward was replaced \(Linear\): pass a Head"):
        head_of(layer)
    moved = accelerate.hooks.add_hook_to_module(nn.Linear(3, 4), accelerate.hooks.ModelHook())
    assert "forward" in vars(moved)
    assert head_of(moved).weight is moved.weight
