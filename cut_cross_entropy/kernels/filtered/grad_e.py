"""dE from the stored strips: one owner per output tile, sums in float32 registers, no atomics.

Shape legend: ``cut_cross_entropy.kernels``.
"""

import torch.nn.functional as F
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.block_sizes import tiles_on, two_per_sm
from cut_cross_entropy.kernels.filtered.strips import StoredStrips
from cut_cross_entropy.kernels.filtered.tail import TokenTails
from cut_cross_entropy.kernels.launch import cdiv, launch, next_power_of_2
from cut_cross_entropy.kernels.tokens import BackwardTokens, scatter_rows
from cut_cross_entropy.kernels.triton.filtered.grad_e import grad_e_kernel

BLOCK_K = 64  # strips per step
STAGES = 5  # loads depend on the list: two steps ahead of their product, where three are one


def write_grad_e(
    c: Tensor,
    tokens: BackwardTokens,
    stored: StoredStrips,  # all kept strips of their blocks
    tails: TokenTails,
    *,
    centers: Tensor,  # (blocks, D) float32
    tilts: Tensor | None,  # (blocks,) float32; None for zeros
    out: Tensor,  # (N, D) in the caller's order
) -> None:
    """Write the rows of dE that belong to the blocks of the stored strips."""
    _launch(c, tokens, stored, out, tails, centers=centers, tilts=tilts)


def add_grad_e(
    c: Tensor,  # (classes, D) rows of the classes that the stored strips name
    tokens: BackwardTokens,
    stored: StoredStrips,  # some kept strips of their blocks
    out: Tensor,  # (whole blocks of tokens, D) float32, in, out: in the order of the tokens
) -> None:
    """Add stored strips to the sums of dE, without the tail."""
    _launch(c, tokens, stored, out)


def finish_grad_e(
    sums: Tensor,  # from add_grad_e; is overwritten
    tokens: BackwardTokens,
    tails: TokenTails,
    centers: Tensor,  # (blocks, D) float32
    out: Tensor,  # (N, D) in the caller's order
) -> None:
    """Write dE from the sums of all strips and the tail."""
    num_tokens, (num_rows, dim) = tails.weights.shape[0], sums.shape
    weights = F.pad(tails.weights, (0, num_rows - num_tokens))
    blocks = sums.view(-1, BLOCK_T, dim)
    blocks.addcmul_(weights.view(-1, BLOCK_T, 1), centers[: blocks.shape[0], None])
    scatter_rows(sums[:num_tokens], tokens.origin, out)


def _launch(
    c: Tensor,
    tokens: BackwardTokens,
    stored: StoredStrips,
    out: Tensor,
    tails: TokenTails | None = None,
    centers: Tensor | None = None,
    tilts: Tensor | None = None,
) -> None:
    strips, tiles, dim = stored.strips, tiles_on(tokens.e.device), c.shape[1]
    block_n = min(tiles.block_n, max(32, next_power_of_2(dim)))
    options = two_per_sm(c.device, tiles)
    if tails is not None and tiles.block_v > BLOCK_T:  # the memory of these is large enough
        options["num_stages"] = STAGES
    launch(
        grad_e_kernel,
        (cdiv(dim, block_n), strips.num_blocks),
        grad_ptr=stored.grads,
        borrowed_ptr=stored.borrowed,
        c_ptr=c,
        classes_ptr=strips.classes,
        slots_ptr=strips.slots,
        starts_ptr=strips.index.block_starts,
        scale_ptr=tokens.scale,
        tail_ptr=None if tails is None else tails.weights,
        centers_ptr=centers,
        origin_ptr=None if tails is None else tokens.origin,
        tilts_ptr=tilts,
        mass_ptr=None if tails is None or tilts is None else tails.mass,
        e_ptr=None if tilts is None else tokens.e,
        multiplier_ptr=None if tilts is None else tokens.multiplier,
        out_ptr=out,
        N=out.shape[0],
        D=dim,
        first_block=strips.first_block,
        first_borrowed=stored.grads.shape[0],
        stride_out=out.stride(0),
        BLOCK_T=BLOCK_T,
        BLOCK_K=min(BLOCK_K, tiles.block_d),
        BLOCK_N=block_n,
        **options,
    )
