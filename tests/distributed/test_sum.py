"""Sums of losses whose gradients come from the forward, with the classes in three processes."""

import contextlib
import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from cut_cross_entropy import VocabParallelOptions, linear_cross_entropy
from cut_cross_entropy.implementations import chunked, chunked_sum
from tests.distributed.processes import Cases, assert_passed
from tests.distributed.sharded import assert_same_bits, check, rows
from tests.distributed.test_kernels import exchanged
from tests.support import Problem, check_checkpoint, leaves_of, make_problem
from tests.test_sum import PER_TOKEN, factors_in

pytestmark = pytest.mark.interpret

WORLD = 3
IMPLS = ("cce_exact", "chunked")
RAGGED = ((0, 1), (1, 1), (1, 300))  # one class; none; all others
CASES = Cases()
case = CASES.add


@contextlib.contextmanager
def passes():
    """Record the tokens of each chunk that is multiplied, and passes that compute logits again."""
    from cut_cross_entropy.kernels import exact_sum

    made = []
    with contextlib.ExitStack() as stack:

        def watch(module, name, record):
            function = getattr(module, name)

            def called(*args, **kwargs):
                made.append(record(*args))
                return function(*args, **kwargs)

            stack.enter_context(mock.patch.object(module, name, called))

        watch(exact_sum, "store_powers", lambda chunk, powers: len(powers))
        watch(exact_sum, "forward", lambda *_: "again")
        watch(chunked_sum, "_subtract_targets_of_shard", lambda logits, *_: len(logits))
        watch(chunked, "forward", lambda *_: "again")
        yield made


@contextlib.contextmanager
def chunks_of(impl, tokens):
    """Let a chunk hold so many tokens at most; the processes have different memory."""
    from cut_cross_entropy.kernels import exact_sum

    most = {1: 2 * tokens}.get(dist.get_rank(), tokens)
    module, name = {
        "cce_exact": (exact_sum, "powers_per_chunk"),
        "chunked": (chunked_sum, "tokens_per_chunk"),
    }[impl]
    with mock.patch.object(module, name, return_value=most):
        yield


def check_sum(problem, impl, own=None, **options):
    return check(problem, impl, own, return_lse=False, **options)


@case(*((impl, softcap) for impl in IMPLS for softcap in (None, 5.0)))
def one_chunk(rank, impl, softcap):
    """Three products and one exchange of two floats for each token that counts."""
    problem = make_problem((5, 13), 300, 16, bias=True)
    kept = int((problem.targets != -100).sum())
    with passes() as made, exchanged() as seen:
        check_sum(problem, impl, softcap=softcap)
    size = 65 if impl == "cce_exact" else kept
    assert made == [size]
    assert seen[1:3] == [("all_reduce", 16), ("all_gather_single", 8 * size)]


@case(*IMPLS)
def several_chunks(rank, impl):
    """Of the same size on every process, also where one has memory for more."""
    problem = make_problem((5, 80), 603, 24, bias=True, ignored=0.1)
    with chunks_of(impl, 128), passes() as made:
        check_sum(problem, impl, softcap=5.0, reduction="sum", shift=1)
    assert len(made) == 3
    assert max(made) == (128 if impl == "cce_exact" else 118), made


@case(*IMPLS)
def too_little_memory_on_one_process(rank, impl):
    """All compute the logits again, and round the gradients once."""
    problem = make_problem((5, 13), 300, 16, bias=True)
    weights = torch.linspace(-1, 2, 65).view(5, 13)
    own = VocabParallelOptions.from_vocab(300)
    with chunks_of(impl, 128 if rank != 2 else 0), passes() as made:
        check_sum(problem, impl, softcap=5.0)
        results = factors_of(problem, impl, own, token_weights=weights, reduction="sum")
    assert made == ["again"] * 2
    assert_factors(results, problem, own, token_weights=weights, reduction="sum")


@case(*IMPLS)
def ragged(rank, impl):
    problem = make_problem((5, 13), 300, 16, bias=True)
    with passes() as made:
        check_sum(problem, impl, VocabParallelOptions(*RAGGED[rank]), softcap=5.0)
    assert len(made) == 1


@case(*IMPLS)
def more_classes_than_are_frequent(rank, impl):
    """And a likely class behind these, which makes powers overflow."""
    problem = make_problem((70,), 4000, 16, bias=True, ignored=0.0)
    problem.e[:, 3], problem.e[7], problem.e[7, 3] = 0.0, 0.0, 1.0
    problem.c[3900] = 0.0
    problem.c[3900, 3], problem.targets[7] = 150.0, 5
    check_sum(problem, impl)


@case(*IMPLS)
def impossible_classes(rank, impl):
    """All classes of a process, or its frequent ones, with a bias of -inf."""
    problem = make_problem((9,), 4000, 16, bias=True, ignored=0.0)
    problem.targets.fill_(3999)
    problem.bias[:3900], problem.bias[3900:] = -torch.inf, -100.0
    check_sum(problem, impl)


@case(*((impl, needed) for impl in IMPLS for needed in ("e", "c", "bias")))
def one_gradient(rank, impl, needed):
    check_sum(make_problem((9,), bias=True), impl, needed=(needed,))


