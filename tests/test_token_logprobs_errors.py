"""Refusals of ``token_logprobs``, and of the options that the loss has too, by message."""

import math

import pytest
import torch

from cut_cross_entropy import LinearCrossEntropy, linear_cross_entropy, token_logprobs

NAMES = "lse, entropy, mean_logit, log_sum_sq, rank, max_logit"


def call(**changes):
    arguments = {
        "e": torch.ones(2, 3, 4),
        "head": torch.ones(5, 4),
        "targets": torch.zeros(2, 3, dtype=torch.long),
    }
    return token_logprobs(**{**arguments, **changes})


def ids(*shape, value=0, dtype=torch.long):
    return torch.full(shape, value, dtype=dtype)


BAD = {
    "unknown output": (
        ValueError,
        {"outputs": ("entropie",)},
        f"outputs must be among {NAMES}, got 'entropie'. Did you mean 'entropy'?",
    ),
    "output no name": (ValueError, {"outputs": (3,)}, f"outputs must be among {NAMES}, got 3"),
    "outputs a string": (
        TypeError,
        {"outputs": "entropy"},
        "outputs must be a collection of names, such as a tuple, got 'entropy'",
    ),
    "outputs a number": (
        TypeError,
        {"outputs": 1},
        "outputs must be a collection of names, such as a tuple, got int",
    ),
    "candidates out of range": (
        ValueError,
        {"candidates": ids(2, 3, 4, value=5)},
        "candidates must be class ids in [0, V) with V = 5, or -1 for none, got 5 "
        "(24 out of range)",
    ),
    "support below -1": (
        ValueError,
        {"support": ids(2, 3, 1, value=-2)},
        "support must be class ids in [0, V) with V = 5, or -1 for none, got -2 (6 out of range)",
    ),
    "candidates of fewer tokens": (
        ValueError,
        {"candidates": ids(2, 2, 4)},
        "candidates must have the shape of targets, (2, 3), with a last dimension of K class ids, "
        "-1 for none, got (2, 2, 4)",
    ),
    "candidates without a dimension of their own": (
        ValueError,
        {"candidates": ids(2, 3)},
        "candidates must have the shape of targets, (2, 3), with a last dimension of K class ids, "
        "-1 for none, got (2, 3)",
    ),
    "rows of support that differ in length": (
        TypeError,
        {"support": [[0], [0, 1]]},
        "support must be a torch.Tensor, got list",
    ),
    "candidates floats": (
        TypeError,
        {"candidates": torch.zeros(2, 3, 4)},
        "the dtype of candidates must be one of torch.int64, torch.int32, got torch.float32",
    ),
    "candidates elsewhere": (
        ValueError,
        {"candidates": ids(2, 3, 4).to("meta")},
        "candidates must be on the device of targets, cpu, got meta",
    ),
    "target out of range": (
        ValueError,
        {"targets": ids(2, 3, value=5)},
        "targets must lie in [0, V) with V = 5, or be ignore_index = -100, got 5 (6 out of range)",
    ),
    "top_k a bool": (TypeError, {"top_k": True}, "top_k must be an int, got bool"),
    "top_k below 0": (ValueError, {"top_k": -1}, "top_k must be >= 0, got -1"),
    "top_k above V": (ValueError, {"top_k": 6}, "top_k must be at most V = 5, got 6"),
    "compiled": (
        ValueError,
        {"impl": "torch_compile"},
        "impl='torch_compile' computes losses only: use 'auto', 'chunked' or 'reference'",
    ),
}

