"""Leaves out what needs Liger where it cannot be installed: it needs Triton."""

import platform

NEED_LIGER = ["test_liger.py", "test_liger_distillation.py", "test_tensor_parallel.py"]
collect_ignore = [] if platform.system() == "Linux" else NEED_LIGER
