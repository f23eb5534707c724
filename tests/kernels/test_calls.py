"""Launches of kernels, read from the source: their arguments are named."""

import ast
import functools
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "cut_cross_entropy" / "kernels"
MODULES = sorted(PACKAGE.rglob("*.py"))


@functools.cache
def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def name_of(call: ast.Call) -> str:
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def test_kernels_are_launched_by_keyword():
    launches = [call for path in MODULES for call in calls(path) if name_of(call) == "launch"]
    assert len(launches) > 15
    assert all(len(call.args) == 2 for call in launches), "a kernel and its grid"
    direct = [
        call
        for path in MODULES
        for call in calls(path)
        if isinstance(call.func, ast.Subscript) and path.stem != "launch"
    ]
    assert not direct, "kernels are launched by launch(), which can plan them"
