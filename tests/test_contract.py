"""Every public name that existing code imports, called as its users call it.

The names and orders are those of Apple's releases and of the forks that trainers use; they are a
promise, so they are written out here and not read from the package.
"""

import importlib
import inspect

import pytest
import torch
import torch.nn.functional as F

from tests.support import make_problem

SYMBOLS = {
    "cut_cross_entropy": (
        "linear_cross_entropy",
        "LinearCrossEntropy",
        "LinearCrossEntropyImpl",
        "VocabParallelOptions",
        "__version__",
    ),
    "cut_cross_entropy.linear_cross_entropy": (
        "linear_cross_entropy",
        "LinearCrossEntropy",
        "LCE_IMPL_DEFAULT",
    ),
    "cut_cross_entropy.cce_utils": ("LinearCrossEntropyImpl", "CCEPreset", "CCEPresets"),
    "cut_cross_entropy.constants": ("IGNORE_INDEX",),
    "cut_cross_entropy.utils": ("compute_z_loss", "softcapping"),
    "cut_cross_entropy.tl_utils": (
        "is_triton_greater_or_equal",
        "is_triton_greater_or_equal_3_2_0",
    ),
    "cut_cross_entropy.torch_compile": ("torch_compile_linear_cross_entropy",),
    "cut_cross_entropy.vocab_parallel": ("VocabParallelOptions",),
    "cut_cross_entropy.vocab_parallel.utils": (
        "VocabParallelOptions",
        "partition_n_into_range",
    ),
}


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in SYMBOLS.items() for name in names]
)
def test_symbol_exists(module, name):
    # A submodule has the name of a function; the attribute of the package must be the function.
    assert not inspect.ismodule(getattr(importlib.import_module(module), name))


PARAMETERS = {
    "e": inspect.Parameter.empty,
    "c": inspect.Parameter.empty,
    "targets": inspect.Parameter.empty,
    "bias": None,
    "ignore_index": -100,
    "softcap": None,
    "reduction": "mean",
    "shift": 0,
    "return_lse": False,
    "filter_eps": "auto",
    "accum_e_fp32": False,
    "accum_c_fp32": False,
    "filter_e_grad": True,
    "filter_c_grad": True,
    "impl": "auto",
    "vocab_parallel_options": None,
}


def test_signature():
    from cut_cross_entropy import linear_cross_entropy
    from cut_cross_entropy.linear_cross_entropy import LCE_IMPL_DEFAULT

    expected = {**PARAMETERS, "impl": LCE_IMPL_DEFAULT}
    got = inspect.signature(linear_cross_entropy).parameters
    ours = {k: p.default for k, p in got.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY}
    assert ours == expected
    assert list(ours) == list(expected)


@pytest.fixture
def call():
    """The tensors of a small call and the loss that plain PyTorch has for them."""
    problem = make_problem((2, 5))
    logits = (problem.e @ problem.c.T).flatten(0, 1)
    return problem, F.cross_entropy(logits, problem.targets.flatten())


def test_basic_call(call):
    from cut_cross_entropy import linear_cross_entropy

    problem, expected = call
    torch.testing.assert_close(
        linear_cross_entropy(problem.e, problem.c, problem.targets), expected
    )


def test_every_option_by_keyword(call):
    from cut_cross_entropy import linear_cross_entropy

    problem, expected = call
    loss, lse = linear_cross_entropy(
        e=problem.e,
        c=problem.c,
        targets=problem.targets,
        bias=None,
        ignore_index=-100,
        softcap=None,
        reduction="mean",
        shift=0,
        return_lse=True,
        filter_eps="high",
        accum_e_fp32=True,
        accum_c_fp32=True,
        filter_e_grad=False,
        filter_c_grad=False,
        impl="auto",
        vocab_parallel_options=None,
    )
    torch.testing.assert_close(loss, expected)
    assert lse.shape == problem.targets.shape


