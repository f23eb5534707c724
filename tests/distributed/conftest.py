"""The cases of a module, run once in processes of their own."""

import pytest

from tests.distributed.processes import outcomes_of


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """Run the module's ``CASES`` in ``WORLD`` processes; how each ended, by its name."""
    module = request.module
    name = module.__name__.rpartition(".test_")[2]
    return outcomes_of(module.CASES, module.WORLD, tmp_path_factory, name)
