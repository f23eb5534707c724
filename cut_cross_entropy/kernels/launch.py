"""Launches kernels on the tensors' device, and plans launches so that they compile beforehand.

Triton compiles a kernel when it is first launched. A step launches twenty kernels one after the
other, and compiling them in that order takes three times as long as compiling them concurrently.

Arguments that change from call to call (numbers of tokens, rows of tables, ends of ranges) are
declared ``do_not_specialize`` where a kernel is defined; otherwise a training run would stop to
compile whenever one of them happens to be a multiple of 16. Two kernels still specialise on the
number of tokens, since one of them spills otherwise: they have two variants.
"""

import contextlib
import contextvars
import copy
import functools
import operator
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import build

from cut_cross_entropy.device_support import triton_is_interpreted
from cut_cross_entropy.kernels.shapes import ShapesAlone

# That compile: the first part of a compilation is Python, for which more would wait while LLVM and
# the assembler have nothing to do. Of 32 threads the first kernel was done when 12 had done thirty.
MOST_THREADS = 12

_as_captured: contextvars.ContextVar[bool] = contextvars.ContextVar("as_captured", default=False)


def is_captured(tensor: Tensor) -> bool:
    """Return whether work on ``tensor`` is captured in a CUDA graph: the host cannot wait then."""
    return _as_captured.get() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


@contextlib.contextmanager
def as_captured() -> Iterator[None]:
    """Make the launches inside the block those of a captured step."""
    token = _as_captured.set(True)
    try:
        yield
    finally:
        _as_captured.reset(token)


