"""Kernels of the stages in Triton: each module has the path of its stage in the folder above."""
