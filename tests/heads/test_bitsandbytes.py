"""Heads that bitsandbytes quantised: rows, losses and QLoRA, by its own kernels for CPUs."""

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes import functional
from torch import nn

from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.heads import Head, head_of
from cut_cross_entropy.heads.quantised import FourBitRows, int8_rows
from tests.heads.quantised_layers import BUDGET, D, V, check_layer, check_qlora
from tests.largest import Largest

BLOCK = 64


def four_bits(weight, compress, kind="nf4"):
    layer = bnb.nn.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        compute_dtype=torch.float32,
        compress_statistics=compress,
        quant_type=kind,
    )
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type=kind, compress_statistics=compress
    )
    return layer.to("cpu")


KINDS = {
    "nf4": lambda w: four_bits(w, False),
    "nf4_of_nested_scales": lambda w: four_bits(w, True),
    "fp4": lambda w: four_bits(w, True, "fp4"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer(kind):
    check_layer(KINDS[kind])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "lora_dropout": 0.5},
        {"use_dora": True, "lora_dropout": 0.5},
        {"second": True},
    ],
    ids=", ".join,
)
@pytest.mark.parametrize("kind", ["nf4", "nf4_of_nested_scales"])
def test_qlora_by_the_patch(kind, options):
    check_qlora(KINDS[kind], **options)


def int8_layer(weight):
    layer = bnb.nn.Linear8bitLt(D, V, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


def test_int8():
    """The rows are the weight's; the layer rounds its input too, so it is only close."""
    torch.manual_seed(0)
    weight = torch.randn(V, D)
    layer = int8_layer(weight)
    rows = int8_rows(layer)
    assert (rows.rows(100, 300) - weight[100:300]).abs().max() < 4 / 127
    e, targets = torch.randn(9, D), torch.randint(0, V, (9,))
    loss = linear_cross_entropy(e, Head(rows), targets)
    torch.testing.assert_close(loss, F.cross_entropy(layer(e), targets), rtol=1e-2, atol=0)


def test_int8_in_the_dtype_of_the_embeddings():
    layer = int8_layer(torch.randn(V, D))
    rows = int8_rows(layer, torch.bfloat16)
    with Largest() as largest:
        made = rows.rows(0, V)
    assert rows.dtype == made.dtype == torch.bfloat16
    assert largest.bytes == V * D * 2, "no copy in float32 on the way"
    assert torch.equal(made, int8_rows(layer).rows(0, V).to(torch.bfloat16))
    e, targets = torch.randn(9, D, dtype=torch.bfloat16), torch.randint(0, V, (9,))
    loss = linear_cross_entropy(e, Head(rows), targets, impl="chunked")
    exact = F.cross_entropy(F.linear(e.float(), int8_rows(layer).rows(0, V)), targets)
    torch.testing.assert_close(loss, exact, rtol=2e-3, atol=0)


def test_blocks_that_span_rows():
    """Rows are sliced right; on a CPU the layer takes blocks for rows, so it is refused."""
    torch.manual_seed(0)
    weight = torch.randn(V, 96)
    layer = four_bits(weight.clone(), False)
    with pytest.raises(NotImplementedError, match="rows of 96 numbers are not whole blocks of 64"):
        head_of(layer)
    (wrong,) = layer(torch.eye(96)).T.sub(weight).abs().max()[None]
    assert wrong > 1, "mended there: this refusal can go"
    packed, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    rows = FourBitRows(
        (V, 96), torch.float32, weight.device, data=packed, absmax=state.absmax, state=state
    )
    whole = rows.rows(0, V)
    assert (whole - weight).abs().max() < 0.2 * weight.abs().max()
    for start, stop in ((0, 1), (1, 2), (128, 256), (V - 1, V), (7, 130)):
        assert torch.equal(rows.rows(start, stop), whole[start:stop]), (start, stop)
    e, targets = torch.randn(9, 96), torch.randint(0, V, (9,))
    loss = linear_cross_entropy(e, Head(rows), targets, memory_budget=BUDGET)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(e, whole), targets))


def test_a_layer_that_is_not_quantised_yet():
    layer = bnb.nn.Linear4bit(D, V)
    with pytest.raises(NotImplementedError, match="not quantised yet: move it to its device"):
        head_of(layer)


def test_int8_is_refused_by_name():
    layer = nn.Module()
    layer.weight = bnb.nn.Int8Params(torch.zeros(4, 3), requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"multiplies embeddings in 8 bits.*int8_rows"):
        head_of(layer)
