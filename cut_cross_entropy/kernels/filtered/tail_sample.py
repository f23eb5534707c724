"""What a few classes tell of the tail, before strips are computed.

For each block, classes are drawn by their masses in the strips under a threshold. Their logits give

- the dropped mass of each token: its risk in ``calibrate``, and where that does not run, whether
  the tail would stand for too much;
- the *tilt* of the block's tail. The tail (``tail``) gives all tokens of a block the same mean row
  of c. The dropped classes of a token are in truth those whose logits are high for it, so that
  their mean row lies further along its embedding, at every token: to first order by
  ``covariance of the dropped rows of c @ (e - mean of e)``. The error is small, but always the same
  way: without it dE asks for a sharper model in every step, which a long enough training shows in
  held-out losses. A multiple of ``e - mean of e`` is put in its place, the one with which the tails
  of a block have the mean logit that they have in truth.

Shape legend: ``cut_cross_entropy.kernels``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.block_sizes import rows_operand, tiles_on
from cut_cross_entropy.kernels.filtered.selection import CHUNK, Threshold, most_upstream
from cut_cross_entropy.kernels.launch import cdiv, launch, next_power_of_2, pointers
from cut_cross_entropy.kernels.tokens import SCAN, BackwardTokens
from cut_cross_entropy.kernels.triton.filtered.tail_sample import (
    chunk_masses_kernel,
    draw_classes_kernel,
    dropped_mass_kernel,
    sample_tail_kernel,
)
from cut_cross_entropy.problem import Problem, low_columns

DRAWS = 32  # classes drawn for a block; one may be drawn more than once
AT_ONCE = 4  # of them by a program
ROWS = 8  # blocks whose masses a program sums


@dataclass(frozen=True)
class TailSample:
    """What was estimated from the classes that were drawn.

    Args:
        tilts: (blocks,) float32 factor of ``e - mean of e``, not negative.
        mass: (N,) float32 dropped probability of each token.
    """

    tilts: Tensor
    mass: Tensor

    @classmethod
    def of(cls, problem: Problem, tokens: BackwardTokens, threshold: Threshold) -> "TailSample":
        """Draw classes under ``threshold``; c is contiguous and of the compute dtype."""
        strips, e, c = threshold.strips, tokens.e, problem.c
        num_blocks, num_chunks = strips.shape[0], cdiv(c.shape[0], CHUNK)
        columns, low_c = next_power_of_2(num_chunks), low_columns(problem)
        light = {
            **pointers(threshold, "strips weights"),
            "threshold_ptr": threshold.value,
            "sums_ptr": e.new_empty((num_blocks, num_chunks), dtype=torch.float32),
            "V": c.shape[0],
            "num_chunks": num_chunks,
            "CHUNK": CHUNK,
        }
        launch(
            chunk_masses_kernel,
            (num_chunks, cdiv(num_blocks, ROWS)),
            **light,
            num_blocks=num_blocks,
            ROWS=ROWS,
        )
        classes = torch.empty((num_blocks, DRAWS), dtype=torch.int32, device=e.device)
        launch(
            draw_classes_kernel,
            (num_blocks, DRAWS // AT_ONCE),
            **light,
            classes_ptr=classes,
            COLUMNS=columns,
            DRAWS=DRAWS,
            HERE=AT_ONCE,
        )
        sample = cls(
            tilts=e.new_empty(num_blocks, dtype=torch.float32),
            mass=e.new_empty(e.shape[0], dtype=torch.float32),
        )
        tiles = tiles_on(e.device)
        launch(
            sample_tail_kernel,
            (num_blocks,),
            e=rows_operand(e, BLOCK_T, tiles.block_d, tiles),
            c_ptr=c,
            **pointers(tokens, "low_e multiplier lse target_grad"),
            low_c_ptr=low_c,
            strips_ptr=strips,
            classes_ptr=classes,
            sums_ptr=light["sums_ptr"],
            bias_ptr=problem.bias,
            softcap=problem.softcap,
            **pointers(sample, "tilts mass"),
            N=e.shape[0],
            V=c.shape[0],
            D=e.shape[1],
            num_chunks=num_chunks,
            LOW_RANK=0 if low_c is None else low_c.shape[1],
            BLOCK_T=BLOCK_T,
            BLOCK_D=tiles.block_d,
            COLUMNS=columns,
            DRAWS=DRAWS,
            num_warps=8,
        )
        return sample

    def write_dropped(self, tokens: BackwardTokens, threshold: Threshold) -> None:
        """Write the mean of ``mass``, weighted by the upstream gradients, to the statistics."""
        launch(
            dropped_mass_kernel,
            (1,),
            a_ptr=most_upstream(tokens),
            **pointers(tokens, "b target_grad"),
            mass_ptr=self.mass,
            dropped_ptr=threshold.statistics[-3:],
            N=tokens.a.shape[0],
            SCAN=SCAN,
            num_warps=8,
        )
