"""Names of other packages that stand for functions of this one while an adapter is active."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cut_cross_entropy.call_context import constant_in_traces
from cut_cross_entropy.divergence import TokenDivergence, linear_divergence
from cut_cross_entropy.token_logprobs import TokenLogprobs, token_logprobs

_OPTIONS = ("impl", "filter_eps", "filter_mass", "memory_budget")


@dataclass(frozen=True)
class Seam:
    """A function of another package that an adapter replaces, as the adapter knows it.

    Args:
        package: name of the distribution.
        version: of the package that the adapter was tested with.
        module: where the trainer looks the name up when it calls.
        name: of a function, or of a class whose ``apply`` the trainer calls.
        parameters: names of its parameters, without ``ctx``.
        newer_parameters: names of those that later versions have in addition, all or none.
        method: method of the class that has these parameters; "" for a function.
        copies: module and name of what other modules import from there, and so keep.
    """

    package: str
    version: str
    module: str
    name: str
    parameters: tuple[str, ...]
    method: str = ""
    newer_parameters: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()

    def original(self) -> Any:
        """Return what the name stands for, with its signature checked.

        Raises:
            ImportError: the package is not installed, or cannot be imported.
            RuntimeError: the name is gone, takes other parameters, or is replaced already.
        """
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name == self.module.partition(".")[0]:
                raise ImportError(
                    f"{self.package} is not installed; this adapter was written for "
                    f"{self.package} {self.version}"
                ) from error
            if error.name is None or not f"{self.module}.".startswith(f"{error.name}."):
                raise  # something that the package needs
            raise self._moved(f"has no module {error.name}") from error
        path = f"{self.module}.{self.name}"
        found = getattr(module, self.name, None)
        if found is None:
            raise self._moved(f"has no {path}")
        if self.is_replaced():
            raise RuntimeError(f"{path} is replaced already: remove the adapter that did it first")
        # A name may be bound to the ``apply`` of a class.
        function = getattr(getattr(found, "__self__", found), self.method) if self.method else found
        parameters = tuple(name for name in inspect.signature(function).parameters if name != "ctx")
        if parameters not in (self.parameters, self.parameters + self.newer_parameters):
            raise self._moved(
                f"has {path} with the parameters ({', '.join(parameters)}) instead of "
                f"({', '.join(self.parameters)})"
            )
        return found

    def is_replaced(self) -> bool:
        """Whether an adapter is active here."""
        return isinstance(getattr(sys.modules.get(self.module), self.name, None), _Replacement)

    def _moved(self, change: str) -> RuntimeError:
        try:
            installed = version(self.package)
        except PackageNotFoundError:
            installed = "(version unknown)"
        return RuntimeError(
            f"{self.package} {installed} {change}. This adapter was written for {self.package} "
            f"{self.version}: use that version, or a cut-cross-entropy that knows yours"
        )


class OutputLayer(NamedTuple):
    """Input and parameters of an output layer, and what its logits go through."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None
    logit_scale: float = 1.0


class _Replacement:
    """A function of ours, called as the original is: directly, or by ``apply``."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    apply = __call__


class Adapter:
    """Functions of ours in the place of a trainer's, until :meth:`remove` is called.

    Each function of ``cut_cross_entropy.adapters`` that is named after a trainer returns an active
    one. As a context manager it removes itself at the end of the block.

    Args:
        options: ``impl``, ``filter_eps``, ``filter_mass`` and ``memory_budget`` of
            :func:`token_logprobs`, keyword arguments of the functions; the rest is the trainer's.

    Attributes:
        calls: how often the trainer has called ours. Compiled code counts when it is traced.
        options: those of the user.

    Raises:
        ImportError: the trainer is not installed.
        RuntimeError: its functions have moved or take other arguments, or are replaced already.
        TypeError: an unknown option.
    """

    def __init__(self, options: dict[str, Any]):
        for name in options:
            if name not in _OPTIONS:
                raise TypeError(f"unknown option {name!r}; an adapter takes {', '.join(_OPTIONS)}")
        self.calls = 0
        self.options = options
        self._places: list[tuple[str, str, Any, Any]] = []  # module, name, original, ours

    def install(self, *replacements: tuple[Seam, Callable[..., Any]]) -> "Adapter":
        """Put each function in the place of the one that its seam describes, or change nothing."""
        for seam, function in replacements:
            original, ours = seam.original(), _Replacement(function)
            for module, name in ((seam.module, seam.name), *seam.copies):
                self._places.append((module, name, original, ours))
        for module, name, original, ours in self._places:
            _exchange(module, name, original, ours)
        return self

    def remove(self) -> None:
        """Put the originals back, except where ours was replaced by something else since."""
        for module, name, original, ours in self._places:
            _exchange(module, name, ours, original)
        self._places.clear()

    def compute(self, e: Tensor, head: Tensor, targets: Tensor, **arguments: Any) -> TokenLogprobs:
        """Call :func:`token_logprobs` with the user's options, and count the call."""
        self._count()
        return token_logprobs(e, head, targets, **arguments, **self.options)

    def compute_divergence(
        self, student: "OutputLayer", teacher: "OutputLayer", **arguments: Any
    ) -> TokenDivergence:
        """Call :func:`linear_divergence` with those of the options it has, and count the call."""
        self._count()
        options = {x: y for x, y in self.options.items() if x != "filter_mass"}
        return linear_divergence(
            student.hidden,
            in_dtype_of(student.hidden, student.weight),
            teacher.hidden,
            in_dtype_of(teacher.hidden, teacher.weight),
            student_bias=in_dtype_of(student.hidden, student.bias),
            teacher_bias=in_dtype_of(teacher.hidden, teacher.bias),
            student_softcap=student.softcap,
            teacher_softcap=teacher.softcap,
            student_logit_scale=student.logit_scale,
            teacher_logit_scale=teacher.logit_scale,
            **arguments,
            **options,
        )

    def _count(self) -> None:
        if torch.compiler.is_compiling():  # a count per step would have each step traced again
            _count_trace(self)
        else:
            self.calls += 1

    def __enter__(self) -> "Adapter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _exchange(module: str, name: str, old: Any, new: Any) -> None:
    """Let ``name`` stand for ``new`` if it stands for ``old``; a module may not be imported yet."""
    found = sys.modules.get(module)
    if found is not None and getattr(found, name, None) is old:
        setattr(found, name, new)


@constant_in_traces
def _count_trace(adapter: Adapter) -> None:
    adapter.calls += 1


def in_dtype_of(hidden: Tensor, parameter: Tensor | None) -> Any:
    """A parameter of the head in the dtype of its input, unless autocast sees to that."""
    if parameter is None or torch.is_autocast_enabled(hidden.device.type):
        return parameter
    return parameter.to(hidden.dtype)
