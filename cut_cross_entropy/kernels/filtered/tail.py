"""The tail: low-rank matrices that stand in for the dropped strips, one for each block of tokens.

The dropped probabilities of a block become the matrix ``m w^T / sum(w)``, with m the mass that each
token lost and w the mass that each class lost in this block. Its products with c and e are a vector
for each block: the centre of the dropped rows of c, and the sum of the block's tokens weighted by
their tails. Shape legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T, SUPERBLOCK
from cut_cross_entropy.kernels.block_sizes import tiles_on
from cut_cross_entropy.kernels.filtered.selection import Kept
from cut_cross_entropy.kernels.filtered.strips import StoredStrips
from cut_cross_entropy.kernels.launch import aligned_rows, cdiv, launch, next_power_of_2
from cut_cross_entropy.kernels.primitives import ABSENT, LOG2E, byte_to_value, gather_rows
from cut_cross_entropy.kernels.tokens import BackwardTokens
from cut_cross_entropy.problem import Problem

MAX_SPLITS = 64
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tail_product(left, right, total, BF16: tl.constexpr):
    """Add the product of masses with rows or sums of rows, whose range float16 does not have."""
    if BF16:
        total = tl.dot(left.to(tl.bfloat16), right.to(tl.bfloat16), total)
    else:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="tf32")
    return total


@triton.jit
def dropped_mass(strips, masks, blocks):
    """Return the bytes of mass of strips, 0 of those that their class's mask keeps."""
    kept = ((masks >> blocks.to(tl.int64)) & 1) != 0
    return tl.where(kept, 0, (strips >> 8) & 255)


@triton.jit
def load_dropped(
    kept,  # pointers to (blocks, V) int16 and (superblocks, V) int64; V and the number of blocks
    superblock,
    classes,  # (R,) consecutive
    inside,  # (R,)
    SUPERBLOCK: tl.constexpr,
):
    """Load the dropped masses of some classes in the blocks of one superblock, (SUPERBLOCK, R)."""
    strips_ptr, masks_ptr, V, num_blocks = kept
    bits = tl.arange(0, SUPERBLOCK)
    blocks = superblock * SUPERBLOCK + bits
    here = (blocks < num_blocks)[:, None] & inside[None, :]
    place = blocks.to(tl.int64)[:, None] * V + classes[None, :]
    both = tl.load(strips_ptr + place, mask=here, other=0).to(tl.int32)
    masks = tl.load(masks_ptr + tl.cast(superblock, tl.int64) * V + classes, mask=inside, other=0)
    return byte_to_value(dropped_mass(both, masks[None, :], bits[:, None]))


