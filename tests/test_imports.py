"""The import of the package is cheap, and works without Triton."""

import ast
import graphlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BLOCK_TRITON = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "transformers"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
try:
    import triton
except ImportError:
    pass
else:
    raise SystemExit("the blocker does not block")
"""

TRAIN = """
import torch
from cut_cross_entropy import linear_cross_entropy

torch.manual_seed(0)
e, c = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
targets = torch.tensor([0, 1, 2, 3, -100, 8])
expected = torch.nn.functional.cross_entropy(e @ c.T, targets)
loss = linear_cross_entropy(e, c, targets, impl=IMPL)
torch.testing.assert_close(loss, expected)
loss.backward()
assert e.grad.abs().sum() > 0 and c.grad.abs().sum() > 0
print("computed")
"""


def python(code, warnings="error"):
    """Words that ``code`` prints in a fresh process, run from the root of the repository."""
    done = subprocess.run(
        [sys.executable, "-W", warnings, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_does_not_import_triton_or_transformers():
    """Nor the compiler, which takes a second: a loss that is not compiled needs none."""
    code = """
    import sys
    import torch
    before = set(sys.modules)
    import cut_cross_entropy, cut_cross_entropy.cce_utils, cut_cross_entropy.constants
    import cut_cross_entropy.tl_utils, cut_cross_entropy.torch_compile, cut_cross_entropy.utils
    import cut_cross_entropy.vocab_parallel.utils, cut_cross_entropy.kernels
    print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
    print("torch._dynamo" in set(sys.modules) - before)
    """
    *imported, compiler = python(code)
    assert "cut_cross_entropy" in imported
    assert not {"triton", "transformers"} & set(imported)
    assert compiler == "False"


def test_without_triton():
    impls = ("auto", "chunked", "reference")  # one process, whose start takes longest
    code = BLOCK_TRITON + "".join(TRAIN.replace("IMPL", repr(impl)) for impl in impls)
    assert python(code) == ["computed"] * 3


def test_torch_compile_without_triton():
    """On a CPU the compiler writes C++, and needs no Triton."""
    code = BLOCK_TRITON + TRAIN.replace("IMPL", "'torch_compile'")
    # PyTorch's compiler warns about its own parts when it is imported.
    assert python(code, warnings="default") == ["computed"]


def test_kernels_without_triton_are_refused():
    code = """
    import torch
    from cut_cross_entropy import linear_cross_entropy
    from cut_cross_entropy.tl_utils import is_triton_greater_or_equal
    try:
        linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1]), impl="cce")
    except RuntimeError as error:
        print(error)
    print(is_triton_greater_or_equal("1.0"))
    """
    words = " ".join(python(BLOCK_TRITON + textwrap.dedent(code)))
    assert words.startswith("impl='cce' cannot run here: Triton cannot be imported")
    assert "use impl='auto', 'chunked', 'torch_compile' or 'reference'" in words
    assert words.endswith("False")


PACKAGE = Path(__file__).parent.parent / "cut_cross_entropy"


def imports_of(tree, package, modules):
    """Modules of ours that a module imports, in functions too, except for type checkers."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: 1 - node.level or None], base]).rstrip(".")
            # A name is a module of its own, or it is made by the module that it comes from.
            names = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in modules else base for name in names]
        else:
            continue
        yield from (name for name in names if name in modules)


def import_graph(root):
    files = {}
    for path in root.rglob("*.py"):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        files[".".join(parts).removesuffix(".__init__")] = path
    graph = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = set(imports_of(tree, package, files.keys())) - {name}
    return graph


def test_no_import_circle():
    graph = import_graph(PACKAGE)
    assert len(graph) > 50
    assert "cut_cross_entropy.options" in graph["cut_cross_entropy.linear_cross_entropy"]
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_a_circle_would_be_found(tmp_path):
    package = tmp_path / "circular"
    package.mkdir()
    (package / "__init__.py").write_text("from circular import a\n")
    (package / "a.py").write_text("def f():\n    from .b import g\n")
    (package / "b.py").write_text("from typing import TYPE_CHECKING\nimport circular.c\n")
    (package / "c.py").write_text("if TYPE_CHECKING:\n    from circular.a import f\n")
    assert import_graph(package)["circular.c"] == set()
    list(graphlib.TopologicalSorter(import_graph(package)).static_order())
    (package / "c.py").write_text("from circular.a import f\n")
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(import_graph(package)).static_order())
