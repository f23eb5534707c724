"""The kernels, interpreted, in two processes that hold a vocabulary together."""

import math
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from cut_cross_entropy import (
    VocabParallelOptions,
    dispatch,
    linear_cross_entropy,
    record_filter,
)
from cut_cross_entropy.kernels.filtered import measure
from tests.distributed.processes import Cases, assert_passed
from tests.distributed.sharded import assert_same_bits, check, rows, rows_of
from tests.kernels.test_interpreted_filtered import sharp
from tests.support import KERNEL_FLOOR, Problem, full_logits, make_problem, run, run_ours

pytestmark = pytest.mark.interpret

WORLD = 2
CASES = Cases()
case = CASES.add
GRADIENTS = ("grad_e", "grad_c", "grad_bias")


@contextmanager
def filter_of(
    tolerance=dispatch.FILTER_TOLERANCE, dense=math.inf, flat=1000, fraction=math.inf, dropped=1.0
):
    """Set the tolerance of "auto", and where data is too flat: by default nowhere."""
    from cut_cross_entropy.kernels.filtered import backward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "FILTER_TOLERANCE", tolerance)
        patch.setattr(dispatch, "MOST_DROPPED", dropped)
        patch.setattr(backward, "DENSE_FRACTION", dense)
        patch.setattr(backward, "FLAT_SUPPORT", flat)
        patch.setattr(backward, "FLAT_FRACTION", fraction)
        yield


def results_of(problem, own, impl="cce", **options):
    with record_filter() as records:
        results = run_ours(rows(problem, own), impl, vocab_parallel_options=own, **options)
    return results, records


ROUTES = {"exact": ("cce_exact", 1.0), "dense": ("cce", -1.0), "filtered": ("cce", math.inf)}


@case(*((route, softcap) for route in ROUTES for softcap in (None, 5.0)))
def drops_nothing(rank, route, softcap):
    """Each path through the kernels is as exact as PyTorch if the filter keeps everything."""
    impl, dense = ROUTES[route]
    problem = make_problem((9,), 300, 16, bias=True)
    with filter_of(1e-15, dense), record_filter() as records:
        check(problem, impl, softcap=softcap)
    assert [record.path for record in records] == [route]
    if route == "filtered":  # the part of dE and the rows of dC of this process
        assert 0 <= records[0].error_e < 0.02
        assert 0 <= records[0].error_c < 0.02


@case(("cce_exact",), ("cce",))
def ragged(rank, impl):
    """One process has a single class, then none; the other all."""
    for stop in (1, 0):
        own = VocabParallelOptions(0, stop) if rank == 0 else VocabParallelOptions(stop, 300)
        with filter_of(1e-15):
            check(make_problem((5,), 300, 16), impl, own)


@case(("cce_exact",), ("cce",))
def more_classes_than_are_frequent(rank, impl):
    with filter_of(1e-15):
        check(make_problem((5,), 2200, 16), impl)


@case(("cce_exact",), ("cce",))
def half_precision(rank, impl):
    with filter_of(1e-15):
        check(make_problem((9,), 300, 16, dtype=torch.float16), impl)


@case(("cce_exact",), ("cce",))
def nothing_to_do(rank, impl):
    assert check(make_problem((5,), ignored=1.0), impl).loss == 0
    check(make_problem((0,)), impl)
    check(make_problem((5,)), impl, needed=())


@case()
def presets_of_one_gradient(rank):
    with filter_of(1e-15):
        for impl in ("cce_kahan_full_c", "cce_kahan_full_e"):
            check(make_problem((5,), 300, 16), impl, needed=("c",))


@case()
def default_stays_within_the_rounding_of_bfloat16(rank):
    """The promise of the default holds for each process's rows and for the sum that is dE."""
    problem = sharp()
    own = VocabParallelOptions.from_vocab(problem.c.shape[0])
    results, (record,) = results_of(problem, own)
    truth = rows_of(run(full_logits, problem.to(torch.float64)), own)
    assert record.path == "filtered"
    assert 0 < record.strips_kept < 0.45
    assert record.dropped_mass > 0
    assert_same_bits(results.grad_e, "grad_e")
    for name in GRADIENTS:
        exact = truth.named()[name]
        error, rounding = (results.named()[name] - exact).norm(), exact.bfloat16() - exact
        assert error <= 2 * rounding.norm(), (name, error, rounding.norm())
    exact = truth.grad_c
    error = (results.grad_c - exact).norm() / exact.norm() / measure.ROUNDING
    assert math.isclose(record.error_c, error, rel_tol=0.2), "measured on the classes of a process"


@case()
def tail_stands_for_what_a_shard_dropped(rank):
    """Without it, or with the mass of all classes, a shard's sums over classes would be off."""
    problem = sharp()
    own = VocabParallelOptions.from_vocab(problem.c.shape[0])
    settings = {"reduction": "sum", "lse_weight": 0.0}
    with filter_of():
        results, (record,) = results_of(problem, own, filter_eps=0.1, **settings)
    truth = rows_of(run(full_logits, problem.to(torch.float64), **settings), own)
    assert record.dropped_mass > 1e-4
    difference = (results.grad_bias.sum() - truth.grad_bias.sum()).abs()
    assert difference < 1e-5 * truth.grad_bias.abs().sum()


@case((None,), (30.0,))
def budget_of_all_is_that_of_one_process(rank, softcap):
    """However many processes share the budget of the filter, dE errs about as much."""
    problem = sharp(24)
    own = VocabParallelOptions.from_vocab(problem.c.shape[0])
    truth = run(full_logits, problem.to(torch.float64), softcap=softcap).grad_e
    with filter_of(0.02):
        alone = run_ours(problem, "cce", softcap=softcap).grad_e
        results, (record,) = results_of(problem, own, softcap=softcap)
    assert record.path == "filtered"
    together = results.grad_e
    one, two = ((x - truth).norm().item() for x in (alone, together))
    assert 0 < two < 1.5 * one, (one, two)


