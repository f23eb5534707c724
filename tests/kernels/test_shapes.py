"""Plans of launches by shapes alone: the launches are the same, and no compiler is imported."""

import contextlib
import subprocess
import sys

import pytest
import torch

from cut_cross_entropy.kernels import launch, warmup
from cut_cross_entropy.kernels.shapes import ShapesAlone
from cut_cross_entropy.problem import AdaptedProblem, Filter, Needed, Problem

SIZES = (9000, 70000, 512)  # two superblocks, and enough for a sample and class weights


def problem_of(dtype=torch.bfloat16, bias=False, softcap=None, rank=0, sizes=SIZES):
    num_tokens, num_classes, dim = sizes
    empty = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype)  # is never read
    kind, more = Problem, {}
    if rank:
        kind, more = (
            AdaptedProblem,
            {
                "low_e": empty(num_tokens, rank),
                "low_c": empty(num_classes, rank),
            },
        )
    return kind(
        empty(num_tokens, dim),
        empty(num_classes, dim),
        empty(num_tokens, dtype=torch.int64),
        empty(num_classes) if bias else None,
        -100,
        softcap,
        dtype,
        2**28,
        **more,
    )


PROBLEMS = {
    "plain": {},
    "bias": {"bias": True, "softcap": 30.0},
    "half": {"dtype": torch.float16, "bias": True},
    "single": {"dtype": torch.float32},
    "adapter": {"rank": 16},
    "small": {"sizes": (200, 1100, 64)},
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_plans_are_those_by_pytorchs_shapes(name, monkeypatch):
    problem, both = problem_of(**PROBLEMS[name]), []
    needed = Needed(e=True, c=True, bias=problem.bias is not None)
    for mode in (ShapesAlone, contextlib.nullcontext):
        monkeypatch.setattr(launch, "ShapesAlone", mode)
        filter_ = Filter(4e-4, max_error=1.0)
        plans = [warmup.plan_step(problem, filter_, training) for training in (True, False)]
        if name != "adapter":
            plans.append(warmup.plan_sum(problem, needed, None, Filter(0.0)))
        both.append([[one.variant() for one in plan.launches] for plan in plans])
    assert both[0] == both[1]
    assert all(both[0])


SCRIPT = """
import sys
import torch
from tests.kernels.test_shapes import problem_of
from cut_cross_entropy.kernels import warmup
from cut_cross_entropy.problem import Filter
compilers = {"sympy", "torch._dynamo", "torch._inductor"}
loaded = compilers & set(sys.modules)
assert warmup.plan_step(problem_of(bias=True), Filter(4e-4, max_error=1.0), True).launches
print(sorted(compilers & set(sys.modules) - loaded), bool(loaded))
"""


def test_a_plan_imports_no_compiler():
    run = [sys.executable, "-c", SCRIPT]
    found = subprocess.run(run, capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.split("\n")[0] == "[] False"


def calls():
    """Return functions of meta tensors, some with other shapes than their first argument."""
    x = torch.empty((6, 1), dtype=torch.bfloat16, device="meta")
    y = torch.empty((6, 4), device="meta")
    rows = torch.empty((3, 2), dtype=torch.int64, device="meta")
    valid = torch.empty((6, 4), dtype=torch.bool, device="meta")
    return {
        "minus": lambda: y - y,
        "broadcast first": lambda: x * y,
        "broadcast second": lambda: y * x,
        "times a number": lambda: rows * 2.5,
        "sub": lambda: y.sub(x),
        "shift": lambda: (rows >> 30) + 2,
        "bits": lambda: rows & 3,
        "bools": lambda: valid & valid,
        "a mask and a number": lambda: valid * 2.0,
        "abs": lambda: y.abs(),
        "eq": lambda: y == 1.0,
        "lt, broadcast": lambda: x < y,
        "invert": lambda: ~valid,
        "masked_fill": lambda: y.masked_fill(valid, 0),
        "rows": lambda: y[rows],
        "slice": lambda: y[1:],
        "new axis": lambda: y[:, None],
        "where": lambda: torch.where(valid, y, 0.0),
        "where, broadcast": lambda: torch.where(x < 0, y, y),
        "sum of an axis": lambda: y.sum(0),
        "sum of another dtype": lambda: x.sum(0, dtype=torch.float32),
        "sum": lambda: y.sum(),
        "sum that keeps its axis": lambda: y.sum(1, keepdim=True),
        "sum of integers": lambda: rows.int().sum(0),
        "sort": lambda: torch.sort(y, dim=1).indices,
        "like, of another dtype": lambda: torch.empty_like(y, dtype=x.dtype),
        "mm": lambda: torch.mm(y, y.T),
        "an output": lambda: torch.where(valid, y, y, out=torch.empty_like(y)),
        "ones": lambda: torch.ones_like(rows),
        "in place": lambda: y.zero_(),
    }


@pytest.mark.parametrize("name", calls())
def test_shapes_and_dtypes_are_those_of_pytorch(name):
    call = calls()[name]
    with ShapesAlone():
        found = call()
    expected = call()
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.is_meta
