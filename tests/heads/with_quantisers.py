"""Quantised heads of the packages themselves, which the suite does not install.

``pip install bitsandbytes torchao hqq``, then ``pytest tests/heads/with_quantisers.py``. Tests of a
package that is missing are skipped.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.heads import Head, head_of
from cut_cross_entropy.heads.quantised import int8_rows
from cut_cross_entropy.transformers import call_count, cce_patch
from tests.transformers.models import assert_same_step, llama, loss_and_grads

V, D = 700, 128
BUDGET = 2**18


def nf4(weight, compress, kind="nf4"):
    bnb = pytest.importorskip("bitsandbytes")
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


def torchao(weight, config):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    quantization.quantize_(model, getattr(quantization, config)())
    return model[0]


def hqq(weight, bits):
    quantize = pytest.importorskip("hqq.core.quantize")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=32)
    return quantize.HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")


QUANTISED = {
    "nf4": lambda w: nf4(w, False),
    "nf4_of_nested_scales": lambda w: nf4(w, True),
    "fp4": lambda w: nf4(w, True, "fp4"),
    "torchao_int8": lambda w: torchao(w, "Int8WeightOnlyConfig"),
    "torchao_float8": lambda w: torchao(w, "Float8WeightOnlyConfig"),
    "hqq_8": lambda w: hqq(w, 8),
    "hqq_4": lambda w: hqq(w, 4),
    "hqq_2": lambda w: hqq(w, 2),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_layer(kind):
    torch.manual_seed(0)
    layer = QUANTISED[kind](torch.randn(V, D))
    e, targets = torch.randn(9, D, requires_grad=True), torch.randint(0, V, (9,))
    head = head_of(layer)
    whole = head.weight.rows(0, V)
    for start, stop in ((0, 1), (1, 2), (128, 256), (V - 1, V), (7, 600)):
        torch.testing.assert_close(head.weight.rows(start, stop), whole[start:stop])
    loss = linear_cross_entropy(e, head, targets, memory_budget=BUDGET)
    expected = F.cross_entropy(layer(e), targets)
    torch.testing.assert_close(loss, expected)
    (ours,), (theirs,) = (torch.autograd.grad(x, e) for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_int8_of_bitsandbytes():
    """The rows are the weight's; the layer rounds its input too, so it is only close."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.randn(V, D)
    layer = bnb.nn.Linear8bitLt(D, V, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    rows = int8_rows(layer)
    assert (rows.rows(100, 300) - weight[100:300]).abs().max() < 4 / 127
    e, targets = torch.randn(9, D), torch.randint(0, V, (9,))
    loss = linear_cross_entropy(e, Head(rows), targets)
    torch.testing.assert_close(loss, F.cross_entropy(layer(e), targets), rtol=1e-2, atol=0)


def test_blocks_that_span_rows_on_a_cpu():
    """There bitsandbytes takes blocks for rows, and multiplies other numbers than were stored."""
    weight = torch.randn(V, 96)
    layer = nf4(weight, False)
    with pytest.raises(NotImplementedError, match="rows of 96 numbers are not whole blocks of 64"):
        head_of(layer)
    (wrong,) = layer(torch.eye(96)).T.sub(weight).abs().max()[None]
    assert wrong > 1, "mended there: this refusal can go"


def test_a_dynamically_quantised_layer_is_left_alone():
    layer = torchao(torch.randn(V, D), "Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(NotImplementedError, match="quantised activations"):
        head_of(layer)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "nf4_of_nested_scales", "torchao_int8"])
def test_qlora_by_the_patch(kind, dora):
    """Loss, and gradients of adapters and magnitude, of a model whose head is quantised."""

    def model():
        base = llama(hidden_size=D, vocab_size=V)
        base.lm_head = QUANTISED[kind](base.lm_head.weight.detach().clone())
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["lm_head"], use_dora=dora, task_type="CAUSAL_LM")
        adapted = get_peft_model(base, copy.deepcopy(config))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return adapted.train()

    expected = loss_and_grads(model())
    patched = cce_patch(model(), memory_budget=BUDGET)
    assert_same_step(expected, loss_and_grads(patched))
    assert call_count(patched) == 1
