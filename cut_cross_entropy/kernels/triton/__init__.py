"""The stages' kernels in Triton: a module has the path of its stage."""
