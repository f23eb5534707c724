"""Several processes over gloo that run many cases, and tell for each how it ended.

Starting processes takes seconds and a case milliseconds, so a test module starts them once. A case
is a function of this process's rank that raises if something is wrong. After a case that failed
anywhere, everybody gets a new process group, so the next one starts clean.
"""

import datetime
import functools
import gc
import multiprocessing
import os
import pickle
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessException

from cut_cross_entropy.device_support import triton_version

TIMEOUT = 60  # seconds that a collective waits for the other processes
LIMIT = 600  # seconds that processes may take for everything

PRELOADED = [
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "cut_cross_entropy.kernels.step",
    "peft",
    "pytest",
    "transformers.models.llama.modeling_llama",
    "tests.support",
]


class Cases(dict):
    """Functions of a rank by name, which a module registers with the decorator :meth:`add`."""

    def add(self, *parameters):
        """Register a case for each parameter, or a single one."""

        def register(function):
            for parameter in parameters or [()]:
                values = parameter if isinstance(parameter, tuple) else (parameter,)
                name = "-".join([function.__name__, *map(str, values)])
                self[name] = functools.partial(_call, function, values)
            return function

        return register


def _call(function, values, rank):
    function(rank, *values)


class Die(Exception):
    """Raised by a case: this process ends at once, and that is what the case wants."""


def fork_processes(function, arguments, world_size):
    """Call ``function(rank, *arguments)`` in processes that have imported most of what they need.

    What the server imports counts when it starts, so it is the same for all tests. What it forks
    has run no backward pass, which a fork cannot follow.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    started = mp.start_processes(
        function, arguments, nprocs=world_size, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + LIMIT
    while not started.join(max(0.0, deadline - time.monotonic())):
        if time.monotonic() > deadline:
            for process in started.processes:
                process.kill()
            raise TimeoutError(f"processes of {function.__name__} have not ended in {LIMIT} s")


def run_cases(cases, world_size, folder, *, device="cpu", timeout=TIMEOUT):
    """Run ``{name: function}`` in ``world_size`` processes.

    Returns:
        By name: a list with, for each rank, None or the text of what was raised.
    """
    arguments = (list(cases.items()), world_size, str(folder), timeout)
    died = "not run"
    try:
        if device == "cpu":
            fork_processes(_process, arguments, world_size)
        else:
            mp.spawn(_process, arguments, nprocs=world_size)
    except ProcessException as error:
        died = f"in this case or one before it: {error}"

    def outcome(file):
        return (file.read_text() or None) if file.exists() else died

    # In files of their own: that of a store is gone with the last process.
    files = [
        [Path(f"{folder}/{i}-{rank}") for rank in range(world_size)] for i in range(len(cases))
    ]
    return {name: [outcome(f) for f in files[i]] for i, name in enumerate(cases)}


def outcomes_of(cases, world_size, factory, name, **options):
    """:func:`run_cases` once, even if several workers of pytest share the tests of a module."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return run_cases(cases, world_size, factory.mktemp(name), **options)
    folder = factory.getbasetemp().parent / name
    finished = folder / "outcomes"
    try:
        folder.mkdir()
    except FileExistsError:  # another worker was first
        deadline = time.monotonic() + 600
        while not finished.exists():
            assert time.monotonic() < deadline, f"no outcomes of {name} from another worker"
            time.sleep(0.1)
        return pickle.loads(finished.read_bytes())
    outcomes = run_cases(cases, world_size, folder, **options)
    (folder / "writing").write_bytes(pickle.dumps(outcomes))
    (folder / "writing").rename(finished)
    return outcomes


def _process(rank, cases, world_size, folder, timeout):
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1" and triton_version() is not None:
        from tests.fast_interpreter import skip_repeated_work

        skip_repeated_work()
    warnings.simplefilter("error")
    # What PyTorch says about itself: compiled code and DTensors in processes.
    of_pytorch = ("`torch.jit.", "The .grad attribute", ".*autograd.function.Function'> should not")
    for message in of_pytorch:
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    store = dist.FileStore(f"{folder}/store", world_size)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    generation, start = 0, functools.partial(_new_group, store, rank, world_size, timeout)
    start(generation)
    for i, (name, case) in enumerate(cases):
        report = Path(f"{folder}/{i}-{rank}")
        try:
            case(rank)
            outcome = ""
        except Die:
            report.write_text("")
            store.set(f"{name}/{rank}", "")
            os._exit(0)
        except BaseException:  # what pytest raises is no Exception
            outcome = traceback.format_exc() or "failed"
        report.write_text(outcome)
        store.set(f"{name}/{rank}", outcome)
        outcomes = [store.get(f"{name}/{other}") for other in range(world_size)]
        if any(outcomes):
            generation += 1
            dist.destroy_process_group()
            start(generation)
    dist.destroy_process_group()


def _new_group(store, rank, world_size, timeout, generation):
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"generation{generation}", store),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )


def assert_passed(outcomes):
    """Fail with the text of each rank that failed."""
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(outcomes) if text is not None]
    assert not failed, "\n".join(failed)


def settled(measure):
    """Return ``measure()`` once it is 0 or None, or after ten seconds.

    Computation may be done with a tensor a moment before the threads of gloo, which hold what they
    sent, let go of it, or PyTorch may leave it in a cycle of references. What is kept stays,
    however long one waits.
    """
    for _ in range(100):
        gc.collect()
        value = measure()
        if not value:
            break
        time.sleep(0.1)
    return value
