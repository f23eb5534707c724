"""``token_logprobs`` and the loss's options by processes that hold a vocabulary together."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from cut_cross_entropy import VocabParallelOptions, linear_cross_entropy, token_logprobs
from tests.distributed.processes import assert_passed, outcomes_of
from tests.support import make_problem
from tests.test_token_logprobs import (
    DIFFERENTIABLE,
    OUTPUTS,
    everything,
    gradients,
    leaves,
    objective,
    plain,
)

WORLD = 3
RAGGED = ((0, 1), (1, 130), (130, 300))
EMPTY = ((0, 170), (170, 170), (170, 300))


def outputs(rank, shards, softcap, gather):
    start, stop = shards[rank]
    problem = make_problem((6, 5), dtype=torch.float64, bias=True)
    targets, candidates, support, temperature = everything(problem)
    options = {"candidates": candidates, "support": support, "temperature": temperature}
    options |= {"softcap": softcap, "top_k": 3}
    # With gather_e each process has tokens of its own.
    mine = slice(2 * rank, 2 * rank + 2) if gather else slice(None)
    named = {name: x[mine] if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    tensors = leaves(problem)
    tensors["e"] = problem.e[mine].clone().requires_grad_()
    tensors["c"] = problem.c[start:stop].clone().requires_grad_()
    tensors["bias"] = problem.bias[start:stop].clone().requires_grad_()
    got = token_logprobs(
        tensors["e"],
        tensors["c"],
        targets[mine],
        outputs=OUTPUTS,
        bias=tensors["bias"],
        vocab_parallel_options=VocabParallelOptions(start, stop, gather_e=gather),
        memory_budget=1,
        **named,
    )
    whole = leaves(problem)
    expected = plain(whole["e"], whole["c"], targets, bias=whole["bias"], **options)
    for name, x in expected.items():
        torch.testing.assert_close(getattr(got, name), x[mine], msg=lambda m, n=name: f"{n}: {m}")
    if gather:
        # Every process's own tokens: the sum of all objectives.
        total = sum(
            objective({name: x[2 * r : 2 * r + 2] for name, x in expected.items()}, DIFFERENTIABLE)
            for r in range(WORLD)
        )
    else:
        total = objective(expected, DIFFERENTIABLE)
    found = gradients(objective(vars(got), DIFFERENTIABLE), tensors)
    wanted = gradients(total, whole)
    torch.testing.assert_close(found["e"], wanted["e"][mine])
    torch.testing.assert_close(found["c"], wanted["c"][start:stop])
    torch.testing.assert_close(found["bias"], wanted["bias"][start:stop])


def loss(rank, shards, impl, softcap):
    start, stop = shards[rank]
    problem = make_problem((6, 5), dtype=torch.float64, bias=True)
    random = torch.Generator().manual_seed(0)
    weights = torch.rand(300, generator=random, dtype=torch.float64)
    token_weights = torch.rand(6, 5, generator=random, dtype=torch.float64)
    tensors, whole = leaves(problem), leaves(problem)
    tensors["c"] = problem.c[start:stop].clone().requires_grad_()
    tensors["bias"] = problem.bias[start:stop].clone().requires_grad_()
    got = linear_cross_entropy(
        tensors["e"],
        tensors["c"],
        problem.targets,
        tensors["bias"],
        softcap=softcap,
        temperature=0.7,
        label_smoothing=0.1,
        class_weights=weights,
        token_weights=token_weights,
        num_items_in_batch=11,
        impl=impl,
        vocab_parallel_options=VocabParallelOptions(start, stop),
    )
    z = whole["e"] @ whole["c"].T + whole["bias"]
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    losses = F.cross_entropy(
        (z / 0.7).flatten(0, 1),
        problem.targets.flatten(),
        weights,
        reduction="none",
        label_smoothing=0.1,
    )
    expected = (losses * token_weights.flatten()).sum() / 11
    torch.testing.assert_close(got, expected)
    found, wanted = gradients(got, tensors), gradients(expected, whole)
    torch.testing.assert_close(found["e"], wanted["e"])
    torch.testing.assert_close(found["c"], wanted["c"][start:stop])
    torch.testing.assert_close(found["bias"], wanted["bias"][start:stop])


def wrong_weights(rank):
    start, stop = RAGGED[rank]
    problem = make_problem()
    with pytest.raises(ValueError, match=r"class_weights must have shape \(V,\) with V >="):
        linear_cross_entropy(
            problem.e,
            problem.c[start:stop],
            problem.targets,
            class_weights=torch.ones(stop - 1),
            vocab_parallel_options=VocabParallelOptions(start, stop),
        )
    dist.barrier()


CASES = {
    **{
        f"outputs-{name}-{softcap}": functools.partial(
            outputs, shards=shards, softcap=softcap, gather=gather
        )
        for name, shards, gather in (
            ("ragged", RAGGED, False),
            ("empty", EMPTY, False),
            ("gathered", RAGGED, True),
        )
        for softcap in (None, 4.0)
    },
    **{
        f"loss-{impl}-{softcap}": functools.partial(loss, shards=RAGGED, impl=impl, softcap=softcap)
        for impl in ("chunked", "reference")
        for softcap in (None, 4.0)
    },
    "wrong_weights": wrong_weights,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return outcomes_of(CASES, WORLD, tmp_path_factory, "token_logprobs")


@pytest.mark.parametrize("name", CASES)
def test_case(outcomes, name):
    assert_passed(outcomes[name])
