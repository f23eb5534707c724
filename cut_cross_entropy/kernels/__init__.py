"""The kernels: one module per stage, a wing for the filtered backward, a folder per backend.

Legend, used in every file here:
    N tokens, V classes (the vocabulary), D features
    block       BLOCK_T = 128 tokens; a superblock is 64 blocks, a chunk 1,024 classes
    strip       one class for one block of tokens: the unit that is kept or dropped
    K strips    a strip's slot is the row where its logit gradient is stored
    valid       not ignored; valid tokens are compacted into the first rows
    bound       (N,)  a lower bound of a token's log-sum-exp; +inf marks an absent token
    a, b        (N,)  gradients of (loss + lse) and of the loss: dlogits = a * p - b * onehot
    energy      sum of p * p over the 128 tokens of a strip, stored as one byte (its log2)
Logits, bounds and log-sum-exps inside kernels are in units of log2, so that exp2 serves.
Tiles of logits are (classes, tokens): a strip's sum then stays inside a thread.

``step`` is the entrance: its ``forward`` calls ``tokens`` (compact, score the targets), which takes
the order of the tokens from ``order``, and ``lse``
(passes over the vocabulary), its ``backward`` ``tokens``, then ``filtered`` and ``exact``, as the
filter and the data ask for. ``warmup`` compiles beforehand what a step launches. Callers make the
tensors' device the current one first (``launch.current_device``).

A stage is a function of a ``Problem`` (the call) and, in the backward, ``BackwardTokens``: it
allocates and launches. Its kernels have its path in a backend's folder: those of ``lse`` are in
``triton/lse``, those of ``filtered/tail`` in ``triton/filtered/tail``. Another backend of a kernel
is ``<backend>/lse`` with a kernel of the same name and parameters; the stage takes it where
``block_sizes`` says so of the device. Backends import no stage, and only stages import backends.
Facts that Triton's kernels share are in ``triton/primitives``: how rows of c are read
(``load_rows``, ``gather_rows``), logits (``transform_logits``) and their gradient
(``logit_gradient``). A further sum per token belongs in ``lse`` and ``entropy_and_rank``, a further
term of the gradient in ``logit_gradient``.
"""

from cut_cross_entropy.constants import BLOCK_TOKENS as BLOCK_T

__all__ = ["BLOCK_T", "SUPERBLOCK"]

SUPERBLOCK = 64  # token blocks whose bits share an int64