@case(*IMPLS)
def nothing_to_do(rank, impl):
    assert check_sum(make_problem((5,), ignored=1.0), impl).loss == 0
    check_sum(make_problem((0,)), impl)
    check_sum(make_problem((5,)), impl, needed=())
    with passes() as made:
        check_sum(make_problem((5,)), impl, recompute=True)
    assert made.count("again") == len(made)


@case(*IMPLS, "cce")
def frozen_on_other_processes(rank, impl):
    """Only the last classes are trained, as new tokens on a frozen model."""
    problem, own = make_problem((40,), 300, 16), VocabParallelOptions.from_vocab(300)
    part = rows(problem, own)
    c = part.c.requires_grad_(rank == WORLD - 1)
    loss = linear_cross_entropy(part.e, c, part.targets, impl=impl, vocab_parallel_options=own)
    whole = problem.c.double().requires_grad_()
    expected = F.cross_entropy(problem.e.double() @ whole.T, problem.targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    if c.requires_grad:
        loss.backward()
        expected.backward()
        torch.testing.assert_close(
            c.grad.double(), whole.grad[own.start : own.stop], atol=1e-5, rtol=1e-3
        )


@case(*IMPLS)
def half_precision(rank, impl):
    check_sum(make_problem((9,), 300, 16, dtype=torch.float16, bias=True), impl)
    if impl == "chunked":
        check_sum(make_problem((9,), 300, 16, dtype=torch.bfloat16, bias=True), impl)
        check_sum(make_problem((9,), 300, 16, dtype=torch.float64, bias=True), impl)


def factors_of(problem, impl, own, **options):
    e, c, bias = leaves_of(rows(problem, own))
    loss = linear_cross_entropy(
        e, c, problem.targets, bias, impl=impl, vocab_parallel_options=own, **options
    )
    loss.backward()
    return loss.detach(), e.grad, c.grad, bias.grad


def assert_factors(results, problem, own, **options):
    """The results are those of plain PyTorch with all classes."""
    whole = functools.partial(linear_cross_entropy, impl="reference")
    inputs = leaves_of(problem)
    loss = whole(inputs[0], inputs[1], problem.targets, inputs[2], **options)
    grads = torch.autograd.grad(loss, inputs)
    here = slice(own.start, own.stop)
    expected = (loss.detach(), grads[0], grads[1][here], grads[2][here])
    for got, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=2e-6)
    assert_same_bits(results[0], "loss")


@case(*((impl, name) for impl in IMPLS for name in ("both", "negative", "all")))
def known_factors(rank, impl, name):
    """Weights of tokens and classes, temperatures, a number of items."""
    problem = make_problem((5, 13), 300, 16, bias=True)
    options = {"softcap": 5.0, **factors_in(torch.float32, name)}
    own = VocabParallelOptions(*((0, 90), (90, 100), (100, 300))[rank])
    with passes() as made:
        results = factors_of(problem, impl, own, **options)
    assert len(made) == 1
    assert_factors(results, problem, own, **options)


@case(*IMPLS)
def weights_with_a_gradient(rank, impl):
    """They need the losses of the tokens, so the logits are computed again."""
    problem = make_problem((5, 13), 300, 16, bias=True)
    weights = PER_TOKEN.float().requires_grad_()
    own = VocabParallelOptions.from_vocab(300)
    with passes() as made:
        results = factors_of(problem, impl, own, token_weights=weights)
    assert made == (["again"] if impl == "chunked" else [])
    assert weights.grad is not None
    assert_factors(results, problem, own, token_weights=weights.detach())


@case(*((impl, miss) for impl in IMPLS for miss in (1e-3, 1e-6, 1e-9)))
def sure_tokens(rank, impl, miss):
    """The gradient of a target, 1 - p, is a sum over all processes and no difference."""
    classes = 200
    e = torch.zeros(1, classes)
    e[0, 7] = torch.log(torch.tensor((classes - 1) * (1 - miss) / miss, dtype=torch.float64))
    own = VocabParallelOptions.from_vocab(classes)
    part = rows(Problem(e, torch.eye(classes), torch.tensor([7])), own)
    loss = linear_cross_entropy(
        part.e.requires_grad_(), part.c, part.targets, impl=impl, vocab_parallel_options=own
    )
    loss.backward()
    expected = torch.full((classes,), miss / (classes - 1))
    expected[7] = -miss
    torch.testing.assert_close(part.e.grad[0], expected, rtol=1e-3, atol=0)


@case(*IMPLS)
def own_tokens(rank, impl):
    """Every process has tokens of its own; the mean is over those of all."""
    problem = make_problem((WORLD * 9,), 300, 16, bias=True)
    own = VocabParallelOptions.from_vocab(300, gather_e=True)
    here = slice(9 * rank, 9 * (rank + 1))
    part = rows(problem, own)
    e, c, bias = (x.detach().clone().requires_grad_() for x in (part.e[here], part.c, part.bias))
    loss = linear_cross_entropy(
        e, c, problem.targets[here], bias, impl=impl, vocab_parallel_options=own
    )
    loss.backward()
    inputs = leaves_of(problem)
    whole = linear_cross_entropy(*inputs[:2], problem.targets, inputs[2], impl="reference")
    grads = torch.autograd.grad(whole, inputs)
    classes = slice(own.start, own.stop)
    torch.testing.assert_close(loss, whole)
    expected = (grads[0][here], grads[1][classes], grads[2][classes])
    for got, exact in zip((e.grad, c.grad, bias.grad), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=2e-6)


