"""Every refusal: its class, and a message that says what was wrong, what came and what may."""

import math
import re

import pytest
import torch

import cut_cross_entropy
from cut_cross_entropy import (
    LinearCrossEntropy,
    LinearCrossEntropyImpl,
    VocabParallelOptions,
    linear_cross_entropy,
)
from cut_cross_entropy.cce_utils import CCEPresets
from cut_cross_entropy.implementations import full_logits
from cut_cross_entropy.options import ALL_IMPLS, KERNEL_IMPLS
from cut_cross_entropy.utils import compute_z_loss
from cut_cross_entropy.vocab_parallel.utils import partition_n_into_range

FLOATS = "torch.float32, torch.bfloat16, torch.float16, torch.float64"


def call(**changes):
    arguments = {
        "e": torch.zeros(2, 3, 4),
        "c": torch.zeros(5, 4),
        "targets": torch.zeros(2, 3, dtype=torch.long),
    }
    return linear_cross_entropy(**{**arguments, **changes})


def refused(error, message, **changes):
    with pytest.raises(error) as caught:
        call(**changes)
    assert type(caught.value) is error
    assert str(caught.value) == message


TENSORS = {
    "e no tensor": (TypeError, {"e": [1.0]}, "e must be a torch.Tensor, got list"),
    "c no tensor": (TypeError, {"c": None}, "c must be a torch.Tensor, got NoneType"),
    "targets no tensor": (TypeError, {"targets": 3}, "targets must be a torch.Tensor, got int"),
    "bias no tensor": (TypeError, {"bias": 0.5}, "bias must be a torch.Tensor, got float"),
    "bias a bool": (TypeError, {"bias": True}, "bias must be a torch.Tensor, got bool"),
    "e integers": (
        TypeError,
        {"e": torch.zeros(2, 3, 4, dtype=torch.int64)},
        f"the dtype of e must be one of {FLOATS}, got torch.int64",
    ),
    "c complex": (
        TypeError,
        {"c": torch.zeros(5, 4, dtype=torch.complex64)},
        f"the dtype of c must be one of {FLOATS}, got torch.complex64",
    ),
    "bias integers": (
        TypeError,
        {"bias": torch.zeros(5, dtype=torch.int32)},
        f"the dtype of bias must be one of {FLOATS}, got torch.int32",
    ),
    "targets floats": (
        TypeError,
        {"targets": torch.zeros(2, 3)},
        "the dtype of targets must be one of torch.int64, torch.int32, got torch.float32: "
        "probabilities as targets are not supported",
    ),
    "targets bools": (
        TypeError,
        {"targets": torch.zeros(2, 3, dtype=torch.bool)},
        "the dtype of targets must be one of torch.int64, torch.int32, got torch.bool",
    ),
    "e and c differ": (
        TypeError,
        {"e": torch.zeros(2, 3, 4, dtype=torch.float16)},
        "e and c must have the same dtype outside autocast, got torch.float16 and torch.float32",
    ),
    "bias differs": (
        TypeError,
        {"bias": torch.zeros(5, dtype=torch.bfloat16)},
        "bias must have the dtype of c, torch.float32, or torch.float32, got torch.bfloat16",
    ),
    "e a scalar": (ValueError, {"e": torch.zeros(())}, "e must have shape (..., D), got ()"),
    "c a vector": (ValueError, {"c": torch.zeros(4)}, "c must have shape (V, D), got (4,)"),
    "no classes": (
        ValueError,
        {"c": torch.zeros(0, 4)},
        "c must have at least one row and one column, got (0, 4)",
    ),
    "no features": (
        ValueError,
        {"e": torch.zeros(2, 3, 0), "c": torch.zeros(5, 0)},
        "c must have at least one row and one column, got (5, 0)",
    ),
    "c transposed": (
        ValueError,
        {"c": torch.zeros(4, 5)},
        "e and c must agree in their last dimension, got (2, 3, 4) and (4, 5). Is c transposed? It "
        "is (V, D), as the weight of nn.Linear",
    ),
    "other features": (
        ValueError,
        {"c": torch.zeros(5, 6)},
        "e and c must agree in their last dimension, got (2, 3, 4) and (5, 6)",
    ),
    "e and c swapped": (
        ValueError,
        {"e": torch.zeros(9, 4), "c": torch.zeros(6, 4), "targets": torch.zeros(6).long()},
        "targets must have the leading shape of e, (9,), or as many elements, got (6,). Are e and "
        "c swapped? The embeddings come first, then the classifier",
    ),
    "c a layer": (
        TypeError,
        {"c": torch.nn.Linear(4, 5)},
        "c must be a torch.Tensor, got Linear: pass its .weight",
    ),
    "e sparse": (
        TypeError,
        {"e": torch.eye(4)[:3].to_sparse()},
        "e must be a dense tensor, got layout torch.sparse_coo: call to_dense() first",
    ),
    "c sparse": (
        TypeError,
        {"c": torch.eye(4).to_sparse()},
        "c must be a dense tensor, got layout torch.sparse_coo: call to_dense() first",
    ),
    "e nested": (
        TypeError,
        {"e": torch.nested.nested_tensor([torch.ones(2, 4)], layout=torch.jagged)},
        "e must be a dense tensor, got a nested tensor: pass its values() and the targets of the "
        "same tokens",
    ),
    "bias too long": (
        ValueError,
        {"bias": torch.zeros(6)},
        "bias must have shape (V,) = (5,), got (6,)",
    ),
    "bias a matrix": (
        ValueError,
        {"bias": torch.zeros(1, 5)},
        "bias must have shape (V,) = (5,), got (1, 5)",
    ),
    "too few targets": (
        ValueError,
        {"targets": torch.zeros(2, 2, dtype=torch.long)},
        "targets must have the leading shape of e, (2, 3), or as many elements, got (2, 2)",
    ),
    "another shape and a shift": (
        ValueError,
        {"targets": torch.zeros(6, dtype=torch.long), "shift": 1},
        "targets must have the leading shape of e, (2, 3), when shift=1, got (6,)",
    ),
    "shift of a single token": (
        ValueError,
        {"e": torch.zeros(4), "targets": torch.tensor(0), "shift": True},
        "shift must be 0 when targets is a single element, got 1",
    ),
    "another device": (
        ValueError,
        {"c": torch.zeros(5, 4, device="meta")},
        "c must be on the device of e, cpu, got meta",
    ),
}

