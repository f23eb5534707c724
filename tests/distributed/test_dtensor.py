"""DTensors in four processes: what their sharding means, and what is refused."""

import functools
import re
from collections import OrderedDict
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cut_cross_entropy import LinearCrossEntropy, VocabParallelOptions, linear_cross_entropy
from cut_cross_entropy.distributed import DataParallelOptions
from tests.distributed.processes import Cases, assert_passed, settled
from tests.support import make_problem
from tests.test_memory import peak_bytes

WORLD = 4
V = 301  # rows do not divide evenly: 76, 76, 76, 73
CASES = Cases()
case = CASES.add
close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


def mesh_of(*names, shape=None):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape or (WORLD,), mesh_dim_names=names or None)


def by_rows(tensor, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    return nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)]))


def expected(problem, **options):
    """Loss and gradients of one process with all classes."""
    e, c, bias = (None if x is None else x.clone().requires_grad_()
                  for x in (problem.e, problem.c, problem.bias))  # fmt: skip
    loss = linear_cross_entropy(e, c, problem.targets, bias, **options)
    loss.backward()
    return loss.detach(), e.grad, c.grad, None if bias is None else bias.grad


def head_of(c, mesh, **options):
    """A linear layer with the weight ``c`` that FSDP2 manages."""
    from torch.distributed.fsdp import fully_shard

    head = nn.Linear(c.shape[1], c.shape[0], bias=False)
    head.weight = nn.Parameter(c.clone())
    return fully_shard(head, mesh=mesh, **options)


# --- tensor-parallel: the vocabulary-parallel path


@case(("chunked",), ("reference",))
def tensor_parallel_by_name(rank, impl):
    problem = make_problem(classes=V, bias=True)
    loss, grad_e, grad_c, grad_bias = expected(problem, impl=impl)
    mesh = mesh_of("tp")
    c, bias = by_rows(problem.c, mesh), by_rows(problem.bias, mesh)
    e = problem.e.requires_grad_()
    mine = linear_cross_entropy(e, c, problem.targets, bias, impl=impl)
    mine.backward()
    close(mine, loss)
    close(e.grad, grad_e)
    assert c.grad.placements == c.placements
    close(c.grad.full_tensor(), grad_c)
    close(bias.grad.full_tensor(), grad_bias)


@case()
def tensor_parallel_gathers_nothing(rank):
    problem = make_problem(classes=V)
    c = by_rows(problem.c, mesh_of("tp"))
    seen = []
    original = dist.all_gather_single
    dist.all_gather_single = lambda out, source, **k: (seen.append(source.shape),
                                                       original(out, source, **k))  # fmt: skip
    from cut_cross_entropy.distributed import collectives

    collectives._collective.cache_clear()
    try:
        linear_cross_entropy(problem.e, c, problem.targets)
    finally:
        dist.all_gather_single = original
        collectives._collective.cache_clear()
    kept = int((problem.targets != -100).sum())
    assert seen == [(6,), (2, kept)]


@case()
def tensor_parallel_within_a_compiled_function(rank):
    problem = make_problem(classes=V)
    loss, grad_e, grad_c, _ = expected(problem)
    c, e = by_rows(problem.c, mesh_of("tp")), problem.e.requires_grad_()
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    mine = compiled(e, c, problem.targets)
    mine.backward()
    close(mine, loss)
    close(e.grad, grad_e)
    close(c.grad.full_tensor(), grad_c)


