"""Matrix products whose number of rows or of terms is known on the device only.

While a CUDA graph is captured the host knows neither how many tokens count nor whether a product
is wanted at all. The vendor library would compute all of it; these programs read the number and
leave at once if there is nothing to do. Shape legend: ``cut_cross_entropy.kernels``.
"""

from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.block_sizes import tiles_on
from cut_cross_entropy.kernels.launch import cdiv, launch, next_power_of_2
from cut_cross_entropy.kernels.triton.counted_products import counted_product_kernel


def counted_product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    count: Tensor,
    scale: Tensor,
    of_rows: bool,
    accumulate: bool = False,
) -> None:
    """Compute ``out = left @ right / scale``, with float32 sums, as far as a count says.

    Args:
        left: (M, K); rows or columns are contiguous.
        right: (K, D) with contiguous rows.
        out: (M, D), or (S, M, D) for S sums over consecutive parts of the terms, contiguous.
        count: () int32. Of 0 nothing is written.
        scale: () float32.
        of_rows: whether ``count`` rows are computed, or all rows of the first ``count`` terms.
        accumulate: add to ``out``.
    """
    tiles, dim = tiles_on(out.device), right.shape[1]
    (num_rows, num_terms), num_splits = left.shape, 1 if out.dim() == 2 else out.shape[0]
    block_n = min(tiles.block_v, max(32, next_power_of_2(dim)))
    launch(
        counted_product_kernel,
        (cdiv(dim, block_n), cdiv(num_rows, BLOCK_T), num_splits),
        left_ptr=left,
        right_ptr=right,
        scale_ptr=scale,
        count_ptr=count,
        out_ptr=out,
        M=num_rows,
        K=num_terms,
        D=dim,
        left_m=left.stride(0),
        left_k=left.stride(1),
        right_k=right.stride(0),
        out_m=out.stride(-2),
        terms=cdiv(cdiv(num_terms, num_splits), 64) * 64,
        has_sums=accumulate,
        COUNTS_ROWS=of_rows,
        BLOCK_M=BLOCK_T,
        BLOCK_N=block_n,
        BLOCK_K=tiles.block_d,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
