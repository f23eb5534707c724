"""Device functions that several kernels share: reading c, logits and their gradient, energy bytes.

Shape legend: ``cut_cross_entropy.kernels``.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
BYTE_STEPS = tl.constexpr(4.0)  # byte values per octave of a strip's energy or mass
BYTE_FLOOR = tl.constexpr(-55)  # log2 of the value that byte 0 stands for
MANTISSAS = tl.constexpr(0x6B45260C)  # of 2^(1/8), 2^(3/8), 2^(5/8) and 2^(7/8), 7 bits in a byte
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # positive normal float32
FORCED = tl.constexpr(255)  # byte of a strip that holds a target: always kept
FLAT = tl.constexpr(-1.0)  # target_grad of a token whose distribution is flat
RANK_STEP = tl.constexpr(16)  # columns of a low-rank product at a time
ABSENT = tl.constexpr(-2.0)  # target_grad of a row without a token


@triton.jit
def swizzle_program(num_blocks, swizzle_width, num_segments):
    """Return the token block and the segment of classes of this program.

    Neighbouring programs share a segment (rows of c) and ``swizzle_width`` blocks (rows of e).
    """
    program = tl.program_id(0)
    first_block = program // (swizzle_width * num_segments) * swizzle_width
    blocks_here = min(num_blocks - first_block, swizzle_width)
    within = program - first_block * num_segments
    return first_block + within % blocks_here, within // blocks_here


@triton.jit
def load_rows(
    source,  # (rows, D), a tensor descriptor or a pointer to contiguous rows
    row,
    num_rows,
    column,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Load a (ROWS, COLUMNS) tile at (row, column); zeros outside."""
    if source.dtype.is_ptr():  # the dtype of a descriptor is that of its elements
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        tile = tl.load(
            source + rows.to(tl.int64)[:, None] * D + columns[None, :],
            mask=(rows < num_rows)[:, None] & (columns < D)[None, :],
            other=0.0,
        )
    else:
        tile = source.load([row, column])
    return tile


