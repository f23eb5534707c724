"""Sets the threshold of a step by the error that it makes on a sample of its tokens.

The energy of what is dropped does not tell how far dE is off: that depends on how alike the rows of
the classifier are. Before strips are computed, the error of the tail is therefore estimated for two
thresholds: from all logits of sampled tokens, drawn with a probability in proportion to their risk,
whose squared errors are divided by it. The rows of dE are not needed for that, only their norms,
and random projections of the rows of c keep these. Everything stays on the device, and is a
function of the inputs.

Shape legend: ``cut_cross_entropy.kernels``.
"""

import math

import torch
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T
from cut_cross_entropy.kernels.block_sizes import rows_operand, tiles_on
from cut_cross_entropy.kernels.filtered.measure import ROUNDING
from cut_cross_entropy.kernels.filtered.selection import Threshold
from cut_cross_entropy.kernels.launch import aligned_rows, cdiv, launch, pointers
from cut_cross_entropy.kernels.tokens import SCAN, BackwardTokens
from cut_cross_entropy.kernels.triton.filtered.calibrate import (
    ROWS,
    SAMPLES,
    SKETCH,
    SUMS,
    choose_threshold_kernel,
    draw_tokens_kernel,
    left_factor_kernel,
    sampled_gradients_kernel,
    sampled_sums_kernel,
)
from cut_cross_entropy.problem import Filter, MadeProblem, Problem, low_columns

MOST_BELOW = 32.0  # bytes by which a threshold may be lower than the lower one
# Growth of the error's logarithm (base 2) per byte, where it is extrapolated: on two real heads it
# was 0.08 to 0.12.
SLOPES = (0.05, 0.125)
MIN_TOKENS = 4096  # the pass over c costs the more matmuls the fewer the tokens
MIN_WORK = 4e11  # multiplications in a matmul below which the launches cost more than it does
CHUNK_BYTES = 128 * 2**20  # of logit gradients at a time
PROGRAMS = 264  # that share the sums over classes, for every TILE of the samples
TILE = 32
BLOCKS = {torch.bfloat16: 128, torch.float32: 64}  # classes at once


def calibrates(problem: Problem, filter_: Filter) -> bool:
    """Whether the threshold of a call follows from a sample.

    Shards would have to exchange projections of their errors.
    """
    (num_tokens, dim), num_classes = problem.e.shape, problem.c.shape[0]
    large = num_tokens >= MIN_TOKENS and num_tokens * dim * num_classes >= MIN_WORK
    has_rows = not isinstance(problem, MadeProblem)
    return filter_.max_error > 0 and problem.group is None and has_rows and large


def calibrate(
    problem: Problem,
    tokens: BackwardTokens,
    mass: Tensor,  # (N,) dropped probability, roughly
    threshold: Threshold,
    max_error: float,
) -> None:
    """Move a threshold, in place, to where the tail makes a given error of dE.

    Args:
        problem: without a group, c of the compute dtype.
        tokens: without ``eta`` and ``q``.
        mass: see above.
        threshold: the threshold by energy. It is raised by STEP bytes at most, and not beyond what
            the dropped mass allows. What it drops is estimated as well.
        max_error: relative error (Frobenius norm) to reach, of the tail alone, in multiples of the
            rounding error of bfloat16.
    """
    rows, factors, weight = draw_tokens(tokens, mass)
    launch(
        choose_threshold_kernel,
        (1,),
        sums_ptr=sampled_sums(problem, tokens, rows, threshold),
        factors_ptr=factors,
        weight_ptr=weight,
        histogram_ptr=threshold.histogram,
        most_ptr=threshold.most,
        threshold_ptr=threshold.value,
        num_kept_ptr=threshold.num_kept,
        dropped_ptr=threshold.statistics[-3:],
        target=math.log2(max_error * ROUNDING),
        lowest_slope=SLOPES[0],
        highest_slope=SLOPES[1],
        most_below=MOST_BELOW,
        num_warps=8,
    )