@case()
def a_shard_may_drop_its_part_of_the_limit(rank):
    """And what it drops is told by itself alone."""
    problem = sharp(24)
    own = VocabParallelOptions.from_vocab(problem.c.shape[0])
    with filter_of(0.02):
        _, (free,) = results_of(problem, own)
    assert free.path == "filtered"
    assert free.dropped_mass > 1e-4
    for parts, path in ((0.5, "dense"), (3.0, "filtered")):
        limit = parts * free.dropped_mass * dist.get_world_size()
        with filter_of(0.02, dropped=limit):
            _, (record,) = results_of(problem, own)
        assert record.path == path, (parts, free.dropped_mass)


@case()
def flat_tokens_among_sharp_ones_are_exact(rank):
    flat = (3, 17, 31)
    problem = sharp(flat=flat)
    problem.targets[list(flat)] = 7
    own = VocabParallelOptions.from_vocab(problem.c.shape[0])
    with filter_of(0.05, flat=100):
        results, (record,) = results_of(problem, own)
    assert (record.path, record.flat_tokens) == ("filtered", len(flat))
    truth = run(full_logits, problem.to(torch.float64))
    for token in flat:
        exact = truth.grad_e[token]
        assert (results.grad_e[token] - exact).norm() < 1e-5 * exact.norm()


@case()
def loose_bounds_overflow_and_are_repaired(rank):
    """The likely class of a token is neither frequent nor its target."""
    problem = make_problem((5,), 2200, 16, ignored=0.0)
    problem.targets.fill_(3)
    c = problem.c.clone()
    norms = problem.e[:2].square().sum(1, keepdim=True) ** 0.5
    c[[1060, 2190]] = 60 * problem.e[:2] / norms
    # A probability is 2^(logit - lse), and the backward computes both again. Ten float32 operations
    # on numbers as large as the lse lie between: the two products (NumPy's BLAS chooses the order
    # of their sums by CPU and shape), two changes of base of logits and four of the lse, and two
    # sums over parts. Each is off by up to eps / 2 of the lse, and the probability by their sum,
    # relative to itself. Plain PyTorch computes a logit once, so its error grants none of that.
    largest_lse = 60 * norms.max().item()
    floor = max(KERNEL_FLOOR, 10 / 2 * largest_lse)
    with filter_of(1e-15):
        check(Problem(problem.e, c, problem.targets), "cce", kernel_floor=floor)
        check(Problem(problem.e, c, problem.targets), "cce_exact", kernel_floor=floor)


@case(("cce_exact",), ("cce",))
def out_of_range_unseen(rank, impl):
    from cut_cross_entropy.distributed import collectives

    problem = make_problem((5,), ignored=0.0, bias=True)
    problem.targets[3] = 300
    own = VocabParallelOptions.from_vocab(300)
    original, collectives.check_target_range = collectives.check_target_range, lambda *_: None
    try:
        with filter_of(1e-15):
            results, _ = results_of(problem, own, impl, reduction="none")
    finally:
        collectives.check_target_range = original
    wrong = torch.tensor([False, False, False, True, False])
    assert torch.equal(results.loss.isnan(), wrong)
    assert torch.equal(results.grad_e.isnan().all(1), wrong)
    assert results.grad_c.isnan().all()


@case()
def compiled(rank):
    own = VocabParallelOptions.from_vocab(300)
    part = rows(make_problem((5,)), own)
    e, c = part.e.requires_grad_(), part.c.requires_grad_()

    def loss(e, c):
        return linear_cross_entropy(
            torch.sin(e), c, part.targets, impl="cce", vocab_parallel_options=own
        )

    torch.compile(loss, backend="aot_eager", fullgraph=True)(e, c).backward()
    got = (e.grad, c.grad)
    e.grad = c.grad = None
    loss(e, c).backward()
    torch.testing.assert_close(got, (e.grad, c.grad))


@case()
def what_is_exchanged(rank):
    """N floats for the bound; three a token with the filter, else two; and dE."""
    problem = make_problem((8,), 300, 16, ignored=0.0)
    own = VocabParallelOptions.from_vocab(300)
    n, dim = problem.e.shape
    header = ("all_gather_single", 6 * 8)
    gradient = ("all_reduce", n * dim * 4)
    expected = {
        "cce": [header, ("all_reduce", 4 * n), ("all_gather_single", 12 * n), gradient],
        "cce_exact": [header, ("all_gather_single", 8 * n), gradient],
        "chunked": [header, ("all_gather_single", 8 * n), gradient],
    }
    for impl, calls in expected.items():
        with exchanged() as seen:
            results_of(problem, own, impl)
        assert seen == calls, (impl, seen)


@contextmanager
def exchanged():
    """Names and bytes sent of the collectives that are called."""
    from cut_cross_entropy.distributed import collectives

    seen, originals = [], {}

    def watch(module, name, source):
        original = originals[module, name] = getattr(module, name)

        def called(*args, **kwargs):
            seen.append((name, args[source].nbytes))
            return original(*args, **kwargs)

        setattr(module, name, called)

    collectives._collective.cache_clear()
    for name, source in (("all_reduce", 0), ("all_gather_single", 1)):
        watch(dist, name, source)
    try:
        yield seen
    finally:
        for (module, name), original in originals.items():
            setattr(module, name, original)
        collectives._collective.cache_clear()


@pytest.mark.parametrize("name", CASES)
def test_kernels(outcomes, name):
    assert_passed(outcomes[name])
