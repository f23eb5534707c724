"""No tensor of N x V elements is ever made by the bounded implementation, and its budget holds.

Two watchers. A dispatch mode sees each tensor that an operation returns, with its shape; custom
operators run below it, so the functions within them are called directly. PyTorch's profiler sees
each allocation and release of bytes, within operators too, so it watches the public function.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.implementations import blocks, chunked
from cut_cross_entropy.problem import Directions, Needed, PerToken, Problem
from tests.support import make_problem

N, V, D = 256, 2048, 32
LOGITS = N * V
BUDGET = 2**18  # bytes; the logits in float32 take eight times as much


class AllocationWatcher(TorchDispatchMode):
    """Records the elements and bytes of every new tensor; views of arguments are not new."""

    def __init__(self):
        super().__init__()
        self.elements, self.bytes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def tensors(tree):
            return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]

        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        for new in tensors(result):
            if new.untyped_storage().data_ptr() not in known:
                self.elements.append(new.numel())
                self.bytes.append(new.untyped_storage().nbytes())
        return result


def peak_bytes(function):
    """The most bytes held at once by what ``function`` allocates, and the largest single one."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [x for x in recorded.profiler.kineto_results.events() if x.name() == "[memory]"]
    held = peak = largest = 0
    for event in sorted(events, key=lambda x: x.start_ns()):
        held += event.nbytes()
        peak, largest = max(peak, held), max(largest, event.nbytes())
    return peak, largest


def problem_of(dtype, bias=True, ignored=0.25):
    return make_problem((N,), V, D, dtype=dtype, bias=bias, ignored=ignored)


def loss_and_gradients(problem, impl, **options):
    leaves = [x.requires_grad_() for x in (problem.e, problem.c, problem.bias)]

    def compute():
        e, c, bias = leaves
        loss, lse = linear_cross_entropy(
            e, c, problem.targets, bias, impl=impl, return_lse=True, **options
        )
        torch.autograd.grad(loss + lse.square().mean(), leaves)

    compute()  # what is made once, such as caches, does not count
    return compute


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("ignored", [0.0, 0.25])  # without ignored tokens nothing is gathered
def test_no_operation_makes_the_logits(dtype, softcap, ignored):
    problem = problem_of(dtype, ignored=ignored)
    tensors = (problem.e, problem.c, problem.targets, problem.bias)
    call = Problem(*tensors, -100, softcap, dtype, BUDGET)
    with AllocationWatcher() as forward:
        results = chunked.forward(call)
    ones = PerToken(*(torch.ones_like(x) for x in results))
    with AllocationWatcher() as backward:
        chunked.backward(ones, results, call, Needed(True, True, True))
    accumulator = N * D * results.lse.element_size()  # to sum the gradient of e
    gradient = V * D * problem.c.element_size()
    assert max(forward.elements) < LOGITS
    assert max(backward.elements) < LOGITS
    assert max(forward.bytes) <= BUDGET
    over = [size for size in backward.bytes if size > BUDGET]
    assert all(size in (accumulator, gradient) for size in over)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_tangents_keep_to_the_budget(dtype, softcap):
    problem = problem_of(dtype)
    tensors = (problem.e, problem.c, problem.targets, problem.bias)
    call = Problem(*tensors, -100, softcap, dtype, BUDGET)
    results = chunked.forward(call)
    with AllocationWatcher() as watcher:
        chunked.tangents(Directions(problem.e, problem.c, problem.bias), results, call)
    assert max(watcher.elements) < LOGITS
    assert max(watcher.bytes) <= BUDGET


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_dispatch_watcher_sees_the_logits_of_the_reference(impl):
    """Proof that the watcher watches; and that custom operators are opaque to it."""
    with AllocationWatcher() as watcher:
        loss_and_gradients(problem_of(torch.float32), impl)()
    assert (max(watcher.elements) >= LOGITS) == (impl == "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("budget", [BUDGET, 2**20])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_public_function_keeps_to_its_budget(dtype, budget, softcap):
    problem = problem_of(dtype)
    compute = loss_and_gradients(problem, "chunked", memory_budget=budget, softcap=softcap)
    peak, largest = peak_bytes(compute)
    wide = torch.promote_types(dtype, torch.float32).itemsize
    results = sum(x.nbytes for x in (problem.e, problem.c, problem.bias))
    accumulators = 2 * N * D * wide  # the gradient of e, of all tokens and of those that count
    per_token = 20 * N * wide  # loss, lse, their gradients, masks and indices
    assert peak <= budget + results + accumulators + per_token
    assert largest < LOGITS * wide


def test_profiler_sees_the_logits_of_the_reference():
    peak, largest = peak_bytes(loss_and_gradients(problem_of(torch.float32), "reference"))
    assert largest >= LOGITS * 4
    assert peak >= 2 * LOGITS * 4


@pytest.mark.parametrize("classes", [2**9, 2**12, 2**15])
def test_peak_grows_with_the_classifier_and_not_with_the_logits(classes):
    problem = make_problem((N,), classes, 8, bias=True)
    compute = loss_and_gradients(problem, "chunked", memory_budget=BUDGET)
    peak, _ = peak_bytes(compute)
    assert peak <= BUDGET + sum(x.nbytes for x in (problem.e, problem.c, problem.bias)) + 2**16


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("budget", [1, 2**12, 2**20, 2**28])
@pytest.mark.parametrize(("tokens", "classes", "dim"), [(0, 5, 3), (10**5, 10**5, 64), (1, 1, 1)])
def test_choice_of_blocks(tokens, classes, dim, itemsize, budget):
    rows, columns = blocks.choose_blocks(tokens, classes, dim, itemsize=itemsize, budget=budget)
    assert 1 <= rows <= max(tokens, 1)
    assert 1 <= columns <= classes
    smallest = rows == 1 and columns <= blocks.MIN_CLASSES
    assert smallest or (rows * columns + (rows + columns) * dim) * itemsize <= budget
