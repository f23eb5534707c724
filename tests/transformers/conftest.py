"""Settings for the tests of the transformers integration."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may ask a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import transformers

from tests.support import forget_warnings

transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def every_warning_anew():
    """Warnings are given once per process; each test is to see its own."""
    forget_warnings()
    yield
    forget_warnings()