@triton.jit(do_not_specialize=["first_class", "stop_class", "rows_per_split", "num_blocks"])
def centers_kernel(
    strips_ptr,  # (blocks, V)
    masks_ptr,  # (superblocks, V)
    c_ptr,  # (classes, D) rows from the first class on
    out_ptr,  # (splits, blocks, D) out
    V,
    D,
    first_class,
    stop_class,
    rows_per_split,
    num_blocks,
    BF16: tl.constexpr,
    SUPERBLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum mass times row of c over one split of the classes, for the blocks of a superblock."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    superblock = tl.program_id(2)
    total = tl.zeros((SUPERBLOCK, BLOCK_D), tl.float32)
    first = first_class + split * rows_per_split
    stop = min(stop_class, first + rows_per_split)
    kept = (strips_ptr, masks_ptr, V, num_blocks)
    for start in tl.range(first, stop, BLOCK_R, num_stages=3):
        classes = start + tl.arange(0, BLOCK_R)
        inside = classes < stop
        masses = load_dropped(kept, superblock, classes, inside, SUPERBLOCK)
        rows = gather_rows(c_ptr, classes - first_class, inside, columns, D)
        total = tail_product(masses, rows, total, BF16)
    blocks = superblock * SUPERBLOCK + tl.arange(0, SUPERBLOCK)
    out = out_ptr + (split * tl.num_programs(2) * SUPERBLOCK + blocks).to(tl.int64)[:, None] * D
    tl.store(out + columns[None, :], total, mask=(columns < D)[None, :])


@triton.jit(do_not_specialize=["num_blocks", "num_chunks", "num_splits"])
def finish_centers_kernel(
    sums_ptr,  # (3, num_blocks, chunks) see Kept
    parts_ptr,  # (splits, blocks, D)
    shares_ptr,  # (blocks, 3) out, see Tail
    out_ptr,  # (blocks, D) out
    D,
    num_blocks,
    num_chunks,
    num_splits,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Reduce the splits of one block, and its sums over the chunks."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    block = tl.program_id(1)
    chunks = tl.arange(0, COLUMNS)
    wanted = chunks < tl.where(block < num_blocks, num_chunks, 0)  # blocks beyond are padding
    row = sums_ptr + block * num_chunks + chunks
    mass = tl.sum(tl.load(row, mask=wanted, other=0.0), 0)
    # Masses are not negative: where their sum is 0, so are they. A NaN propagates.
    inverse = tl.where(mass == 0, 0.0, 1.0 / tl.where(mass == 0, 1.0, mass))
    if tl.program_id(0) == 0:
        table = num_blocks * num_chunks
        first = tl.sum(tl.load(row + table, mask=wanted, other=0.0), 0)
        second = tl.sum(tl.load(row + 2 * table, mask=wanted, other=0.0), 0)
        log_mass = tl.log2(tl.where(mass == 0, 1.0, mass))
        mean = first * inverse
        tl.store(shares_ptr + block * 3, inverse)
        tl.store(shares_ptr + block * 3 + 1, (mean - log_mass) * LN2)
        square = second * inverse - log_mass * (2.0 * mean - log_mass)
        tl.store(shares_ptr + block * 3 + 2, square * LN2 * LN2)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for split in range(num_splits):
        part = parts_ptr + (tl.cast(split, tl.int64) * tl.num_programs(1) + block) * D
        total += tl.load(part + columns, mask=columns < D, other=0.0)
    tl.store(out_ptr + block * D + columns, total * inverse, mask=columns < D)


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


@triton.jit(do_not_specialize=["N", "first_block"])
def tails_kernel(
    tiles_ptr,  # (tiles, BLOCK) mass of each token in the strips of a tile
    first_tile_ptr,  # (blocks of the list + 1,)
    kept_mass_ptr,  # (N,) in, out: mass of a token in its kept strips
    a_ptr,  # (N,)
    eta_ptr,  # (N,), or None
    lse_ptr,  # (N,) log2
    target_grad_ptr,  # (N,) negative for tokens without a filtered gradient
    shares_ptr,  # (blocks, 3) see Tail
    shard_mass_ptr,  # (N,) probability of this shard's classes; None: it has all
    tails_ptr,  # (N,) out
    mass_ptr,  # (N,) out
    first_block,
    N,
    softcap,  # or None
    BLOCK: tl.constexpr,
):
    """Write the weight of each token's tail: its gradient per mass times mass and softcap's slope.

    In the rank-one model a dropped probability is ``mass * share``, so its logarithm is
    ``log(mass) + log(share)`` and its logit higher by ``lse``. The mean of the logarithm, which the
    gradient of an entropy needs, and that of the squared logit have a closed form.
    """
    block = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    tokens = (first_block + block) * BLOCK + lanes
    inside = tokens < N
    kept_mass = tl.load(kept_mass_ptr + tokens, mask=inside, other=1.0)
    first, stop = tl.load(first_tile_ptr + block), tl.load(first_tile_ptr + block + 1)
    for tile in range(first, stop):  # in order, whatever the number of tiles
        kept_mass += tl.load(tiles_ptr + tile * BLOCK + lanes)
    tl.store(kept_mass_ptr + tokens, kept_mass, mask=inside)
    # Not ">= 0": a NaN has to propagate.
    filtered = inside & ~(tl.load(target_grad_ptr + tokens, mask=inside, other=ABSENT) < 0)
    whole = 1.0
    if shard_mass_ptr is not None:
        whole = tl.load(shard_mass_ptr + tokens, mask=inside, other=1.0)
    mass = tl.where(
        filtered, tl.maximum(whole - kept_mass, 0.0, propagate_nan=tl.PropagateNan.ALL), 0.0
    )
    weight = mass
    share = shares_ptr + (first_block + block) * 3
    log_mass = tl.log2(tl.maximum(mass, 1e-30)) / LOG2E
    if softcap is not None:
        lse = tl.load(lse_ptr + tokens, mask=inside & filtered, other=0.0)
        base = lse / LOG2E + log_mass
        square = base * base + 2 * base * tl.load(share + 1) + tl.load(share + 2)
        weight *= tl.minimum(tl.maximum(1.0 - square / (softcap * softcap), 0.0), 1.0)
    a = tl.load(a_ptr + tokens, mask=inside, other=0.0)
    if eta_ptr is not None:
        eta = tl.load(eta_ptr + tokens, mask=inside, other=0.0)
        a += eta * (log_mass + tl.load(share + 1))
    tl.store(tails_ptr + tokens, tl.where(filtered, a * weight, 0.0), mask=inside)
    tl.store(mass_ptr + tokens, mass, mask=inside)


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


@triton.jit(do_not_specialize=["N"])
def block_sums_kernel(
    tails_ptr,  # (N,) weight of each token's tail
    e_ptr,  # (N, D)
    shares_ptr,  # (blocks, 3)
    sums_ptr,  # (blocks, D) out, in the dtype of the products
    weights_ptr,  # (blocks,) out
    N,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the tokens of one block, weighted by their tails."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    block = tl.program_id(1)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    tails = tl.load(tails_ptr + tokens, mask=tokens < N, other=0.0)
    rows = tl.load(
        e_ptr + tokens.to(tl.int64)[:, None] * D + columns[None, :],
        mask=(tokens < N)[:, None] & (columns < D)[None, :],
        other=0.0,
    )
    inverse = tl.load(shares_ptr + block * 3)
    total = tl.sum(tails[:, None] * rows.to(tl.float32), 0) * inverse
    tl.store(sums_ptr + block * D + columns, total.to(sums_ptr.dtype.element_ty), mask=columns < D)
    if tl.program_id(0) == 0:
        tl.store(weights_ptr + block, tl.sum(tails, 0) * inverse)


@dataclass(frozen=True)
class BlockSums:
    """The tokens of each block, weighted by their tails and divided by the block's dropped mass.

    Args:
        rows: (blocks, D) sum of the embeddings, in bfloat16 if they are and else in float32.
        weights: (blocks,) float32 sum of the weights.
    """

    rows: Tensor
    weights: Tensor

    @classmethod
    def of(cls, tokens: BackwardTokens, tail: Tail, tails: TokenTails) -> "BlockSums":
        """Sum all blocks; the tails are final."""
        (num_tokens, dim), padded = tokens.e.shape, tail.shares.shape[0]
        bf16 = tokens.e.dtype == torch.bfloat16
        rows = tail.centers.new_empty((padded, dim), dtype=tokens.e.dtype if bf16 else None)
        weights = tail.centers.new_empty(padded)
        block_d = min(64, next_power_of_2(dim))
        launch(
            block_sums_kernel,
            (cdiv(dim, block_d), padded),
            tails_ptr=tails.weights,
            e_ptr=tokens.e,
            shares_ptr=tail.shares,
            sums_ptr=rows,
            weights_ptr=weights,
            N=num_tokens,
            D=dim,
            BLOCK_T=BLOCK_T,
            BLOCK_D=block_d,
        )
        return cls(rows, weights)


@triton.jit(do_not_specialize=["first_class", "stop_class", "num_superblocks", "num_blocks"])
def tail_bias_kernel(
    strips_ptr,  # (blocks, V)
    masks_ptr,  # (superblocks, V)
    weights_ptr,  # (blocks,) see BlockSums
    kept_ptr,  # (V,) float32 sums over the kept strips
    out_ptr,  # (V,) out
    V,
    first_class,
    stop_class,
    num_superblocks,
    num_blocks,
    SUPERBLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write dbias: the kept strips and the tail."""
    classes = first_class + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = classes < stop_class
    total = tl.load(kept_ptr + classes, mask=inside, other=0.0)
    blocks = tl.arange(0, SUPERBLOCK)
    kept = (strips_ptr, masks_ptr, V, num_blocks)
    for superblock in range(num_superblocks):
        masses = load_dropped(kept, superblock, classes, inside, SUPERBLOCK)
        weights = tl.load(weights_ptr + superblock * SUPERBLOCK + blocks)
        total += tl.sum(masses * weights[:, None], 0)
    tl.store(out_ptr + classes, total.to(out_ptr.dtype.element_ty), mask=inside)


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
