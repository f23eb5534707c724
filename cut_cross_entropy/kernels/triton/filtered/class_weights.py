"""Triton kernels of ``kernels.filtered.class_weights``."""

import triton
import triton.language as tl

from cut_cross_entropy.kernels.triton.filtered.selection import class_group, dropped_mass
from cut_cross_entropy.kernels.triton.primitives import ABSENT, byte_to_value


@triton.jit(do_not_specialize=["first_block", "num_blocks", "num_samples", "first", "step", "N"])
def class_weights_kernel(
    grads_ptr,  # (tokens, stride) logit gradients times the scale, from the first block on
    scale_ptr,  # ()
    target_grad_ptr,  # (N,) negative for tokens without a filtered gradient
    strips_ptr,  # (blocks, V)
    masks_ptr,  # (superblocks, V)
    class_mass_ptr,  # (V,) see class_group, like the two that follow
    mean_mass_ptr,  # ()
    mass_deviation_ptr,  # ()
    weights_ptr,  # (GROUPS - 1, N) out: see ClassWeights
    own_mass_ptr,  # (GROUPS, num_blocks) out, but for the last group
    first_block,
    num_blocks,
    num_samples,
    first,  # sampled class, and their distance
    step,
    N,
    V,
    stride,
    SUPERBLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum gradients and masses of dropped strips of one group's samples in one block."""
    here = tl.program_id(0)
    group = tl.program_id(1)
    block = first_block + here
    lanes = tl.arange(0, BLOCK_T)
    tokens = block * BLOCK_T + lanes
    filtered = tl.load(target_grad_ptr + tokens, mask=tokens < N, other=ABSENT)
    filtered = (tokens < N) & ~(filtered < 0)  # NaN has to propagate
    strips = strips_ptr + block.to(tl.int64) * V
    masks = masks_ptr + (block // SUPERBLOCK).to(tl.int64) * V
    masses_of = (class_mass_ptr, mean_mass_ptr, mass_deviation_ptr)
    total = tl.zeros((BLOCK_T,), tl.float32)
    total_mass = 0.0
    for start in range(0, num_samples, BLOCK):
        samples = start + tl.arange(0, BLOCK)
        inside = samples < num_samples
        classes = first + samples * step
        inside &= class_group(masses_of, classes, inside) == group
        both = tl.load(strips + classes, mask=inside, other=0).to(tl.int32)
        kept = tl.load(masks + classes, mask=inside, other=0)
        mass = byte_to_value(dropped_mass(both, kept, block % SUPERBLOCK))
        grads = tl.load(
            grads_ptr + (here * BLOCK_T + lanes)[:, None] * stride + samples[None, :],
            mask=filtered[:, None] & (mass > 0)[None, :],
            other=0.0,
        )
        total += tl.sum(grads.to(tl.float32), 1)
        total_mass += tl.sum(mass, 0)
    total /= tl.load(scale_ptr)
    tl.store(weights_ptr + group * N + tokens, total, mask=tokens < N)
    tl.store(own_mass_ptr + group * num_blocks + block, total_mass)
