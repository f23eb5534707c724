"""Functions that the tests on a GPU share."""

import importlib
import pkgutil

import pytest
import torch

DEVICE = "cuda"


requires_kernels = pytest.mark.usefixtures("gpu")


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the Frobenius norm of the difference relative to that of the exact tensor."""
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def rounding_error(exact: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the relative error of rounding the exact tensor to ``dtype``."""
    return relative_error(exact.to(dtype), exact)


def variants_in_use() -> dict[str, int]:
    """Count the compiled variants of every kernel of the package."""
    from triton.runtime.jit import JITFunction

    import cut_cross_entropy.kernels

    counts = {}
    package = cut_cross_entropy.kernels
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        names = vars(importlib.import_module(module.name))
        for name, value in names.items():
            if isinstance(value, JITFunction):
                counts[name] = sum(len(cache[0]) for cache in value.device_caches.values())
    return counts
