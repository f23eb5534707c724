"""Triton kernels of ``kernels.likely_classes``."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])
def list_likely_kernel(
    targets_ptr,  # (N,) row of c, or -1
    counts_ptr,  # (2, V) int32, in: zeros; changed
    classes_ptr,  # (SIZE,) int64 out
    N,
    V,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """List SIZE different classes, in one program: frequent targets first, first ids last."""
    latest_ptr = counts_ptr + V
    for start in range(0, N, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        targets = tl.load(targets_ptr + tokens, mask=tokens < N, other=-1)
        tl.atomic_add(counts_ptr + targets, 1, mask=targets >= 0, sem="relaxed")
        # One token stands for a class: its first one.
        tl.atomic_max(latest_ptr + targets, N - tokens, mask=targets >= 0, sem="relaxed")
    tl.debug_barrier()
    found = 0
    least, most = 8, N
    while least > 0:  # 8 targets or more, then 4, 2 and 1
        for start in range(0, N, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            targets = tl.load(targets_ptr + tokens, mask=tokens < N, other=-1)
            given = targets >= 0
            # Past the first-level cache, which atomic operations leave as it is.
            count = tl.load(counts_ptr + targets, mask=given, other=0, cache_modifier=".cg")
            latest = tl.load(latest_ptr + targets, mask=given, other=0, cache_modifier=".cg")
            listed = given & (latest == N - tokens) & (count >= least) & (count <= most)
            place = found + tl.cumsum(listed.to(tl.int32), 0) - 1
            tl.store(classes_ptr + place, targets, mask=listed & (place < SIZE))
            found += tl.sum(listed.to(tl.int32), 0)
        least, most = least // 2, least - 1
    # Of the first 2 SIZE ids at least SIZE are not listed yet, or all classes are among them.
    for start in range(0, min(V, 2 * SIZE), BLOCK):
        ids = start + tl.arange(0, BLOCK)
        count = tl.load(counts_ptr + ids, mask=ids < V, other=1, cache_modifier=".cg")
        listed = count == 0
        place = found + tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(classes_ptr + place, ids.to(tl.int64), mask=listed & (place < SIZE))
        found += tl.sum(listed.to(tl.int32), 0)