def draw_tokens(tokens: BackwardTokens, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens by their risk, of which ``mass`` (N,) is what they drop, roughly.

    Returns:
        rows (ROWS,) int64, of which the first SAMPLES count, in order; factors of their squared
        errors (ROWS,) float32; and the sum of the upstream gradients (1,) float32.
    """
    num_tokens, device = tokens.a.shape[0], tokens.a.device
    num_rows = ROWS.value
    rows = torch.empty(num_rows, dtype=torch.int64, device=device)
    sums, factors, weight = aligned_rows(3, max(num_tokens, num_rows), torch.float32, device)
    launch(
        draw_tokens_kernel,
        (1,),
        **pointers(tokens, "a b target_grad"),
        mass_ptr=mass,
        sums_ptr=sums,
        rows_ptr=rows,
        factors_ptr=factors,
        weight_ptr=weight,
        N=num_tokens,
        search_steps=num_tokens.bit_length(),
        SCAN=SCAN,
        num_warps=8,
    )
    return rows, factors[:num_rows], weight[:1]


def sampled_sums(
    problem: Problem, tokens: BackwardTokens, rows: Tensor, threshold: Threshold
) -> Tensor:
    """Return what two thresholds drop of the sampled tokens, times projections of the rows of c.

    Returns:
        (SUMS, SAMPLES, SKETCH) float32. The first three are sums of the token's logit gradients:
        of those dropped by the threshold less STEP, by the threshold, and of all, targets too. The
        other two are sums of the masses of its block that the two thresholds drop. The last
        projection is the constant 1.
    """
    e, c, tiles = tokens.e, problem.c, tiles_on(tokens.e.device)
    low_c = low_columns(problem)
    dim, num_classes, block_v = e.shape[1], c.shape[0], tiles.block_v
    num_rows, num_samples = ROWS.value, SAMPLES.value
    left = e.new_empty((num_rows, dim))
    launch(
        left_factor_kernel,
        (cdiv(dim, 32),),
        e_ptr=e,
        rows_ptr=rows,
        out_ptr=left,
        D=dim,
        BLOCK_D=32,
    )
    # Gradients of float16 would underflow in it.
    dtype = torch.bfloat16 if e.dtype == torch.bfloat16 else torch.float32
    fitting = min(CHUNK_BYTES, problem.memory_budget // 2) // (num_rows * dtype.itemsize)
    stride = max(1, fitting // block_v) * block_v
    stride = min(stride, cdiv(num_classes, block_v) * block_v)
    grads = e.new_empty((num_rows, stride), dtype=dtype)
    num_chunks = cdiv(num_classes, stride)
    parts = e.new_empty((PROGRAMS, SUMS, num_samples, SKETCH.value), dtype=torch.float32)
    total: Tensor | None = None
    block_d = max(16, tiles.block_d * 2 // e.element_size())
    left_rows = rows_operand(left, num_rows, block_d, tiles)
    c_rows = rows_operand(c, block_v, block_d, tiles)
    for chunk in range(num_chunks):
        first, stop = chunk * stride, min((chunk + 1) * stride, num_classes)
        launch(
            sampled_gradients_kernel,
            (cdiv(stop - first, block_v),),
            e=left_rows,
            c=c_rows,
            values=tokens.values,
            **pointers(tokens, "low_e multiplier"),
            low_c_ptr=low_c,
            rows_ptr=rows,
            bias_ptr=problem.bias,
            out_ptr=grads,
            V=num_classes,
            D=dim,
            stride=stride,
            softcap=problem.softcap,
            first_class=first,
            stop_class=stop,
            LOW_RANK=0 if low_c is None else low_c.shape[1],
            BLOCK_V=block_v,
            BLOCK_D=block_d,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        launch(
            sampled_sums_kernel,
            (PROGRAMS, num_samples // TILE),
            grads_ptr=grads,
            rows_ptr=rows,
            strips_ptr=threshold.strips,
            weights_ptr=threshold.weights,
            threshold_ptr=threshold.value,
            sums_ptr=parts,
            V=num_classes,
            stride=stride,
            first_class=first,
            num_classes=stop - first,
            SUMS=SUMS,
            BLOCK_T=BLOCK_T,
            TILE=TILE,
            BLOCK=BLOCKS[dtype],
            num_warps=8,
            num_stages=2,
        )
        of_chunk = parts.sum(0)
        total = of_chunk if total is None else total.add_(of_chunk)
    assert total is not None, "c has classes"
    return total
