"""Quantised heads of HQQ and torchao themselves, which the suite does not install.

``pip install torchao hqq``, then ``pytest tests/heads/with_quantisers.py``. Tests of a package that
is missing are skipped.
"""

import pytest
import torch
from torch import nn

from cut_cross_entropy.heads import head_of
from tests.heads.quantised_layers import D, V, check_layer, check_qlora


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
    "torchao_int8": lambda w: torchao(w, "Int8WeightOnlyConfig"),
    "torchao_float8": lambda w: torchao(w, "Float8WeightOnlyConfig"),
    "hqq_8": lambda w: hqq(w, 8),
    "hqq_4": lambda w: hqq(w, 4),
    "hqq_2": lambda w: hqq(w, 2),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_layer(kind):
    check_layer(QUANTISED[kind])


def test_a_dynamically_quantised_layer_is_left_alone():
    layer = torchao(torch.randn(V, D), "Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(NotImplementedError, match="quantised activations"):
        head_of(layer)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dora", [False, True])
def test_qlora_by_the_patch(dora):
    check_qlora(QUANTISED["torchao_int8"], use_dora=dora)
