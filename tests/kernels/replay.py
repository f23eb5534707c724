"""A CUDA graph on the CPU: records what a function launches, and launches it again."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from cut_cross_entropy.kernels.launch import HostCopy, as_captured

ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")


class Replay(TorchDispatchMode):
    """Operators and interpreted kernels of a function, on the tensors of its first run.

    As in a CUDA graph the host decides nothing again: sizes, grids and arguments that are no
    tensors stay what they were. A read of a value by the host is an error.
    """

    def __init__(self, function: Callable[[], Any], monkeypatch: Any) -> None:
        super().__init__()
        self._steps: list[Callable[[], None]] = []
        run = InterpretedFunction.run

        def record(kernel: Any, **arguments: Any) -> None:
            def step() -> None:
                with _disable_current_modes():
                    run(kernel, **arguments)

            self._steps.append(step)
            step()

        def refuse(*_: Any) -> None:
            raise AssertionError("the host asks for a copy while a graph is captured")

        with monkeypatch.context() as patched, as_captured(), self:
            patched.setattr(InterpretedFunction, "run", record)
            patched.setattr(HostCopy, "__init__", refuse)
            self.results = function()

    def __call__(self) -> Any:
        """Run everything again; return the results, in the memory of the first run."""
        for step in self._steps:
            step()
        return self.results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        assert name not in READS, f"the host reads a value by {name}"
        out = func(*args, **kwargs)
        if name in ALLOCATIONS:
            return out
        inputs = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        fresh = [x.untyped_storage().data_ptr() not in inputs for x in _tensors(out)]

        def step() -> None:
            for is_fresh, old, new in zip(
                fresh, _tensors(out), _tensors(func(*args, **kwargs)), strict=True
            ):
                if is_fresh:  # neither a view nor written in place
                    old.copy_(new)

        self._steps.append(step)
        return out


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
