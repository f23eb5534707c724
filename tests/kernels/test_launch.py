"""Launches of machine code that an earlier launch has compiled."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from cut_cross_entropy.kernels import launch
from cut_cross_entropy.kernels.triton import powers


class Kernel:
    """Stands for Triton's: notes what it compiled, and what was launched without it.

    ``again`` has the launches by what Triton's launcher calls, ``told`` those by Triton.
    """

    __name__ = "kernel"
    arg_names = ("x_ptr", "y_ptr", "N", "D", "softcap", "BLOCK")
    do_not_specialize = ("N", "y_ptr")

    def __init__(self, launcher):
        self.compiled, self.again, self.told, self.launcher = 0, [], [], launcher

    @staticmethod
    def fn(x_ptr, y_ptr, N, D, softcap, BLOCK: tl.constexpr):
        """Only its annotations are read."""

    def __getitem__(self, grid):
        def compile_and_launch(**arguments):
            self.compiled += 1
            return Code(self, self.compiled)

        return compile_and_launch


class Code:
    """Stands for the machine code of one variant, with what all of Triton 3.3 to 3.9 have."""

    function, packed_metadata = "function", ("packed",)

    def __init__(self, kernel, number):
        self.kernel, self.number = kernel, number
        self.run = kernel.launcher()
        self.run.launch = self.launch

    def __getitem__(self, grid):
        return lambda *values: self.kernel.told.append((self.number, grid, values))

    def launch(self, x, y, z, *arguments):
        values = arguments[-1] if self.run.as_tuple else arguments[-len(self.kernel.arg_names) :]
        assert arguments == self.run.arguments("stream of 0", "function", ("packed",), *values)
        self.kernel.again.append((self.number, (x, y, z), values))


class Triton33:
    """Stands for the launcher of Triton 3.3: what it passes on, after the grid."""

    global_scratch_size, as_tuple = 0, False

    def __call__(self, x, y, z, stream, function, *rest):
        metadata, *hooks = rest[:4]
        assert hooks == [None] * 3
        self.launch(x, y, z, *self.arguments(stream, function, metadata, *rest[4:]))

    def arguments(self, stream, function, metadata, *values):
        return (stream, function, False, None, metadata, None, None, None, *values)


class Triton36(Triton33):
    """That of Triton 3.6."""

    profile_scratch_size = 0

    def arguments(self, stream, function, metadata, *values):
        return (stream, function, False, True, None, None, metadata, None, None, None, *values)


class Triton39(Triton36):
    """That of Triton 3.9."""

    as_tuple = True

    def arguments(self, stream, function, metadata, *values):
        hooks, scratch = (None,) * 3, (None,) * 2
        of_signature = (["annotation"], b"signature")
        return (stream, function, False, True, metadata, *hooks, *scratch, *of_signature, values)


class WithScratch(Triton36):
    """One whose kernels need memory of their own."""

    profile_scratch_size = 16


class Instrumented(Triton39):
    """One that adds arguments of its own."""

    def arguments(self, *arguments):
        *first, values = super().arguments(*arguments)
        return (*first, (*values, "more"))


class Unknown(Triton36):
    """One that takes other arguments."""

    def __call__(self, grid, stream, function):
        raise AssertionError("it was given too many")


@pytest.fixture
def kernel(request, monkeypatch):
    on_device(monkeypatch, 0)
    monkeypatch.setattr(launch, "_layouts", {})
    return Kernel(getattr(request, "param", Triton36))


def on_device(monkeypatch, device):
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: device, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", "stream of {}".format, raising=False)


FLOATS = torch.zeros(64)
FIRST = {"y_ptr": FLOATS, "x_ptr": FLOATS, "N": 5, "D": 32, "softcap": None, "BLOCK": 8}


def again(kernel, **changes):
    launch._launch_again(kernel, (3,), {**FIRST, "num_warps": 4, **changes})


OTHER = torch.ones(99)
AGAIN = (1, (3, 1, 1), (OTHER.data_ptr(), FLOATS.data_ptr(), 16, 64, None, 8))


def again_with_other_values(kernel):
    again(kernel)
    again(kernel, x_ptr=OTHER, N=16, D=64)
    assert kernel.compiled == 1


@pytest.mark.parametrize("kernel", [Triton33, Triton36, Triton39], indirect=True)
def test_the_same_kind_is_launched_again_with_all_values_in_order(kernel):
    again_with_other_values(kernel)
    assert (kernel.again, kernel.told) == ([AGAIN], [])


@pytest.mark.parametrize("kernel", [WithScratch, Instrumented, Unknown], indirect=True)
def test_triton_launches_what_needs_more_than_its_values(kernel):
    again_with_other_values(kernel)
    assert (kernel.again, kernel.told) == ([], [AGAIN])


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_told_of_every_launch(kernel, name, monkeypatch):
    again_with_other_values(kernel)
    hook = getattr(launch._HOOKS, name)
    if hook is None:  # Triton 3.3
        monkeypatch.setattr(launch._HOOKS, name, print)
    else:
        monkeypatch.setattr(hook, "calls", [print])
    again(kernel, x_ptr=OTHER, N=16, D=64)
    assert (kernel.again, kernel.told) == ([AGAIN], [AGAIN])
    monkeypatch.undo()
    assert not getattr(hook, "calls", hook)


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


def test_a_descriptor_is_launched_as_it_is(kernel):
    one, other = (SimpleNamespace(base=FLOATS, block_shape=[8, n]) for n in (8, 16))
    for descriptor in (one, one, other, other):
        again(kernel, x_ptr=descriptor)
    assert kernel.compiled == 2
    assert [values[0] for *_, values in kernel.again] == [one, other]


class KernelOfTuple(Kernel):
    """Stands for a kernel one of whose parameters is a tuple."""

    arg_names, do_not_specialize = ("x", "N", "BLOCK"), ("N",)

    @staticmethod
    def fn(x, N, BLOCK: tl.constexpr):
        """Only its annotations are read."""


@pytest.mark.parametrize("launcher", [Triton33, Triton36, Triton39])
def test_members_of_a_tuple_are_compiled_for_like_arguments(kernel, launcher):
    kernel = KernelOfTuple(launcher)
    first = (FLOATS, None, 2.0, 5)
    for x in (first, (OTHER, None, 3.0, 6)):
        launch._launch_again(kernel, (3,), {"x": x, "BLOCK": 8, "N": 5})
    assert kernel.compiled == 1
    assert kernel.again == [(1, (3, 1, 1), ((OTHER.data_ptr(), None, 3.0, 6), 5, 8))]
    for place, other in ((0, FLOATS[1:]), (0, FLOATS.half()), (1, FLOATS), (2, None), (3, 16)):
        x = (*first[:place], other, *first[place + 1 :])
        launch._launch_again(kernel, (3,), {"x": x, "BLOCK": 8, "N": 5})
    assert kernel.compiled == 6


@pytest.mark.parametrize("x", [(), (FLOATS, 3)], ids=["empty", "two"])
def test_a_parameter_left_to_its_default_beside_a_tuple(kernel, x):
    """The values of a launch are in the order of the parameters, and as many."""
    kernel = KernelOfTuple(Triton36)
    with pytest.raises(TypeError, match="kernel must be launched with a value of N"):
        launch._launch_again(kernel, (3,), {"x": x, "BLOCK": 8})
    for _ in range(2):
        launch._launch_again(kernel, (3,), {"x": x, "N": 5, "BLOCK": 8})
    passed = tuple(getattr(member, "data_ptr", lambda m=member: m)() for member in x)
    assert kernel.again == [(1, (3, 1, 1), (passed, 5, 8))]


def test_a_tuple_of_constants_is_compiled_for_its_values(kernel):
    kernel = KernelOfTuple(Triton36)
    for block in ((64, 128), (128, 64), (64, 128)):
        launch._launch_again(kernel, (3,), {"x": FLOATS, "N": 5, "BLOCK": block})
    assert kernel.compiled == 2
    assert [(number, values[2]) for number, _, values in kernel.again] == [(1, (64, 128))]


@pytest.mark.parametrize("changes", [{"y_ptr": FLOATS[1:]}, {"N": 16}, {"N": 1}], ids=str)
def test_what_is_not_specialised_compiles_nothing(kernel, changes):
    again(kernel)
    again(kernel, **changes)
    assert kernel.compiled == 1


@pytest.mark.parametrize("device", [0, 1])
def test_devices_have_their_own_code(kernel, monkeypatch, device):
    again(kernel)
    on_device(monkeypatch, device)
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
