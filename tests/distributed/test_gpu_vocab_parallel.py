"""The compiled kernels in several processes that share one GPU, over gloo."""

import functools

import pytest
import torch

from cut_cross_entropy import VocabParallelOptions, linear_cross_entropy, record_filter
from tests.distributed.processes import assert_passed, outcomes_of
from tests.distributed.scenario import train

pytestmark = pytest.mark.gpu

WORLD = 4
TRAINING = {
    f"{impl}-{dtype}": functools.partial(
        train, impl=impl, dtype=dtype, device="cuda", tokens=(4, 67), classes=1213, dim=512
    )
    for impl in ("cce_exact", "cce", "torch_compile", "chunked")
    for dtype in ("float16", "bfloat16")
}


def relative_error(got, exact):
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def filtered(rank, own_tokens, softcap):
    """Data like a trained model's: filtered on every process, and as exact as on one."""
    from cut_cross_entropy.benchmark.data import make
    from cut_cross_entropy.benchmark.shapes import Shape

    shape = Shape("shards", 32768, 1024, softcap)
    problem = make("structured", 2048, shape, torch.bfloat16, "cuda")
    own = VocabParallelOptions.from_vocab(32768, gather_e=own_tokens)
    here = slice(own.start, own.stop)
    tokens = slice(512 * rank, 512 * (rank + 1)) if own_tokens else slice(0, 2048)

    def gradients(e, c, targets, impl="cce", **options):
        e, c = (x.detach().clone().requires_grad_() for x in (e, c))
        linear_cross_entropy(e, c, targets, softcap=softcap, impl=impl, **options).backward()
        return e.grad, c.grad

    exact_e, exact_c = gradients(
        problem.e.float(), problem.c.float(), problem.targets, impl="chunked"
    )
    alone_e, alone_c = gradients(problem.e, problem.c, problem.targets)
    with record_filter() as records:
        grad_e, grad_c = gradients(
            problem.e[tokens], problem.c[here], problem.targets[tokens], vocab_parallel_options=own
        )
    assert [record.path for record in records] == ["filtered"]
    rounding = relative_error(exact_e.bfloat16(), exact_e)
    found = relative_error(grad_e, exact_e[tokens])
    # Beside what one process errs: each of four parts is rounded, and so is each of their sums.
    assert found < relative_error(alone_e[tokens], exact_e[tokens]) + 2 * rounding, found
    found = relative_error(grad_c, exact_c[here])
    assert found < max(relative_error(alone_c[here], exact_c[here]), 2 * rounding) * 1.5, found


UNEVEN = (0, 9000, 9000, 21000, 32768)  # of four processes, one without a class


def exact_sum(rank, impl, softcap, factors):
    """Three products with exact gradients, in one chunk or in several, within the budget."""
    from cut_cross_entropy.benchmark.data import make
    from cut_cross_entropy.benchmark.shapes import Shape
    from cut_cross_entropy.kernels import exact_sum

    shape, tokens, budget = Shape("shards", 32768, 1024, softcap), 2048, 2**24
    problem = make("structured", tokens, shape, torch.bfloat16, "cuda")
    problem.targets[::7] = -100
    options = {}
    if factors:
        options["token_weights"] = torch.linspace(0.5, 2, tokens, device="cuda")
        options["temperature"] = torch.linspace(0.8, 1.25, tokens, device="cuda")
    own = VocabParallelOptions(UNEVEN[rank], UNEVEN[rank + 1], reduce_e_grad=False)
    here = slice(own.start, own.stop)

    def gradients(e, c, impl, **further):
        e, c = (x.detach().clone().requires_grad_() for x in (e, c))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = linear_cross_entropy(
            e, c, problem.targets, softcap=softcap, impl=impl, **options, **further
        )
        loss.backward()
        torch.cuda.synchronize()
        return loss.item(), e.grad, c.grad, torch.cuda.max_memory_allocated() - before

    exact_loss, exact_e, exact_c, _ = gradients(problem.e.float(), problem.c.float(), "chunked")
    alone_c = gradients(problem.e, problem.c, impl, memory_budget=budget)[2]
    chunks, store = [], exact_sum.store_powers

    def record(chunk, powers):
        if powers.is_cuda:  # else kernels are compiled ahead
            chunks.append(len(powers))
        store(chunk, powers)

    exact_sum.store_powers = record
    try:
        results = [
            gradients(
                problem.e,
                problem.c[here],
                impl,
                vocab_parallel_options=own,
                memory_budget=budget,
            )
            for _ in range(2)
        ]
    finally:
        exact_sum.store_powers = store
    (loss, grad_e, grad_c, _), (_, again_e, again_c, peak) = results
    assert torch.equal(grad_e, again_e)
    assert torch.equal(grad_c, again_c)
    if impl == "cce_exact":
        assert len(chunks) == 4, chunks  # of two calls; a process with fewer classes has room for 1
    assert abs(loss - exact_loss) <= 1e-4 * exact_loss
    grads, sums = (size * (problem.e.numel() + grad_c.numel()) for size in (2, 4))
    assert peak <= grads + sums + 1.1 * budget, peak
    total = grad_e.float()
    torch.distributed.all_reduce(total)
    pairs = [(total, exact_e)] if rank == 1 else [(total, exact_e), (grad_c, exact_c[here])]
    for got, exact in pairs:
        found, rounding = relative_error(got, exact), relative_error(exact.bfloat16(), exact)
        allowed = 1.7 * rounding  # the parts of dE are rounded one by one
        if got is grad_c:
            allowed = max(1.4 * rounding, 1.05 * relative_error(alone_c[here], exact))
        assert found <= allowed, (found / rounding, allowed / rounding)


EXACT_SUM = {
    f"exact_sum-{impl}-{softcap}-{factors}": functools.partial(
        exact_sum, impl=impl, softcap=softcap, factors=factors
    )
    for impl in ("cce_exact", "chunked")
    for softcap, factors in ((None, False), (30.0, True))
}


FILTERED = {
    f"{'own' if own else 'shared'}-{softcap}": functools.partial(
        filtered, own_tokens=own, softcap=softcap
    )
    for own, softcap in ((False, None), (False, 30.0), (True, 30.0))
}


def unseen(rank):
    """Nobody looks at the targets on a GPU: NaN on every process; and nothing waits for the device
    in the forward after the first call."""
    e = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    c = torch.randn(512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.distributed.broadcast(e.detach(), 0)
    targets = torch.arange(300, device="cuda")
    own = VocabParallelOptions(512 * rank, 512 * (rank + 1))

    def loss():
        return linear_cross_entropy(
            e, c, targets, reduction="none", impl="cce", vocab_parallel_options=own
        )

    assert loss().isfinite().all()
    targets[7] = 512 * WORLD
    result = loss()
    assert result.isnan().sum() == 1
    assert result[7].isnan()
    result.sum().backward()
    assert e.grad[7].isnan().all()
    assert e.grad[:7].isfinite().all()


CASES = {**TRAINING, **FILTERED, **EXACT_SUM, "unseen": unseen}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    if not torch.cuda.is_available():
        pytest.fail("there is no GPU", pytrace=False)
    return outcomes_of(CASES, WORLD, tmp_path_factory, "gpu", device="cuda")


@pytest.mark.parametrize("name", CASES)
def test_processes_on_one_gpu(outcomes, name):
    assert_passed(outcomes[name])
