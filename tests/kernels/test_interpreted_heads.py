"""Heads by Triton's interpreter: each chunk of classes by the kernels."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.heads import Head, LowRank
from cut_cross_entropy.kernels import made_rows
from tests.support import make_problem

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison_empty")]


@pytest.mark.parametrize(
    ("impl", "filter_eps", "trains", "softcap"),
    [
        ("cce", "auto", False, None),
        ("cce_exact", None, False, None),
        ("cce_exact", None, False, 6.0),
        ("cce_exact", None, True, None),
    ],
)
def test_gradients_of_an_adapted_head(impl, filter_eps, trains, softcap):
    """Where the weight is frozen, the kernels read it and the columns of the adapter."""
    made = make_problem((140,), classes=400, dim=32, bias=True)
    e, weight, bias = (x.requires_grad_() for x in (made.e, made.c, made.bias))
    weight.requires_grad_(trains)
    torch.manual_seed(1)
    a, b = torch.randn(8, 32, requires_grad=True), torch.randn(400, 8, requires_grad=True)
    leaves = [e, bias, a, b, *([weight] if trains else [])]
    head = Head(weight, bias, low_rank=(LowRank(a, b, 0.1),), softcap=softcap)
    budget = 2 * 3 * 40 * 4 * 256  # two chunks
    loss = linear_cross_entropy(
        e, head, made.targets, impl=impl, filter_eps=filter_eps, memory_budget=budget
    )
    ours = torch.autograd.grad(loss, leaves)
    truth = [x.detach().double().requires_grad_(x.requires_grad) for x in (e, bias, a, b, weight)]
    x, shift, down, up, matrix = truth
    logits = F.linear(x, matrix + 0.1 * up @ down, shift)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected_loss = F.cross_entropy(logits, made.targets)
    expected = torch.autograd.grad(expected_loss, [t for t in truth if t.requires_grad])
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
    for mine, theirs in zip(ours, expected, strict=True):
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert error < (1e-5 if impl == "cce_exact" else 4e-3)


class Stored:
    """Rows on demand that count how often each is made."""

    def __init__(self, weight):
        self.weight, self.made = weight, torch.zeros(weight.shape[0], dtype=torch.int64)
        self.shape, self.dtype, self.device = tuple(weight.shape), weight.dtype, weight.device

    def rows(self, start, stop):
        self.made[start:stop] += 1
        return self.weight[start:stop].clone()


def frozen_case(classes=1100, tokens=300):
    """A frozen head, the matrix that it stands for, and embeddings and targets."""
    made = make_problem((tokens,), classes=classes, dim=32, bias=True, ignored=0.2)
    source = Stored(made.c)
    scale = torch.linspace(0.5, 1.5, classes)
    low_rank = LowRank(torch.randn(4, 32), torch.randn(classes, 4) / 8)
    head = Head(source, made.bias, scale, (low_rank,), logit_scale=0.9)
    matrix = scale[:, None] * (made.c + low_rank.b @ low_rank.a)
    return made, head, source, matrix.double() * 0.9


@pytest.mark.parametrize(
    ("impl", "softcap", "factors"),
    [("cce", None, False), ("cce_exact", 6.0, True), ("cce_exact", None, True)],
)
def test_a_frozen_head_makes_its_rows_once(impl, softcap, factors, monkeypatch):
    """Within the forward, for both products; in chunks of classes and of tokens."""
    monkeypatch.setattr(made_rows, "FEWEST", 256)
    made, head, source, matrix = frozen_case()
    head = dataclasses.replace(head, softcap=softcap)
    e = made.e.requires_grad_()
    options, temperature = {}, 1.0
    if factors:
        temperature = torch.linspace(0.7, 1.4, 300)
        options = {"token_weights": torch.linspace(-1, 1, 300), "temperature": temperature}
    budget = 256 * 4 * (128 + 2 * 36)
    loss = linear_cross_entropy(
        e, head, made.targets, impl=impl, memory_budget=budget, reduction="sum", **options
    )
    (3 * loss).backward()
    assert torch.equal(source.made, torch.ones(1100, dtype=torch.int64))
    x = made.e.detach().double().requires_grad_()
    logits = x @ matrix.T + 0.9 * made.bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / torch.as_tensor(temperature).reshape(-1, 1)
    losses = F.cross_entropy(logits, made.targets, reduction="none")
    expected = (losses * options.get("token_weights", 1.0)).sum()
    (expected_grad,) = torch.autograd.grad(3 * expected, x)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    error = (e.grad.double() - expected_grad).norm() / expected_grad.norm()
    assert error < 1e-6


def test_chunks_of_a_frozen_head_whose_logits_rise():
    """A later chunk exceeds the bound of the first, so that the sums before it are scaled."""
    made, head, source, _ = frozen_case()
    made.e[:, 3], made.e[40:60, 3], made.e[250, 3] = 0.0, 1.0, 1.0
    made.c[:, 3], made.c[700, 3], made.c[1050, 3] = 0.0, 110.0, 220.0
    e, targets = made.e.requires_grad_(), made.targets
    targets[45], targets[50] = 700, 1050
    loss = linear_cross_entropy(
        e, Head(source), targets, impl="cce_exact", memory_budget=256 * 4 * (300 + 64)
    )
    loss.backward()
    x = e.detach().double().requires_grad_()
    expected = F.cross_entropy(x @ made.c.double().T, targets)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(e.grad.double(), x.grad, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("leading", [(0,), (5,)])
def test_a_frozen_head_without_a_token_that_counts(leading):
    made, head, *_ = frozen_case()
    e = torch.randn(*leading, 32, requires_grad=True)
    loss = linear_cross_entropy(e, head, torch.full(leading, -100), impl="cce_exact")
    loss.backward()
    assert loss == 0
    assert torch.equal(e.grad, torch.zeros_like(e))


def test_a_frozen_head_in_half_precision():
    """The gradient has the dtype of the embeddings, and is rounded once."""
    made, head, _, matrix = frozen_case()
    half = made.to(torch.float16)
    e = half.e.requires_grad_()
    loss = linear_cross_entropy(e, Head(Stored(half.c)), made.targets, impl="cce_exact")
    loss.backward()
    x = half.e.detach().double().requires_grad_()
    expected = F.cross_entropy(x @ half.c.double().T, made.targets)
    (grad,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    rounding = (grad.half().double() - grad).norm()
    assert e.grad.dtype == torch.float16
    assert (e.grad.double() - grad).norm() < 2 * rounding
