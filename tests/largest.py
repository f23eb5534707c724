"""The largest tensor that a piece of code makes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Remembers how many elements and bytes the largest new tensors of floats have."""

    def __init__(self):
        super().__init__()
        self.elements = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {
            x.untyped_storage().data_ptr()
            for x in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        for x in torch.utils._pytree.tree_leaves(result):
            is_new = isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given
            if is_new and x.is_floating_point() and x.device.type != "meta":
                size = x.untyped_storage().nbytes()
                self.bytes = max(self.bytes, size)
                self.elements = max(self.elements, size // x.itemsize)
        return result
