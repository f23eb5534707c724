"""What a training loop does with a sum of losses, by the compiled kernels on a GPU."""

import math

import pytest
import torch

from cut_cross_entropy import dispatch, linear_cross_entropy, record_filter
from cut_cross_entropy.kernels import exact_sum, step
from tests.kernels.gpu import DEVICE, relative_error, requires_kernels
from tests.kernels.test_gpu_exactness import data
from tests.sums_in_training import BACKWARD, FORWARD, SUM, USES, check_use, record_passes

pytestmark = [pytest.mark.gpu, requires_kernels]


IMPLS = {"cce_exact": "exact", "cce_kahan_full_c": "filtered", "cce_kahan_full_e": "filtered"}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", USES)
def test_in_a_training_loop(name, impl, monkeypatch):
    monkeypatch.setattr(dispatch, "FEW_PRODUCTS_BY_HALF", 0.0)
    problem = data("structured")
    check_use(name, impl, problem)  # compiles, which calls the passes on tensors without memory
    passes = record_passes(monkeypatch, (exact_sum, (SUM,)), (step, (FORWARD, BACKWARD)))
    assert check_use(name, impl, problem) == passes
    if name == "hooked":  # once; what is recorded keeps tensors, which some uses look for
        with record_filter() as records:
            check_use(name, impl, problem)
        assert [record.path for record in records] == [IMPLS[impl]]


@pytest.mark.parametrize("impl", [*IMPLS, "chunked"])
@pytest.mark.parametrize("miss", [1e-3, 1e-6, 1e-9])
def test_exact_gradients_of_sure_tokens(impl, miss, monkeypatch):
    """In float32, 1 - p has an error of 6 % at 1e-6. Here: that of the result's dtype, and 1e-3."""
    monkeypatch.setattr(dispatch, "FEW_PRODUCTS_BY_HALF", 0.0)
    tokens, classes = torch.arange(300, device=DEVICE), 4096
    targets = 7 * tokens
    e = torch.zeros(300, classes, device=DEVICE, dtype=torch.bfloat16)
    e[tokens, targets] = math.log((classes - 1) * (1 - miss) / miss)
    logit = e[0, 0].double().item()  # rounded
    left = (classes - 1) / (classes - 1 + math.exp(logit))
    c = torch.eye(classes, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    loss = linear_cross_entropy(e.requires_grad_(), c, targets, impl=impl, reduction="sum")
    grad_e, grad_c = torch.autograd.grad(loss, (e, c))
    for name, found, expected in (
        ("e", grad_e[tokens, targets], -left),
        ("c", grad_c[targets, targets], -left * logit),
    ):
        if {"cce_kahan_full_c": "e", "cce_kahan_full_e": "c"}.get(impl) != name:  # is filtered
            assert ((found.double() / expected - 1).abs() < 2**-9 + 1e-3).all(), name


@pytest.mark.parametrize("allowed", [False, True])
def test_plain_pytorch_takes_tf32_only_where_it_is_allowed(allowed):
    problem = data("structured")
    e, c = problem.e.float(), problem.c.float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        found, exact = (
            torch.autograd.grad(
                linear_cross_entropy(*inputs, problem.targets, impl="chunked"), inputs
            )
            for inputs in ([x.to(dtype).requires_grad_() for x in (e, c)]
                           for dtype in (torch.float32, torch.float64))
        )  # fmt: skip
    finally:
        torch.set_float32_matmul_precision(before)
    for got, want in zip(found, exact, strict=True):
        assert (relative_error(got, want) > 2e-5) == allowed
