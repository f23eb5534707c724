"""The API page shows values of constants as defaults, and no Sphinx roles."""

from pathlib import Path

import griffe
import pytest

ROOT = Path(__file__).parents[2]

SOURCE = '''
import platform
from dataclasses import dataclass, field
from example.constants import IGNORED, BUDGET

CHOSEN: str = "compiled" if platform.system() == "Darwin" else "auto"


def loss(a, b: int = IGNORED, c: str = CHOSEN, d: int = BUDGET, e: float = 1.5, f: object = print):
    """Like :func:`other` of :class:`~example.Loss`."""


@dataclass
class Loss:
    """A loss."""

    ignored: int = IGNORED
    budget: int = field(default=BUDGET, kw_only=True)
    names: list = field(default_factory=list)
'''


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "example"
    folder.mkdir()
    (folder / "constants.py").write_text("IGNORED = -100\nBUDGET = 256 * 2**20\n")
    (folder / "__init__.py").write_text(SOURCE)
    path = ROOT / "docs" / "site" / "defaults.py"
    return griffe.load(
        "example", search_paths=[tmp_path], extensions=griffe.load_extensions(str(path))
    )


def defaults(function):
    return {parameter.name: str(parameter.default) for parameter in function.parameters}


def test_constants_of_the_package_become_their_values(package):
    found = defaults(package["loss"])
    assert found["b"] == "-100"
    assert found["c"] == "'auto'"
    assert found["d"] == "256 * 2 ** 20"


def test_other_defaults_stay(package):
    found = defaults(package["loss"])
    assert (found["a"], found["e"], found["f"]) == ("None", "1.5", "print")


def test_dataclasses_too(package):
    found = defaults(package["Loss.__init__"])
    assert (found["ignored"], found["budget"]) == ("-100", "256 * 2 ** 20")


def test_roles_are_left_out(package):
    assert package["loss"].docstring.value == "Like `other` of `Loss`."


def test_the_defaults_of_the_package():
    path = ROOT / "docs" / "site" / "defaults.py"
    found = griffe.load(
        "cut_cross_entropy", search_paths=[ROOT], extensions=griffe.load_extensions(str(path))
    )
    module = found["linear_cross_entropy"]
    for function in (module["linear_cross_entropy"], module["LinearCrossEntropy.__init__"]):
        shown = defaults(function)
        assert shown["ignore_index"] == "-100"
        assert shown["impl"] == "'auto'"
        assert shown["memory_budget"] == "256 * 2 ** 20"
