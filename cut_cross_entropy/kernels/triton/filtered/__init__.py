"""Kernels of the filtered backward."""
