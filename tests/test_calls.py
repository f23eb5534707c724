"""Calls of our own functions, read from the source: more than a few arguments are named."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("cut_cross_entropy", "training", "experiments", "docs", "research", "examples")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
MOST = 5  # positional arguments
POSITIONAL = {"apply", "Arguments"}
"""Of PyTorch's functions, which take no names; and a list of any length."""


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def own_names() -> set[str]:
    """Return the names of all functions and classes."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for path in FILES for node in ast.walk(tree(path)) if isinstance(node, kinds)}


def foreign_names(path: Path) -> set[str]:
    """Return names that a file imports from elsewhere."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            if (node.module or "").split(".")[0] not in FOLDERS:
                found |= {name.asname or name.name for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.asname or name.name for name in node.names}
    return found


def long_calls(path: Path) -> list[str]:
    own, foreign, found = own_names() - POSITIONAL, foreign_names(path), []
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call) or len(node.args) <= MOST:
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        owner = getattr(getattr(node.func, "value", node.func), "id", name)
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        if name in own and owner not in foreign and not starred:
            found.append(f"line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_few_arguments_are_positional(path):
    assert not long_calls(path), "name all after the fifth"


def test_long_calls_are_found(tmp_path):
    path = tmp_path / "calls.py"
    source = "from elsewhere import vocabulary_pass\nraise_bound(1, 2, 3, 4, 5, 6)\n"
    path.write_text(source + "vocabulary_pass(1, 2, 3, 4, 5, 6)\nraise_bound(1, 2)\n")
    assert long_calls(path) == ["line 2: raise_bound"]
