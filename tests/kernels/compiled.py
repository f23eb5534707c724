"""What Triton has compiled so far in this process."""

import importlib
import pkgutil

from triton.runtime.jit import JITFunction

import cut_cross_entropy.kernels


def variants_in_use() -> dict[str, int]:
    """Number of compiled variants of every kernel of the package."""
    counts = {}
    for module in pkgutil.iter_modules(cut_cross_entropy.kernels.__path__):
        names = vars(importlib.import_module(f"cut_cross_entropy.kernels.{module.name}"))
        for name, value in names.items():
            if isinstance(value, JITFunction):
                counts[name] = sum(len(cache[0]) for cache in value.device_caches.values())
    return counts
