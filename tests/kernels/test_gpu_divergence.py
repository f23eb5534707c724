"""Divergences on a GPU: the kernels against float64 autograd of full logits."""

import pytest
import torch

from cut_cross_entropy import linear_divergence
from cut_cross_entropy.benchmark.data import Shape, make
from cut_cross_entropy.kernels import divergence_columns
from tests.kernels.gpu import DEVICE, relative_error, requires_kernels, rounding_error
from tests.test_divergence import truth

pytestmark = [pytest.mark.gpu, requires_kernels]

SHAPE = Shape("test", 32768, 1024)
TOKENS = 1024
FILTER_EPS = {torch.bfloat16: 2.0**-12, torch.float16: 2.0**-15, torch.float32: None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_close_teacher(beta, dtype, monkeypatch):
    """Gradients with at most two roundings; as in training, from a mean."""
    made = make("structured", TOKENS, SHAPE, device=DEVICE)
    noise = torch.randn_like(made.e, dtype=torch.float32)
    tensors = {
        "e_student": made.e.to(dtype).requires_grad_(),
        "head_student": made.c.to(dtype).requires_grad_(),
        "e_teacher": (made.e.float() + 0.1 * made.e.float().std() * noise).to(dtype),
        "head_teacher": made.c.to(dtype),
    }
    found = linear_divergence(*tensors.values(), beta=beta, targets=made.targets, temperature=0.8)
    leaves = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    none = {f"{side}_bias": made.c.new_zeros(()) for side in ("student", "teacher")}
    expected = truth({**leaves, **none}, made.targets, beta, temperature=0.8)
    for name in ("divergence", "student_entropy", "student_logprobs"):
        ours = getattr(found, name).double()
        # Sums of a thousand products in tensor cores err more than float32 arithmetic.
        torch.testing.assert_close(ours, getattr(expected, name), rtol=4e-6, atol=1e-4)
    names = ("e_student", "head_student")
    ours = torch.autograd.grad(found.divergence.mean(), [tensors[x] for x in names])
    exact = torch.autograd.grad(expected.divergence.mean(), [leaves[x] for x in names])
    for mine, other in zip(ours, exact, strict=True):
        allowed = 1e-4 if dtype == torch.float32 else 2 * rounding_error(other, dtype)
        assert relative_error(mine, other) <= allowed
    # Gradients in the forward, of chunks of 384 or 512 tokens, and from the classes that matter as
    # "auto" would choose them in a larger problem.
    expected, kept = expected.divergence.mean(), []
    wait = divergence_columns.number_to_keep

    def record(num_dropped, num_classes):
        number = wait(num_dropped, num_classes)
        kept.append(1.0 if number is None else number / num_classes)
        return number

    monkeypatch.setattr(divergence_columns, "number_to_keep", record)
    monkeypatch.setattr(divergence_columns, "LEAST_PRODUCTS", 0)
    for filter_eps in {None, FILTER_EPS[dtype]}:
        found = linear_divergence(
            *tensors.values(), beta=beta, temperature=0.8, reduction="mean", memory_budget=2**26,
            filter_eps=filter_eps,
        )  # fmt: skip
        torch.testing.assert_close(found.divergence.double(), expected, rtol=1e-5, atol=1e-5)
        ours = torch.autograd.grad(found.divergence, [tensors[x] for x in names])
        for mine, other in zip(ours, exact, strict=True):
            allowed = 1e-4 if dtype == torch.float32 else 2 * rounding_error(other, dtype)
            assert relative_error(mine, other) <= allowed
    assert (len(kept) > 0) == (dtype != torch.float32)
    assert all(0 < share < divergence_columns.MOST_KEPT for share in kept)


@pytest.mark.parametrize(
    ("reduction", "memory_budget", "filter_eps"),
    [("none", 2**24, None), ("sum", 2**26, None), ("sum", 2**26, 2.0**-10)],
)
def test_deterministic(reduction, memory_budget, filter_eps, monkeypatch):
    monkeypatch.setattr(divergence_columns, "LEAST_PRODUCTS", 0)
    made = make("structured", TOKENS, SHAPE, device=DEVICE)
    results = []
    for _ in range(2):
        e, c = made.e.clone().requires_grad_(), made.c.clone().requires_grad_()
        found = linear_divergence(
            e, c, made.e.flip(0), made.c, beta=0.3, reduction=reduction,
            memory_budget=memory_budget, filter_eps=filter_eps,
        )  # fmt: skip
        found.divergence.sum().backward()
        results.append((found.divergence.detach(), e.grad, c.grad))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
