"""Partial sums of dC between superblocks, interpreted: error of storing them, and their size."""

import pytest
import torch
import triton
import triton.language as tl

from cut_cross_entropy.kernels.filtered.partial_sums import (
    FEW_SUPERBLOCKS,
    PartialSums,
    bytes_per_row,
    choose_low_bits,
)
from cut_cross_entropy.kernels.triton.filtered.partial_sums import load_sums, store_sums

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison_empty")]

ROWS, COLUMNS, FIRST = 16, 32, 3  # of a tile; first class of the range


@triton.jit
def store_and_load_kernel(
    values_ptr,
    high_ptr,
    low_ptr,
    out_ptr,
    num_rows,
    first_class,
    D,
    stride,
    LOW_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store ``values`` (rows, D) as the sums of classes from ``first_class`` on, and load them."""
    classes = first_class + tl.arange(0, ROWS)
    inside = tl.arange(0, ROWS) < num_rows
    for column in range(0, D, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        element = tl.arange(0, ROWS)[:, None] * D + columns[None, :]
        here = inside[:, None] & (columns < D)[None, :]
        values = tl.load(values_ptr + element, mask=here, other=0.0)
        cells, table = (classes, column, inside), (first_class, D, stride)
        store_sums(high_ptr, low_ptr, values, cells, table, LOW_BITS)
    for column in range(0, D, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        cells, table = (classes, columns, inside), (first_class, D, stride)
        found = load_sums(high_ptr, low_ptr, cells, table, LOW_BITS)
        element = tl.arange(0, ROWS)[:, None] * D + columns[None, :]
        tl.store(out_ptr + element, found, mask=inside[:, None] & (columns < D)[None, :])


def store_and_load(values, dtype, num_superblocks):
    """Return ``values`` (rows, D) after they were stored in a gradient of ``dtype``."""
    rows, dim = values.shape
    grad = torch.full((rows + 5, dim), 7.0, dtype=dtype)
    sums = PartialSums.zeros(grad, num_superblocks, (FIRST, FIRST + rows))
    out = torch.empty_like(values)
    store_and_load_kernel[(1,)](
        values, sums.high, sums.low, out, rows, FIRST, dim, dim,
        LOW_BITS=sums.low_bits, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    assert (grad[:FIRST] == 7).all(), "rows of other classes"
    assert (grad[FIRST + rows :] == 7).all(), "rows of other classes"
    return out


CASES = [
    (torch.float32, 2, 0.0),
    (torch.bfloat16, 2, 2**-12),
    (torch.bfloat16, FEW_SUPERBLOCKS + 1, 2**-16),
    (torch.float16, 2, 2**-16),
]


@pytest.mark.parametrize(("dtype", "num_superblocks", "error"), CASES)
@pytest.mark.parametrize("dim", [32, 64, 45])
def test_error_of_stored_sums(dtype, num_superblocks, error, dim):
    random = torch.Generator().manual_seed(0)
    values = torch.randn(13, dim, generator=random) * 10.0 ** torch.arange(-6, 7)[:, None]
    values[:, 0] = 0
    found = store_and_load(values, dtype, num_superblocks)
    assert ((found - values).abs() <= error * values.abs()).all()
    assert (found != 0).sum() == (values != 0).sum()


@pytest.mark.parametrize(("dtype", "num_superblocks"), [case[:2] for case in CASES])
def test_sums_that_are_not_finite(dtype, num_superblocks):
    values = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0] * 8])
    found = store_and_load(values, dtype, num_superblocks)
    torch.testing.assert_close(found, values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "num_superblocks", "bits", "size"),
    [
        (torch.float32, 2, 0, 0),
        (torch.bfloat16, FEW_SUPERBLOCKS, 4, 32),
        (torch.bfloat16, FEW_SUPERBLOCKS + 1, 8, 45),
        (torch.float16, 2, 8, 45),
    ],
)
def test_memory_of_sums(dtype, num_superblocks, bits, size):
    out = torch.empty(3, 45, dtype=dtype)
    assert choose_low_bits(out, num_superblocks) == bits
    assert bytes_per_row(out, num_superblocks) == size
