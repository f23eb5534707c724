"""Leaves out what needs Liger where it cannot be installed: it needs Triton."""

import platform

collect_ignore = (
    [] if platform.system() == "Linux" else ["test_liger.py", "test_tensor_parallel.py"]
)