@case()
def tensor_parallel_by_an_option(rank):
    """The mesh has no names; parallelize_module made the head."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    problem = make_problem(classes=V)
    head = nn.Linear(16, V, bias=False)
    head.weight = nn.Parameter(problem.c.clone())
    parallelize_module(head, mesh_of(), ColwiseParallel())
    own = VocabParallelOptions.from_dtensor(head.weight)
    assert (own.start, own.stop) == (76 * rank, min(76 * rank + 76, V))
    loss_of = LinearCrossEntropy(vocab_parallel_options=own)
    loss, grad_e, grad_c, _ = expected(problem)
    e = problem.e.requires_grad_()
    mine = loss_of(e, head.weight, problem.targets)
    mine.backward()
    close(mine, loss)
    close(e.grad, grad_e)
    close(head.weight.grad.full_tensor(), grad_c)


@case(("Replicate",), ("batch",), ("time",), ("Partial",))
def embeddings_as_a_dtensor(rank, how):
    """As a sequence-parallel norm, or anything else on the mesh of the head, leaves them."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    problem = make_problem((6, 5), classes=V)
    loss, grad_e, grad_c, _ = expected(problem, shift=1)
    mesh = mesh_of("tp")
    placement = {"Replicate": Replicate(), "batch": Shard(0), "time": Shard(1),
                 "Partial": Partial()}[how]  # fmt: skip
    if how == "Partial":
        e = DTensor.from_local(problem.e / WORLD, mesh, [placement]).requires_grad_()
    else:
        e = distribute_tensor(problem.e, mesh, [placement]).requires_grad_()
    c, targets = by_rows(problem.c, mesh), distribute_tensor(problem.targets, mesh, [Replicate()])
    mine = linear_cross_entropy(e, c, targets if how == "time" else problem.targets, shift=1)
    mine.backward()
    close(mine, loss)
    close(e.grad.full_tensor(), grad_e)
    close(c.grad.full_tensor(), grad_c)


@case()
def fsdp_and_tensor_parallel(rank):
    """Within the forward of the module that FSDP manages, the head has its own dimension alone."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    class Head(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.output = nn.Linear(16, c.shape[0], bias=False)
            self.output.weight = nn.Parameter(c.clone())

        def forward(self, e, targets):
            return linear_cross_entropy(e, self.output.weight, targets)

    mesh = mesh_of("dp", "tp", shape=(2, 2))
    problems = [make_problem(classes=300, seed=0), make_problem((4, 5), classes=300, seed=1)]
    problems[1] = type(problems[1])(problems[1].e, problems[0].c, problems[1].targets)
    results = [expected(problem) for problem in problems]
    head = Head(problems[0].c)
    parallelize_module(head, mesh["tp"], {"output": ColwiseParallel()})
    fully_shard(head, mesh=mesh["dp"])
    problem = problems[rank // 2]
    e = problem.e.requires_grad_()
    loss = head(e, problem.targets)
    loss.backward()
    close(loss, results[rank // 2][0])
    close(e.grad, results[rank // 2][1])
    close(head.output.weight.grad.full_tensor(), (results[0][2] + results[1][2]) / 2)
    with pytest.raises(NotImplementedError, match=r"mesh of several dimensions.*'dp', 'tp'"):
        linear_cross_entropy(e.detach(), head.output.weight, problem.targets)


# --- data-parallel: gathered, and the gradient reduce-scattered


def own_problem(rank, c=None, **options):
    """Tokens of this process over the classifier of all."""
    shared = make_problem(classes=V, bias=True, **options)
    own = make_problem((5 + rank,), classes=V, seed=10 + rank, **options)
    return type(own)(own.e, shared.c, own.targets, shared.bias)


def mean_gradients(**options):
    results = [expected(own_problem(rank), **options) for rank in range(WORLD)]
    return results, *(sum(r[i] for r in results) / WORLD for i in (2, 3))


@case(*((kind, impl) for kind in ("named", "option", "hsdp") for impl in ("chunked", "reference")))
def data_parallel(rank, kind, impl):
    meshes = {"named": lambda: mesh_of("dp_shard"), "option": mesh_of,
              "hsdp": lambda: mesh_of("dp_replicate", "dp_shard", shape=(2, 2))}  # fmt: skip
    mesh = meshes[kind]()
    results, grad_c, grad_bias = mean_gradients(impl=impl)
    problem = own_problem(rank)
    layer = nn.Linear(16, V)
    layer.weight, layer.bias = (nn.Parameter(x.clone()) for x in (problem.c, problem.bias))
    from torch.distributed.fsdp import fully_shard

    fully_shard(layer, mesh=mesh)
    e = problem.e.requires_grad_()
    options = {"data_parallel_options": DataParallelOptions()} if kind == "option" else {}
    loss = linear_cross_entropy(e, layer.weight, problem.targets, layer.bias, impl=impl, **options)
    loss.backward()
    close(loss, results[rank][0])
    close(e.grad, results[rank][1])
    assert layer.weight.grad.placements == layer.weight.placements
    close(layer.weight.grad.full_tensor(), grad_c)
    close(layer.bias.grad.full_tensor(), grad_bias)
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    close(layer.weight.full_tensor(), problem.c - grad_c)


@case()
def sum_instead_of_mean(rank):
    problem = own_problem(rank)
    head = head_of(problem.c, mesh_of())
    options = DataParallelOptions(average=False)
    linear_cross_entropy(
        problem.e, head.weight, problem.targets, problem.bias, data_parallel_options=options
    ).backward()
    close(head.weight.grad.full_tensor(), WORLD * mean_gradients()[1])


@case(("embeddings",), ("autocast",), ("option",))
def mixed_precision(rank, how):
    """Gathered in the dtype of the product; the gradient comes back in the parameter's."""
    from cut_cross_entropy.distributed import data_parallel

    problem = own_problem(rank)
    head = head_of(problem.c, mesh_of("fsdp"))
    e, options, seen = problem.e, {}, []
    if how != "autocast":
        e = e.bfloat16()
    if how == "option":
        options["data_parallel_options"] = DataParallelOptions(torch.bfloat16, torch.float32)
    original = data_parallel._whole
    data_parallel._whole = lambda sharded, like: (seen.append(like.dtype), original(sharded, like))[
        1
    ]
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = linear_cross_entropy(e, head.weight, problem.targets, **options)
        loss.backward()
    finally:
        data_parallel._whole = original
    assert seen == [torch.bfloat16]
    grad = head.weight.grad
    assert grad.dtype == torch.float32
    results = [own_problem(r) for r in range(WORLD)]
    exact = sum(expected(type(p)(p.e, p.c, p.targets))[2] for p in results) / WORLD
    error = (grad.full_tensor() - exact).norm() / exact.norm()
    assert error < (0.01 if how != "option" else 0.008), error


