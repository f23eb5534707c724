"""A step sends as much as ``benchmark.distributed_traffic`` says."""

from functools import partial

import pytest
import torch

from cut_cross_entropy.benchmark.data import Problem
from cut_cross_entropy.benchmark.distributed_traffic import (
    FILTERED,
    Collective,
    Replay,
    back_to_back,
    collectives,
)
from cut_cross_entropy.benchmark.setups import OWN_TOKENS, SETUPS
from tests.distributed.processes import assert_passed

WORLD, TOKENS, CLASSES, DIM = 2, 64, 640, 32

DTYPES = {"float": torch.float32, "long int": torch.int64}


def recorded(run):
    """The collectives of a call as the profiler saw them: kind, numbers of the whole, dtype."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        run()
    found, scatters = [], 0
    for event in profile.events():
        if event.name in ("c10d::_reduce_scatter_base_", "c10d::reduce_scatter_tensor_coalesced_"):
            scatters += 1  # which gloo does by an all-reduce
        elif event.name in ("gloo:all_gather", "gloo:all_reduce"):
            kind = event.name.removeprefix("gloo:")
            count = torch.Size(event.input_shapes[0]).numel()
            if kind == "all_gather":
                count *= WORLD
            elif scatters:
                kind, scatters = "reduce_scatter", scatters - 1
            found.append((kind, count, DTYPES[event.input_dtypes[0]]))
    return found


def problem_of(setup):
    generator = torch.Generator().manual_seed(0)
    tokens = TOKENS * (WORLD if setup in OWN_TOKENS else 1)
    return Problem(
        torch.randn(tokens, DIM, generator=generator),
        torch.randn(CLASSES, DIM, generator=generator),
        torch.randint(CLASSES, (tokens,), generator=generator),
    )


def counted(setup, impl, rank):
    step = SETUPS[setup](problem_of(setup), impl)
    step.run()  # DDP sends its weights before its first step
    # The header that processes compare on CPUs in every call is six integers from each.
    header = ("all_gather", 6 * WORLD, torch.int64)
    sent = [one for one in recorded(step.run) if one != header]
    said = collectives(setup, TOKENS, CLASSES, DIM, impl, torch.float32, WORLD)
    wanted = [(one.kind, one.count, one.dtype) for one in said]
    assert sorted(sent, key=str) == sorted(wanted, key=str)


def replayed(setup, rank):
    step = SETUPS[setup](problem_of(setup), "chunked")
    loss = step.run()
    before = local(step.e.grad).clone(), local(step.c.grad).clone()
    replay = Replay(step.run)
    assert torch.equal(replay.run(), loss)
    assert recorded(replay.run) == []
    assert torch.equal(local(step.e.grad), before[0])
    assert torch.equal(local(step.c.grad), before[1])
    assert len(recorded(step.run)) >= 3  # and communicates again


def local(grad):
    return grad.to_local() if hasattr(grad, "to_local") else grad


def runs_alone(rank):
    found = collectives("FSDP2", TOKENS, CLASSES, DIM, "chunked", torch.float32, WORLD)
    found.append(Collective("all_reduce", 11, torch.float32))
    run = back_to_back(found, torch.device("cpu"))
    # A ring cuts 11 numbers into two padded parts.
    wanted = [(one.kind, one.count + one.count % WORLD, one.dtype) for one in found]
    assert recorded(run) == wanted


COUNTED = (
    "vocabulary-parallel",
    "vocabulary-parallel, own tokens",
    "FSDP2",
    "FSDP2, DTensor",
    "DDP",
    "tensor-parallel DTensor",
)
REPLAYED = (
    "vocabulary-parallel",
    "vocabulary-parallel, own tokens",
    "tensor-parallel DTensor",
)
CASES = {
    **{f"counted {setup}": partial(counted, setup, "chunked") for setup in COUNTED},
    "counted full logits": partial(counted, "tensor-parallel full logits", "reference"),
    **{f"replayed {setup}": partial(replayed, setup) for setup in REPLAYED},
    "runs alone": runs_alone,
}


@pytest.mark.parametrize("name", CASES)
def test_two_processes(name, outcomes):
    assert_passed(outcomes[name])


def test_bytes_of_the_table_in_the_documentation():
    """docs/distributed.md, "Set-ups": R - 1 of R times what it says."""
    n, v, d, r = 100, 1000, 64, 4

    def sent(setup, impl="chunked"):
        found = collectives(setup, n, v, d, impl, torch.bfloat16, r)
        return sum(one.sent(r) for one in found) / ((r - 1) / r)

    assert sent("DDP") == 2 * 2 * v * d
    assert sent("FSDP2") == sent("FSDP2, DTensor", "cce") == 3 * 2 * v * d
    assert sent("FSDP2, DTensor") == 2 * 2 * v * d
    chunk = 2 * 16  # on how many tokens exact losses agree
    assert sent("vocabulary-parallel") == 8 * r * n + 2 * 2 * n * d + chunk
    assert sent("vocabulary-parallel", "cce") == 12 * r * n + 2 * 4 * n + 2 * 2 * n * d
    everyone = r * n
    own = 8 * r * everyone + 2 * 2 * everyone * d + 8 * everyone
    assert sent("vocabulary-parallel, own tokens") == own + chunk
    assert sent("vocabulary-parallel, own tokens", "cce") == own + 4 * r * everyone + 8 * everyone
    assert sent("tensor-parallel DTensor", "cce") == sent("vocabulary-parallel", "cce")


def test_one_process_sends_nothing_and_unknown_is_said():
    assert collectives("DDP", 1, 1, 1, "cce", torch.float32, 1) == []
    assert collectives("HSDP, DTensor", 1, 1, 1, "cce", torch.float32, 2) is None
    assert "cce_exact" not in FILTERED
