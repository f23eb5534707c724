"""The examples in docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import cut_cross_entropy

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(cut_cross_entropy.__path__, "cut_cross_entropy.")
    # These import Triton or transformers, which are optional; their own tests cover them.
    if not name.startswith(("cut_cross_entropy.kernels.", "cut_cross_entropy.transformers"))
]


def examples(name):
    module = importlib.import_module(name)
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    runner = doctest.DocTestRunner(verbose=False)
    for test in examples(name):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_public_functions_have_examples():
    documented = {
        test.name.rsplit(".", 1)[1]
        for name in ("linear_cross_entropy", "distributed.options")
        for test in examples(f"cut_cross_entropy.{name}")
    }
    assert documented >= {"linear_cross_entropy", "LinearCrossEntropy", "partition_n_into_range"}
