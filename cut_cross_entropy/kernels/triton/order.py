"""Triton kernels of ``kernels.order``."""

import triton
import triton.language as tl


@triton.jit
def random_signs(d, FEATURES: tl.constexpr):
    """Return a (len(d), FEATURES) matrix of signs, a function of the row numbers ``d`` alone."""
    f = tl.arange(0, FEATURES)
    x = (d[:, None] * 2 + (f // 32)[None, :] + 1).to(tl.uint32) * 0x9E3779B1
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    return 1.0 - 2.0 * ((x >> (f % 32).to(tl.uint32)[None, :]) & 1).to(tl.float32)


@triton.jit(do_not_specialize=["N", "stride_n"])
def features_kernel(
    e_ptr,  # (N, D) embeddings of the caller
    origin_ptr,  # (N,) position of each valid token; N where absent
    features_ptr,  # (N, FEATURES) float16, out
    N,
    D,
    stride_n,
    stride_d,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Project the direction of each embedding on random vectors."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    origin = tl.load(origin_ptr + rows, mask=rows < N, other=N)
    present = origin < N
    features = tl.arange(0, FEATURES)
    total = tl.zeros((ROWS, FEATURES), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        e = tl.load(
            e_ptr + origin[:, None] * stride_n + d[None, :] * stride_d,
            mask=present[:, None] & (d < D)[None, :],
            other=0.0,
        )
        signs = random_signs(d, FEATURES)
        total = tl.dot(e, signs.to(e.dtype), total)
        square += tl.sum(e.to(tl.float32) * e.to(tl.float32), 1)
    value = total * tl.where(square > 0, 1.0 / tl.sqrt(square), 0.0)[:, None]
    # A token with a NaN or an infinity has to be somewhere; where does not matter.
    value = tl.where(tl.abs(value) < 1e4, value, 0.0)
    out = features_ptr + rows[:, None] * FEATURES + features[None, :]
    tl.store(out, value.to(features_ptr.dtype.element_ty), mask=(rows < N)[:, None])


@triton.jit
def child(blocks, path, LEVELS: tl.constexpr):
    """Return the first block, relative to its root's, and the number of blocks of a node.

    The bits of ``path`` lead from a root of ``blocks`` blocks to it: 1 is the right half.
    """
    first = blocks * 0
    for level in tl.static_range(LEVELS):
        left = (blocks + 1) // 2
        right = (path >> (LEVELS - 1 - level)) & 1
        first += left * right
        blocks = left * (1 - right) + (blocks - left) * right
    return first, blocks


@triton.jit
def ordered_bits(values, BITS: tl.constexpr):
    """Return the first BITS of float32 values as integers from 0 on, in the same order."""
    bits = values.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits >> (32 - BITS)) + (1 << (BITS - 1))


@triton.jit
def principal_directions(
    features_ptr,  # (N, FEATURES)
    order_ptr,  # (N,) only without FIRST
    start,
    size,
    DIRECTIONS: tl.constexpr,
    SAMPLES: tl.constexpr,
    STEP: tl.constexpr,
    ITERATIONS: tl.constexpr,
    FIRST: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Return about the first DIRECTIONS principal directions of a node, (FEATURES, 16)."""
    f = tl.arange(0, FEATURES)
    moments = tl.zeros((FEATURES, FEATURES), tl.float32)
    sums = tl.zeros((FEATURES,), tl.float32)
    taken = tl.minimum(size, SAMPLES)
    for first in range(0, taken, STEP):
        i = first + tl.arange(0, STEP)
        place = start + (i.to(tl.int64) * size // taken).to(tl.int32)
        token = place if FIRST else tl.load(order_ptr + place, mask=i < taken, other=0)
        rows = features_ptr + token[:, None] * FEATURES + f[None, :]
        x = tl.load(rows, mask=(i < taken)[:, None], other=0.0)
        moments = tl.dot(x.T, x, moments)
        sums += tl.sum(x.to(tl.float32), 0)
    mean = sums / taken
    column = tl.sum(tl.where(f[:, None] == f[None, :], mean[None, :], 0.0), 1)
    moments = moments / taken - column[:, None] * mean[None, :]
    slots = tl.arange(0, 16)
    directions = tl.zeros((FEATURES, 16), tl.float32)
    for k in tl.static_range(DIRECTIONS):
        # Any start serves that is not orthogonal to the direction.
        v = 1.0 + (f * (7 + 2 * k) % 11).to(tl.float32) / 22.0
        v = tl.where((f + k) % 2 == 0, v, -v)
        u = tl.sum(moments * v[None, :], 1)
        for _ in range(ITERATIONS):
            u /= tl.maximum(tl.sqrt(tl.sum(u * u, 0)), 1e-30)
            v = tl.sum(moments * u[:, None], 0)
            v /= tl.maximum(tl.sqrt(tl.sum(v * v, 0)), 1e-30)
            u = tl.sum(moments * v[None, :], 1)
        length = tl.sqrt(tl.sum(u * u, 0))
        u /= tl.maximum(length, 1e-30)
        moments -= length * u[:, None] * v[None, :]
        directions += tl.where(slots[None, :] == k, u[:, None], 0.0)
    return directions


@triton.jit
def right_halves(
    key,  # (T,) KEY_BITS bits
    leaf,  # (T,) path from the root to the token's node
    inside,  # (T,) whether there is a token
    blocks,  # of the root
    LEVEL: tl.constexpr,  # of the nodes, at most 2
    KEY_BITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Return 1 for the tokens behind the median of their node, which has whole blocks before it.

    An int64 holds a number below 2^16 for each of the up to four nodes, so that one sum over the
    tokens serves all of them.
    """
    NODES: tl.constexpr = 1 << LEVEL
    field = (leaf * 16).to(tl.int64)
    one = tl.where(inside, 1, 0).to(tl.int64) << field
    wanted = tl.cast(blocks * 0, tl.int64)  # tokens of the left half
    for node in tl.static_range(NODES):
        _, blocks_here = child(blocks, node, LEVEL)
        wanted |= tl.cast((blocks_here + 1) // 2 * BLOCK_T, tl.int64) << (16 * node)
    # The largest number with fewer than the wanted tokens below it, bit by bit.
    median = wanted * 0
    bit = tl.cast(1 << (KEY_BITS - 1), tl.int64)
    for _ in range(KEY_BITS):  # unrolled, it would take ten seconds to compile
        trial = median
        for node in tl.static_range(NODES):
            trial |= bit << (16 * node)
        smaller = key < ((trial >> field) & 0xFFFF).to(tl.int32)
        below = tl.sum(tl.where(smaller, one, 0), 0)
        for node in tl.static_range(NODES):
            few = ((below >> (16 * node)) & 0xFFFF) < ((wanted >> (16 * node)) & 0xFFFF)
            median |= tl.where(few, bit << (16 * node), 0)
        bit = bit >> 1
    own_median = ((median >> field) & 0xFFFF).to(tl.int32)
    equal = key == own_median
    rank = tl.sum(tl.where(key < own_median, one, 0), 0) + tl.cumsum(tl.where(equal, one, 0), 0)
    late = ((rank >> field) & 0xFFFF) > ((wanted >> field) & 0xFFFF)
    return (inside & ((key > own_median) | (equal & late))).to(tl.int32)


@triton.jit(do_not_specialize=["N"])
def split_nodes_kernel(
    features_ptr,  # (N, FEATURES)
    order_ptr,  # (N,) int32 tokens in the order of the levels before; only without FIRST
    count_ptr,  # () valid tokens
    keys_ptr,  # (KEYS, N) float32, scratch
    out_ptr,  # (N,) int32, out: the new order
    N,
    LEVEL: tl.constexpr,  # levels above the nodes
    KEYS: tl.constexpr,  # levels that are split here
    CAPACITY: tl.constexpr,  # tokens that a node has at most
    SAMPLES: tl.constexpr,
    STEP: tl.constexpr,
    ITERATIONS: tl.constexpr,
    KEYS_AT_ONCE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    FIRST: tl.constexpr,
    FEATURES: tl.constexpr,
    SUPERBLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Split one node into 2 ** KEYS, of whole blocks."""
    count = tl.load(count_ptr)
    node = tl.program_id(0)
    superblock = node >> LEVEL
    path = node & ((1 << LEVEL) - 1)
    blocks = tl.cdiv(count, BLOCK_T) - superblock * SUPERBLOCK
    blocks = tl.minimum(tl.maximum(blocks, 0), SUPERBLOCK)
    first_block, blocks = child(blocks, path, LEVEL)
    start = (superblock * SUPERBLOCK + first_block) * BLOCK_T
    size = tl.minimum(blocks * BLOCK_T, count - start)
    lanes = tl.arange(0, CAPACITY)
    if blocks <= 0:
        return

    directions = principal_directions(
        features_ptr,
        order_ptr=order_ptr,
        start=start,
        size=size,
        DIRECTIONS=KEYS,
        SAMPLES=SAMPLES,
        STEP=STEP,
        ITERATIONS=ITERATIONS,
        FIRST=FIRST,
        FEATURES=FEATURES,
    )
    directions = directions.to(features_ptr.dtype.element_ty)
    f = tl.arange(0, FEATURES)
    slots = tl.arange(0, 16)
    for at in range(0, size, KEYS_AT_ONCE):
        i = at + tl.arange(0, KEYS_AT_ONCE)
        token = start + i if FIRST else tl.load(order_ptr + start + i, mask=i < size, other=0)
        rows = features_ptr + token[:, None] * FEATURES + f[None, :]
        keys = tl.dot(tl.load(rows, mask=(i < size)[:, None], other=0.0), directions)
        out = keys_ptr + slots[None, :] * N + (start + i)[:, None]
        tl.store(out, keys, mask=(i < size)[:, None] & (slots < KEYS)[None, :])
    tl.debug_barrier()  # other threads have written the keys that this one reads

    inside = lanes < size
    leaf = tl.zeros((CAPACITY,), tl.int32)  # path of each token, so far
    for k in tl.static_range(KEYS):
        key = tl.load(keys_ptr + k * N + start + lanes, mask=inside, other=0.0)
        key = ordered_bits(key, KEY_BITS)
        right = right_halves(
            key,
            leaf=leaf,
            inside=inside,
            blocks=blocks,
            LEVEL=k,
            KEY_BITS=KEY_BITS,
            BLOCK_T=BLOCK_T,
        )
        leaf = leaf * 2 + right
    place = tl.zeros((CAPACITY,), tl.int32)
    for one in tl.static_range(1 << KEYS):
        first, _ = child(blocks, one, KEYS)
        place = tl.where(leaf == one, start + first * BLOCK_T, place)
    field = (leaf % 4 * 16).to(tl.int64)
    for four in tl.static_range((1 << KEYS) // 4):
        member = inside & (leaf // 4 == four)
        counts = tl.cumsum(tl.where(member, 1, 0).to(tl.int64) << field, 0)
        place += tl.where(member, ((counts >> field) & 0xFFFF).to(tl.int32) - 1, 0)
    token = start + lanes if FIRST else tl.load(order_ptr + start + lanes, mask=inside, other=0)
    tl.store(out_ptr + place, token, mask=inside)


@triton.jit
def scatter_kernel(
    features_ptr,  # (N, FEATURES)
    order_ptr,  # (N,) int32 tokens in order of content
    count_ptr,  # () valid tokens
    scatter_ptr,  # (2, blocks) out: in the caller's order, and in order of content
    FEATURES: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Sum the squared distances of a block's features from their mean."""
    block = tl.program_id(0)
    by_content = tl.program_id(1)
    rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = rows < tl.load(count_ptr)
    ordered = tl.load(order_ptr + rows, mask=inside, other=0)
    token = tl.where(by_content > 0, ordered, rows)
    x = tl.load(
        features_ptr + token[:, None] * FEATURES + tl.arange(0, FEATURES)[None, :],
        mask=inside[:, None],
        other=0.0,
    ).to(tl.float32)
    sums = tl.sum(x, 0)
    size = tl.maximum(tl.sum(inside.to(tl.int32), 0), 1)
    scatter = tl.sum(tl.sum(x * x, 0), 0) - tl.sum(sums * sums, 0) / size
    tl.store(scatter_ptr + by_content * tl.num_programs(0) + block, scatter)


@triton.jit(do_not_specialize=["N", "num_blocks"])
def choose_order_kernel(
    order_ptr,  # (N,) int32 tokens in order of content
    count_ptr,  # () valid tokens
    scatter_ptr,  # (2, blocks)
    origin_ptr,  # (N,) position of each valid token
    out_ptr,  # (N,) out: the same in the better order of each superblock; N where absent
    N,
    num_blocks,
    SUPERBLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write the positions of one block of tokens."""
    block = tl.program_id(0)
    blocks = block // SUPERBLOCK * SUPERBLOCK + tl.arange(0, SUPERBLOCK)
    inside = blocks < num_blocks
    of_caller = tl.sum(tl.load(scatter_ptr + blocks, mask=inside, other=0.0), 0)
    by_content = tl.sum(tl.load(scatter_ptr + num_blocks + blocks, mask=inside, other=0.0), 0)
    rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
    present = rows < tl.load(count_ptr)
    token = tl.load(order_ptr + rows, mask=present, other=0)
    token = tl.where(by_content < of_caller, token, rows)
    origin = tl.load(origin_ptr + token, mask=present, other=N)
    tl.store(out_ptr + rows, origin, mask=rows < N)
