"""Names of the implementations and the options that belong to each.

Every implementation has a lower-case name, which is what ``impl=`` takes. The seven names that
Apple's releases define are also members of :class:`LinearCrossEntropyImpl`; the others
(``OWN_IMPLS``) are ours and exist as strings only, so that the enum keeps its values.
"""

import difflib
import enum
import platform
from collections.abc import Iterable
from typing import ClassVar, Literal, TypeAlias, TypedDict, get_args

ImplName: TypeAlias = Literal[
    "auto",
    "chunked",
    "reference",
    "torch_compile",
    "cce",
    "cce_kahan",
    "cce_kahan_full_c",
    "cce_kahan_full_e",
    "cce_exact",
    "cce_kahan_full_c_full_e",
    "cce_kahan_full",
]
"""Every name that ``impl=`` takes."""

Reduction: TypeAlias = Literal["mean", "sum", "none"]
"""Values of ``reduction=``."""

FilterEps: TypeAlias = float | Literal["auto", "high"] | None
"""Values of ``filter_eps=``."""


class LinearCrossEntropyImpl(enum.IntEnum):
    """The implementations that Apple's releases name, with the same values."""

    CCE = enum.auto()
    TORCH_COMPILE = enum.auto()
    CCE_KAHAN_FULL_C = enum.auto()
    CCE_KAHAN_FULL_E = enum.auto()
    CCE_EXACT = enum.auto()
    CCE_KAHAN_FULL_C_FULL_E = enum.auto()
    CCE_KAHAN_FULL = enum.auto()


ALL_IMPLS: tuple[str, ...] = get_args(ImplName)

KERNEL_IMPLS = tuple(name for name in ALL_IMPLS if name.startswith("cce"))
"""Presets of the Triton kernels; they need a GPU (or Triton's interpreter)."""

OWN_IMPLS = ("auto", "chunked", "reference")
"""Names outside Apple's enum: the choice by device, and the two plain PyTorch paths."""

# Apple's releases have torch_compile as the default on macOS, where Triton does not exist.
# Elsewhere the choice has to wait for the call, since it depends on the device of the tensors.
LCE_IMPL_DEFAULT: ImplName = "torch_compile" if platform.system() == "Darwin" else "auto"
"""Default of ``impl=``."""


class CCEPreset(TypedDict):
    """Options that a preset of the kernels fixes."""

    filter_eps: FilterEps
    accum_e_fp32: bool
    accum_c_fp32: bool
    filter_e_grad: bool
    filter_c_grad: bool


class CCEPresets:
    """Options that each preset of the kernels stands for.

    Gradients are always accumulated in float32 here, so ``accum_e_fp32`` and ``accum_c_fp32``
    record what a preset promises and change nothing in the result.
    """

    names: ClassVar[frozenset[str]] = frozenset(KERNEL_IMPLS)

    _fixed: ClassVar[dict[str, dict[str, float | str | bool | None]]] = {
        "cce": {},
        "cce_kahan": {"accum_e_fp32": True, "accum_c_fp32": True},
        "cce_kahan_full_c": {
            "filter_eps": "auto",
            "accum_e_fp32": True,
            "accum_c_fp32": True,
            "filter_e_grad": True,
            "filter_c_grad": False,
        },
        "cce_kahan_full_e": {
            "filter_eps": "auto",
            "accum_e_fp32": True,
            "accum_c_fp32": True,
            "filter_e_grad": False,
            "filter_c_grad": True,
        },
    }
    _exact: ClassVar[dict[str, float | str | bool | None]] = {
        "filter_eps": None,
        "accum_e_fp32": True,
        "accum_c_fp32": True,
    }

    @classmethod
    def build_for_impl(cls, impl: str, opts: CCEPreset) -> CCEPreset:
        """Options in force for preset ``impl`` when the caller asked for ``opts``.

        Args:
            impl: one of :attr:`names`.
            opts: what the caller passed; not modified.

        Returns:
            A new dictionary: ``opts`` with the values that the preset fixes.

        Raises:
            ValueError: ``impl`` is not a preset of the kernels.
        """
        if impl not in cls.names:
            raise ValueError(f"impl must be one of {sorted(cls.names)}, got {impl!r}")
        fixed = cls._fixed.get(impl, cls._exact)
        return {**opts, **fixed}  # type: ignore[typeddict-item]


def impl_name(impl: ImplName | LinearCrossEntropyImpl) -> str:
    """The lower-case name of ``impl``.

    Raises:
        TypeError: neither a string nor a :class:`LinearCrossEntropyImpl`.
        ValueError: not the name of an implementation.
    """
    if isinstance(impl, LinearCrossEntropyImpl):
        return impl.name.lower()
    if not isinstance(impl, str):
        raise TypeError(
            f"impl must be a string or a LinearCrossEntropyImpl, got {type(impl).__name__}"
        )
    if impl not in ALL_IMPLS:
        hint = did_you_mean(impl, ALL_IMPLS)
        raise ValueError(f"impl must be one of {', '.join(ALL_IMPLS)}, got {impl!r}{hint}")
    return impl


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an error message, empty if nothing in ``known`` resembles ``name``."""
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f". Did you mean {close[0]!r}?" if close else ""


def check_filter_eps(filter_eps: FilterEps) -> None:
    """Accept ``None``, ``"auto"``, ``"high"`` or a float from 0 to 1.

    Raises:
        TypeError, ValueError: anything else.
    """
    if filter_eps is None or filter_eps in ("auto", "high"):
        return
    allowed = 'None, "auto", "high" or a float from 0 to 1'
    if isinstance(filter_eps, str):
        raise ValueError(f"filter_eps must be {allowed}, got {filter_eps!r}")
    if isinstance(filter_eps, bool) or not isinstance(filter_eps, (int, float)):
        raise TypeError(f"filter_eps must be {allowed}, got {type(filter_eps).__name__}")
    if not 0 <= filter_eps <= 1:
        raise ValueError(f"filter_eps must be {allowed}, got {filter_eps!r}")


def check_filter_mass(filter_mass: float | None) -> None:
    """Accept ``None`` or a number from 0 to 1.

    Raises:
        TypeError, ValueError: anything else.
    """
    if filter_mass is None:
        return
    if isinstance(filter_mass, bool) or not isinstance(filter_mass, (int, float)):
        raise TypeError(
            f"filter_mass must be None or a float from 0 to 1, got {type(filter_mass).__name__}"
        )
    if not 0 <= filter_mass <= 1:
        raise ValueError(f"filter_mass must be None or a float from 0 to 1, got {filter_mass!r}")


def check_flag(name: str, value: bool) -> None:
    """Accept True and False, nothing that merely has a truth value.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_chunk_size(c_grad_chunk_size: int) -> None:
    """Accept an int >= 0.

    Raises:
        TypeError, ValueError: anything else.
    """
    if isinstance(c_grad_chunk_size, bool) or not isinstance(c_grad_chunk_size, int):
        raise TypeError(f"c_grad_chunk_size must be an int, got {type(c_grad_chunk_size).__name__}")
    if c_grad_chunk_size < 0:
        raise ValueError(f"c_grad_chunk_size must be >= 0, got {c_grad_chunk_size}")
