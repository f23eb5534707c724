"""Constants shared by the whole package."""

IGNORE_INDEX = -100
"""Target value that marks a token without a loss, as in ``torch.nn.functional.cross_entropy``."""

DEFAULT_MEMORY_BUDGET = 256 * 2**20
"""Bytes of scratch memory that one call may use beyond its results and their accumulators."""

BLOCK_TOKENS = 128
"""Tokens that the kernels' filter keeps or drops a class for, together."""

MAX_ELEMENTS = 2**30
"""Elements of any factor or result of a library product, at most: 32 bits reach them."""