def current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` current: Triton launches on the current device, not on the tensors'."""
    if (
        device.type != "cuda"
        or triton_is_interpreted()
        or device.index == torch.cuda.current_device()
    ):
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments (tensors on the meta device), constants and options."""

    kernel: Any
    arguments: dict[str, Any]

    def variant(self) -> tuple[Any, ...]:
        """Return a key that two launches share if the same machine code serves both."""
        # Interpreted kernels do not know which of their arguments are specialised.
        plain = set(getattr(self.kernel, "do_not_specialize", ()))
        values = set(self.kernel.arg_names) - _constants(self.kernel)
        kinds = tuple(
            (name, kind_of(value, name not in plain) if name in values else value)
            for name, value in sorted(self.arguments.items())
        )
        return (self.kernel.__name__, kinds)


def _constants(kernel: Any) -> set[str]:
    """Return the names of the parameters that are compiled into the code."""
    return {name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)}


@dataclass
class Plan:
    """Launches that were recorded instead of made, on meta tensors that stand for a device's.

    Args:
        device, launches: see above.
        flat_tokens: how many a backward finds, since no device counts them.
        drops_much: whether a tail would stand for more than it may, likewise.
    """

    device: torch.device
    launches: list[Launch] = field(default_factory=list)
    flat_tokens: int = 0
    drops_much: bool = False


_plan: contextvars.ContextVar[Plan | None] = contextvars.ContextVar("plan", default=None)


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a kernel over a grid of programs; inside :func:`planning` only record the launch."""
    plan = _plan.get()
    if plan is not None:
        plan.launches.append(Launch(kernel, arguments))
    elif _LAUNCHES_AGAIN and isinstance(kernel, triton.JITFunction):  # not interpreted
        _launch_again(kernel, grid, arguments)
    else:
        kernel[grid](**arguments)


# Triton finds the machine code of a launch in 40 microseconds, which is most of a small step. On
# NVIDIA GPUs all that it compiles for is in the keys below.
_LAUNCHES_AGAIN = torch.version.hip is None
_SHORT = range(-(2**31), 2**31)  # integers of 32 bits


def _launch_again(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Launch the machine code of an earlier launch of this kind; the first one is Triton's."""
    flat = _flat(arguments) if tuple in map(type, arguments.values()) else arguments
    which = (id(kernel), *flat, *map(type, flat.values()))  # its hash takes a lock
    layout = _layouts.get(which)
    if layout is None:
        layout = _layouts[which] = _Layout.of(kernel, arguments, flat)
    device = torch._C._cuda_getDevice()
    tensors, integers = layout.tensors(flat), layout.integers(flat)
    # Triton asks the driver about each tensor, but takes an address as it is.
    addresses = [*map(Tensor.data_ptr, tensors)]
    values = layout.in_order((*addresses, *layout.others(flat)))
    if layout.members is not None:
        values = tuple([values[place] for place in layout.members])
    key = (
        device,
        layout.constants(flat),
        *[tensor.dtype for tensor in tensors],
        *[address % 16 == 0 for address in addresses[: layout.special_tensors]],
        *[value in _SHORT for value in integers],
        *[(value == 1) - (value % 16 == 0) for value in integers[: layout.special_integers]],
    )
    if layout.descriptors is not None:
        key += tuple([(x.base.dtype, *x.block_shape) for x in layout.descriptors(flat)])
    code = layout.codes.get(key)
    if code is not None:
        code.run(grid, torch._C._cuda_getCurrentRawStream(device), values)
        return
    compiled = kernel[grid](**arguments)
    if compiled is not None:  # a hook may compile instead of Triton
        layout.codes[key] = _Code(compiled, values)


def _flat(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with the members of each tuple in its place."""
    flat = {}
    for name, value in arguments.items():
        if type(value) is tuple:
            for place, member in enumerate(value):
                flat[f"{name}.{place}"] = member
        else:
            flat[name] = value
    return flat


class _Code:
    """Machine code of a kernel, launched by the function that Triton ends up calling.

    Args:
        compiled: what Triton returns of a launch.
        values: of all parameters in that launch.
    """

    def __init__(self, compiled: Any, values: tuple[Any, ...]) -> None:
        self._compiled = compiled
        self._call, self._before, self._as_tuple = _direct(compiled, values)

    def run(self, grid: tuple[int, ...], stream: int, values: tuple[Any, ...]) -> None:
        """Launch programs with the values of all parameters."""
        x, y, z = (*grid, 1, 1)[:3]
        enter, leave = _HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook
        if self._call is None or getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            self._compiled[x, y, z](*values)  # a profiler, for example, is told of every launch
        elif self._as_tuple:
            self._call(x, y, z, stream, *self._before, values)
        else:
            self._call(x, y, z, stream, *self._before, *values)


# Triton 3.3 keeps its hooks in a class.
_HOOKS = triton.knobs.runtime if hasattr(triton, "knobs") else triton.compiler.CompiledKernel


def _direct(
    compiled: Any, values: tuple[Any, ...]
) -> tuple[Callable[..., None] | None, tuple[Any, ...], bool]:
    """Return what Triton's launcher calls, with what arguments.

    Versions of Triton differ in these, so its launcher is asked: a copy of it launches nothing.

    Returns:
        the function, or None if only Triton should call it; its arguments between the stream and
        the values; and whether it takes the values as a tuple.
    """
    passed: list[Any] = []
    try:
        launcher = compiled.run
        if launcher.global_scratch_size or getattr(launcher, "profile_scratch_size", 0):
            return None, (), False  # memory is allocated for each launch
        asked = copy.copy(launcher)
        asked.launch = lambda *arguments: passed.extend(arguments)
        fixed = (compiled.function, compiled.packed_metadata, None, None, None)
        asked(2, 3, 5, 7, *fixed, *values)
    except (AttributeError, TypeError):
        return None, (), False
    if passed[:4] == [2, 3, 5, 7]:
        if passed[-1] is values or passed[-1] == values:
            return launcher.launch, tuple(passed[4:-1]), True
        if tuple(passed[-len(values) :]) == values:
            return launcher.launch, tuple(passed[4 : -len(values)]), False
    return None, (), False


@dataclass(frozen=True)
class _Layout:
    """Names and types of the arguments that a kernel is launched with.

    Args:
        tensors: returns the tensors of arguments, those whose alignment matters first.
        special_tensors: how many these are; the others are not specialised.
        integers: returns the integers that are no constants, those that are specialised first.
        special_integers: how many these are.
        descriptors: returns the tensor descriptors; None if there are none.
        constants: returns constants and options of the compiler.
        others: returns the values of all parameters but the tensors.
        in_order: returns the values of all parameters, from the tensors and the others.
        members: where each parameter's value, or the members of its tuple, are among these; None
            without tuples.
        codes: machine code by all properties that it is compiled for.
    """

    tensors: Callable[[dict[str, Any]], tuple[Any, ...]]
    special_tensors: int
    integers: Callable[[dict[str, Any]], tuple[Any, ...]]
    special_integers: int
    descriptors: Callable[[dict[str, Any]], tuple[Any, ...]] | None
    constants: Callable[[dict[str, Any]], tuple[Any, ...]]
    others: Callable[[dict[str, Any]], tuple[Any, ...]]
    in_order: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    members: list[int | slice] | None
    codes: dict[tuple[Any, ...], _Code] = field(default_factory=dict)

    @classmethod
    def of(cls, kernel: Any, arguments: dict[str, Any], flat: dict[str, Any]) -> "_Layout":
        """Sort the arguments by what the machine code depends on.

        Args:
            kernel: the kernel.
            arguments: those of a launch.
            flat: the same by :func:`_flat`.

        Raises:
            TypeError: a parameter was left to its default, whose value a launch has to pass.
        """
        constants, plain = _constants(kernel), set(kernel.do_not_specialize)
        names: list[str] = []
        members: list[int | slice] = []
        for name in kernel.arg_names:
            if name not in arguments:
                raise TypeError(f"{kernel.__name__} must be launched with a value of {name}")
            if type(arguments[name]) is tuple:
                own = [f"{name}.{place}" for place in range(len(arguments[name]))]
                members.append(slice(len(names), len(names) + len(own)))
                names += own
                if name in constants:
                    constants.update(own)
            else:
                members.append(len(names))
                names.append(name)
        values = [name for name in names if name not in constants]
        values.sort(key=plain.__contains__)
        tensors = [name for name in values if isinstance(flat[name], Tensor)]
        integers = [name for name in values if type(flat[name]) is int]
        descriptors = [name for name in values if hasattr(flat[name], "block_shape")]
        others = [name for name in names if name not in tensors]
        given = [*tensors, *others]
        return cls(
            _getter(tensors),
            len(set(tensors) - plain),
            _getter(integers),
            len(set(integers) - plain),
            _getter(descriptors) if descriptors else None,
            _getter([name for name in flat if name not in values]),
            _getter(others),
            _getter([given.index(name) for name in names]),
            members if flat is not arguments else None,
        )


_layouts: dict[tuple[Any, ...], _Layout] = {}


def _getter(keys: Sequence[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """Return a function that returns the values of ``keys`` in its argument, as a tuple."""
    if len(keys) > 1:
        return operator.itemgetter(*keys)
    return lambda given: tuple([given[key] for key in keys])


@contextlib.contextmanager
def planning(device: torch.device) -> Iterator[Plan]:
    """Record launches instead of making them; meta tensors stand for those of ``device``."""
    plan = Plan(device)
    token = _plan.set(plan)
    try:
        with ShapesAlone():
            yield plan
    finally:
        _plan.reset(token)


def planned_device(device: torch.device) -> torch.device:
    """Return the device that tensors on ``device`` stand for."""
    plan = _plan.get()
    return device if plan is None else plan.device


def planned_flat_tokens() -> int:
    """Return how many flat tokens the planned backward has."""
    plan = _plan.get()
    return 0 if plan is None else plan.flat_tokens


def planned_drops_much() -> bool:
    """Return whether a tail of the planned backward would stand for more than it may."""
    plan = _plan.get()
    return plan is not None and plan.drops_much


def compile_concurrently(plan: Plan) -> None:
    """Compile every variant of a plan, each in a thread of its own, and load one after another.

    Most of a compilation is spent in LLVM and in the assembler, which need no interpreter lock.
    """
    variants = list({launch.variant(): launch for launch in plan.launches}.values())
    if not variants:
        return
    for one in variants:
        one.kernel.cache_key  # noqa: B018 (computed once and kept, and not by two threads)
    threads = min(len(variants), os.cpu_count() or 1, MOST_THREADS)
    with _building_unlocked(), ThreadPoolExecutor(threads, "compile-kernels") as pool:
        list(pool.map(lambda one: _compile(one, plan.device), variants))


# Triton imports each launcher, an extension module, under one name. Importing one that another
# kernel of the same signature has imported before makes Python overwrite the functions of the
# module imported last, so that a thread in between would take the launcher of another kernel.
_loading = threading.Lock()
_this_thread = threading.local()


def _compile(one: Launch, device: torch.device) -> None:
    # A kernel that cannot be compiled fails where it is launched, if it is launched at all.
    with contextlib.suppress(Exception), torch.cuda.device(device):
        compiled = one.kernel.warmup(grid=(1,), **one.arguments)
        with _loading:
            _this_thread.loads = True
            try:
                compiled[(1, 1, 1)]  # loads the machine code and makes what launches it
            finally:
                _this_thread.loads = False


@contextlib.contextmanager
def _building_unlocked() -> Iterator[None]:
    """Let other threads load while a thread waits for the C compiler that builds its launcher.

    Triton 3.6 builds one for every signature, which takes longer than all else that is loaded. In
    versions without this function launchers are built one after another, or not at all.
    """
    original = getattr(build, "_build", None)
    if original is None:
        yield
        return

    def build_unlocked(*args: Any, **options: Any) -> Any:
        if not getattr(_this_thread, "loads", False):
            return original(*args, **options)
        _loading.release()
        try:
            return original(*args, **options)
        finally:
            _loading.acquire()

    build._build = build_unlocked
    try:
        yield
    finally:
        build._build = original


def kind_of(argument: Any, specialised: bool) -> Any:
    """Return a key for the properties of an argument that Triton compiles for."""
    if isinstance(argument, Tensor):
        return str(argument.dtype)
    if hasattr(argument, "block_shape"):  # a tensor descriptor
        return (str(argument.base.dtype), tuple(argument.block_shape))
    if isinstance(argument, tuple):
        return tuple(kind_of(member, specialised) for member in argument)
    if isinstance(argument, int) and specialised:
        return (argument == 1, argument % 16 == 0)
    return type(argument).__name__


def pointers(source: object, names: str, form: str = "{}_ptr") -> dict[str, Any]:
    """Return attributes of ``source`` as arguments of a kernel: ``lse`` is its ``lse_ptr``.

    Args:
        source: an object, or None for None each.
        names: of the attributes, two at least, separated by spaces.
        form: what the argument of a name is called.
    """
    arguments, values = _naming(names, form)
    if source is None:
        return dict.fromkeys(arguments)
    return dict(zip(arguments, values(source), strict=True))


@functools.cache  # made once: host time of every launch
def _naming(names: str, form: str) -> tuple[list[str], Callable[[object], tuple[Any, ...]]]:
    """Return the arguments of some attributes, and what gets their values."""
    found = names.split()
    return [form.format(name) for name in found], operator.attrgetter(*found)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. Triton's own functions take ten times as long on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the lowest power of two that is at least ``n``, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def aligned_rows(
    count: int, length: int, dtype: torch.dtype, device: torch.device, *, zeros: bool = False
) -> tuple[Tensor, ...]:
    """Allocate ``count`` vectors of ``length`` together, each aligned to 16 bytes.

    Kernels are compiled for that alignment. If a vector began where the one before it ends, it
    would be aligned for some lengths only, and a run whose lengths change would stop to compile.
    """
    step = -(-length * dtype.itemsize // 16) * 16 // dtype.itemsize
    make = torch.zeros if zeros else torch.empty
    rows = make((count, step), dtype=dtype, device=device)
    return (rows if step == length else rows[:, :length]).unbind()


class HostCopy:
    """Copy of a small tensor on the host, started before the device has computed the values.

    Work queued behind it keeps the device busy while the host waits.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._values, self._copied = tensor, None
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> Tensor:
        """Return the values, as soon as the device has computed them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values
