"""The operators that PyTorch sees, around the implementations.

``declaration`` makes an operator of the classes of its arguments and results; ``losses``, ``sums``,
``token_outputs`` and ``divergences`` are the operators by what they return. ``transforms`` lets
``torch.func`` and forward-mode differentiation understand them, and ``flop_formulas`` counts their
operations. The kernels are imported when one is first called, so importing these modules needs no
Triton.
"""
