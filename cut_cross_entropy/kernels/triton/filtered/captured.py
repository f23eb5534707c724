"""Triton kernels of ``kernels.filtered.captured``."""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.triton.filtered.selection import DROPPED_UNIT


@triton.jit(do_not_specialize=["token_counts_ptr", "num_blocks", "most_strips", "most_flat"])
def choose_path_kernel(
    token_counts_ptr,  # (3,) int32, the end of Kept.statistics
    block_starts_ptr,  # (blocks + 1,) int32 in, out, see StripIndex, like the next
    first_tile_ptr,  # (blocks + 1,) int32
    choice_ptr,  # (3,) int32 out: filtered or not, few flat tokens, tokens of the exact path
    num_blocks,
    most_strips,
    most_flat,
    V,
    share,
    flat_share,
    most_dropped,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Choose the path as the host would, and empty the lists if it is not the filtered one."""
    dropped = tl.load(token_counts_ptr).to(tl.float32) / DROPPED_UNIT
    num_flat = tl.load(token_counts_ptr + 1)
    num_tokens = tl.load(token_counts_ptr + 2)
    num_strips = tl.load(block_starts_ptr + num_blocks)
    possible = tl.cdiv(num_tokens, BLOCK_T).to(tl.float32) * V
    fits = (num_strips <= most_strips) & (num_flat <= most_flat) & (dropped <= most_dropped)
    fits &= (num_strips.to(tl.float32) > share * possible) == 0
    fits &= (num_flat.to(tl.float32) > flat_share * num_tokens.to(tl.float32)) == 0
    tl.debug_barrier()  # other threads have read the number that this one clears
    tl.store(choice_ptr, fits.to(tl.int32))
    tl.store(choice_ptr + 1, tl.where(fits, num_flat, 0))
    tl.store(choice_ptr + 2, tl.where(fits, 0, num_tokens))
    if fits.to(tl.int32) == 0:
        for start in range(0, num_blocks + 1, BLOCK):
            places = start + tl.arange(0, BLOCK)
            nothing = tl.zeros((BLOCK,), tl.int32)
            tl.store(block_starts_ptr + places, nothing, mask=places <= num_blocks)
            tl.store(first_tile_ptr + places, nothing, mask=places <= num_blocks)
