"""Counted FLOPs against the unfused loss, in a checkpoint where logits are made twice."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.func import jvp
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cut_cross_entropy import budget, linear_cross_entropy, linear_divergence
from cut_cross_entropy.heads import Head, LowRank
from cut_cross_entropy.implementations import chunked_divergence
from tests.support import make_problem

# What PyTorch imports for forward mode scripts functions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

PRODUCT = 2 * 5 * 130 * 8
SUMS = ("chunked", "cce_exact")  # compute the gradients of a sum in the forward
IMPLS = ["chunked", *(pytest.param(x, marks=pytest.mark.interpret) for x in ("cce", "cce_exact"))]


def count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def unfused(e, c, targets, recompute):
    def loss(e, c):
        return F.cross_entropy(F.linear(e, c), targets)

    return checkpoint(loss, e, c, use_reentrant=False) if recompute else loss(e, c)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needed", ["", "e", "c", "ec"])
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients(impl, needed, recompute):
    problem = make_problem((5,), 130, 8)
    again = recompute or impl not in SUMS

    def step(loss):
        e, c = problem.e.clone(), problem.c.clone()
        e.requires_grad_("e" in needed)
        c.requires_grad_("c" in needed)
        result = loss(e, c, problem.targets)
        if needed:
            result.backward()

    def ours(*inputs):
        return linear_cross_entropy(*inputs, impl=impl, recompute=recompute)

    counted = count(lambda: step(ours))
    assert counted == count(lambda: step(lambda *inputs: unfused(*inputs, again)))
    assert counted == PRODUCT * (1 + len(needed) + (again and needed != ""))


@pytest.mark.parametrize("impl", IMPLS)
def test_forward_mode(impl):
    problem = make_problem((5,), 130, 8)

    def loss(e, c):
        return linear_cross_entropy(e, c, problem.targets, impl=impl)

    inputs = (problem.e, problem.c)
    assert count(lambda: jvp(lambda c: loss(problem.e, c), inputs[1:], inputs[1:])) == 3 * PRODUCT
    assert count(lambda: jvp(loss, inputs, inputs)) == 4 * PRODUCT


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize(
    ("needed", "impl"),
    [
        ("", "chunked"),
        ("e", "chunked"),
        ("ec", "chunked"),
        pytest.param("", "cce", marks=pytest.mark.interpret),
        pytest.param("c", "cce", marks=pytest.mark.interpret),
    ],
)
def test_divergence(needed, impl, beta):
    """Without kernels the forward walks over the classes twice, and the backward once."""
    problem, teacher = make_problem((5,), 130, 8), make_problem((5,), 130, 12)
    teacher_product = PRODUCT * 12 // 8

    def step(loss):
        e, c = problem.e.clone(), problem.c.clone()
        e.requires_grad_("e" in needed)
        c.requires_grad_("c" in needed)
        result = linear_divergence(e, c, teacher.e, teacher.c, beta=beta, impl=impl)
        if needed:
            loss(result).sum().backward()

    walks = 1 if impl == "cce" else 2
    forward = walks * (PRODUCT + teacher_product)
    backward = PRODUCT * (1 + len(needed)) if needed else 0
    of_teacher = teacher_product if needed else 0
    assert count(lambda: step(lambda x: x.divergence)) == forward + backward + of_teacher
    of_teacher = 0 if impl == "chunked" else of_teacher
    assert count(lambda: step(lambda x: x.student_entropy)) == forward + backward + of_teacher


@pytest.mark.parametrize("impl", ["chunked", pytest.param("cce", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("needed", ["e", "c", "ec"])
def test_mean_of_divergences(impl, needed, beta, monkeypatch):
    """The logits of each model once, and a product for each gradient."""
    monkeypatch.setattr(chunked_divergence, "MIN_TOKENS", 1)
    monkeypatch.setattr(budget, "MIN_PAIRS", 1)
    monkeypatch.setattr(budget, "MIN_PAIRS_WITHOUT_C", 1)
    problem, teacher = make_problem((5,), 130, 8), make_problem((5,), 130, 12)
    problem.e.requires_grad_("e" in needed)
    problem.c.requires_grad_("c" in needed)

    def step():
        linear_divergence(
            problem.e, problem.c, teacher.e, teacher.c, beta=beta, impl=impl, reduction="mean"
        ).divergence.backward()

    assert count(step) == PRODUCT * (1 + len(needed)) + PRODUCT * 12 // 8


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("on_demand", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_heads(impl, on_demand, trained):
    """Whether a kernel is within an operator or not; a frozen weight has no gradient."""
    problem, rank = make_problem((5,), 130, 8), 16
    a, b = torch.randn(rank, 8), torch.randn(130, rank)
    weight = problem.c
    if on_demand:
        weight = Rows(problem.c, with_product=impl != "chunked")
    head = Head(weight, low_rank=(LowRank(a, b),) if trained else ())

    def step():
        e = problem.e.clone().requires_grad_()
        for x in (a, b):
            x.requires_grad_(trained)
        linear_cross_entropy(e, head, problem.targets, impl=impl).backward()

    products = 3  # that of the forward again, and that of dE
    in_forward = impl == "cce_exact" or (impl == "chunked" and not on_demand)
    if in_forward and not trained:
        products = 2
    expected = PRODUCT * products
    if trained:  # two more for the adapter's columns, and three narrow ones
        expected += PRODUCT * rank // 8 * 4 + 3 * 2 * 5 * 8 * rank
    assert count(step) == expected


@pytest.mark.parametrize("impl", ["chunked", pytest.param("cce", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("teacher_has_head", [False, True])
@pytest.mark.parametrize("of", ["divergence", "student_entropy"])
def test_divergences_of_heads(of, teacher_has_head, reduction, impl, monkeypatch):
    """As of matrices; a mean of a frozen student has its gradient in the forward."""
    for module, name in ((chunked_divergence, "MIN_TOKENS"), (budget, "MIN_PAIRS_WITHOUT_C")):
        monkeypatch.setattr(module, name, 1)
    problem, teacher = make_problem((5,), 130, 8), make_problem((5,), 130, 12)
    of_teacher = PRODUCT * 12 // 8
    student_head = problem.c if teacher_has_head else Head(Rows(problem.c, with_product=True))
    teacher_head = Head(Rows(teacher.c, with_product=True)) if teacher_has_head else teacher.c

    def step():
        e = problem.e.clone().requires_grad_()
        found = linear_divergence(
            e, student_head, teacher.e, teacher_head, beta=0.5, impl=impl, reduction=reduction
        )
        getattr(found, of).sum().backward()

    walks = 2 if impl == "chunked" and reduction == "none" else 1
    expected = (PRODUCT + of_teacher) * walks
    if reduction == "mean":
        expected += PRODUCT  # that of dE
    if reduction == "none" or of != "divergence":
        expected += 2 * PRODUCT
        if impl == "cce" or of == "divergence":
            expected += of_teacher
    assert count(step) == expected


class Rows:
    """Rows on demand, also with a product of their own, which kernels do not count."""

    def __init__(self, weight, with_product):
        self.weight, self.with_product = weight, with_product
        self.shape, self.dtype, self.device = tuple(weight.shape), weight.dtype, weight.device

    def rows(self, start, stop):
        rows = self.weight[start:stop]
        return rows @ torch.eye(rows.shape[1]) if self.with_product else rows.clone()


@pytest.mark.parametrize("called_before", [False, True])
def test_a_counter_that_is_imported_later(called_before):
    """The module imports Triton, so this package does not import it."""
    code = f"""
import torch
from cut_cross_entropy import linear_cross_entropy, linear_divergence
inputs = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1])
if {called_before}:
    linear_cross_entropy(*inputs)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    linear_cross_entropy(*inputs)
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(2 * 2 * 4 * 3)]
