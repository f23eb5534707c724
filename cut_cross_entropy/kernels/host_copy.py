"""Numbers of the device that the host needs."""

import torch
from torch import Tensor


class HostCopy:
    """A copy of a small tensor on the host, started before the device has computed it.

    What is queued behind it keeps the device busy while the host waits and goes on.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._values, self._copied = tensor, None
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> Tensor:
        """The values, as soon as the device has computed them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values