def test_fourth_positional_int_is_ignore_index(call):
    from cut_cross_entropy import linear_cross_entropy

    problem, _ = call
    label = int(problem.targets[problem.targets >= 0][0])
    targets = problem.targets.clamp_min(0)
    by_position = linear_cross_entropy(problem.e, problem.c, targets, label, reduction="none")
    by_name = linear_cross_entropy(
        problem.e, problem.c, targets, ignore_index=label, reduction="none"
    )
    assert torch.equal(by_position, by_name)
    assert torch.count_nonzero(by_position[targets == label]) == 0


def test_module(call):
    from cut_cross_entropy import LinearCrossEntropy, linear_cross_entropy

    problem, expected = call
    torch.testing.assert_close(
        LinearCrossEntropy()(problem.e, problem.c, problem.targets), expected
    )
    bias = torch.randn(300)
    options = {"softcap": 20.0, "reduction": "sum", "shift": True, "impl": "reference"}
    module = LinearCrossEntropy(**options)
    assert repr(module) == (
        "LinearCrossEntropy(softcap=20.0, reduction='sum', shift=True, impl='reference')"
    )
    assert not list(module.parameters())
    for got in (
        module(problem.e, problem.c, problem.targets, bias),
        module(problem.e, problem.c, problem.targets, bias=bias),
        LinearCrossEntropy(-100, 20.0, "sum", 1, impl="reference")(
            problem.e, problem.c, problem.targets, bias
        ),
    ):
        expected = linear_cross_entropy(problem.e, problem.c, problem.targets, bias, **options)
        assert torch.equal(got, expected)


MEMBERS = (
    "CCE",
    "TORCH_COMPILE",
    "CCE_KAHAN_FULL_C",
    "CCE_KAHAN_FULL_E",
    "CCE_EXACT",
    "CCE_KAHAN_FULL_C_FULL_E",
    "CCE_KAHAN_FULL",
)


def test_enum():
    from cut_cross_entropy import LinearCrossEntropyImpl
    from cut_cross_entropy.cce_utils import LinearCrossEntropyImpl as Same

    assert Same is LinearCrossEntropyImpl
    assert [(x.name, int(x)) for x in LinearCrossEntropyImpl] == [
        (name, value) for value, name in enumerate(MEMBERS, start=1)
    ]
    assert LinearCrossEntropyImpl["CCE_EXACT"] is LinearCrossEntropyImpl(5)


@pytest.mark.parametrize("impl", ["auto", "chunked", "reference", "torch_compile"])
def test_names_that_run_everywhere(call, impl):
    from cut_cross_entropy import linear_cross_entropy

    problem, expected = call
    loss = linear_cross_entropy(problem.e, problem.c, problem.targets, impl=impl)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", [*MEMBERS, "CCE_KAHAN"])
@pytest.mark.parametrize("as_member", [False, True], ids=["name", "member"])
def test_names_of_releases(call, name, as_member, monkeypatch):
    """Each runs where it can; on a CPU the kernels are refused, never replaced silently."""
    from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem, expected = call
    if as_member and name == "CCE_KAHAN":
        assert name not in LinearCrossEntropyImpl.__members__  # a string only, as in releases
        return
    impl = LinearCrossEntropyImpl[name] if as_member else name.lower()
    if name == "TORCH_COMPILE":
        loss = linear_cross_entropy(problem.e, problem.c, problem.targets, impl=impl)
        torch.testing.assert_close(loss, expected)
        return
    with pytest.raises(RuntimeError, match=f"impl='{name.lower()}' cannot run here"):
        linear_cross_entropy(problem.e, problem.c, problem.targets, impl=impl)


def test_default_implementation():
    import platform

    from cut_cross_entropy.linear_cross_entropy import LCE_IMPL_DEFAULT

    mac = platform.system() == "Darwin"
    assert ("torch_compile" if mac else "auto") == LCE_IMPL_DEFAULT


@pytest.mark.parametrize("system", ["Darwin", "Linux"])
def test_default_implementation_follows_the_system(monkeypatch, system):
    from pathlib import Path

    from cut_cross_entropy import options

    monkeypatch.setattr("platform.system", lambda: system)
    names = {"__name__": "options_again"}
    exec(Path(options.__file__).read_text(), names)
    assert names["LCE_IMPL_DEFAULT"] == ("torch_compile" if system == "Darwin" else "auto")


