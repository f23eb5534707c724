"""What the tests on a GPU share."""

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
