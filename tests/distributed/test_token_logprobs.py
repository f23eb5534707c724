"""``token_logprobs`` and the loss's options by processes that hold a vocabulary together."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from cut_cross_entropy import VocabParallelOptions, linear_cross_entropy, token_logprobs
from tests.distributed.processes import assert_passed
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


def mesh_of(name):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (WORLD,), mesh_dim_names=(name,))


def by_rows(tensor, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    return nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)]))


def dtensor_outputs(rank, name, softcap):
    """A classifier sharded by rows: divided by classes ("tp"), or gathered ("fsdp")."""
    problem = make_problem((6, 5), classes=301, dtype=torch.float64, bias=True)
    targets, candidates, support, temperature = everything(problem)
    options = {"candidates": candidates, "support": support, "temperature": temperature}
    options |= {"softcap": softcap, "top_k": 3}
    mesh, whole = mesh_of(name), leaves(problem)
    sharded = {"e": leaves(problem)["e"]}
    sharded |= {key: by_rows(whole[key].detach(), mesh) for key in ("c", "bias")}
    got = token_logprobs(
        sharded["e"], sharded["c"], targets, bias=sharded["bias"], outputs=OUTPUTS, **options
    )
    expected = plain(whole["e"], whole["c"], targets, bias=whole["bias"], **options)
    for key, x in expected.items():
        torch.testing.assert_close(getattr(got, key), x, msg=lambda m, n=key: f"{n}: {m}")
    found = gradients(objective(vars(got), DIFFERENTIABLE), sharded)
    wanted = gradients(objective(expected, DIFFERENTIABLE), whole)
    torch.testing.assert_close(found["e"], wanted["e"])
    for key in ("c", "bias"):  # all have the same tokens, so the mean of "fsdp" is the same too
        assert found[key].placements == sharded[key].placements
        torch.testing.assert_close(found[key].full_tensor(), wanted[key])


def dtensor_loss(rank, name, impl):
    problem = make_problem((6, 5), classes=301, dtype=torch.float64, bias=True)
    random = torch.Generator().manual_seed(0)
    options = {
        "temperature": torch.rand(6, 5, generator=random, dtype=torch.float64) + 0.5,
        "logit_scale": 0.7,
        "softcap": 4.0,
        "label_smoothing": 0.1,
        "class_weights": torch.rand(301, generator=random, dtype=torch.float64),
        "token_weights": torch.rand(6, 5, generator=random, dtype=torch.float64),
        "num_items_in_batch": 11,
    }
    mesh, whole = mesh_of(name), leaves(problem)
    sharded = {"e": leaves(problem)["e"]}
    sharded |= {key: by_rows(whole[key].detach(), mesh) for key in ("c", "bias")}
    results = []
    for tensors, how in ((sharded, impl), (whole, "reference")):
        loss = linear_cross_entropy(
            tensors["e"], tensors["c"], problem.targets, tensors["bias"], impl=how, **options
        )
        results.append((loss.detach(), gradients(loss, tensors)))
    (got, found), (expected, wanted) = results
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(found["e"], wanted["e"])
    for key in ("c", "bias"):
        torch.testing.assert_close(found[key].full_tensor(), wanted[key])


def dtensors_of_tokens(rank):
    """Targets of all tokens may be a DTensor; what goes with them is refused by name."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    problem = make_problem((6, 5), classes=301, dtype=torch.float64)
    targets, candidates, support, temperature = everything(problem)
    mesh = mesh_of("tp")
    c = by_rows(problem.c, mesh)
    same = lambda x: distribute_tensor(x, mesh, [Replicate()])
    expected = token_logprobs(problem.e, c, targets).logprobs
    torch.testing.assert_close(token_logprobs(problem.e, c, same(targets)).logprobs, expected)
    for function, name, x in (
        (token_logprobs, "candidates", candidates),
        (token_logprobs, "support", support),
        (token_logprobs, "temperature", temperature),
        (linear_cross_entropy, "temperature", temperature),
        (linear_cross_entropy, "token_weights", temperature),
        (linear_cross_entropy, "class_weights", problem.c[:, 0]),
    ):
        with pytest.raises(
            NotImplementedError, match=rf"{name} is a DTensor .*{name}\.full_tensor"
        ):
            function(problem.e, c, targets, **{name: same(x)})


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
    **{
        f"dtensor-{name}-{softcap}": functools.partial(dtensor_outputs, name=name, softcap=softcap)
        for name in ("tp", "fsdp")
        for softcap in (None, 4.0)
    },
    **{
        f"dtensor-loss-{name}-{impl}": functools.partial(dtensor_loss, name=name, impl=impl)
        for name, impl in (
            ("tp", "chunked"),
            ("tp", "reference"),
            ("fsdp", "chunked"),
            ("fsdp", "torch_compile"),
        )
    },
    "dtensors_of_tokens": dtensors_of_tokens,
    "wrong_weights": wrong_weights,
}


@pytest.mark.parametrize("name", CASES)
def test_case(outcomes, name):
    assert_passed(outcomes[name])