OPTIONS_ASKED = {
    "filter_eps": 0.25,
    "accum_e_fp32": False,
    "accum_c_fp32": False,
    "filter_e_grad": True,
    "filter_c_grad": True,
}
KAHAN = {"accum_e_fp32": True, "accum_c_fp32": True}


@pytest.mark.parametrize(
    ("impl", "fixed"),
    {
        "cce": {},
        "cce_kahan": KAHAN,
        "cce_kahan_full_c": {**KAHAN, "filter_eps": "auto", "filter_c_grad": False},
        "cce_kahan_full_e": {**KAHAN, "filter_eps": "auto", "filter_e_grad": False},
        "cce_exact": {**KAHAN, "filter_eps": None},
        "cce_kahan_full_c_full_e": {**KAHAN, "filter_eps": None},
        "cce_kahan_full": {**KAHAN, "filter_eps": None},
    }.items(),
)
def test_presets(impl, fixed):
    from cut_cross_entropy.cce_utils import CCEPreset, CCEPresets

    assert impl in CCEPresets.names
    asked = CCEPreset(**OPTIONS_ASKED)
    built = CCEPresets.build_for_impl(impl, asked)
    assert built == {**OPTIONS_ASKED, **fixed}
    assert asked == OPTIONS_ASKED
    assert len(CCEPresets.names) == 7


def test_ignore_index():
    from cut_cross_entropy.constants import IGNORE_INDEX

    assert IGNORE_INDEX == -100


@pytest.mark.parametrize("shift", [False, True, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_z_loss_of_a_loss(shift, reduction):
    """As trainers call it: with the lse and the labels of the same call."""
    from cut_cross_entropy import linear_cross_entropy
    from cut_cross_entropy.utils import compute_z_loss

    problem = make_problem((3, 5))
    e, c, targets = problem.e.requires_grad_(), problem.c.requires_grad_(), problem.targets
    _, lse = linear_cross_entropy(e, c, targets, shift=shift, return_lse=True)
    got = compute_z_loss(lse, targets, shift=shift, ignore_index=-100, reduction=reduction)

    kept = targets[..., int(shift) :] != -100
    squares = (e @ c.T).logsumexp(-1)[..., : 5 - int(shift)].square() * kept
    expected = {"mean": squares.sum() / kept.sum(), "sum": squares.sum(), "none": squares}
    torch.testing.assert_close(got, expected[reduction])
    ours = torch.autograd.grad(got.sum(), (e, c))
    theirs = torch.autograd.grad(expected[reduction].sum(), (e, c))
    torch.testing.assert_close(ours, theirs)


def test_softcapping():
    from cut_cross_entropy.utils import softcapping

    logits = torch.tensor([-1e9, 0.0, 1.0, 1e9], dtype=torch.bfloat16)
    capped = softcapping(logits, 30.0)
    assert capped.dtype == torch.bfloat16
    assert capped.tolist() == [-30, 0, 1, 30]


def test_tl_utils_attributes_are_assignable(monkeypatch):
    """NeMo replaces both checks by its own."""
    from cut_cross_entropy import tl_utils

    assert isinstance(tl_utils.is_triton_greater_or_equal("3.2.0"), bool)
    assert isinstance(tl_utils.is_triton_greater_or_equal_3_2_0(), bool)
    for name in ("is_triton_greater_or_equal", "is_triton_greater_or_equal_3_2_0"):
        monkeypatch.setattr(tl_utils, name, lambda *arguments: "replaced")
    assert tl_utils.is_triton_greater_or_equal("9") == "replaced"


def test_torch_compile_function(call):
    from cut_cross_entropy.torch_compile import torch_compile_linear_cross_entropy

    problem, expected = call
    loss = torch_compile_linear_cross_entropy(problem.e, problem.c, problem.targets)
    torch.testing.assert_close(loss, expected)
    shifted, lse = torch_compile_linear_cross_entropy(
        problem.e, problem.c, problem.targets, shift=1, return_lse=True, reduction="none"
    )
    assert shifted.shape == lse.shape == (2, 4)
