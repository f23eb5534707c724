"""The ways through the kernels, each a fixture's value."""

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
        path: what the filter reports of its backward.
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


@pytest.fixture
def drops_nothing(monkeypatch):
    """The filter keeps every strip that a float can see, so whatever path it takes is exact."""
    from cut_cross_entropy import dispatch

    monkeypatch.setattr(dispatch, "FILTER_TOLERANCE", 1e-15)


@pytest.fixture
def always_filtered(monkeypatch):
    """The filtered path is taken however much is kept, and no token counts as flat."""
    from cut_cross_entropy.kernels import filtered

    monkeypatch.setattr(filtered, "DENSE_FRACTION", 2.0)
    monkeypatch.setattr(filtered, "FLAT_GROUPS", math.inf)


@pytest.fixture
def never_filtered(monkeypatch):
    """The filter finds the data too flat, whatever it is."""
    from cut_cross_entropy.kernels import filtered

    monkeypatch.setattr(filtered, "DENSE_FRACTION", -1.0)


def _take(name, request):
    chosen = ROUTES[name]
    if chosen.path != "exact":
        request.getfixturevalue("never_filtered" if chosen.path == "dense" else "always_filtered")
    return chosen


@pytest.fixture(params=["exact", "dense", "filtered"])
def route(request, drops_nothing):
    """One path through the kernels, made to drop nothing: each must be as exact as PyTorch."""
    return _take(request.param, request)


@pytest.fixture(params=ROUTES)
def any_route(request, drops_nothing):
    """The same, with the presets that take one path for one gradient, another for the other."""
    return _take(request.param, request)


@pytest.fixture(scope="session")
def gpu():
    """Fails rather than skips: who asks for these tests wants them run."""
    if not torch.cuda.is_available():
        pytest.fail("there is no GPU", pytrace=False)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        pytest.fail("kernels are interpreted: use `make test-gpu` or pytest -m gpu", pytrace=False)


@pytest.fixture
def several_groups(monkeypatch):
    """A group is 64 blocks, 8,192 tokens; with groups of one block, 133 tokens have two."""
    from cut_cross_entropy.kernels import filtered, grad_c, listing, selection

    for module in (filtered, grad_c, listing, selection):
        monkeypatch.setattr(module, "GROUP", 1)