OPTIONS = {
    "ignore_index float": (
        TypeError,
        {"ignore_index": 1.0},
        "ignore_index must be an int, got float",
    ),
    "ignore_index bool": (
        TypeError,
        {"ignore_index": True},
        "ignore_index must be an int, got bool",
    ),
    "ignore_index too large": (
        ValueError,
        {"ignore_index": 2**31, "targets": torch.zeros(2, 3, dtype=torch.int32)},
        "ignore_index must fit the dtype of targets, torch.int32, got 2147483648",
    ),
    "ignore_index far too large": (
        ValueError,
        {"ignore_index": -(2**63) - 1},
        "ignore_index must fit the dtype of targets, torch.int64, got -9223372036854775809",
    ),
    "ignore_index twice": (
        TypeError,
        {"bias": 3, "ignore_index": 4},
        "bias must be a Tensor or None, got int (3) together with ignore_index=4",
    ),
    "softcap string": (TypeError, {"softcap": "30"}, "softcap must be None or a float, got str"),
    "softcap bool": (TypeError, {"softcap": True}, "softcap must be None or a float, got bool"),
    "reduction None": (TypeError, {"reduction": None}, "reduction must be a string, got NoneType"),
    "reduction unknown": (
        ValueError,
        {"reduction": "avg"},
        "reduction must be one of mean, sum, none, got 'avg'",
    ),
    "reduction misspelt": (
        ValueError,
        {"reduction": "meen"},
        "reduction must be one of mean, sum, none, got 'meen'. Did you mean 'mean'?",
    ),
    "shift float": (TypeError, {"shift": 1.0}, "shift must be a bool or an int, got float"),
    "shift negative": (ValueError, {"shift": -1}, "shift must be >= 0, got -1"),
    "budget float": (
        TypeError,
        {"memory_budget": 1e6},
        "memory_budget must be an int (bytes), got float",
    ),
    "budget bool": (
        TypeError,
        {"memory_budget": True},
        "memory_budget must be an int (bytes), got bool",
    ),
    "budget 0": (
        ValueError,
        {"memory_budget": 0},
        "memory_budget must be at least 1 byte, got 0",
    ),
    "filter_mass word": (
        TypeError,
        {"filter_mass": "2%"},
        "filter_mass must be None or a float from 0 to 1, got str",
    ),
    "filter_mass above 1": (
        ValueError,
        {"filter_mass": 2},
        "filter_mass must be None or a float from 0 to 1, got 2",
    ),
    "filter_eps word": (
        ValueError,
        {"filter_eps": "low"},
        'filter_eps must be None, "auto", "high" or a float from 0 to 1, got \'low\'',
    ),
    "filter_eps negative": (
        ValueError,
        {"filter_eps": -0.5},
        'filter_eps must be None, "auto", "high" or a float from 0 to 1, got -0.5',
    ),
    "filter_eps above 1": (
        ValueError,
        {"filter_eps": 5.0},
        'filter_eps must be None, "auto", "high" or a float from 0 to 1, got 5.0',
    ),
    "filter_eps NaN": (
        ValueError,
        {"filter_eps": math.nan},
        'filter_eps must be None, "auto", "high" or a float from 0 to 1, got nan',
    ),
    "filter_eps bool": (
        TypeError,
        {"filter_eps": True},
        'filter_eps must be None, "auto", "high" or a float from 0 to 1, got bool',
    ),
    "impl number": (
        TypeError,
        {"impl": 1},
        "impl must be a string or a LinearCrossEntropyImpl, got int",
    ),
    "impl unknown": (
        ValueError,
        {"impl": "CCE"},
        f"impl must be one of {', '.join(ALL_IMPLS)}, got 'CCE'. Did you mean 'cce'?",
    ),
    "impl misspelt": (
        ValueError,
        {"impl": "cee"},
        f"impl must be one of {', '.join(ALL_IMPLS)}, got 'cee'. Did you mean 'cce'?",
    ),
    "impl from elsewhere": (
        ValueError,
        {"impl": "liger"},
        f"impl must be one of {', '.join(ALL_IMPLS)}, got 'liger'",
    ),
    "chunk float": (
        TypeError,
        {"c_grad_chunk_size": 128.0},
        "c_grad_chunk_size must be an int, got float",
    ),
    "chunk negative": (
        ValueError,
        {"c_grad_chunk_size": -1},
        "c_grad_chunk_size must be >= 0, got -1",
    ),
    "vocabulary parallel alone": (
        RuntimeError,
        {"vocab_parallel_options": VocabParallelOptions(0, 5)},
        "vocab_parallel_options needs torch.distributed.init_process_group first",
    ),
    "vocabulary parallel type": (
        TypeError,
        {"vocab_parallel_options": (0, 5)},
        "vocab_parallel_options must be None or VocabParallelOptions, got tuple",
    ),
    "data parallel type": (
        TypeError,
        {"data_parallel_options": True},
        "data_parallel_options must be None or DataParallelOptions, got bool",
    ),
}


