"""The filtered backward: computes the heavy strips and replaces all others by a rank-one tail.

``backward`` is the entrance; its docstring lists the other modules in the order of their use. Shape
legend: ``cut_cross_entropy.kernels``.
"""
