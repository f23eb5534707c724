"""Settings and fixtures for all tests."""

import os

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compilers per worker

import pytest
import torch

from cut_cross_entropy.device_support import triton_version

torch.set_num_threads(1)  # tests run in several processes; the problems are small


def pytest_addoption(pluginmanager):
    """Let Triton's interpreter run the kernels, unless the tests that need a GPU are asked for.

    Triton reads the variable when it is imported, which is here: a test that turns the interpreter
    off for a while would decide for all that follow. ``pytest_configure`` would be too late: pytest
    has imported the conftests of subfolders by then, and transformers may import Triton.
    """
    config = pluginmanager.get_plugin("pytestconfig")
    for_gpu = config.known_args_namespace.markexpr == "gpu"
    os.environ.setdefault("TRITON_INTERPRET", "0" if for_gpu else "1")
    if triton_version() is not None and os.environ["TRITON_INTERPRET"] == "1":
        from tests.fast_interpreter import skip_repeated_work

        skip_repeated_work()
    if for_gpu:  # else PyTorch refuses products in its deterministic mode, which poison_empty needs
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def poison_empty():
    """Fill what ``torch.empty`` and its family return with NaN, so unwritten elements show."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before)
