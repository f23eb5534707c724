"""``linear_divergence`` by processes that hold both heads together, against full logits."""

import functools

import pytest
import torch
import torch.distributed as dist

from cut_cross_entropy import VocabParallelOptions, linear_divergence, topk_divergence
from tests.distributed.processes import assert_passed
from tests.test_divergence import NAMES, leaves_of, problem, run, truth

WORLD = 3
TOKENS = 12
RAGGED = ((0, 1), (1, 130), (130, 300))
EMPTY = ((0, 170), (170, 170), (170, 300))
RESULTS = ("divergence", "student_entropy", "student_logprobs")
LIMITS = {"chunked": 1e-9, "cce": 1e-5}


def values_and_gradients(rank, impl, beta, shards, gather):
    start, stop = shards[rank]
    dtype = torch.float64 if impl == "chunked" else torch.float32
    limit = LIMITS[impl]
    tensors, targets = problem(TOKENS, dtype=dtype)
    temperature = torch.linspace(0.5, 2, TOKENS, dtype=dtype)
    softcaps = (None, 3.0)
    whole = leaves_of({name: x.double() for name, x in tensors.items()})
    expected = truth(whole, targets, beta, temperature=temperature, softcaps=softcaps)
    random = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(TOKENS, generator=random, dtype=dtype) for name in RESULTS}
    # With gather_e each process has tokens of its own; what all add to their loss adds up.
    mine = slice(4 * rank, 4 * rank + 4) if gather else slice(None)
    places = {"e_student": mine, "e_teacher": mine}
    own = {name: x[places.get(name, slice(start, stop))] for name, x in tensors.items()}
    leaves = leaves_of(own)
    got = run(
        leaves,
        targets[mine],
        beta,
        softcaps=softcaps,
        temperature=temperature[mine],
        impl=impl,
        memory_budget=1,
        vocab_parallel_options=VocabParallelOptions(start, stop, gather_e=gather),
    )
    for name in RESULTS:
        close(getattr(got, name), getattr(expected, name)[mine], limit)
    names = NAMES[:3]
    found = torch.autograd.grad(
        sum((getattr(got, name) * weights[name][mine]).sum() for name in RESULTS),
        [leaves[name] for name in names],
    )
    wanted = torch.autograd.grad(
        sum((getattr(expected, name) * weights[name]).sum() for name in RESULTS),
        [whole[name] for name in names],
    )
    for name, ours, theirs in zip(names, found, wanted, strict=True):
        close(ours, theirs[places.get(name, slice(start, stop))], 10 * limit)


def weighted_mean(rank, impl, gather):
    """The mean over the tokens of all processes, as a loss has it."""
    start, stop = RAGGED[rank]
    dtype = torch.float64 if impl == "chunked" else torch.float32
    tensors, targets = problem(TOKENS, dtype=dtype)
    whole = leaves_of({name: x.double() for name, x in tensors.items()})
    weights = torch.linspace(0.5, 2, TOKENS, dtype=torch.float64)
    divergences = truth(whole, targets, 0.3).divergence
    expected = (divergences * weights).sum() / weights[targets != -100].sum()
    mine = slice(4 * rank, 4 * rank + 4) if gather else slice(None)
    places = {"e_student": mine, "e_teacher": mine}
    leaves = leaves_of(
        {name: x[places.get(name, slice(start, stop))] for name, x in tensors.items()}
    )
    got = run(
        leaves,
        targets[mine],
        0.3,
        impl=impl,
        reduction="mean",
        token_weights=weights[mine],
        vocab_parallel_options=VocabParallelOptions(start, stop, gather_e=gather),
    ).divergence
    close(got, expected, LIMITS[impl])
    names = NAMES[:3]
    found = torch.autograd.grad(got, [leaves[name] for name in names])
    wanted = torch.autograd.grad(expected, [whole[name] for name in names])
    for name, ours, theirs in zip(names, found, wanted, strict=True):
        close(ours, theirs[places.get(name, slice(start, stop))], 10 * LIMITS[impl])


def close(ours, theirs, limit):
    torch.testing.assert_close(ours.double(), theirs, rtol=limit, atol=2 * limit)


def different_shards(rank):
    tensors, targets = problem(TOKENS)
    start, stop = RAGGED[rank]
    e, c = tensors["e_student"], tensors["head_student"][start:stop]
    options = VocabParallelOptions(start, stop)
    with pytest.raises(ValueError, match="impl='reference' of linear_divergence needs all classes"):
        linear_divergence(e, c, e, c, impl="reference", vocab_parallel_options=options)
    dist.barrier()
    found = linear_divergence(e, c, e, c, targets=targets, vocab_parallel_options=options)
    assert found.divergence.abs().max() < 1e-12


def sharded_head(rank):
    """DTensors tell which classes a process has; one of a head alone is refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    tensors, targets = problem(TOKENS)
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tp",))
    heads = {
        name: distribute_tensor(tensors[name], mesh, [Shard(0)])
        for name in ("head_student", "head_teacher")
    }
    e, e_teacher = tensors["e_student"], tensors["e_teacher"]
    got = linear_divergence(
        e, heads["head_student"], e_teacher, heads["head_teacher"], targets=targets, beta=0.3
    )
    none = {"student_bias": torch.zeros(300), "teacher_bias": torch.zeros(300)}
    close(got.divergence, truth({**tensors, **none}, targets, 0.3).divergence, 1e-9)
    ones = distribute_tensor(torch.ones(TOKENS, dtype=torch.bool), mesh, [Shard(0)])
    for name, values in (("mask", ones), ("token_weights", ones.double())):
        with pytest.raises(
            NotImplementedError, match=f"{name} is a DTensor .* pass a plain tensor"
        ):
            linear_divergence(e, heads["head_student"], e, heads["head_student"], **{name: values})
    logprobs = torch.zeros(TOKENS, 1)
    with pytest.raises(NotImplementedError, match=r"mask is a DTensor .* pass a plain tensor"):
        topk_divergence(logprobs, logprobs, mask=ones)
    with pytest.raises(ValueError, match="head_teacher must be spread over the same processes"):
        linear_divergence(
            e, heads["head_student"], e_teacher, tensors["head_teacher"], targets=targets
        )


CASES = {
    **{
        f"{impl}-{beta}-{name}": functools.partial(
            values_and_gradients, impl=impl, beta=beta, shards=shards, gather=gather
        )
        for impl in LIMITS
        for beta, name, shards, gather in (
            (0.0, "ragged", RAGGED, False),
            (1.0, "empty", EMPTY, False),
            (0.3, "empty", EMPTY, False),
            (0.3, "gathered", RAGGED, True),
        )
    },
    **{
        f"{impl}-mean-{gather:d}": functools.partial(weighted_mean, impl=impl, gather=gather)
        for impl in LIMITS
        for gather in (False, True)
    },
    "different_shards": different_shards,
    "sharded_head": sharded_head,
}


@pytest.mark.parametrize("name", CASES)
def test_divergence(outcomes, name):
    assert_passed(outcomes[name])
