"""The sums of dC that wait between groups of blocks, interpreted: what storing them costs."""

import pytest
import torch
import triton
import triton.language as tl

from cut_cross_entropy.kernels.sums import (
    FEW_GROUPS,
    Sums,
    bits_beside,
    bytes_of_sums,
    load_sums,
    store_sums,
)

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison_empty")]

ROWS, COLUMNS, FIRST = 16, 32, 3  # of a tile; first class of the range


@triton.jit
def there_and_back_kernel(
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
    """``values`` (rows, D) become the sums of classes from ``first_class`` on, and are read."""
    classes = first_class + tl.arange(0, ROWS)
    inside = tl.arange(0, ROWS) < num_rows
    for column in range(0, D, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        place = tl.arange(0, ROWS)[:, None] * D + columns[None, :]
        here = inside[:, None] & (columns < D)[None, :]
        values = tl.load(values_ptr + place, mask=here, other=0.0)
        store_sums(
            high_ptr, low_ptr, values, classes, column, inside, first_class, D, stride, LOW_BITS
        )
    for column in range(0, D, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        found = load_sums(
            high_ptr, low_ptr, classes, columns, inside, first_class, D, stride, LOW_BITS
        )
        place = tl.arange(0, ROWS)[:, None] * D + columns[None, :]
        tl.store(out_ptr + place, found, mask=inside[:, None] & (columns < D)[None, :])


def there_and_back(values, dtype, num_groups):
    """``values`` (rows, D) float32 after they waited in a gradient of ``dtype``."""
    rows, dim = values.shape
    grad = torch.full((rows + 5, dim), 7.0, dtype=dtype)
    sums = Sums.of(grad, num_groups, (FIRST, FIRST + rows))
    out = torch.empty_like(values)
    there_and_back_kernel[(1,)](
        values, sums.high, sums.low, out, rows, FIRST, dim, dim,
        LOW_BITS=sums.low_bits, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    assert (grad[:FIRST] == 7).all(), "rows of other classes"
    assert (grad[FIRST + rows :] == 7).all(), "rows of other classes"
    return out


CASES = [
    (torch.float32, 2, 0.0),
    (torch.bfloat16, 2, 2**-12),
    (torch.bfloat16, FEW_GROUPS + 1, 2**-16),
    (torch.float16, 2, 2**-16),
]


@pytest.mark.parametrize(("dtype", "num_groups", "error"), CASES)
@pytest.mark.parametrize("dim", [32, 64, 45])
def test_sums_that_waited(dtype, num_groups, error, dim):
    random = torch.Generator().manual_seed(0)
    values = torch.randn(13, dim, generator=random) * 10.0 ** torch.arange(-6, 7)[:, None]
    values[:, 0] = 0
    found = there_and_back(values, dtype, num_groups)
    assert ((found - values).abs() <= error * values.abs()).all()
    assert (found != 0).sum() == (values != 0).sum()


@pytest.mark.parametrize(("dtype", "num_groups"), [case[:2] for case in CASES])
def test_sums_that_are_no_numbers(dtype, num_groups):
    values = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0] * 8])
    found = there_and_back(values, dtype, num_groups)
    torch.testing.assert_close(found, values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "num_groups", "bits", "size"),
    [
        (torch.float32, 2, 0, 0),
        (torch.bfloat16, FEW_GROUPS, 4, 32),
        (torch.bfloat16, FEW_GROUPS + 1, 8, 45),
        (torch.float16, 2, 8, 45),
    ],
)
def test_memory_of_sums(dtype, num_groups, bits, size):
    out = torch.empty(3, 45, dtype=dtype)
    assert bits_beside(out, num_groups) == bits
    assert bytes_of_sums(out, num_groups) == size
