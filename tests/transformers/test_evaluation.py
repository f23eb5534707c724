"""Logits in evaluation: there when they are read, and free when they are not."""

import copy
import pickle

import numpy as np
import pytest
import torch
import transformers

from cut_cross_entropy.lazy.logits import LazyLogits
from cut_cross_entropy.transformers import cce_patch
from tests.support import is_computed
from tests.transformers.models import SIZES, VOCAB, batch, llama


@pytest.fixture
def pair():
    """The logits of a model and those of its patched self, not read yet."""
    model = llama().eval()
    with torch.no_grad():
        expected = model(**batch())
        cce_patch(model)
        output = model(**batch())
    torch.testing.assert_close(output.loss, expected.loss)
    assert isinstance(output.logits, LazyLogits)
    assert not is_computed(output.logits)
    return expected.logits, output.logits


def test_nothing_is_computed_for_questions_about_the_tensor(pair):
    real, logits = pair
    assert logits.shape == real.shape
    assert (logits.dtype, logits.device, logits.ndim) == (real.dtype, real.device, real.ndim)
    assert (logits.size(-1), logits.dim(), logits.numel()) == (VOCAB, 3, real.numel())
    assert len(logits) == len(real)
    assert isinstance(logits, torch.Tensor)
    assert torch.is_tensor(logits)
    assert not logits.requires_grad
    assert logits.is_floating_point()
    assert not is_computed(logits)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.float(),
        lambda x: x.detach(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", torch.float64),
        lambda x: x.detach().clone().bfloat16(),
        lambda x: x.contiguous(),
    ],
    ids=["float", "detach", "cpu", "to", "chain", "contiguous"],
)
def test_handing_them_on_stays_deferred(pair, operation):
    real, logits = pair
    later = operation(logits)
    assert isinstance(later, LazyLogits)
    assert not is_computed(later)
    assert later.dtype == operation(real).dtype
    torch.testing.assert_close(later + 0, operation(real))
    assert is_computed(later)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.argmax(-1),
        lambda x: x[:, -1],
        lambda x: torch.softmax(x, -1),
        lambda x: torch.cat([x, x]),
        lambda x: x.mean().item(),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: x.tolist(),
        lambda x: x.view(-1, VOCAB),
        lambda x: copy.deepcopy(x),
        lambda x: pickle.loads(pickle.dumps(x)),
        lambda x: torch.nn.functional.cross_entropy(x.flatten(0, 1), batch()["labels"].flatten()),
        lambda x: repr(x),
        lambda x: [*x][1],
        lambda x: x.data_ptr() != 0,
    ],
)
def test_reading_them_gives_the_logits(pair, operation):
    real, logits = pair
    actual, expected = operation(logits), operation(real)
    assert is_computed(logits)
    if isinstance(expected, (str, bool, float, list)):
        assert actual == expected
    else:
        np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-5, atol=1e-6)


def test_they_are_computed_once(pair):
    _, logits = pair
    assert logits.materialise() is logits.materialise()


def test_they_are_computed_as_in_the_forward():
    model = cce_patch(llama().eval())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(**batch()).logits
        expected = model(batch()["input_ids"]).logits
    assert logits.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(logits + 0, expected)
    assert not (logits + 0).requires_grad


def test_they_have_a_gradient_when_the_forward_had():
    model = llama().eval()
    expected = torch.autograd.grad(
        model(**batch()).logits.logsumexp(-1).sum(), model.lm_head.weight
    )
    logits = cce_patch(model)(**batch()).logits
    assert logits.requires_grad
    with torch.no_grad():
        logits.materialise()
    actual = torch.autograd.grad(logits.logsumexp(-1).sum(), model.lm_head.weight)
    torch.testing.assert_close(actual, expected)


def test_an_autograd_function_has_their_gradient():
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square().sum()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return 2 * grad * x

    model = llama().eval()
    expected = torch.autograd.grad(Sum.apply(model(**batch()).logits), model.lm_head.weight)
    logits = cce_patch(model)(**batch()).logits
    actual = torch.autograd.grad(Sum.apply(logits), model.lm_head.weight)
    torch.testing.assert_close(actual, expected)


def test_reading_them_after_a_step_is_an_error():
    model = cce_patch(llama().eval())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output = model(**batch())
    output.loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) does that"):
        output.logits.argmax(-1)


def test_inference_mode():
    model = cce_patch(llama().eval())
    with torch.inference_mode():
        output = model(**batch())
        expected = model(batch()["input_ids"]).logits
    assert torch.equal(output.logits.clone() + 0, expected)


@pytest.mark.parametrize("config_name", ["Gemma2Config", "CohereConfig", "GraniteConfig"])
def test_scaled_and_capped_logits_are_bit_for_bit_the_same(config_name):
    changes = {"final_logit_softcapping": 3.0, "logit_scale": 0.37, "logits_scaling": 5.0}
    config = getattr(transformers, config_name)(**SIZES | changes)
    torch.manual_seed(0)
    model = cce_patch(transformers.AutoModelForCausalLM.from_config(config).eval())
    with torch.no_grad():
        logits = model(**batch()).logits
        assert torch.equal(logits + 0, model(batch()["input_ids"]).logits)


def test_the_layout_of_the_output_in_training():
    model = cce_patch(llama())
    output = model(**batch(), use_cache=True)
    assert output.logits is None
    assert "logits" not in output
    assert list(output) == ["loss", "past_key_values"]
    assert output.to_tuple()[1] is output.past_key_values
    as_tuple = model(**batch(), use_cache=True, return_dict=False)
    assert as_tuple[1] is None
    assert len(as_tuple) == 3
    torch.testing.assert_close(as_tuple[0], output.loss)


def test_the_layout_of_the_output_in_evaluation():
    model = cce_patch(llama().eval())
    output = model(**batch(), use_cache=True)
    assert list(output) == ["loss", "logits", "past_key_values"]
    assert output[1] is output.logits
    as_tuple = model(**batch(), use_cache=True, return_dict=False)
    assert isinstance(as_tuple[1], LazyLogits)
