"""End of a program that may be one of several processes."""

import os
import sys
from typing import NoReturn


def leave(code: int = 0) -> NoReturn:
    """End this process; as one of several without what the interpreter does when it ends.

    DistributedDataParallel keeps the threads of gloo alive. One of them may still hold the tensor
    of the last exchange, and aborts the process if it lets go of it while the interpreter ends
    (https://github.com/pytorch/pytorch/pull/179291).
    """
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