@case(*IMPLS)
def parts_of_the_gradient(rank, impl):
    check_sum(make_problem(), impl, VocabParallelOptions.from_vocab(300, reduce_e_grad=False))


@case(*IMPLS)
def autocast(rank, impl):
    problem = make_problem()
    own = VocabParallelOptions.from_vocab(300)
    part = rows(problem, own)
    e, c = part.e.requires_grad_(), part.c.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(e, c, part.targets, impl=impl, vocab_parallel_options=own)
    loss.backward()
    expected = linear_cross_entropy(problem.e, problem.c, problem.targets, impl="reference")
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-3, atol=0)
    assert e.grad.dtype == c.grad.dtype == torch.float32


@case(*IMPLS)
def a_target_that_no_process_has(rank, impl):
    """Nobody looks at it on a GPU: NaN, and no plausible number."""
    from cut_cross_entropy.distributed import collectives

    problem = make_problem((5,), ignored=0.0, bias=True)
    problem.targets[3] = 300
    own = VocabParallelOptions.from_vocab(300)
    with mock.patch.object(collectives, "check_target_range"):
        loss, grad_e, grad_c, _ = factors_of(problem, impl, own)
    assert loss.isnan()
    assert grad_e.isnan().all(1).tolist() == [False, False, False, True, False]
    assert grad_c.isnan().all()


@case(*((impl, reentrant) for impl in IMPLS for reentrant in (False, True)))
def checkpointed(rank, impl, reentrant):
    problem = make_problem((5,))
    own = VocabParallelOptions.from_vocab(300)
    part = rows(problem, own)
    e, c = part.e.requires_grad_(), part.c.requires_grad_()

    def head(e, c):
        return linear_cross_entropy(e, c, part.targets, impl=impl, vocab_parallel_options=own)

    check_checkpoint(head, e, c, use_reentrant=reentrant)


@case(*IMPLS)
def fsdp2(rank, impl):
    """A classifier that FSDP2 shards: gathered for the pass of the forward and never again."""
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    problem = make_problem((WORLD, 9), bias=True)
    head = nn.Linear(16, 300)
    head.weight, head.bias = (nn.Parameter(x.clone()) for x in (problem.c, problem.bias))
    fully_shard(head, mesh=init_device_mesh("cpu", (WORLD,)))
    e, targets = problem.e[rank].requires_grad_(), problem.targets
    with passes() as made:
        loss = linear_cross_entropy(e, head.weight, targets[rank], head.bias, impl=impl)
        loss.backward()
    assert "again" not in made
    assert impl == "chunked" or len(made) == 1  # whose chunks are watched with shards only
    inputs = leaves_of(problem)
    means = [
        linear_cross_entropy(x, inputs[1], t, inputs[2], impl="reference")
        for x, t in zip(inputs[0], targets, strict=True)
    ]
    grads = torch.autograd.grad(sum(means) / WORLD, inputs)
    torch.testing.assert_close(loss, means[rank])
    found = (e.grad / WORLD, head.weight.grad.full_tensor(), head.bias.grad.full_tensor())
    for got, exact in zip(found, (grads[0][rank], *grads[1:]), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=2e-6)


@case(*IMPLS)
def twice_through_one_graph(rank, impl):
    problem = make_problem((5,))
    own = VocabParallelOptions.from_vocab(300)
    part = rows(problem, own)
    e, c = part.e.requires_grad_(), part.c.requires_grad_()
    loss = linear_cross_entropy(e, c, part.targets, impl=impl, vocab_parallel_options=own)
    loss.backward(retain_graph=True)
    first = e.grad.clone(), c.grad.clone()
    loss.backward()
    torch.testing.assert_close((e.grad, c.grad), tuple(2 * x for x in first))
    loss = linear_cross_entropy(e, c, part.targets, impl=impl, vocab_parallel_options=own)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(loss, (e, c), create_graph=True)


@case(*IMPLS)
def compiled(rank, impl):
    own = VocabParallelOptions.from_vocab(300)
    part = rows(make_problem((5,)), own)
    e, c = part.e.requires_grad_(), part.c.requires_grad_()

    def loss(e, c):
        return linear_cross_entropy(
            torch.sin(e), c, part.targets, impl=impl, vocab_parallel_options=own
        )

    torch.compile(loss, backend="aot_eager", fullgraph=True)(e, c).backward()
    got = (e.grad, c.grad)
    e.grad = c.grad = None
    loss(e, c).backward()
    torch.testing.assert_close(got, (e.grad, c.grad))


@pytest.mark.parametrize("name", CASES)
def test_sums(outcomes, name):
    assert_passed(outcomes[name])
