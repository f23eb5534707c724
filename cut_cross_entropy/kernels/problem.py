"""What the parts of the backward share, and the gradient of some tokens without a filter.

Shape legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.config import Tiles, tiles_on
from cut_cross_entropy.kernels.dense import dense_gradients
from cut_cross_entropy.kernels.prepare import BackwardTokens, Tokens, scatter_rows


@dataclass(frozen=True)
class Problem:
    """What the parts of the backward share; tokens that count are in front."""

    tokens: Tokens
    c: Tensor
    bias: Tensor | None
    lse: Tensor  # (N,) log2; +inf: no token
    a: Tensor
    b: Tensor
    sharp: Tensor
    scale: Tensor
    softcap: float | None
    tiles: Tiles
    memory_budget: int
    shard: Tensor | None  # (N,) probability of the classes that are here; None: all are

    def of(self, places: Tensor) -> "Problem":
        """The tokens at ``places`` alone."""
        return replace(
            self,
            tokens=self.tokens.at(places),
            lse=self.lse[places],
            a=self.a[places],
            b=self.b[places],
        )

    def without(self, absent: Tensor) -> "Problem":
        """The same places with some tokens taken out."""
        return replace(
            self,
            lse=torch.where(absent, torch.inf, self.lse),
            a=torch.where(absent, 0, self.a),
            b=torch.where(absent, 0, self.b),
        )


@dataclass
class Gradients:
    """Outputs of the backward, None where not needed."""

    e: Tensor | None
    c: Tensor | None
    bias: Tensor | None


def assemble(
    moved: BackwardTokens,
    c: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    compute_dtype: torch.dtype,
    memory_budget: int,
    shard: Tensor | None,
) -> Problem:
    """The problem of tokens moved to the front; in float16 with the scale that keeps a * p."""
    scale = moved.a.new_ones(())
    if compute_dtype == torch.float16:
        # 1/N times a small probability underflows; a power of two brings it back unharmed.
        largest = torch.maximum(moved.a.abs().max(), moved.b.abs().max())
        exponent = -torch.floor(torch.log2(largest))
        scale = torch.where(torch.isfinite(exponent), torch.exp2(exponent), scale)
    return Problem(
        moved.tokens,
        c.to(compute_dtype).contiguous(),
        None if bias is None else bias.contiguous(),
        moved.lse,
        moved.a,
        moved.b,
        moved.sharp,
        scale,
        softcap,
        tiles_on(c.device),
        memory_budget,
        shard,
    )


def write_dense(
    problem: Problem,
    grads: Gradients,
    accumulate: bool,
    new_e: torch.dtype | None = None,
    count: int | None = None,
) -> None:
    """Write the gradients that are asked for from all strips; ``accumulate`` adds to dC, dbias.

    With ``new_e`` dE is made here, in that dtype, and where it can be in place of the embeddings:
    the problem cannot be used again. ``count`` tokens count; None: nobody knows.
    """
    need_e = grads.e is not None or new_e is not None
    if not need_e and grads.c is None and grads.bias is None:
        return
    tokens = problem.tokens
    front = slice(0, _places(count, tokens.e.shape[0]))
    total = dense_gradients(
        tokens.e[front],
        problem.c,
        problem.bias,
        problem.lse[front],
        problem.a[front],
        problem.b[front],
        tokens.targets[front],
        problem.scale,
        problem.softcap,
        problem.tiles,
        problem.memory_budget,
        need_e,
        grads.c,
        grads.bias,
        accumulate,
    )
    if new_e is not None:
        same = tokens.e.dtype == new_e
        grads.e = tokens.e.zero_() if same else torch.zeros_like(tokens.e, dtype=new_e)
    if total is not None and grads.e is not None:
        scatter_rows(total, tokens.origin[front], grads.e)


def _places(count: int | None, num_tokens: int) -> int:
    """How many places to compute for ``count`` tokens in front of ``num_tokens`` places.

    About a whole number of blocks; one with the same remainder where the kernels are compiled for
    that (``kernels.launch``), so that none has to be compiled because a batch has more ignored
    tokens than another.
    """
    if count is None:
        return num_tokens
    beside = 0 if num_tokens % 16 == 0 else 1
    blocks = max(1, -(-(count + beside) // BLOCK_T))
    return min(num_tokens, blocks * BLOCK_T - beside)
