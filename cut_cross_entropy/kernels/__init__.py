"""The Triton kernels, one file for each thing that they do.

Legend, used in every file here:
    N tokens, V classes (the vocabulary), D features
    strip      one class for one block of BLOCK_T = 128 tokens: what is kept or dropped
    bound      (N,)  a lower bound of a token's log-sum-exp; +inf marks "no token here"
    a, b       (N,)  gradients of (loss + lse) and of the loss: dlogits = a * p - b * onehot
    energy     sum of p * p over the 128 tokens of a strip, kept as one byte (its log2)
Logits, bounds and log-sum-exps inside kernels are in units of log2, so that exp2 serves.
Tiles of logits are (classes, tokens): a strip's sum then runs inside a thread.

Order of a step: ``prepare`` (drop ignored tokens), ``forward``, ``selection`` (which strips),
``strips`` (their logit gradients), ``grad_e``, ``grad_c``; ``dense`` where nothing can be skipped.
``filtered`` strings the parts of a filtered backward together, ``pipeline`` the whole; ``ahead``
compiles what it will launch. These two are the only entrances. Whoever enters makes the tensors'
device the current one first.
"""

from cut_cross_entropy.constants import BLOCK_TOKENS as BLOCK_T

__all__ = ["BLOCK_T"]
