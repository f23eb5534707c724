"""Heads that are more than a matrix: adapters, quantised weights, scales of the classes.

``head`` says what a head consists of, ``modules`` and ``quantised`` read it off the modules of
other packages, ``rows`` makes its rows for a chunk of classes, and ``chunks`` computes what the
public functions return, chunk by chunk, by the implementations for matrices. Losses by kernels are
in ``adapted`` (a frozen matrix and the columns of adapters) and ``sums`` (all other heads),
divergences in ``divergences``.
"""

from cut_cross_entropy.heads.head import Head, LowRank, RowSource
from cut_cross_entropy.heads.modules import UnknownHeadError, head_of

__all__ = ["Head", "LowRank", "RowSource", "UnknownHeadError", "head_of"]
