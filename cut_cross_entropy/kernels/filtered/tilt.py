"""The tilt of the tail: how much further a token's tail lies along its own embedding.

The tail of a block gives all its tokens the same mean row of c (``tail``). The dropped classes of a
token are in truth those whose logits are high for it, so their mean row lies further along its
embedding, at every token. The error is small, but never the other way: dE would ask for longer
embeddings in every step, for a sharper model. To first order the difference is
``covariance of the dropped rows of c @ (e - mean of e)``. A multiple of ``e - mean of e`` is put in
its place, the one with which the tails of a block have the mean logit that they have in truth: a
number for each block, from the logits of a few classes that are drawn by the mass that the block
drops of them. Shape legend: ``cut_cross_entropy.kernels``.
"""

import torch
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T, SUPERBLOCK
from cut_cross_entropy.kernels.block_sizes import rows_operand, tiles_on
from cut_cross_entropy.kernels.filtered.selection import CHUNK, Kept
from cut_cross_entropy.kernels.launch import launch, next_power_of_2, pointers
from cut_cross_entropy.kernels.tokens import BackwardTokens
from cut_cross_entropy.kernels.triton.filtered.tilt import draw_classes_kernel, tilts_kernel
from cut_cross_entropy.problem import Problem, low_columns

DRAWS = 32  # classes drawn for a block; one may be drawn more than once
AT_ONCE = 4  # of them by a program


def tail_tilts(problem: Problem, tokens: BackwardTokens, kept: Kept) -> Tensor:
    """Return the factor of ``e - mean of e`` of each block, (blocks,) float32, not negative.

    ``problem`` has c contiguous and of the compute dtype.
    """
    (num_blocks, num_chunks), e, c = kept.shape, tokens.e, problem.c
    classes = torch.empty((num_blocks, DRAWS), dtype=torch.int32, device=e.device)
    launch(
        draw_classes_kernel,
        (num_blocks, DRAWS // AT_ONCE),
        **pointers(kept, "strips masks sums"),
        classes_ptr=classes,
        V=c.shape[0],
        num_blocks=num_blocks,
        num_chunks=num_chunks,
        SUPERBLOCK=SUPERBLOCK,
        CHUNK=CHUNK,
        COLUMNS=next_power_of_2(num_chunks),
        DRAWS=DRAWS,
        HERE=AT_ONCE,
    )
    tilts = torch.empty(num_blocks, dtype=torch.float32, device=e.device)
    tiles, low_c = tiles_on(e.device), low_columns(problem)
    launch(
        tilts_kernel,
        (num_blocks,),
        e=rows_operand(e, BLOCK_T, tiles.block_d, tiles),
        c_ptr=c,
        **pointers(tokens, "low_e multiplier lse target_grad"),
        low_c_ptr=low_c,
        classes_ptr=classes,
        bias_ptr=problem.bias,
        softcap=problem.softcap,
        tilts_ptr=tilts,
        N=e.shape[0],
        D=e.shape[1],
        LOW_RANK=0 if low_c is None else low_c.shape[1],
        BLOCK_T=BLOCK_T,
        BLOCK_D=tiles.block_d,
        DRAWS=DRAWS,
        num_warps=8,
    )
    return tilts
