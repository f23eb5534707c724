"""The kernels compiled before a step are those that it launches, by the interpreter's launches."""

import contextlib
import inspect
import threading
import time

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from cut_cross_entropy import dispatch, linear_cross_entropy, record_filter
from cut_cross_entropy.heads import Head, LowRank
from cut_cross_entropy.kernels import (
    exact,
    exact_products,
    exact_sum,
    lse,
    made_rows,
    made_rows_pass,
    powers,
    tokens,
    warmup,
)
from cut_cross_entropy.kernels.filtered import (
    backward,
    calibrate,
    grad_c,
    grad_e,
    index,
    partial_sums,
    selection,
    strips,
    tail,
    tail_sample,
)
from cut_cross_entropy.kernels.launch import Launch, launch, planning
from cut_cross_entropy.kernels.triton import lse as lse_kernels
from cut_cross_entropy.problem import NO_FILTER, Filter, Needed, Problem
from tests.kernels.test_interpreted_filtered import sharp
from tests.kernels.test_interpreted_heads import CHUNKS, Stored, adapted_case
from tests.support import make_problem, run_ours

pytestmark = pytest.mark.interpret

MODULES = (exact, exact_products, made_rows, made_rows_pass, powers, lse, tokens)
MODULES += (calibrate, grad_c, grad_e, index, selection, strips, tail, tail_sample)


@pytest.fixture
def launched(monkeypatch):
    """Record the variants of all launches; interpreted kernels then know what is specialised."""
    for module in MODULES:
        for _, kernel in inspect.getmembers(module, lambda x: isinstance(x, InterpretedFunction)):
            if not hasattr(kernel, "kwargs"):
                pytest.skip("interpreted kernels of this Triton do not know what is specialised")
            plain = kernel.kwargs["do_not_specialize"] or ()
            monkeypatch.setattr(kernel, "do_not_specialize", plain, raising=False)
    seen = {}
    run = InterpretedFunction.run

    def record(self, *, grid, warmup, **arguments):
        seen[Launch(self, arguments).variant()] = self
        return run(self, grid=grid, warmup=warmup, **arguments)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    return seen


