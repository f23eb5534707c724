"""Launches of machine code that an earlier launch has compiled."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from cut_cross_entropy.kernels import launch
from cut_cross_entropy.kernels.triton import powers


class Kernel:
    """Stands for Triton's: notes what it compiled, and what was launched without it."""

    arg_names = ("x_ptr", "y_ptr", "N", "D", "softcap", "BLOCK")
    do_not_specialize = ("N", "y_ptr")

    def __init__(self):
        self.compiled, self.again = 0, []

    @staticmethod
    def fn(x_ptr, y_ptr, N, D, softcap, BLOCK: tl.constexpr):
        """Only its annotations are read."""

    def __getitem__(self, grid):
        def compile_and_launch(**arguments):
            self.compiled += 1
            return Code(self, self.compiled)

        return compile_and_launch


class Code:
    """Stands for the machine code of one variant."""

    def __init__(self, kernel, number):
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid):
        return lambda *values: self.kernel.again.append((self.number, grid, values))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_launched", {})
    return Kernel()


FLOATS = torch.zeros(64)
FIRST = {"y_ptr": FLOATS, "x_ptr": FLOATS, "N": 5, "D": 32, "softcap": None, "BLOCK": 8}


def again(kernel, **changes):
    launch._launch_again(kernel, (3,), {**FIRST, "num_warps": 4, **changes})


def test_the_same_kind_is_launched_again_with_all_values_in_order(kernel):
    again(kernel)
    other = torch.ones(99)
    again(kernel, x_ptr=other, N=16, D=64)
    assert kernel.compiled == 1
    assert kernel.again == [(1, (3, 1, 1), (other, FLOATS, 16, 64, None, 8))]


@pytest.mark.parametrize(
    "changes",
    [
        {"x_ptr": FLOATS[1:]},  # not aligned to 16 bytes
        {"x_ptr": FLOATS.half()},
        {"x_ptr": None},
        {"D": 33},
        {"D": 1},
        {"N": 2**31},
        {"softcap": 2.0},
        {"BLOCK": 16},
        {"num_warps": 8},
    ],
    ids=str,
)
def test_another_kind_is_compiled(kernel, changes):
    for _ in range(2):
        again(kernel)
        again(kernel, **changes)
    assert kernel.compiled == 2
    assert [number for number, *_ in kernel.again] == [1, 2]


@pytest.mark.parametrize("changes", [{"y_ptr": FLOATS[1:]}, {"N": 16}, {"N": 1}], ids=str)
def test_what_is_not_specialised_compiles_nothing(kernel, changes):
    again(kernel)
    again(kernel, **changes)
    assert kernel.compiled == 1


@pytest.mark.parametrize("device", [0, 1])
def test_devices_have_their_own_code(kernel, monkeypatch, device):
    again(kernel)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
    again(kernel)
    assert kernel.compiled == 1 + device


def test_sizes_are_as_tritons():
    for a in range(40):
        for b in range(1, 9):
            assert launch.cdiv(a, b) == triton.cdiv(a, b)
        assert launch.next_power_of_2(a) == max(1, triton.next_power_of_2(a))


@pytest.mark.interpret
def test_rows_of_a_table_are_not_compiled_for_their_alignment():
    """They are aligned in some chunks of a batch only, where V is not a multiple of 8."""
    kernel = powers.strip_sums_kernel
    if not hasattr(kernel, "kwargs"):
        pytest.skip("interpreted kernels of this Triton do not know what is specialised")
    assert "strips_ptr" in kernel.kwargs["do_not_specialize"]


def test_attributes_as_arguments():
    source = SimpleNamespace(lse=1, a=2, other=3)
    assert launch.pointers(source, "lse a") == {"lse_ptr": 1, "a_ptr": 2}
    assert launch.pointers(source, "lse a", "grad_{}_ptr") == {"grad_lse_ptr": 1, "grad_a_ptr": 2}
    assert launch.pointers(None, "lse a") == {"lse_ptr": None, "a_ptr": None}
