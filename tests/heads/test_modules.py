"""Heads read off modules, and rows of quantised weights."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.heads import Head, UnknownHeadError, head_of
from cut_cross_entropy.heads.quantised import ChosenRows, FourBitRows

CODE = torch.tensor(
    [-1.0, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1]
)


def four_bits(packed, absmax, block):
    """Pack codes as the fake package stores them: two a byte, the first in the high half."""
    codes = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], 1).flatten()
    flat = CODE[codes.int()]
    return flat * absmax.repeat_interleave(block)[: flat.numel()]


class QuantState:
    def __init__(self, absmax, shape, dtype, blocksize, quant_type, code):
        self.absmax, self.shape, self.dtype = absmax, shape, dtype
        self.blocksize, self.quant_type, self.code, self.nested = blocksize, quant_type, code, False


class Params4bit(nn.Parameter):
    pass


@pytest.fixture
def bitsandbytes(monkeypatch):
    """The functions of bitsandbytes that are used, for 4 bits without a library."""
    functional = types.ModuleType("bitsandbytes.functional")
    functional.QuantState = QuantState

    def dequantize_4bit(packed, state):
        assert packed.numel() * 2 == state.shape.numel()
        flat = four_bits(packed, state.absmax, state.blocksize)
        return flat.view(state.shape).to(state.dtype)

    functional.dequantize_4bit = dequantize_4bit
    package = types.ModuleType("bitsandbytes")
    package.functional = functional
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)


@pytest.mark.parametrize("dim", [64, 48], ids=["aligned", "blocks_span_rows"])
def test_rows_of_four_bits(dim, bitsandbytes):
    num_classes, block = 300, 64
    packed = torch.randint(0, 256, (num_classes * dim // 2, 1), dtype=torch.uint8)
    absmax = torch.rand(-(-num_classes * dim // block)) + 0.5
    shape = torch.Size((num_classes, dim))
    state = QuantState(absmax, shape, torch.float32, block, "nf4", CODE)
    if dim % block == 0:
        module = nn.Module()
        module.weight = Params4bit(packed, requires_grad=False)
        module.weight.quant_state = state
        module.bias, module.compute_dtype = None, torch.float32
        head = head_of(module)
    else:  # the package itself reads them otherwise on a CPU
        device = torch.device("cpu")
        head = Head(
            FourBitRows(shape, torch.float32, device, data=packed, absmax=absmax, state=state)
        )
    whole = four_bits(packed, absmax, block).view(shape)
    for start, stop in ((0, 300), (0, 1), (1, 2), (128, 256), (299, 300), (7, 130)):
        assert torch.equal(head.weight.rows(start, stop), whole[start:stop]), (start, stop)
    e, targets = torch.randn(9, dim, requires_grad=True), torch.randint(0, 300, (9,))
    loss = linear_cross_entropy(e, head, targets, memory_budget=2**17)
    expected = F.cross_entropy(F.linear(e, whole), targets)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, e)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)


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
    layer = nn.Linear(3, 4)
    layer.weight = type("Int8Params", (nn.Parameter,), {})(torch.zeros(4, 3))
    with pytest.raises(UnknownHeadError, match=r"multiplies embeddings in 8 bits.*int8_rows"):
        head_of(layer)