SHARED = {
    "temperature 0": (
        ValueError,
        {"temperature": 0.0},
        "temperature must be a finite float > 0, got 0.0",
    ),
    "temperature below 0": (
        ValueError,
        {"temperature": -1},
        "temperature must be a finite float > 0, got -1",
    ),
    "temperature infinite": (
        ValueError,
        {"temperature": math.inf},
        "temperature must be a finite float > 0, got inf",
    ),
    "temperature NaN": (
        ValueError,
        {"temperature": math.nan},
        "temperature must be a finite float > 0, got nan",
    ),
    "temperature a string": (
        TypeError,
        {"temperature": "1"},
        "temperature must be a float or a tensor, got str",
    ),
    "temperatures of another shape": (
        ValueError,
        {"temperature": torch.ones(2)},
        "temperature must broadcast against targets, (2, 3), got shape (2,)",
    ),
    "temperatures with a 0": (
        ValueError,
        {"temperature": torch.tensor([[1.0, 0.0, 2.0]])},
        "temperature must have finite values > 0, got 0.0 to 2.0",
    ),
    "temperatures of ints": (
        TypeError,
        {"temperature": torch.ones(2, 3, dtype=torch.int64)},
        "the dtype of temperature must be a floating point one, got torch.int64",
    ),
    "temperatures elsewhere": (
        ValueError,
        {"temperature": torch.ones(2, 3, device="meta")},
        "temperature must be on the device of targets, cpu, got meta",
    ),
    "temperature with a gradient": (
        ValueError,
        {"temperature": torch.ones(2, 3, requires_grad=True)},
        "temperature has no gradient here: pass temperature.detach()",
    ),
    "logit_scale 0": (
        ValueError,
        {"logit_scale": 0.0},
        "logit_scale must be a finite float other than 0, got 0.0",
    ),
    "logit_scale None": (
        TypeError,
        {"logit_scale": None},
        "logit_scale must be a float, got NoneType",
    ),
}

LOSS = {
    "label_smoothing above 1": (
        ValueError,
        {"label_smoothing": 1.5},
        "label_smoothing must be a float from 0 to 1, got 1.5",
    ),
    "label_smoothing a bool": (
        TypeError,
        {"label_smoothing": True},
        "label_smoothing must be a float, got bool",
    ),
    "class_weights of fewer classes": (
        ValueError,
        {"class_weights": torch.ones(4)},
        "class_weights must have shape (V,) = (5,), got (4,)",
    ),
    "class_weights a list": (
        TypeError,
        {"class_weights": [1.0] * 5},
        "class_weights must be a torch.Tensor, got list",
    ),
    "class_weights ints": (
        TypeError,
        {"class_weights": torch.ones(5, dtype=torch.int64)},
        "the dtype of class_weights must be a floating point one, got torch.int64",
    ),
    "class_weights elsewhere": (
        ValueError,
        {"class_weights": torch.ones(5, device="meta")},
        "class_weights must be on the device of c, cpu, got meta",
    ),
    "class_weights with a gradient": (
        ValueError,
        {"class_weights": torch.ones(5, requires_grad=True)},
        "class_weights have no gradient here: pass class_weights.detach()",
    ),
    "token_weights of another shape": (
        ValueError,
        {"token_weights": torch.ones(3, 2)},
        "token_weights must broadcast against targets, (2, 3), got shape (3, 2)",
    ),
    "token_weights a float": (
        TypeError,
        {"token_weights": 0.5},
        "token_weights must be a torch.Tensor, got float",
    ),
    "items of a sum": (
        ValueError,
        {"num_items_in_batch": 3, "reduction": "sum"},
        "num_items_in_batch is the divisor of reduction='mean', got reduction='sum'",
    ),
    "no items": (
        ValueError,
        {"num_items_in_batch": 0},
        "num_items_in_batch must be > 0, got 0",
    ),
    "items a string": (
        TypeError,
        {"num_items_in_batch": "3"},
        "num_items_in_batch must be None, an int or a tensor, got str",
    ),
    "items a vector": (
        ValueError,
        {"num_items_in_batch": torch.ones(2)},
        "num_items_in_batch must have one element, got shape (2,)",
    ),
}


def refused(function, error, message, **changes):
    with pytest.raises(error) as caught:
        function(**changes)
    assert type(caught.value) is error
    assert str(caught.value) == message


def loss(**changes):
    arguments = (torch.ones(2, 3, 4), torch.ones(5, 4), torch.zeros(2, 3, dtype=torch.long))
    return linear_cross_entropy(*arguments, **changes)


@pytest.mark.parametrize(("error", "changes", "message"), BAD.values(), ids=BAD)
def test_token_logprobs(error, changes, message):
    refused(call, error, message, **changes)


@pytest.mark.parametrize(("error", "changes", "message"), SHARED.values(), ids=SHARED)
def test_both_functions(error, changes, message):
    refused(call, error, message, **changes)
    refused(loss, error, message, **changes)


@pytest.mark.parametrize(("error", "changes", "message"), LOSS.values(), ids=LOSS)
def test_linear_cross_entropy(error, changes, message):
    refused(loss, error, message, **changes)


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.0}, {"logit_scale": 0.0}, {"label_smoothing": 2.0}]
)
def test_module_checks_its_options_at_once(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be"):
        LinearCrossEntropy(**changes)
