"""Calls inside the kernels' package, read from its source: arguments are named."""

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "cut_cross_entropy" / "kernels"
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST = 5  # positional arguments


@functools.cache
def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


@functools.cache
def own_functions() -> set[str]:
    """Return the names of the functions and classes that the package defines."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    nodes = (node for path in MODULES for node in ast.walk(ast.parse(path.read_text())))
    return {node.name for node in nodes if isinstance(node, kinds)}


def name_of(call: ast.Call) -> str:
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_few_arguments_are_positional(path):
    own = own_functions() | {"cls", "Problem", "Gradients", "KernelState"}
    long = [
        f"line {call.lineno}: {name_of(call)}"
        for call in calls(path)
        if name_of(call) in own and len(call.args) > MOST
    ]
    assert not long, long


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
