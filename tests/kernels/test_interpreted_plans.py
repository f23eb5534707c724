"""What is compiled before a step is what the step launches, with the interpreter's launches."""

import inspect

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from cut_cross_entropy import dispatch, record_filter
from cut_cross_entropy.kernels import (
    ahead,
    combine,
    dense,
    forward,
    grad_c,
    grad_e,
    listing,
    prepare,
    selection,
    strips,
    sums,
    tail,
)
from cut_cross_entropy.kernels.launch import Launch, launch, planning
from tests.support import make_problem, run_ours

pytestmark = pytest.mark.interpret

MODULES = (
    combine, dense, forward, grad_c, grad_e, listing, prepare, selection, strips, tail
)  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    """Variants of all kernels that are launched; interpreted ones then know what is specialised."""
    for module in MODULES:
        for _, kernel in inspect.getmembers(module, lambda x: isinstance(x, InterpretedFunction)):
            if not hasattr(kernel, "kwargs"):
                pytest.skip("interpreted kernels of this Triton do not know what is specialised")
            plain = kernel.kwargs["do_not_specialize"] or ()
            monkeypatch.setattr(kernel, "do_not_specialize", plain, raising=False)
    seen = {}
    run = InterpretedFunction.run

    def noting(self, *arguments, grid, warmup, **options):
        seen[Launch(self, arguments, options).variant()] = self
        return run(self, *arguments, grid=grid, warmup=warmup, **options)

    monkeypatch.setattr(InterpretedFunction, "run", noting)
    return seen


CASES = {
    "evaluation": {"needed": ()},
    "exact": {"impl": "cce_exact"},
    "filtered": {},
    "plain": {"bias": False, "softcap": None},
    "half": {"dtype": torch.float16},
    "groups": {"groups": True},
    "groups-half": {"groups": True, "dtype": torch.float16},
    # As for bfloat16, which the interpreter cannot multiply.
    "groups-four-bits": {"groups": True, "dtype": torch.float16, "bits": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_launches_what_was_planned(case, launched, always_filtered, request, monkeypatch):
    options = {"impl": "cce", "bias": True, "softcap": 5.0, "dtype": torch.float32}
    options |= CASES[case]
    if options.get("groups"):
        request.getfixturevalue("several_groups")
    if "bits" in options:
        monkeypatch.setattr(sums, "bits_beside", lambda out, num_groups: options["bits"])
    problem = make_problem((3, 46), 1100, 16, bias=options["bias"]).to(options["dtype"])
    needed = options.get("needed", ("e", "c", "bias") if options["bias"] else ("e", "c"))
    tolerance = dispatch.FILTER_TOLERANCE if options["impl"] == "cce" and needed else 0.0
    step = ahead.Step(
        problem.e.flatten(0, 1),
        problem.c,
        problem.targets.flatten(),
        problem.bias,
        -100,
        options["softcap"],
        options["dtype"],
        2**28,
        tolerance,
        1.0,
        training=bool(needed),
    )
    plan = step.plan()
    assert not launched, "a plan launches nothing"
    run_ours(problem, options["impl"], softcap=options["softcap"], needed=needed)
    planned = {one.variant() for one in plan.launches}
    missing = [variant for variant in launched if variant not in planned]
    assert not missing, missing
    assert len(launched) > 3


def test_kinds_of_steps_differ_where_their_launches_do():
    """Batches of one kind are compiled for once; those of another launch other variants."""

    def kind(tokens):
        e = torch.empty(tokens, 8, device="meta")
        c, targets = torch.empty(32, 8, device="meta"), torch.empty(tokens, device="meta")
        return ahead.Step(
            e, c, targets, None, -100, None, torch.bfloat16, 2**28, 8e-4, 1.0, training=True
        ).kind()

    group = 64 * 128
    same = [(1000, 1001), (1024, 8192), (group + 16, 32 * group), (33 * group, 99 * group)]
    other = [(1000, 1024), (1, 1001), (group, group + 16), (32 * group, 32 * group + 16)]
    for first, second in same:
        assert kind(first) == kind(second), (first, second)
    for first, second in other:
        assert kind(first) != kind(second), (first, second)


def training_step(problem, tolerance):
    return ahead.Step(
        problem.e, problem.c, problem.targets, None, -100, None, torch.float32, 2**28, tolerance,
        1.0, training=True,
    )  # fmt: skip


@pytest.mark.parametrize("tolerance", [0.0, 8e-4])
def test_a_plan_is_no_pass_to_record(tolerance):
    problem = make_problem((9,), 1100, 8)
    step = training_step(problem, tolerance)
    with record_filter() as records:
        assert step.plan().launches
        assert records == []
        run_ours(problem, "cce_exact")
    assert len(records) == 1


def test_planning_ends():
    with planning(torch.device("cpu")) as plan:
        launch(combine.bound_kernel, (1,), "anything")
    assert [one.kernel for one in plan.launches] == [combine.bound_kernel]
    with pytest.raises(RuntimeError), planning(torch.device("cpu")):
        raise RuntimeError
    assert len(plan.launches) == 1


def test_a_plan_that_fails_is_said_and_fails_no_step(monkeypatch):
    """Kernels are then compiled when they are launched; a second such step says nothing."""
    problem = make_problem((9,), 130, 8)
    step = training_step(problem, tolerance=0.0)
    monkeypatch.setattr(ahead, "triton_is_interpreted", lambda: False)
    monkeypatch.setattr(ahead, "_compiled", set())
    asked = []

    def compile_nothing(plan):
        asked.append(len(plan.launches))
        raise OSError("no space left on device")

    monkeypatch.setattr(ahead, "compile_side_by_side", compile_nothing)
    with pytest.warns(UserWarning, match="not compiled ahead: OSError.*no space left"):
        ahead.compile_ahead(step)
    ahead.compile_ahead(step)
    assert len(asked) == 1
    assert asked[0] > 3


def test_variants_are_compiled_once_each(monkeypatch):
    """Launches that the same machine code serves are one task for the threads."""
    from cut_cross_entropy.kernels import launch as module

    compiled = []
    monkeypatch.setattr(
        module, "_compile", lambda one, device: compiled.append((one.kernel.fn.__name__, device))
    )
    monkeypatch.setattr(InterpretedFunction, "cache_key", "", raising=False)
    vector = torch.empty(9, device="meta")
    with planning(torch.device("cpu")) as plan:
        for count in (9, 9, 32):
            launch(combine.bound_kernel, (1,), vector, vector, count, 4, BLOCK_T=128)
        launch(combine.bound_kernel, (1,), vector, vector, 9, 4, BLOCK_T=64)
        launch(combine.bound_kernel, (1,), vector.double(), vector, 9, 4, BLOCK_T=64)
    monkeypatch.setattr(
        combine.bound_kernel, "do_not_specialize", ["N", "num_segments"], raising=False
    )
    module.compile_side_by_side(plan)
    assert compiled == [("bound_kernel", torch.device("cpu"))] * 3
