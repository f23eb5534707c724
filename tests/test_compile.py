"""``torch.compile(fullgraph=True)`` around a model that ends in the loss."""

import contextlib
import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cut_cross_entropy import LinearCrossEntropy, call_context, device_support, linear_cross_entropy
from cut_cross_entropy.adapters import seam
from cut_cross_entropy.implementations import full_logits
from cut_cross_entropy.lazy import notices
from tests.support import IMPLS, check, make_problem, run, run_ours


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same(got, expected):
    for name, value in expected.named().items():
        torch.testing.assert_close(
            got.named()[name], value, msg=lambda text, n=name: f"{n}: {text}"
        )


# aot_eager traces forward and backward, inductor also generates code for what surrounds the loss.
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("impl", IMPLS)
def test_fullgraph(impl, backend):
    problem = make_problem(bias=True)
    options = {"softcap": 5.0, "shift": 1, "reduction": "none"}

    def model(e, c, targets, bias):
        return linear_cross_entropy(
            torch.sin(e), c, targets, bias, return_lse=True, impl=impl, **options
        )

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_same(run(compiled, problem), run(model, problem))


@pytest.mark.parametrize("impl", IMPLS)
def test_dynamic_shapes(impl):
    compiled = torch.compile(
        linear_cross_entropy, backend="aot_eager", fullgraph=True, dynamic=True
    )
    for leading in ((2, 5), (3, 7), (4, 4)):
        problem = make_problem(leading)
        got = run(lambda *inputs: compiled(*inputs, impl=impl, shift=1, return_lse=True), problem)
        assert_same(got, run_ours(problem, impl, shift=1))


def test_module_within_a_compiled_function():
    problem = make_problem()
    module = LinearCrossEntropy(reduction="sum", return_lse=True, impl="chunked")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_same(run(compiled, problem), run(module, problem))


def test_transposed_classifier_within_a_compiled_function():
    """The gradient's strides must be those that the operator's fake announced."""
    problem = make_problem()
    weight = problem.c.T.contiguous()

    def loss(weight):
        return linear_cross_entropy(problem.e, weight.T, problem.targets, impl="chunked")

    expected, got = (weight.clone().requires_grad_() for _ in range(2))
    loss(expected).backward()
    torch.compile(loss, backend="inductor", fullgraph=True)(got).backward()
    torch.testing.assert_close(got.grad, expected.grad)


def test_more_variants_than_the_compiler_grants_a_function(monkeypatch):
    """Eight compilations of one function is PyTorch's limit; options multiply to more."""
    captured = torch.compile(  # no code generation: the limit counts what is captured
        full_logits._logits_and_lse, backend="eager", fullgraph=True, dynamic=True
    )
    monkeypatch.setattr(full_logits, "_compiled", lambda: captured)
    variants = 0
    for bias in (False, True):
        for softcap in (None, 5.0):
            for needed in ((), ("e",), ("e", "c")):
                problem = make_problem((4,), 10, 4, bias=bias)
                check(problem, "torch_compile", softcap=softcap, needed=needed)
                variants += 1
    assert variants > torch._dynamo.config.cache_size_limit


def test_graph_of_the_loss_has_no_logits():
    """Within a compiled model, the bounded implementation stays one opaque operator."""
    names = []

    def backend(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    problem = make_problem()
    compiled = torch.compile(linear_cross_entropy, backend=backend, fullgraph=True)
    compiled(problem.e, problem.c, problem.targets, impl="chunked")
    assert any("cut_cross_entropy" in name for name in names)
    assert not any("matmul" in name or "linear" in name for name in names)


@pytest.mark.parametrize("where", ["fake", "meta"])
def test_torch_compile_without_values(where):
    problem = make_problem((5,), bias=True)
    mode = FakeTensorMode() if where == "fake" else None
    tensors = (problem.e, problem.c, problem.targets, problem.bias)
    with mode or contextlib.nullcontext():
        e, c, targets, bias = (mode.from_tensor(x) if mode else x.to("meta") for x in tensors)
        inputs = [x.requires_grad_() for x in (e, c, bias)]
        loss = linear_cross_entropy(e, c, targets, bias, impl="torch_compile")
        assert loss.shape == ()
        for x, grad in zip(inputs, torch.autograd.grad(loss, inputs), strict=True):
            assert (grad.shape, grad.dtype, grad.device) == (x.shape, x.dtype, x.device)


def test_compiled_function_is_made_once():
    assert full_logits._compiled() is full_logits._compiled()


@pytest.mark.parametrize("compiled_before", [False, True])
def test_the_graph_of_torch_compile_may_be_retained(compiled_before):
    """Compiled backward passes overwrite what was saved for them, where that is not seen."""
    problem = make_problem((5,), bias=True)
    tensors = (problem.e, problem.c, problem.bias)
    inputs = [x.double().requires_grad_() for x in tensors]

    def loss(e, c, bias):
        return linear_cross_entropy(e, c, problem.targets, bias, impl="torch_compile")

    if compiled_before:
        loss(*inputs).backward()
    expected = torch.autograd.grad(
        linear_cross_entropy(*inputs[:2], problem.targets, inputs[2], impl="reference"), inputs
    )
    result = loss(*inputs)
    passes = [torch.autograd.grad(result, inputs, retain_graph=retain) for retain in (1, 1, 0)]
    for gradients in passes:
        for got, exact in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        result.backward()


def test_second_derivative_of_torch_compile_is_refused():
    problem = make_problem((5,))
    e = problem.e.requires_grad_()
    loss = linear_cross_entropy(e, problem.c, problem.targets, impl="torch_compile")
    (grad,) = torch.autograd.grad(loss, e, create_graph=True)
    # The second message is PyTorch 2.4's, whose compiled code is not within a Function of ours.
    messages = "impl='reference' has one|does not currently support double backward"
    with pytest.raises(RuntimeError, match=messages):
        (grad.sum() + e.sum()).backward()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (call_context, "_within_functorch"),
        (device_support, "_why_unavailable"),
        (notices, "warn_once"),
        (notices, "count_traced_loss"),
        (seam, "_count_trace"),
    ],
)
def test_results_in_traces_replace_no_function(module, name):
    """PyTorch 2.4 stores the result as a global with the name of the function's code."""
    function = getattr(module, name)
    assert function._dynamo_marked_constant
    # A test before this one may have made PyTorch store it: the source alone says what is replaced.
    assert function.__code__.co_name not in inspect.getsource(module)