@pytest.mark.parametrize(("error", "changes", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors(error, changes, message):
    refused(error, message, **changes)


@pytest.mark.parametrize(("error", "changes", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options(error, changes, message):
    refused(error, message, **changes)


FLAGS = (
    "return_lse",
    "accum_e_fp32",
    "accum_c_fp32",
    "filter_e_grad",
    "filter_c_grad",
    "recompute",
)


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_are_bools(flag):
    refused(TypeError, f"{flag} must be True or False, got 'yes'", **{flag: "yes"})
    refused(TypeError, f"{flag} must be True or False, got 1", **{flag: 1})


UNKNOWN = {
    "target": ": the argument is named targets",
    "labels": ": the argument is named targets",
    "weight": ": class weights are named class_weights, and the classifier c",
    "label_smooting": ". Did you mean 'label_smoothing'?",
    "lse_square_scale": ": use return_lse=True and compute_z_loss",
    "reductoin": ". Did you mean 'reduction'?",
    "colour": "",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_keywords(name):
    message = f"got an unexpected keyword argument '{name}'{UNKNOWN[name]}"
    refused(TypeError, f"linear_cross_entropy() {message}", **{name: 0.1})
    with pytest.raises(TypeError, match=re.escape(message)):
        LinearCrossEntropy(**{name: 0.1})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("reduction", "x"),
        ("impl", "cee"),
        ("ignore_index", 1.5),
        ("softcap", -1.0),
        ("shift", -1),
        ("return_lse", "yes"),
        ("filter_eps", 5.0),
        ("accum_e_fp32", 1),
        ("filter_mass", 2),
        ("memory_budget", 0),
        ("c_grad_chunk_size", -1),
        ("vocab_parallel_options", 3),
        ("data_parallel_options", 3),
    ],
)
def test_the_module_checks_its_options_when_made_as_the_function_does(option, value):
    with pytest.raises((TypeError, ValueError)) as of_function:
        call(**{option: value})
    with pytest.raises(type(of_function.value)) as of_module:
        LinearCrossEntropy(**{option: value})
    assert str(of_module.value) == str(of_function.value)


@pytest.mark.parametrize("softcap", [0, 0.0, -1.0, math.inf, math.nan])
def test_softcap_out_of_range(softcap):
    refused(
        ValueError, f"softcap must be None or a finite float > 0, got {softcap!r}", softcap=softcap
    )


@pytest.mark.parametrize("impl", KERNEL_IMPLS)
def test_kernels_are_refused_on_the_cpu_with_what_can_run(impl, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError) as caught:
        call(impl=impl)
    message = str(caught.value)
    assert message.startswith(f"impl='{impl}' cannot run here: ")
    named = re.findall(r"'(\w+)'", message.rsplit("use impl=", 1)[1])
    assert set(named) == {"auto", "chunked", "torch_compile", "reference"}


@pytest.mark.parametrize("function", ["token_logprobs", "linear_divergence"])
def test_other_functions_name_no_implementation_of_losses_alone(function, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    e, c = torch.zeros(2, 4), torch.zeros(5, 4)
    others = (torch.zeros(2, dtype=torch.int64),) if function == "token_logprobs" else (e, c)
    with pytest.raises(RuntimeError, match="use impl='auto', 'chunked' or 'reference'"):
        getattr(cut_cross_entropy, function)(e, c, *others, impl="cce")


def test_refused_calls_compute_nothing():
    """A bad option is found before the tensors are touched: a NaN loss would be too late."""
    e = torch.zeros(2, 3, 4, requires_grad=True)
    with pytest.raises(ValueError, match="reduction"):
        call(e=e, reduction="avg", impl="torch_compile")
    assert e.grad is None


def test_torch_compile_without_a_compiler(monkeypatch):
    monkeypatch.setattr(full_logits.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    refused(
        RuntimeError,
        "impl='torch_compile' cannot run on cpu here: no C++ compiler was found "
        "(looked for g++, clang++, c++, cl). Use impl='chunked', which needs no compiler",
        impl="torch_compile",
    )
    monkeypatch.setenv("CXX", "my-compiler")
    assert (
        full_logits.missing_compiler("cpu") == "no C++ compiler was found (looked for my-compiler)"
    )


def test_torch_compile_on_a_gpu_without_triton(monkeypatch):
    monkeypatch.setattr(full_logits, "has_triton", lambda: False)
    assert full_logits.missing_compiler("cuda") == "Triton cannot be imported"
    assert full_logits.missing_compiler("mps") is None


def test_module_refuses_unknown_options_when_made():
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        LinearCrossEntropy(colour=3)
    with pytest.raises(TypeError, match="positional arguments"):
        LinearCrossEntropy(*range(30))


def test_preset_of_something_else():
    with pytest.raises(ValueError, match=r"impl must be one of \['cce', .*\], got 'chunked'"):
        CCEPresets.build_for_impl("chunked", {})


@pytest.mark.parametrize("member", list(LinearCrossEntropyImpl))
def test_int_value_of_a_member_is_not_a_name(member):
    with pytest.raises(TypeError, match="got int"):
        call(impl=member.value)


def test_z_loss():
    lse = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'avg'"):
        compute_z_loss(lse, reduction="avg")
    with pytest.raises(ValueError, match="shift must be >= 0, got -1"):
        compute_z_loss(lse, torch.zeros(2, 3, dtype=torch.long), shift=-1)
    message = "targets less shift=1 must have as many elements as lse, (2, 3), got (2, 2)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        compute_z_loss(lse, torch.zeros(2, 3, dtype=torch.long), shift=True)
    with pytest.raises(TypeError, match=r"^lse must be a torch.Tensor, got tuple: pass the second"):
        compute_z_loss((lse, lse))
    with pytest.raises(TypeError, match=r"^targets must be a torch.Tensor, got list$"):
        compute_z_loss(lse, [1, 2])


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2)])
def test_range_of_classes(start, stop):
    message = f"start and stop must satisfy 0 <= start <= stop, got {start} and {stop}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        VocabParallelOptions(start, stop)


def test_from_vocab_without_a_process_group():
    with pytest.raises(RuntimeError) as caught:
        VocabParallelOptions.from_vocab(100)
    assert str(caught.value) == (
        "VocabParallelOptions.from_vocab needs torch.distributed.init_process_group first"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 1), "n must be >= 0, got -1"),
        ((5, 2, 2), "rank must be in [0, world_size) = [0, 2), got 2"),
        ((5, -1, 2), "rank must be in [0, world_size) = [0, 2), got -1"),
        ((5, 0, 0), "rank must be in [0, world_size) = [0, 0), got 0"),
    ],
)
def test_partition(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        partition_n_into_range(*arguments)
