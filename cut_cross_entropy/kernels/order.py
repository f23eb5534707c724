"""Orders tokens by content: the tokens of a block put their probability on the same classes.

Every superblock is a balanced tree: a node's tokens are halved at the median of their projection on
one of its principal directions, down to single blocks. The features are random projections of the
embeddings' directions, so all shards of a vocabulary find the same order without an exchange. Where
the caller's order has blocks that are more alike, as with many short documents, a superblock keeps
it. A token's loss does not depend on its neighbours, and results are returned in the caller's
order. Shape legend: ``cut_cross_entropy.kernels``.
"""

import torch
from torch import Tensor

from cut_cross_entropy.kernels import BLOCK_T, SUPERBLOCK
from cut_cross_entropy.kernels.launch import aligned_rows, cdiv, launch
from cut_cross_entropy.kernels.triton.order import (
    choose_order_kernel,
    features_kernel,
    scatter_kernel,
    split_nodes_kernel,
)

FEATURES = 64
STAGE = 3  # levels that use the principal directions of one node; two stages make 64 blocks
SAMPLES = 1024  # tokens that a node's directions are computed from
STEP = 128  # of them at once
KEYS_AT_ONCE = 256  # tokens that are projected at once
ITERATIONS = 3  # of the power method, two products each
KEY_BITS = 15  # of a projection; tokens that agree in them keep their order


def order_by_content(
    e: Tensor,  # (N, D) in the caller's order
    origin: Tensor,  # (N,) int64 position of each valid token, compacted; N where absent
    count: Tensor,  # () int32 number of valid tokens
) -> Tensor:
    """Return the positions of the valid tokens, ordered by content: (N,) int64, N where absent.

    The order depends on the embeddings alone. Tokens of equal features stay in their order.
    """
    num_tokens, dim = e.shape
    num_blocks = cdiv(num_tokens, BLOCK_T)
    if num_blocks < 2:
        return origin
    device = e.device
    features = torch.empty((num_tokens, FEATURES), dtype=torch.float16, device=device)
    rows = 32
    launch(
        features_kernel,
        (cdiv(num_tokens, rows),),
        e_ptr=e,
        origin_ptr=origin,
        features_ptr=features,
        N=num_tokens,
        D=dim,
        stride_n=e.stride(0),
        stride_d=e.stride(1),
        ROWS=rows,
        BLOCK_D=64 if e.element_size() > 2 else 128,
        FEATURES=FEATURES,
        num_warps=4,
        num_stages=3,
    )
    orders = aligned_rows(2, num_tokens, torch.int32, device)
    keys = torch.empty((STAGE, num_tokens), dtype=torch.float32, device=device)
    for level in (0, STAGE):  # nodes of small batches are empty: one variant serves all
        launch(
            split_nodes_kernel,
            (cdiv(num_blocks, SUPERBLOCK) << level,),
            features_ptr=features,
            order_ptr=orders[0],
            count_ptr=count,
            keys_ptr=keys,
            out_ptr=orders[level // STAGE],
            N=num_tokens,
            LEVEL=level,
            KEYS=STAGE,
            CAPACITY=SUPERBLOCK * BLOCK_T >> level,
            SAMPLES=SAMPLES,
            STEP=STEP,
            ITERATIONS=ITERATIONS,
            KEYS_AT_ONCE=KEYS_AT_ONCE,
            KEY_BITS=KEY_BITS,
            FIRST=level == 0,
            FEATURES=FEATURES,
            SUPERBLOCK=SUPERBLOCK,
            BLOCK_T=BLOCK_T,
            num_warps=16 if level == 0 else 8,
            num_stages=2,
        )
    scatter = torch.empty((2, num_blocks), dtype=torch.float32, device=device)
    launch(
        scatter_kernel,
        (num_blocks, 2),
        features_ptr=features,
        order_ptr=orders[1],
        count_ptr=count,
        scatter_ptr=scatter,
        FEATURES=FEATURES,
        BLOCK_T=BLOCK_T,
    )
    result = torch.empty_like(origin)
    launch(
        choose_order_kernel,
        (num_blocks,),
        order_ptr=orders[1],
        count_ptr=count,
        scatter_ptr=scatter,
        origin_ptr=origin,
        out_ptr=result,
        N=num_tokens,
        num_blocks=num_blocks,
        SUPERBLOCK=SUPERBLOCK,
        BLOCK_T=BLOCK_T,
    )
    return result
