"""Divergences over candidates, against their definitions in float64."""

import math

import pytest
import torch

from cut_cross_entropy import topk_divergence
from tests.test_divergence import BETAS


def candidates(seed=0):
    random = torch.Generator().manual_seed(seed)
    logprobs = [torch.randn(2, 6, 40, generator=random, dtype=torch.float64) for _ in range(2)]
    return [x.log_softmax(-1)[..., :5] for x in logprobs]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", ["drop", "renormalise", "bucket"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_candidates(beta, tail, dtype):
    student, teacher = (x.requires_grad_() for x in candidates())
    p, q = student.exp(), teacher.detach().exp()
    if tail == "renormalise":
        p, q = (x / x.sum(-1, keepdim=True) for x in (p, q))
    elif tail == "bucket":
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    if beta in (0, 1):
        first, second = (q, p) if beta == 0 else (p, q)
        expected = (first * (first / second).log()).sum(-1)
    else:
        m = (1 - beta) * p + beta * q
        expected = (beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()).sum(-1)
    (grad,) = torch.autograd.grad(expected.sum(), student)
    leaf = student.detach().to(dtype).requires_grad_()
    found = topk_divergence(leaf, teacher.to(dtype), beta=beta, tail=tail)
    found.sum().backward()
    limit = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=limit, atol=limit)
    torch.testing.assert_close(leaf.grad.double(), grad, rtol=limit, atol=limit)
    assert teacher.grad is None


def test_bucket_of_nearly_nothing():
    """The rest of candidates that have nearly all of the probability, and of too much."""
    rest = torch.tensor([1e-4, 0.7, 1 - 1e-5], dtype=torch.float64)
    logprobs = torch.log1p(-rest)[:, None].float()
    exact = torch.log(-torch.expm1(logprobs.double()))
    teacher = torch.full_like(logprobs, -1.0)
    q = torch.tensor([math.exp(-1.0), 1 - math.exp(-1.0)], dtype=torch.float64)
    expected = (q * (q.log() - torch.cat([logprobs.double(), exact], 1))).sum(1)
    found = topk_divergence(logprobs, teacher, tail="bucket")
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    above = torch.tensor([[1e-7]], requires_grad=True)
    result = topk_divergence(above, torch.tensor([[-1.0]]), tail="bucket")
    result.backward()
    assert result.isfinite()
    assert above.grad.isfinite().all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", ["drop", "renormalise", "bucket"])
def test_absent_candidates(beta, tail):
    student, teacher = candidates()
    expected = topk_divergence(student, teacher, beta=beta, tail=tail)
    nothing = torch.full_like(student[..., :1], -torch.inf)
    student = torch.cat([student, nothing], -1).requires_grad_()
    found = topk_divergence(student, torch.cat([teacher, nothing], -1), beta=beta, tail=tail)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert (student.grad[..., -1] == 0).all()


@pytest.mark.parametrize("tail", ["drop", "renormalise", "bucket"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_masked_candidates_are_none(tail, beta):
    """As without them, though a log-probability of 0 stands there; 0 where none is left."""
    student, teacher = (torch.randn(5, 20).log_softmax(-1)[:, :6] for _ in range(2))
    expected = topk_divergence(student[:, :4], teacher[:, :4], beta=beta, tail=tail)
    mask = torch.arange(6).expand(5, 6) < 4
    padded = student.masked_fill(~mask, 0).requires_grad_()
    found = topk_divergence(padded, teacher.masked_fill(~mask, 0), beta=beta, tail=tail, mask=mask)
    torch.testing.assert_close(found, expected)
    nothing = topk_divergence(padded, teacher, beta=beta, tail=tail, mask=torch.zeros_like(mask))
    torch.testing.assert_close(nothing, torch.zeros(5), rtol=0, atol=1e-6)
    (grad,) = torch.autograd.grad((found + nothing).sum(), padded)
    assert grad.isfinite().all()
    assert (grad[~mask] == 0).all()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"tail": "none"}, ValueError, "tail must be one of drop, renormalise, bucket"),
        ({"tail": "buckets"}, ValueError, "got 'buckets'. Did you mean 'bucket'"),
        ({"beta": -0.1}, ValueError, "beta"),
        ({"teacher_logprobs": torch.zeros(2, 3)}, ValueError, "the shape of student_logprobs"),
        ({"student_logprobs": torch.zeros(2, 5).long()}, TypeError, "dtype of student_logprobs"),
        (
            {"teacher_logprobs": torch.zeros(2, 5).to(torch.float8_e4m3fn)},
            TypeError,
            "dtype of teacher_logprobs must be one of .*, got torch.float8_e4m3fn",
        ),
        (
            {"teacher_logprobs": torch.full((2, 5), 3.0)},
            ValueError,
            "teacher_logprobs must be log-probabilities, at most 0, got 3: pass log_softmax",
        ),
        ({"teacher_logprobs": torch.zeros(2, 5).to_sparse()}, TypeError, "a dense tensor"),
        ({"student_logprobs": torch.zeros(2, 0)}, ValueError, "K > 0"),
        ({"teacher_logprobs": None}, TypeError, "teacher_logprobs must be a torch.Tensor"),
        ({"student_logprobs": None}, TypeError, "student_logprobs must be a torch.Tensor"),
        ({"mask": [True]}, TypeError, "mask must be a torch.Tensor, got list"),
        ({"mask": torch.ones(2, 5)}, TypeError, "the dtype of mask must be torch.bool"),
        (
            {"mask": torch.ones(2).bool()},
            ValueError,
            "mask must have the shape of student_logprobs",
        ),
    ],
)
def test_errors_of_candidates(change, error, match):
    arguments = {"student_logprobs": torch.zeros(2, 5), "teacher_logprobs": torch.zeros(2, 5)}
    with pytest.raises(error, match=match):
        topk_divergence(**{**arguments, **change})


def test_logits_of_candidates_are_renormalised():
    """Only what lies outside of the candidates needs probabilities over all classes."""
    student, teacher = (torch.randn(4, 6) + 5 for _ in range(2))
    expected = topk_divergence(student.log_softmax(-1), teacher.log_softmax(-1), tail="drop")
    torch.testing.assert_close(topk_divergence(student, teacher, tail="renormalise"), expected)


def test_what_stands_at_masked_candidates_is_not_looked_at():
    mask = torch.tensor([[True, False]])
    found = topk_divergence(torch.tensor([[-1.0, 7.0]]), torch.tensor([[-1.0, 9.0]]), mask=mask)
    assert found.item() == 0
