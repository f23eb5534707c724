"""Four processes that train with a sharded vocabulary; on a GPU in test_gpu_vocab_parallel.py."""

import functools

import pytest

from tests.distributed.processes import assert_passed
from tests.distributed.scenario import train

WORLD = 4
# The kernels are interpreted here, and the interpreter computes products of bfloat16 wrongly.
RUNS = (
    ("chunked", "float16"),
    ("chunked", "bfloat16"),
    ("reference", "bfloat16"),
    ("cce_exact", "float16"),
    ("cce", "float16"),
    ("torch_compile", "float16"),
    ("torch_compile", "bfloat16"),
)
CASES = {
    f"{impl}-{dtype}": functools.partial(train, impl=impl, dtype=dtype) for impl, dtype in RUNS
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", CASES)
def test_training(outcomes, name):
    assert_passed(outcomes[name])