CASES = {
    "evaluation": {"needed": ()},
    "exact": {"impl": "cce_exact"},
    "filtered": {},
    "calibrated": {"calibrated": True},
    "limited": {"limited": True},
    "plain": {"bias": False, "softcap": None},
    "half": {"dtype": torch.float16},
    "superblocks": {"superblocks": True},
    "superblocks-half": {"superblocks": True, "dtype": torch.float16},
    # As for bfloat16, which the interpreter cannot multiply.
    "superblocks-four-bits": {"superblocks": True, "dtype": torch.float16, "bits": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_launches_what_was_planned(case, launched, always_filtered, request, monkeypatch):
    options = {"impl": "cce", "bias": True, "softcap": 5.0, "dtype": torch.float32}
    options |= CASES[case]
    if options.get("superblocks"):
        request.getfixturevalue("several_superblocks")
    if options.get("calibrated"):
        monkeypatch.setattr(calibrate, "MIN_TOKENS", 0)
        monkeypatch.setattr(calibrate, "MIN_WORK", 0)
    if "bits" in options:
        monkeypatch.setattr(partial_sums, "choose_low_bits", lambda out, n: options["bits"])
    problem = make_problem((3, 46), 1100, 16, bias=options["bias"]).to(options["dtype"])
    needed = options.get("needed", ("e", "c", "bias") if options["bias"] else ("e", "c"))
    tolerance = dispatch.FILTER_TOLERANCE if options["impl"] == "cce" and needed else 0.0
    call = Problem(
        problem.e.flatten(0, 1),
        problem.c,
        problem.targets.flatten(),
        problem.bias,
        -100,
        options["softcap"],
        options["dtype"],
        2**28,
    )
    if options.get("limited"):
        monkeypatch.setattr(dispatch, "MOST_DROPPED", 0.99)
    filter_ = Filter(
        tolerance,
        max_error=dispatch.MAX_ERROR["auto"] if tolerance else 0.0,
        most_dropped=dispatch.MOST_DROPPED,
    )
    plan = warmup.plan_step(call, filter_, training=bool(needed))
    assert not launched, "a plan launches nothing"
    run_ours(problem, options["impl"], softcap=options["softcap"], needed=needed)
    planned = {one.variant() for one in plan.launches}
    missing = [variant for variant in launched if variant not in planned]
    assert not missing, missing
    assert len(launched) > 3
    names = {kernel.__name__ for kernel in launched.values()}
    assert ("draw_tokens_kernel" in names) == options.get("calibrated", False)
    assert ("dropped_mass_kernel" in names) == options.get("limited", False)


@pytest.mark.parametrize("flat", [(3,), (3, 17, 131)], ids=str)
def test_a_step_with_flat_tokens_launches_what_was_planned(flat, launched, monkeypatch):
    """Their number is not part of what a kernel is compiled for."""
    monkeypatch.setattr(backward, "FLAT_SUPPORT", 100)
    problem = sharp(150, flat=flat)
    tensors = (problem.e, problem.c, problem.targets, problem.bias)
    call = Problem(*tensors, -100, None, torch.float32, 2**28)
    plan = warmup.plan_step(call, Filter(dispatch.FILTER_TOLERANCE), training=True)
    run_ours(problem, "cce")
    kinds = [dict(kinds) for name, kinds in launched if name == "grad_c_kernel"]
    assert [kind["flat_grads_ptr"] for kind in kinds] == ["torch.float32"]
    planned = {one.variant() for one in plan.launches}
    assert not [variant for variant in launched if variant not in planned]


@pytest.mark.parametrize("needed", [("e", "c", "bias"), ("e",)])
@pytest.mark.parametrize(("tokens", "weighted"), [(138, False), (300, False), (300, True)])
def test_a_sum_launches_what_was_planned(needed, tokens, weighted, launched, monkeypatch):
    """Also where its chunks are of different sizes."""
    monkeypatch.setattr(exact_sum, "powers_per_chunk", lambda problem, needed: 128)
    problem = make_problem((tokens,), 1100, 16, bias=True)
    tensors = (problem.e, problem.c, problem.targets, problem.bias)
    weights, options = None, {}
    if weighted:
        weights = torch.rand(tokens)
        options = {"token_weights": weights, "temperature": 0.5}
    call = Problem(
        *tensors, -100, 5.0, torch.float32, 2**28, multiplier=2 * weights if weighted else None
    )
    gradients = Needed(*(name in needed for name in ("e", "c", "bias")))
    plan = warmup.plan_sum(call, gradients, weights, NO_FILTER)
    assert not launched, "a plan launches nothing"
    run_ours(problem, "cce_exact", softcap=5.0, needed=needed, return_lse=False, **options)
    planned = {one.variant() for one in plan.launches}
    missing = [variant for variant in launched if variant not in planned]
    assert not missing, missing
    assert len(launched) > 3


@pytest.mark.parametrize("needs_all", [None, "flat", "drops much", "sample drops much"])
@pytest.mark.parametrize("exact", ["e", "c"])
def test_a_sum_with_one_gradient_filtered_launches_what_was_planned(
    exact, needs_all, launched, monkeypatch
):
    """Also where the first tokens do not show that all strips are to be taken."""
    problem = sharp(138)
    if needs_all == "flat":
        problem.e.mul_(0.01)
    if needs_all == "sample drops much":
        monkeypatch.setattr(calibrate, "MIN_TOKENS", 0)
        monkeypatch.setattr(calibrate, "MIN_WORK", 0)
    if needs_all and "drops much" in needs_all:
        monkeypatch.setattr(dispatch, "MOST_DROPPED", 1e-6)
    call = Problem(
        problem.e, problem.c, problem.targets, problem.bias, -100, None, torch.float32, 2**28
    )
    filter_ = Filter(8e-4, 1.0, exact != "e", exact != "c", 1.0, dispatch.MOST_DROPPED)
    plan = warmup.plan_sum(call, Needed(e=True, c=True, bias=True), None, filter_)
    run_ours(problem, f"cce_kahan_full_{exact}", return_lse=False)
    planned = {one.variant() for one in plan.launches}
    missing = [variant for variant in launched if variant not in planned]
    assert not missing, missing
    with record_filter() as records:  # launches more
        run_ours(problem, f"cce_kahan_full_{exact}", return_lse=False)
    assert records[-1].path == ("dense" if needs_all else "filtered")


def test_kinds_of_steps_differ_where_their_launches_do():
    """Batches of one kind launch the same variants; those of another kind launch others."""

    def kind(tokens):
        e = torch.empty(tokens, 8, device="meta")
        c, targets = torch.empty(32, 8, device="meta"), torch.empty(tokens, device="meta")
        problem = Problem(e, c, targets, None, -100, None, torch.bfloat16, 2**28)
        return warmup.kind_of_step(problem, Filter(8e-4), training=True)

    size = 64 * 128  # of a superblock
    same = [(1000, 1001), (1024, 8192), (size + 16, 32 * size), (33 * size, 99 * size)]
    other = [(1000, 1024), (1, 1001), (size, size + 16), (32 * size, 32 * size + 16)]
    for first, second in same:
        assert kind(first) == kind(second), (first, second)
    for first, second in other:
        assert kind(first) != kind(second), (first, second)


def test_kinds_of_steps_tell_whether_the_threshold_follows_a_sample(monkeypatch):
    monkeypatch.setattr(calibrate, "MIN_WORK", 0)

    def kind(tokens, max_error, most_dropped=1.0):
        filter_ = Filter(8e-4, max_error=max_error, most_dropped=most_dropped)
        problem = make_problem((tokens,), 32, 8)
        call = Problem(
            problem.e, problem.c, problem.targets, None, -100, None, torch.float32, 2**28
        )
        return warmup.kind_of_step(call, filter_, training=True)

    fewest = calibrate.MIN_TOKENS
    assert kind(fewest, 0.0) != kind(fewest, 1.0) == kind(fewest + 16, 0.5)
    assert kind(fewest - 16, 0.0) == kind(fewest - 16, 1.0) == kind(fewest, 0.0)
    assert kind(fewest, 0.0, most_dropped=0.5) != kind(fewest, 0.0)


def training_step(problem, tolerance):
    """Return the arguments of a training step for ``warmup``."""
    call = Problem(problem.e, problem.c, problem.targets, None, -100, None, torch.float32, 2**28)
    return call, Filter(tolerance), True


@pytest.mark.parametrize("tolerance", [0.0, 8e-4])
def test_a_plan_is_not_recorded_as_a_pass(tolerance):
    problem = make_problem((9,), 1100, 8)
    with record_filter() as records:
        assert warmup.plan_step(*training_step(problem, tolerance)).launches
        assert records == []
        run_ours(problem, "cce_exact")
    assert len(records) == 1


def test_planning_ends():
    with planning(torch.device("cpu")) as plan:
        launch(lse_kernels.bound_kernel, (1,), lse_ptr="anything")
    assert [one.kernel for one in plan.launches] == [lse_kernels.bound_kernel]
    with pytest.raises(RuntimeError), planning(torch.device("cpu")):
        raise RuntimeError
    assert len(plan.launches) == 1


def test_a_plan_that_fails_is_said_and_fails_no_step(monkeypatch):
    """Kernels are then compiled when they are launched; a second such step does not warn."""
    problem = make_problem((9,), 130, 8)
    step = training_step(problem, tolerance=0.0)
    monkeypatch.setattr(warmup, "triton_is_interpreted", lambda: False)
    monkeypatch.setattr(warmup, "_compiled", set())
    asked = []

    def compile_nothing(plan):
        asked.append(len(plan.launches))
        raise OSError("no space left on device")

    monkeypatch.setattr(warmup, "compile_concurrently", compile_nothing)
    with pytest.warns(UserWarning, match="not compiled ahead: OSError.*no space left"):
        warmup.compile_ahead(*step)
    warmup.compile_ahead(*step)
    assert len(asked) == 1
    assert asked[0] > 3


def test_variants_are_compiled_once_each(monkeypatch):
    """Launches that share machine code are one task for the threads."""
    from cut_cross_entropy.kernels import launch as module

    compiled = []
    monkeypatch.setattr(
        module, "_compile", lambda one, device: compiled.append((one.kernel.fn.__name__, device))
    )
    monkeypatch.setattr(InterpretedFunction, "cache_key", "", raising=False)
    vector = torch.empty(9, device="meta")
    with planning(torch.device("cpu")) as plan:
        shared = {"lse_ptr": vector, "bound_ptr": vector, "num_segments": 4, "BLOCK_T": 128}
        for count in (9, 9, 32):
            launch(lse_kernels.bound_kernel, (1,), **shared, N=count)
        launch(lse_kernels.bound_kernel, (1,), **{**shared, "N": 9, "BLOCK_T": 64})
        launch(lse_kernels.bound_kernel, (1,), **{**shared, "N": 9, "lse_ptr": vector.double()})
    monkeypatch.setattr(
        lse_kernels.bound_kernel, "do_not_specialize", ["N", "num_segments"], raising=False
    )
    module.compile_concurrently(plan)
    assert compiled == [("bound_kernel", torch.device("cpu"))] * 3


def test_machine_code_is_loaded_by_one_thread_at_a_time(monkeypatch):
    """Triton would mix up the launchers of kernels that are loaded concurrently.

    Those that a C compiler has to build are built meanwhile, all at the same time.
    """
    from cut_cross_entropy.kernels import launch as module

    loading, loaded, overlaps = threading.Lock(), [], []
    builders = threading.Barrier(8)

    def build_launcher(name):
        builders.wait(timeout=60)
        return name

    class Compiled:
        def __getitem__(self, grid):
            assert module.build._build("launcher") == "launcher"
            overlaps.append(not loading.acquire(blocking=False))
            time.sleep(0.01)
            loading.release()
            loaded.append(grid)

    class Kernel:
        arg_names, do_not_specialize, cache_key = (), (), ""
        fn = staticmethod(lambda: None)

        def __init__(self, name):
            self.__name__ = name

        def warmup(self, grid):
            return Compiled()

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(module.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(module.build, "_build", build_launcher)
    plan = module.Plan(
        torch.device("cpu"), [module.Launch(Kernel(f"kernel {i}"), {}) for i in range(8)]
    )
    module.compile_concurrently(plan)
    assert len(loaded) == 8
    assert overlaps == [False] * 8
    assert module.build._build is build_launcher


@pytest.mark.parametrize("kind", ["sum", "weighted", "trained"])
def test_a_walk_over_made_rows_launches_what_was_planned(kind, launched):
    """In chunks of classes, and in chunks of tokens for the gradients."""
    problem = make_problem((300,), 1100, 16, bias=True)
    e, bias = problem.e.requires_grad_(), problem.bias
    weights = torch.rand(300) if kind == "weighted" else None
    budget, low_rank, width, frozen, needed = 256 * 4 * (128 + 2 * 16), (), 16, 16, None
    if kind == "trained":
        low_rank = (LowRank(torch.randn(4, 16), torch.randn(1100, 4).requires_grad_()),)
        width, needed = 20, Needed(e=True, c=True, bias=False)
    call = Problem(
        e.detach().new_empty(300, width), torch.empty(1100, width), problem.targets, bias, -100,
        5.0, torch.float32, budget, frozen_columns=frozen,
    )  # fmt: skip
    plan = warmup.plan_made_rows(call, weights, needed)
    assert not launched, "a plan launches nothing"
    head = Head(Stored(problem.c), bias, low_rank=low_rank, softcap=5.0)
    options = {"token_weights": weights, "memory_budget": budget, "impl": "cce_exact"}
    linear_cross_entropy(e, head, problem.targets, **options).backward()
    planned = {one.variant() for one in plan.launches}
    missing = [variant for variant in launched if variant not in planned]
    assert not missing, missing
    assert {"score_targets_kernel"} <= {kernel.__name__ for kernel in launched.values()}


@pytest.mark.parametrize("kind", ["none", "one"])
@pytest.mark.parametrize("dense", [False, True])
def test_a_filtered_head_of_made_rows_launches_what_was_planned(
    kind, dense, launched, request, monkeypatch
):
    made, head, leaves, _ = adapted_case(kind, on_demand=True)
    plans = []

    def plan_ahead(problem, filter_, training):
        plans.extend(warmup.plan_step(problem, filter_, training).launches)
        assert not launched, "a plan launches nothing"

    monkeypatch.setattr(warmup, "compile_ahead", plan_ahead)
    if dense:
        request.getfixturevalue("never_filtered")
    loss = linear_cross_entropy(leaves[0], head, made.targets, impl="cce", memory_budget=CHUNKS)
    loss.backward()
    planned = {one.variant() for one in plans}
    missing = [variant for variant in launched if variant not in planned]
    assert not missing, missing
    names = {kernel.__name__ for kernel in launched.values()}
    assert {"score_targets_kernel", "kept_strips_kernel"} <= names
    assert ("chunk_gradients_kernel" if dense else "grad_e_kernel") in names
