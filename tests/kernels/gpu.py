"""What the tests on a GPU share."""

import importlib
import pkgutil

import pytest
import torch

DEVICE = "cuda"


requires_kernels = pytest.mark.usefixtures("gpu")


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the difference beside that of the exact tensor."""
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def rounding_error(exact: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> float:
    """The relative error of rounding the exact tensor to ``dtype``."""
    return relative_error(exact.to(dtype), exact)


def variants_in_use() -> dict[str, int]:
    """Number of compiled variants of every kernel of the package."""
    from triton.runtime.jit import JITFunction

    import cut_cross_entropy.kernels

    counts = {}
    for module in pkgutil.iter_modules(cut_cross_entropy.kernels.__path__):
        names = vars(importlib.import_module(f"cut_cross_entropy.kernels.{module.name}"))
        for name, value in names.items():
            if isinstance(value, JITFunction):
                counts[name] = sum(len(cache[0]) for cache in value.device_caches.values())
    return counts
