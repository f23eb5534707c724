"""Launches of kernels, read from the source: their arguments are named."""

import ast
import functools
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "cut_cross_entropy" / "kernels"
MODULES = sorted(PACKAGE.rglob("*.py"))


@functools.cache
def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def imports(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return {f"{node.module}.{name.name}" for node in froms for name in node.names}


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


def test_backends_hold_the_kernels_and_import_no_stage():
    ours, backend = "cut_cross_entropy.", "cut_cross_entropy.kernels.triton."
    for path in MODULES:
        found = imports(path)
        compiled = "@triton.jit" in path.read_text()
        if path.is_relative_to(PACKAGE / "triton"):
            stage = PACKAGE / path.relative_to(PACKAGE / "triton")
            assert stage.exists() or path.stem == "primitives", f"{path} has no stage of its path"
            assert all(name.startswith(backend) for name in found if name.startswith(ours)), path
        else:
            assert not compiled, f"{path}: kernels belong in a backend's folder"
    users = [path for path in PACKAGE.parent.rglob("*.py") if path not in MODULES]
    assert not [path for path in users if any(name.startswith(backend) for name in imports(path))]
