"""Installing and removing adapters, and refusing what they do not know."""

import subprocess
import sys
import types

import pytest
import torch

from cut_cross_entropy import adapters
from cut_cross_entropy.adapters import seam as seam_module
from cut_cross_entropy.adapters.seam import Adapter, OutputLayer, Seam


@pytest.fixture
def trainer(monkeypatch):
    """A package with a function that two of its modules have."""
    package, module = types.ModuleType("trainer"), types.ModuleType("trainer.utils")
    other = types.ModuleType("trainer.other")

    def logprobs(hidden, weight, targets):
        return "theirs"

    class Function:
        @staticmethod
        def forward(ctx, hidden, weight, targets):
            return "theirs"

        @classmethod
        def apply(cls, *args):
            return cls.forward(None, *args)

    module.logprobs = other.found = logprobs
    module.Function, module.bound = Function, Function.apply
    for one in (package, module, other):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    package.__path__ = []
    return types.SimpleNamespace(utils=module, other=other)


def seam(**changes):
    known = {
        "package": "trainer",
        "version": "1.2.3",
        "module": "trainer.utils",
        "name": "logprobs",
        "parameters": ("hidden", "weight", "targets"),
        "copies": (("trainer.other", "found"), ("trainer.late", "logprobs")),
    }
    return Seam(**known | changes)


def installed(*replacements):
    return Adapter({}).install(*replacements)


def ours(hidden, weight, targets):
    return "ours"


def test_replaced_and_put_back_wherever_the_name_was(trainer, monkeypatch):
    original = trainer.utils.logprobs
    with installed((seam(), ours)):
        assert trainer.utils.logprobs(1, 2, 3) == trainer.other.found(1, 2, targets=3) == "ours"
        late = types.ModuleType("trainer.late")  # imported after the name was replaced
        late.logprobs = trainer.utils.logprobs
        monkeypatch.setitem(sys.modules, "trainer.late", late)
    assert trainer.utils.logprobs is trainer.other.found is late.logprobs is original


@pytest.mark.parametrize("name", ["Function", "bound"])
def test_functions_of_autograd(trainer, name):
    known = seam(name=name, method="forward", copies=())
    with installed((known, ours)):
        replaced = getattr(trainer.utils, name)
        assert (replaced.apply if name == "Function" else replaced)(1, 2, 3) == "ours"
    assert trainer.utils.Function.apply(1, 2, 3) == trainer.utils.bound(1, 2, 3) == "theirs"


def test_what_somebody_else_has_put_there_stays(trainer):
    adapter = installed((seam(), ours))
    other = trainer.utils.logprobs = lambda hidden, weight, targets: "another"
    adapter.remove()
    assert trainer.utils.logprobs is other
    adapter.remove()  # once is enough
    assert trainer.utils.logprobs is other


def test_removed_after_an_error(trainer):
    original = trainer.utils.logprobs
    with pytest.raises(KeyError), installed((seam(), ours)):
        raise KeyError
    assert trainer.utils.logprobs is original


def test_only_one_at_a_time(trainer):
    with installed((seam(), ours)):
        message = r"trainer\.utils\.logprobs is replaced already: remove the adapter"
        with pytest.raises(RuntimeError, match=message):
            installed((seam(), ours))
        assert trainer.utils.logprobs(1, 2, 3) == "ours"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "gone"}, r"has no trainer\.utils\.gone\."),
        ({"module": "trainer.gone"}, r"has no module trainer\.gone\."),
        (
            {"parameters": ("hidden", "targets")},
            r"has trainer\.utils\.logprobs with the parameters \(hidden, weight, targets\) instead "
            r"of \(hidden, targets\)\.",
        ),
    ],
)
def test_a_seam_that_has_moved(trainer, changes, message):
    """And nothing is replaced, not even what was found."""
    original = trainer.utils.logprobs
    with pytest.raises(
        RuntimeError,
        match=f"trainer .version unknown. {message} This adapter was "
        r"written for trainer 1\.2\.3: use that version",
    ):
        installed((seam(), ours), (seam(**changes), ours))
    assert trainer.utils.logprobs is original


def test_a_version_is_named_if_there_is_one(trainer):
    with pytest.raises(RuntimeError, match=r"pytest \d+\.\d.* has no trainer\.utils\.gone"):
        installed((seam(package="pytest", name="gone"), ours))


def test_a_package_that_is_not_installed():
    missing = seam(package="no-such-trainer", module="no_such_trainer.utils")
    with pytest.raises(ImportError, match=r"no-such-trainer is not installed; .* 1\.2\.3"):
        installed((missing, ours))


def test_a_package_whose_own_import_fails(trainer, tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_dependency'"):
        installed((seam(module="needs_more"), ours))


def test_unknown_options():
    with pytest.raises(
        TypeError, match=r"unknown option 'filter'; an adapter takes impl, filter_eps"
    ):
        adapters.trl(filter=3)


def test_a_divergence_takes_the_options_it_has(monkeypatch):
    taken = {}
    monkeypatch.setattr(
        seam_module, "linear_divergence", lambda *inputs, **arguments: taken.update(arguments)
    )
    options = {"impl": "chunked", "filter_eps": None, "memory_budget": 2**20}
    layer = OutputLayer(torch.zeros(2, 3), torch.zeros(4, 3))
    capped = layer._replace(softcap=30.0, logit_scale=2.0)
    Adapter({**options, "filter_mass": 0.9}).compute_divergence(layer, capped, beta=0.5)
    student = {"student_bias": None, "student_softcap": None, "student_logit_scale": 1.0}
    teacher = {"teacher_bias": None, "teacher_softcap": 30.0, "teacher_logit_scale": 2.0}
    assert taken == {**options, **student, **teacher, "beta": 0.5}


def test_the_package_imports_no_trainer():
    code = """
import sys
import cut_cross_entropy
cut_cross_entropy.adapters.trl
print(sorted({"trl", "transformers", "liger_kernel", "verl"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
