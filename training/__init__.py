"""Fine-tuning of causal language models with a choice of losses. Not part of the wheel.

Imports run one way: ``train`` and ``demo``, then ``fit``, ``header`` and ``resume``, then the parts
that they use.
"""
