"""Functions of Apple's releases beyond the contract, against plain PyTorch."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from cut_cross_entropy import cce, linear_cross_entropy
from cut_cross_entropy.utils import (
    TensorInfo,
    _build_flat_valids,
    _handle_eps,
    handle_reduction_none,
    recommend_c_grad_chunk_size,
    to_full_tensor,
)
from tests.support import full_logits, make_problem


def test_a_package_has_its_modules_as_attributes():
    program = (
        "import cut_cross_entropy.vocab_parallel as vp; "
        "print(vp.utils.partition_n_into_range(10, 1, 3), vp.VocabParallelOptions.__name__)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout == "(4, 7) VocabParallelOptions\n", found.stderr


@pytest.mark.parametrize("shift", [0, 1, 2, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_apply_with_flat_tokens(shift, reduction):
    """The call that ``cce_linear_cross_entropy`` makes in these releases, and that of 25.1."""
    problem = make_problem((3, 5), classes=40, bias=True)
    e, c, targets, bias = problem.e, problem.c, problem.targets, problem.bias
    params = cce.CCEParams(
        targets.flatten(),
        _build_flat_valids(targets, -100, shift),
        None,
        reduction,
        _handle_eps(None, e.dtype),
        shift,
        targets.shape,
        return_lse=True,
    )
    loss, lse = cce.linear_cross_entropy_apply(e.flatten(0, 1), c, bias, params)
    wanted, wanted_lse = (
        full_logits(e, c, targets, bias, reduction=reduction, shift=shift)
        if (shift < 5)
        else (torch.zeros((3, 0) if reduction == "none" else ()), torch.zeros(3, 0))
    )
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    params.return_lse = False
    assert cce.linear_cross_entropy_apply(e.flatten(0, 1), c, bias, params)[1] is None
    alone = cce.linear_cross_entropy_apply(e.flatten(0, 1), c, params)
    expected = linear_cross_entropy(e, c, targets, reduction=reduction, shift=shift)
    torch.testing.assert_close(alone, expected)
    with pytest.raises(TypeError, match="params must be a CCEParams, got NoneType"):
        cce.linear_cross_entropy_apply(e, c, bias)


def test_the_function_of_the_kernels(monkeypatch):
    problem = make_problem((4,), classes=40, ignored=0.0)
    expected, lse = full_logits(problem.e, problem.c, problem.targets)
    got = cce.cce_linear_cross_entropy(problem.e, problem.c, problem.targets, return_lse=True)
    torch.testing.assert_close(got, (expected, lse))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="impl='cce' cannot run here"):
        cce.cce_linear_cross_entropy(problem.e, problem.c, problem.targets)


@pytest.mark.parametrize("shift", [False, True, 2, 7])
def test_flat_valids_and_back(shift):
    targets = make_problem((3, 5)).targets
    valids = _build_flat_valids(targets, -100, shift)
    expected = [
        row * 5 + t
        for row in range(3)
        for t in range(5 - int(shift))
        if targets[row, t + int(shift)] != -100
    ]
    assert valids.dtype == torch.int32
    assert valids.tolist() == expected
    full = handle_reduction_none(targets.shape, valids, shift, torch.ones(len(valids)))
    counted = (targets != -100).float()
    counted[:, : int(shift)] = 0
    assert torch.equal(full, counted)


def test_flat_valids_of_tokens_that_all_count():
    targets = make_problem((3, 5), ignored=0.0).targets
    assert _build_flat_valids(targets, -100, 0) is None
    assert _build_flat_valids(targets, -100, 1).tolist() == [
        *range(4),
        *range(5, 9),
        *range(10, 14),
    ]
    losses = torch.arange(15.0)
    assert torch.equal(handle_reduction_none(targets.shape, None, 0, losses), losses.reshape(3, 5))


def test_eps():
    assert _handle_eps(None, torch.bfloat16) is None
    assert _handle_eps(0.25, torch.bfloat16) == 0.25
    assert _handle_eps("auto", torch.bfloat16) == 2.0**-12
    assert _handle_eps("high", torch.bfloat16) == 2.0**-13
    with pytest.raises(ValueError, match="filter_eps must be"):
        _handle_eps("low", torch.bfloat16)


def test_chunk_size():
    assert recommend_c_grad_chunk_size(8192, 248320, 4096, target_programs=8 * 188) == 0
    for name in ("num_tokens", "vocab_size", "hidden_size", "target_programs"):
        sizes = {"num_tokens": 1, "vocab_size": 1, "hidden_size": 1, name: -1}
        with pytest.raises(ValueError, match=f"{name} must be an int >= [01], got -1"):
            recommend_c_grad_chunk_size(**sizes)


def test_tensors():
    x = torch.zeros(2, requires_grad=True)
    assert to_full_tensor(x) is x
    assert TensorInfo(x.dtype, x.requires_grad) == TensorInfo(torch.float32, True)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_reductions_of_one_process(one_process):
    """In a group of one they change nothing but types; test_vocab_parallel has the sums of two."""
    from cut_cross_entropy.vocab_parallel import utils

    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = x.detach()
    torch.testing.assert_close(utils.vp_reduce_lse(y, None), y)
    assert utils.vp_reduce_correct_logit(y, None, torch.float32).dtype == torch.float32
    torch.testing.assert_close(utils.vp_reduce_e_grad(y.bfloat16(), None), y.bfloat16())
    assert torch.equal(utils.vp_reduce_e_grad(y, None), y)  # float64 keeps its precision
    for reduce in (True, False):
        options = utils.VocabParallelOptions(0, 3, reduce_e_grad=reduce)
        hooked = utils.vp_reduce_e_grad_hook(x, options)
        (grad,) = torch.autograd.grad((hooked * y).sum(), x)
        torch.testing.assert_close(grad, y)


def test_public_names_only():
    code = """
import sys
import cut_cross_entropy
print(*dir(cut_cross_entropy))
assert "transformers" not in sys.modules
from cut_cross_entropy import cce_patch, compute_z_loss
from cut_cross_entropy.transformers import cce_patch as same
assert cce_patch is same
assert "cce_patch" not in cut_cross_entropy.__all__  # a star import needs no transformers
try:
    cut_cross_entropy.nothing
except AttributeError as error:
    assert "has no attribute 'nothing'" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "DataParallelOptions",
        "FilterRecord",
        "LinearCrossEntropy",
        "LinearCrossEntropyImpl",
        "TokenDivergence",
        "TokenLogprobs",
        "VocabParallelOptions",
        "__version__",
        "adapters",
        "cce_patch",
        "compute_z_loss",
        "linear_cross_entropy",
        "linear_divergence",
        "recommend_c_grad_chunk_size",
        "record_filter",
        "token_logprobs",
        "topk_divergence",
    ]
