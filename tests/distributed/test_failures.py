"""An error on one process becomes an error on every process, within the time-out."""

import datetime
import time

import pytest
import torch
import torch.distributed as dist

from cut_cross_entropy import VocabParallelOptions, linear_cross_entropy
from tests.distributed.processes import Cases, Die, assert_passed, run_cases
from tests.distributed.sharded import check, rows
from tests.support import make_problem

TIMEOUT = 4  # seconds, where waiting is what is tested
WORLD = 2
CASES = Cases()


def impatient(ranks):
    """A group that waits for its members no longer than the time-out."""
    return dist.new_group(ranks, timeout=datetime.timedelta(seconds=TIMEOUT))


def call(problem, own, **options):
    part = rows(problem, own)
    return linear_cross_entropy(
        part.e.requires_grad_(),
        part.c.requires_grad_(),
        part.targets,
        vocab_parallel_options=own,
        **options,
    )


@CASES.add()
def tokens(rank):
    """Processes would wait for bytes that never come, or end without a word."""
    problem = make_problem((5 + rank,))
    for options in ({}, {"gather_e": True}):
        own = VocabParallelOptions.from_vocab(300, **options)
        with pytest.raises(ValueError, match=r"as many tokens on every rank .*, got 5, 6"):
            call(problem, own)


@CASES.add()
def features(rank):
    problem = make_problem(dim=16 + rank)
    with pytest.raises(ValueError, match=r"as many features on every rank .*, got 16, 17"):
        call(problem, VocabParallelOptions.from_vocab(300))


@CASES.add()
def dtypes(rank):
    problem = make_problem(dtype=(torch.float32, torch.bfloat16)[rank])
    with pytest.raises(ValueError, match=r"same dtype .*, got torch.float32, torch.bfloat16"):
        call(problem, VocabParallelOptions.from_vocab(300))


@CASES.add()
def targets(rank):
    problem = make_problem(seed=rank)
    with pytest.raises(ValueError, match=r"targets must be the same on every rank.*gather_e=True"):
        call(problem, VocabParallelOptions.from_vocab(300))


@CASES.add()
def shards(rank):
    """A gap, an overlap, and a first class that nobody has."""
    for bounds in (((0, 140), (150, 300)), ((0, 160), (150, 300)), ((1, 150), (150, 300))):
        own = VocabParallelOptions(*bounds[rank])
        (start, stop), (next_start, next_stop) = bounds
        got = rf"\[{start}, {stop}\), \[{next_start}, {next_stop}\)"
        with pytest.raises(ValueError, match=f"without gaps or overlaps, got by rank {got}"):
            call(make_problem(), own)


@CASES.add()
def targets_of_one_process_out_of_range(rank):
    problem = make_problem((2, 5))
    problem.targets[1] = 300
    own = VocabParallelOptions.from_vocab(300, gather_e=True)
    part = rows(problem, own)
    with pytest.raises(ValueError, match=r"\[0, V\) with V = 300.* got 300 \(5 out of range\)"):
        linear_cross_entropy(part.e[rank], part.c, part.targets[rank], vocab_parallel_options=own)


@CASES.add()
def the_next_call_is_unharmed(rank):
    check(make_problem(), "chunked")


@CASES.add()
def rows_of_one_process(rank):
    """An error that one process sees is raised at once; the others wait, but not for ever."""
    problem = make_problem()
    own = VocabParallelOptions.from_vocab(300, impatient([0, 1]))
    part = rows(problem, own)
    call(problem, own)
    start = time.monotonic()
    if rank == 1:
        with pytest.raises(ValueError, match=r"c must have the 150 rows .*, got \(149, 16\)"):
            linear_cross_entropy(part.e, part.c[1:], part.targets, vocab_parallel_options=own)
        time.sleep(2 * TIMEOUT)
    else:
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            linear_cross_entropy(part.e, part.c, part.targets, vocab_parallel_options=own)
        assert time.monotonic() - start < 2 * TIMEOUT


def a_peer_dies(rank):
    """Of one pair of processes before the loss, of the other between loss and gradients."""
    groups = [impatient([0, 1]), impatient([2, 3])]
    own = VocabParallelOptions.from_vocab(300, groups[rank // 2])
    problem = make_problem()
    call(problem, own)
    if rank == 1:
        raise Die
    if rank == 0:
        with pytest.raises(RuntimeError):
            call(problem, own)
        return
    loss = call(problem, own)
    if rank == 3:
        raise Die
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("name", CASES)
def test_disagreement(outcomes, name):
    assert_passed(outcomes[name])


def test_a_peer_dies(tmp_path):
    start = time.monotonic()
    outcomes = run_cases({"a_peer_dies": a_peer_dies}, 4, tmp_path)
    assert_passed(outcomes["a_peer_dies"])
    assert time.monotonic() - start < 60