@case()
def under_fsdp_s_own_gathering(rank):
    """In the forward of its module the weight is a plain tensor, and the option changes nothing."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    class Head(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.weight = nn.Parameter(c.clone())

        def forward(self, e, targets):
            options = DataParallelOptions()
            return linear_cross_entropy(e, self.weight, targets, data_parallel_options=options)

    problem = own_problem(rank)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    head = fully_shard(Head(problem.c), mp_policy=policy)
    loss = head(problem.e.bfloat16(), problem.targets)
    loss.backward()
    assert head.weight.grad.dtype == torch.float32
    results = [own_problem(r) for r in range(WORLD)]
    exact = sum(expected(type(p)(p.e, p.c, p.targets))[2] for p in results) / WORLD
    assert (head.weight.grad.full_tensor() - exact).norm() < 0.01 * exact.norm()


@case((None,), (True,), (False,))
def loss_beside_a_model_that_fsdp_manages(rank, reshard):
    """Kept whole after the root's forward the head is a plain tensor, resharded a DTensor; twice,
    since gradients of two micro-batches add up."""
    from torch.distributed.fsdp import fully_shard

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(16, 16), nn.Linear(16, V, bias=False)

        def forward(self, x):
            return torch.tanh(self.body(x))

    def step(model, problem):
        loss = linear_cross_entropy(model(problem.e), model.head.weight, problem.targets)
        loss.backward()
        return loss.detach()

    reference, losses = Model(), []
    for other in range(WORLD):
        losses.append(step(reference, own_problem(other)))
        step(reference, own_problem(other + WORLD))
    model = Model()
    fully_shard(model, mesh=mesh_of("dp"), reshard_after_forward=reshard)
    close(step(model, own_problem(rank)), losses[rank])
    step(model, own_problem(rank + WORLD))
    for (name, wanted), got in zip(reference.named_parameters(), model.parameters(), strict=True):
        grad = got.grad.full_tensor()
        close(grad, wanted.grad / WORLD, msg=lambda text, n=name: f"{n}: {text}")


@case(("chunked", False), ("chunked", True), ("reference", True), ("torch_compile", True))
def the_whole_lives_while_it_is_needed(rank, impl, recompute):
    """Gathered for the loss, and again for the gradients that are not computed with it."""
    from cut_cross_entropy.distributed import data_parallel

    problem = own_problem(rank)
    head = head_of(problem.c, mesh_of("fsdp"))
    wholes, original, e = [], data_parallel._whole, problem.e.requires_grad_()

    def watched(sharded, like):
        whole = original(sharded, like)
        wholes.append(ref(whole.untyped_storage()))
        return whole

    data_parallel._whole = watched
    try:
        loss = linear_cross_entropy(e, head.weight, problem.targets, impl=impl, recompute=recompute)
        assert len(wholes) == 1
        assert settled(wholes[0]) is None
        loss.backward()
        assert len(wholes) == 1 + recompute
        assert settled(wholes[-1]) is None
        with torch.no_grad():
            linear_cross_entropy(e, head.weight, problem.targets, impl=impl)
        assert len(wholes) == 2 + recompute
    finally:
        data_parallel._whole = original


@case()
def peak_of_memory(rank):
    """Forward: the whole. Backward: the whole, the whole of its gradient, and the scratch."""
    problem = make_problem((64,), classes=4096, dim=64, seed=rank)
    head = head_of(problem.c, mesh_of("fsdp"))
    whole, budget = problem.c.nbytes, 2**17
    e = problem.e.requires_grad_()

    def loss():
        return linear_cross_entropy(
            e, head.weight, problem.targets, memory_budget=budget, recompute=True
        )

    def both():
        torch.autograd.grad(loss(), (e, head.weight))

    both()
    with torch.no_grad():
        forward, _ = peak_bytes(loss)
    total, _ = peak_bytes(both)
    # The exchange packs what it sends and receives: a second copy for as long.
    assert forward < 2.3 * whole + budget, forward / whole
    assert total < 3.3 * whole + budget, total / whole


@case()
def modification_between_forward_and_backward_is_caught(rank):
    problem = own_problem(rank)
    head = head_of(problem.c, mesh_of("fsdp"))
    loss = linear_cross_entropy(
        problem.e.requires_grad_(), head.weight, problem.targets, recompute=True
    )
    with torch.no_grad():
        head.weight.mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- the set-ups of docs/distributed.md, as training code would call them


@case()
def every_setup_of_the_table(rank):
    from cut_cross_entropy.benchmark.data import Problem
    from cut_cross_entropy.benchmark.setups import SETUPS
    from tests.distributed.run_many_gpus import errors, reference

    made = make_problem((16,), classes=304, ignored=0.0)
    problem = Problem(made.e, made.c, made.targets, 30.0)
    expected = reference(problem)
    for name, setup in SETUPS.items():
        step = setup(problem, "chunked")
        found = errors(step, step.run(), expected)
        assert max(found) < 1e-5, (name, found)


@case(("chunked",), ("reference",))
def data_parallel_on_the_default_mesh(rank, impl):
    """``fully_shard`` without a mesh makes one of a single dimension, without a name."""
    from torch.distributed.fsdp import fully_shard

    problem = make_problem((8, 5), classes=V)
    _, grad_e, grad_c, _ = expected(problem, impl=impl, reduction="sum")
    model = nn.Sequential(OrderedDict(head=nn.Linear(16, V, bias=False)))
    model.head.weight = nn.Parameter(problem.c.clone())
    fully_shard(model)
    assert model.head.weight.device_mesh.mesh_dim_names is None
    own = slice(2 * rank, 2 * rank + 2)  # rows of the batch
    e = problem.e[own].clone().requires_grad_()
    targets = problem.targets[own]
    linear_cross_entropy(e, model.head.weight, targets, impl=impl, reduction="sum").backward()
    close(e.grad, grad_e[own])
    close(model.head.weight.grad.full_tensor() * WORLD, grad_c)  # FSDP averages


# --- what is refused


def refused(message, error=NotImplementedError):
    return pytest.raises(error, match=re.escape(message))


@case()
def refusals(rank):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    problem = make_problem(classes=V)
    e, targets = problem.e, problem.targets
    unnamed, tp, dp = mesh_of(), mesh_of("tp"), mesh_of("dp")
    c = by_rows(problem.c, unnamed)
    unnamed_square = distribute_tensor(problem.c, mesh_of(shape=(2, 2)), [Replicate(), Shard(0)])
    with refused("the mesh does not say what for: name its dimensions"):
        linear_cross_entropy(e, unnamed_square, targets)
    with refused("vocab_parallel_options=VocabParallelOptions.from_dtensor(c)"):
        linear_cross_entropy(e, by_rows(problem.c, mesh_of("ep")), targets)
    with refused("exclude each other", ValueError):
        linear_cross_entropy(
            e,
            c,
            targets,
            vocab_parallel_options=VocabParallelOptions.from_dtensor(c),
            data_parallel_options=DataParallelOptions(),
        )
    with refused("c must be sharded by rows, Shard(0), over a mesh of one dimension"):
        linear_cross_entropy(e, distribute_tensor(problem.c, tp, [Shard(1)]), targets)
    with refused("c must be sharded by rows to be gathered"):
        linear_cross_entropy(e, distribute_tensor(problem.c, dp, [Shard(1)]), targets)
    with refused("c must be a DTensor, got Tensor", TypeError):
        VocabParallelOptions.from_dtensor(problem.c)
    whole = VocabParallelOptions(0, V)
    with refused("and vocab_parallel_options the classes [0, 301)", ValueError):
        linear_cross_entropy(e, c, targets, vocab_parallel_options=whole)
    with refused("bias is a DTensor and c is not"):
        linear_cross_entropy(e, problem.c, targets, by_rows(problem.c[:, 0], tp))
    spread = distribute_tensor(e, dp, [Shard(0)])
    with refused("pass the tokens of this process, e.to_local()"):
        linear_cross_entropy(spread, by_rows(problem.c, dp), targets)
    with refused("pass the tokens of this process, targets.to_local()"):
        linear_cross_entropy(e, problem.c, distribute_tensor(targets, dp, [Shard(0)]))
    square = mesh_of("dp", "tp", shape=(2, 2))
    with refused("e is a DTensor (placements"):
        linear_cross_entropy(
            distribute_tensor(e, square, [Shard(0), Replicate()]), by_rows(problem.c, tp), targets
        )
    with refused("e is a DTensor sharded by features"):
        linear_cross_entropy(distribute_tensor(e, tp, [Shard(2)]), by_rows(problem.c, tp), targets)
    own = VocabParallelOptions.from_dtensor(c, gather_e=True)
    with refused("gather_e is for plain tensors", ValueError):
        linear_cross_entropy(
            distribute_tensor(e, unnamed, [Shard(0)]), c, targets, vocab_parallel_options=own
        )
    head = by_rows(problem.c, dp)
    with refused("which torch.compile cannot trace", Exception):
        torch.compile(linear_cross_entropy, backend="eager", fullgraph=True)(e, head, targets)
    loss = linear_cross_entropy(e, head, targets)
    with refused("no second derivative"):
        torch.autograd.grad(loss, head, create_graph=True)


@pytest.mark.parametrize("name", CASES)
def test_dtensor(outcomes, name):
    assert_passed(outcomes[name])
