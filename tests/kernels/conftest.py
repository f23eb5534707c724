"""Paths through the kernels, as values of a fixture, and settings of the filter."""

import math
import os
from dataclasses import dataclass

import pytest
import torch

from tests.support import Problem, Results, check


@dataclass(frozen=True)
class Route:
    """A preset, and the path through the kernels that it has to take.

    Args:
        impl: the preset.
        path: the path that the filter reports of its backward.
    """

    impl: str
    path: str

    def check(self, problem: Problem, **options: object) -> Results:
        """Compare with plain PyTorch within the error budget, having taken the route's path."""
        from cut_cross_entropy.filter_report import record_filter

        with record_filter() as records:
            results = check(problem, self.impl, **options)
        needed = set(options.get("needed", ("e", "c", "bias")))
        filtered = {"cce_kahan_full_c": {"e"}, "cce_kahan_full_e": {"c", "bias"}}
        # A preset filters nothing when only its unfiltered gradient is asked for.
        path = self.path if needed & filtered.get(self.impl, needed) else "exact"
        assert {record.path for record in records} <= {path}
        everything = all(name in options.get("needed", ("e", "c")) for name in ("e", "c"))
        assert records or not everything or not problem.targets.numel(), "no backward was recorded"
        return results


ROUTES = {
    "exact": Route("cce_exact", "exact"),
    "dense": Route("cce", "dense"),
    "filtered": Route("cce", "filtered"),
    "full_c": Route("cce_kahan_full_c", "filtered"),
    "full_e": Route("cce_kahan_full_e", "filtered"),
}


@pytest.fixture(autouse=True)
def drops_much(monkeypatch):
    """Let the filter drop what it does of small problems: more than of trained heads."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        from cut_cross_entropy import dispatch

        monkeypatch.setattr(dispatch, "MOST_DROPPED", 1.0)


@pytest.fixture
def drops_nothing(monkeypatch):
    """Let the filter keep every strip that a float can see, so that its path is exact."""
    from cut_cross_entropy import dispatch

    monkeypatch.setattr(dispatch, "FILTER_TOLERANCE", 1e-15)
    monkeypatch.setattr(dispatch, "MAX_ERROR", {})


@pytest.fixture
def always_filtered(monkeypatch):
    """Take the filtered path however much is kept, and let hardly any token count as flat.

    Those that the likely classes show to be flat have no part in the strips, so they do.
    """
    from cut_cross_entropy import dispatch
    from cut_cross_entropy.kernels.filtered import backward

    monkeypatch.setattr(dispatch, "MOST_DROPPED", 1.0)
    monkeypatch.setattr(backward, "DENSE_FRACTION", math.inf)
    monkeypatch.setattr(backward, "FLAT_SUPPORT", 1000)
    monkeypatch.setattr(backward, "FLAT_FRACTION", math.inf)


@pytest.fixture
def never_filtered(monkeypatch):
    """Let the filter find any data too flat."""
    from cut_cross_entropy.kernels.filtered import backward

    monkeypatch.setattr(backward, "DENSE_FRACTION", -1.0)


def take_route(name, request):
    """Return a route, made to drop nothing and to take its path."""
    request.getfixturevalue("drops_nothing")
    chosen = ROUTES[name]
    if chosen.path != "exact":
        request.getfixturevalue("never_filtered" if chosen.path == "dense" else "always_filtered")
    return chosen


@pytest.fixture(params=["exact", "dense", "filtered"])
def route(request):
    """One path through the kernels that drops nothing: each must be as exact as PyTorch."""
    return take_route(request.param, request)


@pytest.fixture(params=ROUTES)
def any_route(request):
    """The same, and presets that take one path for dE and another for dC."""
    return take_route(request.param, request)


@pytest.fixture
def bfloat16(monkeypatch):
    """Let the interpreter, which truncates bfloat16 and multiplies its bits, round and multiply."""
    from triton import language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast, create_dot = builder.cast_impl, builder.create_dot

    def rounding_cast(self, value, dtype):
        if (value.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, value, dtype)
        rounded = torch.from_numpy(value.data.copy()).bfloat16().view(torch.int16)
        return interpreter.TensorHandle(rounded.numpy().view("uint16"), tl.bfloat16)

    def dot(self, a, b, *others):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (cast(self, x, tl.float32) for x in (a, b))
        return create_dot(self, a, b, *others)

    monkeypatch.setattr(builder, "cast_impl", rounding_cast)
    monkeypatch.setattr(builder, "create_dot", dot)


@pytest.fixture(scope="session")
def gpu():
    """Fail rather than skip: these tests run only if they are asked for."""
    if not torch.cuda.is_available():
        pytest.fail("no GPU is available", pytrace=False)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        pytest.fail("kernels are interpreted: use `make test-gpu` or pytest -m gpu", pytrace=False)


@pytest.fixture
def several_superblocks(monkeypatch):
    """Make superblocks of one block instead of 64 (8,192 tokens), so that 133 tokens have two."""
    from cut_cross_entropy.kernels.filtered import (
        class_weights,
        grad_c,
        index,
        measure,
        selection,
        tail,
    )

    for module in (class_weights, grad_c, index, measure, selection, tail):
        monkeypatch.setattr(module, "SUPERBLOCK", 1)
