"""Abilities of the machine: Triton's version, and why kernels cannot be used."""

import importlib
import sys
import types

import pytest
import torch

from cut_cross_entropy import device_support, tl_utils
from cut_cross_entropy.dispatch import choose_impl


@pytest.fixture
def fake_triton(monkeypatch):
    """A function that makes the import of Triton give a module of some version, or fail."""

    def install(version):
        module = None if version is None else types.ModuleType("triton")
        if module is not None and version:
            module.__version__ = version
        monkeypatch.setitem(sys.modules, "triton", module)  # None makes the import fail
        device_support.triton_version.cache_clear()

    yield install
    monkeypatch.undo()
    device_support.triton_version.cache_clear()


@pytest.mark.parametrize(
    ("text", "version"),
    {
        "3.3.1": (3, 3, 1),
        "3.6.0+git1a2b": (3, 6, 0),
        "3.4.0rc1": (3, 4, 0),
        "3.4.0.post2": (3, 4, 0),
        "3": (3,),
        "main": (),
    }.items(),
)
def test_version_tuple(text, version):
    assert device_support.version_tuple(text) == version


@pytest.mark.parametrize(
    ("installed", "asked", "answer"),
    [
        ("3.2.0", "3.2.0", True),
        ("3.10.0", "3.9.0", True),  # numbers, not text
        ("3.1.9", "3.2.0", False),
        (None, "1.0.0", False),
    ],
)
def test_triton_greater_or_equal(fake_triton, installed, asked, answer):
    fake_triton(installed)
    assert tl_utils.is_triton_greater_or_equal(asked) is answer
    assert tl_utils.is_triton_greater_or_equal_3_2_0() is (installed in ("3.2.0", "3.10.0"))


@pytest.mark.parametrize(
    ("version", "device", "interpreted", "reason"),
    [
        (None, "cuda", "0", "Triton cannot be imported"),
        ("3.2.0", "cuda", "0", "Triton 3.2.0 is older than 3.3"),
        ("3.3.0", "cuda", "0", None),
        ("3.3.0", "cpu", "1", None),
        ("3.3.0", "cpu", "0", "the kernels need a GPU and the tensors are on 'cpu'"),
        ("3.3.0", "mps", "1", "the kernels need a GPU and the tensors are on 'mps'"),
    ],
)
def test_kernels_unavailable(fake_triton, monkeypatch, version, device, interpreted, reason):
    fake_triton(version)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    assert device_support.kernels_unavailable(torch.device(device)) == reason


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((7, 5), "compute capability 8.0, and this one has 7.5"),
        ((8, 0), None),
        ((10, 0), None),
        (None, None),
    ],
)
def test_older_gpus(fake_triton, monkeypatch, capability, reason):
    """``auto`` goes on without the kernels there; their name is refused."""
    fake_triton("3.6.0")
    monkeypatch.setattr(device_support, "_capability", lambda index: capability)
    gpu = torch.device("cuda", 0)
    assert (reason or "") in (device_support.kernels_unavailable(gpu) or "")
    chosen = choose_impl("auto", gpu, torch.float16)
    assert chosen == ("cce" if reason is None else "chunked")
    if reason is not None:
        with pytest.raises(RuntimeError, match=f"impl='cce' cannot run here: .*{reason}"):
            choose_impl("cce", gpu, torch.float16)


def test_a_capability_is_that_of_an_nvidia_gpu(monkeypatch):
    ask = device_support._capability.__wrapped__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, index))
    monkeypatch.setattr(torch.version, "hip", None)
    assert ask(5) == (7, 5)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert ask(5) is None
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ask(5) is None


@pytest.mark.parametrize("version", [None, "3.2.0", "3.6.0"])
def test_compiled_code_chooses_as_eager_code_does(fake_triton, monkeypatch, version):
    importlib.import_module("torch._dynamo")  # with what it really finds
    # Where PyTorch has found Triton, Dynamo imports parts of it while it traces.
    monkeypatch.setattr("torch.utils._triton.has_triton_package", lambda: False)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    fake_triton(version)
    gpu = torch.device("cuda", 0)

    def chosen(x):
        return x + (1 if choose_impl("auto", gpu, torch.bfloat16) == "cce" else 2)

    torch._dynamo.reset()
    x = torch.zeros(1)
    compiled = torch.compile(chosen, backend="eager", fullgraph=True)
    assert compiled(x).item() == chosen(x).item() == (1 if version == "3.6.0" else 2)
    torch._dynamo.reset()


def test_triton_without_a_version(fake_triton):
    fake_triton("")
    assert device_support.triton_version() == (0,)
    assert device_support.has_triton()


@pytest.mark.parametrize(
    ("torch_version", "hip", "device", "expected"),
    [
        ("2.7.1+cu126", None, "cuda", False),
        ("2.8.0", None, "cuda", True),
        ("2.11.0a0+git12", None, "cuda", True),
        ("2.13.0+cpu", None, "cpu", False),
        ("2.9.1+rocm6.4", "6.4", "cuda", False),
        ("2.10.0+rocm7.0", "7.0", "cuda", True),
    ],
)
def test_wide_products(torch_version, hip, device, expected, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert device_support.has_wide_products(torch.device(device)) is expected


@pytest.mark.parametrize(
    ("capability", "multiprocessors", "expected"),
    [
        ((9, 0), 132, 1.0),
        ((9, 0), 66, 0.5),
        ((8, 0), 132, 0.5),
        ((10, 0), 148, 148 / 66),
        (None, 1, 0),
    ],
)
def test_relative_throughput(capability, multiprocessors, expected, monkeypatch):
    """Of an H100, half of one, an A100 of that size, a B200, and a device of another vendor."""
    monkeypatch.setattr(device_support, "_capability", lambda index: capability)
    properties = types.SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert device_support.relative_throughput(torch.device("cuda", 0)) == pytest.approx(expected)
    assert device_support.relative_throughput(torch.device("cpu")) == 0
