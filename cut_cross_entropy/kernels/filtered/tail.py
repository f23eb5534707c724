"""The tail: low-rank matrices that stand in for the dropped strips, one for each block of tokens.

The dropped probabilities of a block become the matrix ``m w^T / sum(w)``, with m the mass that each
token lost and w the mass that each class lost in this block. Its products with c and e are a vector
for each block: the centre of the dropped rows of c, and the sum of the block's tokens weighted by
their tails. In the rows of dC each group of classes has its own weights (``class_weights``). Shape
legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T, SUPERBLOCK
from cut_cross_entropy.kernels.block_sizes import tiles_on
from cut_cross_entropy.kernels.filtered.class_weights import ClassWeights
from cut_cross_entropy.kernels.filtered.selection import Kept
from cut_cross_entropy.kernels.filtered.strips import StoredStrips
from cut_cross_entropy.kernels.launch import aligned_rows, cdiv, launch, next_power_of_2
from cut_cross_entropy.kernels.tokens import BackwardTokens
from cut_cross_entropy.kernels.triton.filtered.selection import GROUPS
from cut_cross_entropy.kernels.triton.filtered.tail import (
    block_sums_kernel,
    centers_kernel,
    finish_centers_kernel,
    tail_bias_kernel,
    tails_kernel,
)
from cut_cross_entropy.problem import Problem

MAX_SPLITS = 64


@dataclass(frozen=True)
class Tail:
    """The tail's parts that follow from the selection; blocks are padded to whole superblocks.

    Args:
        shares: (blocks, 3) float32 1 / W, and the means of log(share) and of its square over the
            tail, where W is the sum of the dropped masses and the share of a class its part of W.
        centers: (blocks, D) float32 mean row of c over the dropped strips.
    """

    shares: Tensor
    centers: Tensor

    @classmethod
    def of(cls, kept: Kept, c: Tensor) -> "Tail":
        """Compute the tail of dropped strips; ``c`` is contiguous and of the compute dtype."""
        return cls.of_sums(kept, sum_rows(kept, c, 0))

    @classmethod
    def without_centers(cls, kept: Kept, dim: int) -> "Tail":
        """Compute the shares alone; the centres are 0."""
        shape = (1, kept.num_superblocks * SUPERBLOCK, dim)
        return cls.of_sums(kept, kept.sums.new_zeros(shape))

    @classmethod
    def of_sums(cls, kept: Kept, parts: Tensor) -> "Tail":
        """Compute the tail from sums over parts of the classes, see :func:`sum_rows`."""
        (splits, padded, dim), (num_blocks, num_chunks) = parts.shape, kept.shape
        block_d = _block_d(dim)
        shares = torch.empty((padded, 3), dtype=torch.float32, device=parts.device)
        centers = torch.empty((padded, dim), dtype=torch.float32, device=parts.device)
        launch(
            finish_centers_kernel,
            (cdiv(dim, block_d), padded),
            sums_ptr=kept.sums,
            parts_ptr=parts,
            shares_ptr=shares,
            out_ptr=centers,
            D=dim,
            num_blocks=num_blocks,
            num_chunks=num_chunks,
            num_splits=splits,
            COLUMNS=next_power_of_2(num_chunks),
            BLOCK_D=block_d,
            num_warps=1,
        )
        return cls(shares, centers)


def sum_rows(kept: Kept, rows: Tensor, first_class: int) -> Tensor:
    """Sum dropped masses times rows over parts of some consecutive classes.

    Args:
        kept: the kept strips.
        rows: (classes, D) contiguous, of the compute dtype: those from ``first_class`` on.
        first_class: see above.

    Returns:
        (parts, blocks, D) float32, blocks padded to whole superblocks.
    """
    num_classes, dim = rows.shape
    num_superblocks = kept.num_superblocks
    padded = num_superblocks * SUPERBLOCK
    block_r, block_d, tiles = 64, _block_d(dim), tiles_on(rows.device)
    if rows.dtype == torch.bfloat16 and tiles.block_v > 128:
        # Masses are read and converted half as often; the memory of others is too small.
        block_d = min(2 * block_d, max(16, next_power_of_2(dim)))
    # Enough programs to fill a GPU.
    wanted = min(MAX_SPLITS, cdiv(1024, cdiv(dim, block_d) * num_superblocks))
    per_split = block_r * cdiv(cdiv(num_classes, block_r), wanted)
    splits = cdiv(num_classes, per_split)
    parts = torch.empty((splits, padded, dim), dtype=torch.float32, device=rows.device)
    launch(
        centers_kernel,
        (cdiv(dim, block_d), splits, num_superblocks),
        strips_ptr=kept.strips,
        masks_ptr=kept.masks,
        c_ptr=rows,
        out_ptr=parts,
        V=kept.masks.shape[1],
        D=dim,
        first_class=first_class,
        stop_class=first_class + num_classes,
        rows_per_split=per_split,
        num_blocks=kept.shape[0],
        BF16=rows.dtype == torch.bfloat16,
        SUPERBLOCK=SUPERBLOCK,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return parts


def _block_d(dim: int) -> int:
    """Return how many features a program sums."""
    return min(128, max(16, next_power_of_2(dim)))


@dataclass(frozen=True)
class TokenTails:
    """Tails of the tokens, (N,) float32 each.

    Args:
        kept_mass: probability in the kept strips that were computed so far.
        weights: factor of the centre of the dropped rows of c, once all strips were computed.
        mass: dropped probability, likewise.
    """

    kept_mass: Tensor
    weights: Tensor
    mass: Tensor

    @classmethod
    def zeros(cls, num_tokens: int, device: torch.device) -> "TokenTails":
        """Return tails of tokens of which no strip was computed yet."""
        return cls(*aligned_rows(3, num_tokens, torch.float32, device, zeros=True))


def update_tails(
    problem: Problem,
    tokens: BackwardTokens,
    stored: StoredStrips,
    tail: Tail,
    tails: TokenTails,
) -> None:
    """Add the kept mass of stored strips to ``tails``; recompute weights and masses, in place.

    Once all strips of a block were added, the weights and masses of its tokens are final.
    """
    strips = stored.strips
    launch(
        tails_kernel,
        (strips.num_blocks,),
        tiles_ptr=stored.kept_mass,
        first_tile_ptr=strips.index.first_tile,
        kept_mass_ptr=tails.kept_mass,
        a_ptr=tokens.a,
        eta_ptr=tokens.eta,
        lse_ptr=tokens.lse,
        target_grad_ptr=tokens.target_grad,
        shares_ptr=tail.shares,
        shard_mass_ptr=tokens.shard_mass,
        tails_ptr=tails.weights,
        mass_ptr=tails.mass,
        first_block=strips.first_block,
        N=tokens.a.shape[0],
        softcap=problem.softcap,
        BLOCK=BLOCK_T,
    )


@dataclass(frozen=True)
class BlockSums:
    """The tokens of each block, weighted by their tails and divided by the block's dropped mass.

    Args:
        rows: (GROUPS, blocks, D) sum of the embeddings for each group of classes, in bfloat16 if
            they are and else in float32; all may be the same memory.
        weights: (blocks,) float32 sum of the weights, of all classes.
    """

    rows: Tensor
    weights: Tensor

    @classmethod
    def of(
        cls, tokens: BackwardTokens, tail: Tail, tails: TokenTails, own: ClassWeights | None
    ) -> "BlockSums":
        """Sum all blocks; the tails are final. Without ``own`` all classes are alike."""
        (num_tokens, dim), padded = tokens.e.shape, tail.shares.shape[0]
        bf16 = tokens.e.dtype == torch.bfloat16
        shape = (1 if own is None else GROUPS.value, padded, dim)
        rows = tail.centers.new_empty(shape, dtype=tokens.e.dtype if bf16 else None)
        weights = tail.centers.new_empty(padded)
        block_d = min(64, next_power_of_2(dim))
        launch(
            block_sums_kernel,
            (cdiv(dim, block_d), padded, shape[0]),
            tails_ptr=tails.weights,
            own_ptr=None if own is None else own.weights,
            own_mass_ptr=None if own is None else own.masses,
            e_ptr=tokens.e,
            shares_ptr=tail.shares,
            sums_ptr=rows,
            weights_ptr=weights,
            N=num_tokens,
            D=dim,
            BLOCK_T=BLOCK_T,
            BLOCK_D=block_d,
        )
        return cls(rows.expand(GROUPS.value, -1, -1), weights)


def write_bias(
    kept: Kept, sums: BlockSums, kept_sums: Tensor, classes: tuple[int, int], out: Tensor
) -> None:
    """Write dbias of a range of classes: ``kept_sums`` (V,) float32 plus the tail."""
    block = 64
    launch(
        tail_bias_kernel,
        (cdiv(classes[1] - classes[0], block),),
        strips_ptr=kept.strips,
        masks_ptr=kept.masks,
        weights_ptr=sums.weights,
        kept_ptr=kept_sums,
        out_ptr=out,
        V=out.shape[0],
        first_class=classes[0],
        stop_class=classes[1],
        num_superblocks=kept.num_superblocks,
        num_blocks=kept.shape[0],
        SUPERBLOCK=SUPERBLOCK,
        BLOCK=block,
    )
