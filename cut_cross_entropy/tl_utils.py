"""Compatibility: version checks that Apple's releases keep here. See ``device_support``."""

from cut_cross_entropy.device_support import triton_version, version_tuple


def is_triton_greater_or_equal(v: str) -> bool:
    """Whether the Triton that can be imported has version ``v`` or newer; False without Triton."""
    version = triton_version()
    return version is not None and version >= version_tuple(v)


def is_triton_greater_or_equal_3_2_0() -> bool:
    """:func:`is_triton_greater_or_equal` for 3.2.0."""
    return is_triton_greater_or_equal("3.2.0")
