"""The Triton kernels, one file for each thing that they do."""
