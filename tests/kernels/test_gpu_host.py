"""The host's side on a GPU: synchronisations, streams, graphs, devices, and a memory checker."""

import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.problem import Filter
from tests.kernels.gpu import DEVICE, requires_kernels, variants_in_use
from tests.support import Problem, make_problem, run_ours

pytestmark = [
    pytest.mark.gpu,
    requires_kernels,
    # Said once whenever the mode is used.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

IMPLS = ("cce", "cce_exact")
TOLERANCE = 6e-4


def sharp(tokens=300, classes=4096, dim=64, seed=0) -> Problem:
    """Every token has a likely class, so that the filter finds something to drop."""
    random = torch.Generator().manual_seed(seed)
    c = torch.randn(classes, dim, generator=random)
    targets = torch.randint(0, 64, (tokens,), generator=random)
    e = 14 * c[targets] / c[targets].norm(dim=1, keepdim=True)
    e += 0.2 * torch.randn(tokens, dim, generator=random)
    return Problem(e, c, targets).to(torch.bfloat16).on(DEVICE)


def flat_settings(softcap, tolerance):
    """Return the values after the tensors of the operators in a training step."""
    of_problem = (-100, softcap, torch.bfloat16, 2**28, 0, None, 0, None)
    return (*of_problem, *Filter(tolerance).flat(), True)


def operators(problem, tolerance):
    """Forward and backward as functions on this thread, not autograd's."""
    from cut_cross_entropy.operators.losses import cce_gradients, cce_losses

    inputs = (problem.e, problem.c, problem.targets, problem.bias)
    settings = flat_settings(None, tolerance)

    def forward():
        return cce_losses(*inputs, *settings)

    def backward(saved):
        upstream = (torch.ones_like(saved[0]), torch.zeros_like(saved[1]))
        return cce_gradients(*upstream, *saved, *inputs, *settings, True, True, False)

    return forward, backward


@pytest.fixture
def sync_mode():
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
def test_forward_does_not_wait_for_the_device(tolerance, sync_mode):
    forward, _ = operators(sharp(), tolerance)
    forward()
    sync_mode("error")
    forward()


@pytest.mark.parametrize("impl", IMPLS)
def test_public_forward_does_not_wait_for_the_device(impl, sync_mode):
    problem = sharp()
    run_ours(problem, impl, shift=0, reduction="mean")
    sync_mode("error")
    e = problem.e.requires_grad_()
    linear_cross_entropy(e, problem.c, problem.targets, impl=impl, return_lse=True)


@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
def test_waits_of_a_backward(tolerance, sync_mode, monkeypatch):
    """For the number of kept strips; without a filter for that of tokens, and for their scale."""
    forward, backward = operators(sharp(), tolerance)
    saved = forward()
    backward(saved)
    torch.cuda.synchronize()
    waited, wait = [], torch.cuda.Event.synchronize
    # PyTorch does not warn of events, so these are counted.
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda x: (waited.append(x), wait(x)))
    sync_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backward(saved)
    found = [str(x.message) for x in caught if "synchronizing CUDA operation" in str(x.message)]
    assert len(found) + len(waited) == (1 if tolerance else 2), found