@triton.jit
def multiply_step(
    product,  # (BLOCK_T, BLOCK_V) of the tile so far
    e,  # (N, D), a tensor descriptor or a pointer, like the one that follows
    c,  # (V, D)
    step,  # its index, the first token, the first class of the first tile
    shape,  # (N, V, D)
    TILE,  # (BLOCK_T, BLOCK_V, BLOCK_D)
):
    """Take a step of one loop over tiles of classes and features; return the product.

    With one loop, loads of the next tile overlap a tile's end.
    """
    i, first_token, first_class = step
    N, V, D = shape
    BLOCK_T: tl.constexpr = TILE[0]
    BLOCK_V: tl.constexpr = TILE[1]
    BLOCK_D: tl.constexpr = TILE[2]
    steps = tl.cdiv(D, BLOCK_D)
    column = i % steps * BLOCK_D
    v = first_class + (i // steps) * BLOCK_V
    e_tile = load_rows(e, first_token, N, column, D, ROWS=BLOCK_T, COLUMNS=BLOCK_D)
    c_tile = load_rows(c, v, V, column, D, ROWS=BLOCK_V, COLUMNS=BLOCK_D)
    return tl.dot(e_tile, c_tile.T, product, input_precision="ieee")


@triton.jit
def halves(product, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return the left and the right half of a wide tile (BLOCK_T, BLOCK_V); else the tile twice.

    A wide tile ends in two halves, which need fewer registers at a time.
    """
    if BLOCK_V > BLOCK_T:
        pairs = tl.permute(tl.reshape(product, (BLOCK_T, 2, BLOCK_V // 2)), (0, 2, 1))
        left, right = tl.split(pairs)
    else:
        left, right = product, product
    return left, right


@triton.jit
def load_token_values(
    values,  # pointers to lse (log2), a, b and targets, (N,) each, and others
    tokens,
    is_token,
):
    """Load lse, a, b and the target of some tokens; of no token, those without a gradient."""
    lse = tl.load(values[0] + tokens, mask=is_token, other=float("inf"))
    a = tl.load(values[1] + tokens, mask=is_token, other=0.0)
    b = tl.load(values[2] + tokens, mask=is_token, other=0.0)
    targets = tl.load(values[3] + tokens, mask=is_token, other=-1).to(tl.int32)
    return lse, a, b, targets


@triton.jit
def gather_rows(
    source_ptr,  # (V, D)
    rows,  # (R,)
    inside,  # (R,) whether to read the row
    columns,  # (C,)
    D,
):
    """Load some columns of some rows, (R, C); zeros outside."""
    return tl.load(
        source_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :],
        mask=inside[:, None] & (columns < D)[None, :],
        other=0.0,
    )


@triton.jit
def low_rank_product(
    low_e_ptr,  # (N, LOW_RANK)
    low_c_ptr,  # (V, LOW_RANK)
    rows,  # tokens (tokens,), and class ids (classes,)
    inside,  # whether these are tokens and classes
    LOW_RANK: tl.constexpr,  # 0: there are no such columns
    TOKEN_AXIS: tl.constexpr = 1,
):
    """Multiply the columns that are tensors of their own: what the sums of a tile start with.

    If they were added to a finished tile, ptxas would serialise the products of the main loop.
    """
    tokens, classes = rows
    is_token, is_class = inside
    if TOKEN_AXIS == 1:
        product = tl.zeros((classes.shape[0], tokens.shape[0]), tl.float32)
    else:
        product = tl.zeros((tokens.shape[0], classes.shape[0]), tl.float32)
    for first in tl.static_range(0, LOW_RANK, RANK_STEP):
        columns = first + tl.arange(0, RANK_STEP)
        low_e = gather_rows(low_e_ptr, tokens, is_token, columns, LOW_RANK)
        low_c = gather_rows(low_c_ptr, classes, is_class, columns, LOW_RANK)
        if TOKEN_AXIS == 1:
            product = tl.dot(low_c, low_e.T, product, input_precision="ieee")
        else:
            product = tl.dot(low_e, low_c.T, product, input_precision="ieee")
    return product


@triton.jit
def transform_logits(
    product,  # (classes, tokens) rows of c times rows of e, or its transpose
    classes,  # (classes,) class ids
    inside,  # (classes,) whether the id is a class
    bias_ptr,  # (V,), or None, like the two that follow
    softcap,
    multiplier=None,  # (tokens,)
    TOKEN_AXIS: tl.constexpr = 1,
):
    """Return logits in units of log2: bias, softcap, multiplier; -inf where there is no class."""
    CLASS_AXIS: tl.constexpr = 1 - TOKEN_AXIS
    nothing = tl.where(inside, 0.0, float("-inf"))
    if softcap is not None:
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + classes, mask=inside, other=0.0).to(tl.float32)
            product = product + tl.expand_dims(bias, TOKEN_AXIS)
        # tanh(z) = 1 - 2 / (exp(2 z) + 1), exact at both ends
        power = tl.exp2(product * (2 * LOG2E / softcap))
        capped = softcap * LOG2E - (2 * softcap * LOG2E) / (power + 1.0)
        if multiplier is not None:
            capped *= tl.expand_dims(multiplier, CLASS_AXIS)
        return capped + tl.expand_dims(nothing, TOKEN_AXIS)
    if multiplier is not None:
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + classes, mask=inside, other=0.0).to(tl.float32)
            product = product + tl.expand_dims(bias, TOKEN_AXIS)
        scaled = product * tl.expand_dims(multiplier * LOG2E, CLASS_AXIS)
        return scaled + tl.expand_dims(nothing, TOKEN_AXIS)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + classes, mask=inside, other=0.0).to(tl.float32)
        nothing = bias * LOG2E + nothing
    return product * LOG2E + tl.expand_dims(nothing, TOKEN_AXIS)


@triton.jit
def logit_slope(logits, softcap):
    """Return the derivative of the capped logits (units of log2) by the uncapped ones."""
    ratio = logits * (1.0 / (softcap * LOG2E))
    return tl.maximum(1.0 - ratio * ratio, 0.0)


@triton.jit
def logit_gradient(
    logits,  # (classes, tokens) in units of log2, or its transpose; like the two that follow
    p,  # probabilities
    onehot,  # whether the class is the token's target
    inside,  # (classes,) whether the row is a class
    values,  # lse (log2), a and b, (tokens,) each, and others, which are not read
    softcap,  # or None, like the three that follow
    multiplier=None,  # (tokens,), like the two that follow
    eta=None,
    q=None,
    TOKEN_AXIS: tl.constexpr = 1,
):
    """Return the gradient by the logits before softcap and multiplier.

    Every gradient of the kernels goes through this formula, so further terms belong here. Weights
    of tokens and classes, and the multiplier as a factor, are part of a, b, eta and q. An entropy
    adds ``eta * log p`` to the factor of p, the logarithm of the sum of squares ``q * p``.
    """
    CLASS_AXIS: tl.constexpr = 1 - TOKEN_AXIS
    lse, a, b = values[0], values[1], values[2]
    if eta is not None:
        # Where p is 0 the exponent may be -inf, and their product is to be 0.
        exponent = tl.maximum(logits - tl.expand_dims(lse, CLASS_AXIS), -200.0)
        factor = tl.expand_dims(a, CLASS_AXIS) + tl.expand_dims(eta * LN2, CLASS_AXIS) * exponent
        grad = p * factor
    else:
        grad = p * tl.expand_dims(a, CLASS_AXIS)
    if q is not None:
        grad += p * p * tl.expand_dims(q, CLASS_AXIS)
    grad -= tl.where(onehot, tl.expand_dims(b, CLASS_AXIS), 0.0)
    if softcap is not None:
        if multiplier is not None:
            logits = logits / tl.expand_dims(multiplier, CLASS_AXIS)
        slope = logit_slope(logits, softcap)
        grad *= tl.where(tl.expand_dims(inside, TOKEN_AXIS), slope, 0.0)
    return grad


@triton.jit
def fold_rows(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum sets of rows: (ROWS, COLUMNS) to (64, COLUMNS).

    A set is the rows that one thread holds in the layout of a tensor-core product (bits 3 and 7 of
    the row), so the sum needs no exchange between threads.
    """
    split = tl.reshape(values, (ROWS // 128, 8, 2, 8, COLUMNS))
    return tl.reshape(tl.sum(tl.sum(split, axis=2), axis=0), (64, COLUMNS))


@triton.jit
def next_above(value):
    """Return the next larger float32; of 0 the smallest normal number, of +inf NaN."""
    bits = value.to(tl.int32, bitcast=True)
    away = tl.where(bits < 0, bits - 1, bits + 1)
    return tl.where(value == 0.0, SMALLEST, away.to(tl.float32, bitcast=True))


@triton.jit
def log_to_byte(value):
    """Return one byte (int32) for a value: its log2, BYTE_STEPS per octave; the highest for NaN."""
    steps = tl.clamp(BYTE_STEPS * (tl.log2(value) - BYTE_FLOOR), 0.0, 254.0)
    return tl.where(value == value, steps, 254.0).to(tl.int32)


@triton.jit
def byte_to_log(byte):
    """Return the log2 of the value that a byte stands for."""
    return (byte.to(tl.float32) + 0.5) / BYTE_STEPS + BYTE_FLOOR


@triton.jit
def byte_to_value(byte):
    """Return the value that a byte stands for, rounded to bfloat16; 0 for byte 0.

    Its bits are put together: the exponent, and one of four mantissas, 2^(1/8), 2^(3/8) and so on.
    """
    byte = byte.to(tl.int32)
    exponent = (byte >> 2) + (127 + BYTE_FLOOR)
    mantissa = (MANTISSAS >> ((byte & 3) * 8)) & 0x7F
    value = ((exponent << 23) | (mantissa << 16)).to(tl.float32, bitcast=True)
    return tl.where(byte == 0, 0.0, value)


@triton.jit
def strip_bytes(energy, mass):
    """Return the int16 of a strip: its energy in the low byte, its mass in the high one."""
    return (log_to_byte(energy) | (log_to_byte(mass) << 8)).to(tl.int16)


@triton.jit
def popcount(bits):
    """Count the ones of each int64."""
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    bits = bits + (bits >> 8)
    bits = bits + (bits >> 16)
    bits = bits + (bits >> 32)
    return (bits & 0x7F).to(tl.int32)
