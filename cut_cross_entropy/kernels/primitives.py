"""Device functions that several kernels share. Shape legend: ``cut_cross_entropy.kernels``."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
ENERGY_STEPS = tl.constexpr(4.0)  # bytes an octave of energy
ENERGY_FLOOR = tl.constexpr(-55.0)  # log2 of the energy that byte 0 stands for
FORCED = tl.constexpr(255)  # byte of a strip that holds a target: always kept


@triton.jit
def place_program(num_blocks, group_blocks, num_segments):
    """Token block and segment of classes of this program.

    Programs side by side share a segment (the rows of c) and a group of blocks (those of e).
    """
    program = tl.program_id(0)
    first_block = program // (group_blocks * num_segments) * group_blocks
    blocks_here = min(num_blocks - first_block, group_blocks)
    inside_group = program - first_block * num_segments
    return first_block + inside_group % blocks_here, inside_group // blocks_here


@triton.jit
def load_rows(
    source,  # (rows, D), a tensor descriptor or a pointer to contiguous rows
    row,
    num_rows,
    column,
    D,
    USE_TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A (ROWS, COLUMNS) tile at (row, column); zeros outside."""
    if USE_TMA:
        tile = source.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        tile = tl.load(
            source + rows.to(tl.int64)[:, None] * D + columns[None, :],
            mask=(rows < num_rows)[:, None] & (columns < D)[None, :],
            other=0.0,
        )
    return tile


@triton.jit
def transform_logits(
    product,  # (classes, tokens) rows of c times rows of e, or the other way round
    bias_ptr,  # (V,)
    classes,  # (classes,) class ids
    inside,  # (classes,) whether the id is a class
    softcap,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TOKEN_AXIS: tl.constexpr = 1,
):
    """Logits in units of log2: bias, then softcap; -inf where there is no class."""
    nothing = tl.where(inside, 0.0, float("-inf"))
    if SOFTCAP:
        if HAS_BIAS:
            bias = tl.load(bias_ptr + classes, mask=inside, other=0.0).to(tl.float32)
            product = product + tl.expand_dims(bias, TOKEN_AXIS)
        # tanh(z) = 1 - 2 / (exp(2 z) + 1), exact at both ends
        power = tl.exp2(product * (2 * LOG2E / softcap))
        capped = softcap * LOG2E - (2 * softcap * LOG2E) / (power + 1.0)
        return capped + tl.expand_dims(nothing, TOKEN_AXIS)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + classes, mask=inside, other=0.0).to(tl.float32)
        nothing = bias * LOG2E + nothing
    return product * LOG2E + tl.expand_dims(nothing, TOKEN_AXIS)


@triton.jit
def logit_slope(logits, softcap):
    """Derivative of the capped logits (units of log2) by the uncapped ones."""
    ratio = logits / (softcap * LOG2E)
    return tl.maximum(1.0 - ratio * ratio, 0.0)


@triton.jit
def fold_rows(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum groups of rows: (ROWS, COLUMNS) to (64, COLUMNS).

    The groups are those rows that one thread holds in the layout of a tensor-core product (bits 3
    and 7 of the row), so the sum needs no exchange between threads.
    """
    split = tl.reshape(values, (ROWS // 128, 8, 2, 8, COLUMNS))
    return tl.reshape(tl.sum(tl.sum(split, axis=2), axis=0), (64, COLUMNS))


@triton.jit
def energy_to_byte(energy):
    """One byte for the energy of a strip, ENERGY_STEPS an octave; the highest for NaN."""
    steps = tl.clamp(ENERGY_STEPS * (tl.log2(energy) - ENERGY_FLOOR), 0.0, 254.0)
    return tl.where(energy == energy, steps, 254.0).to(tl.uint8)


@triton.jit
def byte_to_weight(byte):
    """Square root of a strip's energy, its weight in the tail; 0 for byte 0."""
    exponent = (byte.to(tl.float32) + 0.5) / ENERGY_STEPS + ENERGY_FLOOR
    return tl.where(byte == 0, 0.0, tl.exp2(0.5 * exponent))


@triton.jit
def popcount(bits):
    """Number of ones of each int64."""
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    bits = bits + (bits >> 8)
    bits = bits + (bits >> 16)
    bits = bits + (bits >> 32)
    return (bits & 0x7F).to(tl.int32)
