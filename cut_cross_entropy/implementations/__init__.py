"""The plain PyTorch implementations, one a module, and the blocks that ``chunked`` works in.

``reference`` and ``full_logits`` are ordinary differentiable functions. ``chunked`` has a forward
and a backward of its own and is called through the operators in ``cut_cross_entropy.operators``.

Legend, used in every module here and in the kernels:
    N tokens, V classes (the vocabulary), D features
    e     (N, D)  embeddings
    c     (V, D)  classifier
    bias  (V,)    added to the logits
    nll   (N,)    lse - logit of the target; 0 for ignored tokens
    lse   (N,)    log-sum-exp of a token's logits; 0 for ignored tokens
"""