def capture(step):
    """A graph of ``step``, which has run once on another stream, and what it will compute."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def test_exact_preset_is_captured_in_a_graph():
    """A replay computes what an eager call does, from what the tensors then hold."""
    problem, other = sharp(seed=0), sharp(seed=1)
    forward, backward = operators(problem, 0.0)

    def step():
        saved = forward()
        return saved, backward(saved)

    graph, (saved, grads) = capture(step)
    for name in ("e", "c", "targets"):
        getattr(problem, name).copy_(getattr(other, name))
    graph.replay()
    torch.cuda.synchronize()
    expected = forward()
    assert torch.equal(saved[0], expected[0])
    for got, exact in zip(grads, backward(expected), strict=True):
        assert torch.equal(got, exact)


# The leaves' gradient nodes belong to the stream of the warm-up; PyTorch says so.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
def test_public_call_of_the_exact_preset_is_captured():
    problem = sharp()
    e, c = problem.e.requires_grad_(), problem.c.requires_grad_()

    def step():
        loss = linear_cross_entropy(e, c, problem.targets, impl="cce_exact")
        return loss, *torch.autograd.grad(loss, (e, c))

    graph, captured = capture(step)
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


def test_ignored_tokens_of_a_captured_step():
    """They are multiplied there, and not in an eager step."""
    problem = sharp()
    problem.targets[100:] = -100
    forward, backward = operators(problem, 0.0)
    graph, grads = capture(lambda: backward(forward()))
    graph.replay()
    torch.cuda.synchronize()
    for got, eager in zip(grads, backward(forward()), strict=True):
        torch.testing.assert_close(got, eager)


def test_another_stream():
    problem = sharp()
    expected = run_ours(problem, "cce")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = run_ours(problem, "cce")
    stream.synchronize()
    for name, value in expected.named().items():
        assert torch.equal(got.named()[name], value), name


@pytest.mark.parametrize("impl", IMPLS)
def test_current_device_is_not_that_of_the_tensors(impl):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    problem = sharp()
    expected = run_ours(problem, impl)
    moved = problem.on("cuda:1")
    assert torch.cuda.current_device() == 0
    for name, value in run_ours(moved, impl).named().items():
        assert value.device == torch.device("cuda:1")
        assert torch.equal(value.to(DEVICE), expected.named()[name]), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("which", ["e", "c", "targets"])
def test_modification_between_forward_and_backward_is_caught(impl, which):
    problem = sharp()
    tensors = {
        "e": problem.e.requires_grad_(),
        "c": problem.c.requires_grad_(),
        "targets": problem.targets,
    }
    loss = linear_cross_entropy(**tensors, impl=impl)
    with torch.no_grad():
        tensors[which].mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck():
    from cut_cross_entropy.operators.losses import cce_gradients, cce_losses

    problem = make_problem((300,), 1100, 72, bias=True, dtype=torch.bfloat16).on(DEVICE)
    inputs = (problem.e, problem.c, problem.targets, problem.bias)
    settings = flat_settings(5.0, TOLERANCE)
    saved = cce_losses(*inputs, *settings)
    upstream = (torch.ones_like(saved[0]), torch.zeros_like(saved[1]))
    with_grad = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    torch.library.opcheck(cce_losses, (*with_grad, *settings))
    torch.library.opcheck(cce_gradients, (*upstream, *saved, *inputs, *settings, True, True, True))


CHECKED = """
import torch
from cut_cross_entropy import record_filter
from cut_cross_entropy.kernels.filtered import backward, calibrate, class_weights
from tests.support import Problem, make_problem, run_ours

# What large problems launch, however much is kept.
calibrate.MIN_TOKENS = calibrate.MIN_WORK = class_weights.MIN_WORK = 0
backward.DENSE_FRACTION, backward.FLAT_SUPPORT = 1e9, 20
for bias, softcap, dim in ((False, None, 72), (True, 20.0, 73)):
    problem = make_problem((137,), 515, dim, bias=bias)
    likely = problem.c[problem.targets.clamp_min(0)]
    e = 14 * likely / likely.norm(dim=1, keepdim=True)
    e[::40] = 0  # flat
    problem = Problem(e, problem.c, problem.targets, problem.bias).to(torch.bfloat16).on("cuda")
    for impl in ("cce", "cce_exact"):
        for options in ({"memory_budget": 1}, {}):
            with record_filter() as records:
                run_ours(problem, impl, softcap=softcap, **options)
            print(impl, *[(record.path, record.flat_tokens > 0) for record in records])
torch.cuda.synchronize()
"""


def test_no_access_out_of_bounds():
    """By compute-sanitizer, without PyTorch's caching of memory, which would hide an overrun."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(tool):
        pytest.skip("needs compute-sanitizer")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", CHECKED]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("cce")]
    kinds = ["cce ('filtered', True)"] * 2 + ["cce_exact ('exact', False)"] * 2
    assert lines == kinds * 2


def test_a_step_compiles_nothing_that_was_not_planned():
    """The backward is compiled with the forward."""
    for options, tokens in (
        ({"impl": "cce"}, 1000),
        ({"impl": "cce", "softcap": 20.0}, 1000),
        ({"impl": "cce_exact"}, 1000),  # no multiple of 16, like what is left of it
        ({"impl": "cce_exact"}, 1024),
    ):
        problem = sharp(tokens=tokens, classes=5000, dim=72)
        problem.targets[::3] = -100
        run_ours(problem, needed=(), **options)  # an evaluation compiles less
        e, c = (x.clone().requires_grad_() for x in (problem.e, problem.c))
        loss = linear_cross_entropy(e, c, problem.targets, **options)
        before = variants_in_use()
        loss.backward()
        assert variants_in_use() == before, options
