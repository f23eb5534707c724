"""The operators as PyTorch sees them: schema, fake, autograd, and the transforms around them."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cut_cross_entropy import linear_cross_entropy, linear_divergence, token_logprobs
from cut_cross_entropy.operators.losses import chunked_gradients, chunked_losses
from tests.support import IMPLS, check_checkpoint, check_repeated_backward, make_problem, run_ours

SETTINGS = (-100, None, torch.float32, 2**20, 0, None, 0, None)


def gradient_of(problem, impl="chunked", **options):
    e, c = (x.detach().requires_grad_() for x in (problem.e, problem.c))
    linear_cross_entropy(e, c, problem.targets, problem.bias, impl=impl, **options).backward()
    return e.grad, c.grad


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(impl, softcap, reduction):
    problem = make_problem((2, 3), 150, 4, dtype=torch.float64, bias=True)
    inputs = [x.requires_grad_() for x in (problem.e, problem.c, problem.bias)]

    def both(e, c, bias):
        return linear_cross_entropy(
            e,
            c,
            problem.targets,
            bias,
            softcap=softcap,
            reduction=reduction,
            shift=1,
            return_lse=True,
            impl=impl,
            memory_budget=1,
        )

    # Random projections: a full Jacobian of 150 classes would take minutes.
    assert torch.autograd.gradcheck(both, inputs, fast_mode=True)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "mixed dtypes"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_opcheck(layout, bias):
    problem = make_problem((4,), bias=bias)
    e, c = problem.e, problem.c
    if layout == "transposed":
        c = c.T.contiguous().T
    elif layout == "mixed dtypes":
        e = e.bfloat16()
    nll, lse = chunked_losses(e, c, problem.targets, problem.bias, *SETTINGS)
    inputs = [None if x is None else x.requires_grad_() for x in (e, c, problem.bias)]
    e, c, b = inputs
    torch.library.opcheck(chunked_losses, (e, c, problem.targets, b, *SETTINGS))
    e, c, b = (None if x is None else x.detach() for x in inputs)
    grads = (torch.ones_like(nll), torch.ones_like(lse))
    for needed in ((True, True, bias), (False, True, False), (True, False, False)):
        torch.library.opcheck(
            chunked_gradients, (*grads, nll, lse, e, c, problem.targets, b, *SETTINGS, *needed)
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_functional_call(impl):
    problem = make_problem()

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros_like(problem.c))

        def forward(self, e, targets):
            return linear_cross_entropy(e, self.weight, targets, impl=impl)

    weight = problem.c.requires_grad_()
    arguments = (problem.e, problem.targets)
    loss = torch.func.functional_call(Head(), {"weight": weight}, arguments)
    loss.backward()
    assert torch.equal(weight.grad, gradient_of(problem, impl)[1])


def test_func_grad_of_the_reference():
    problem = make_problem()

    def loss(c):
        return linear_cross_entropy(problem.e, c, problem.targets, impl="reference")

    torch.testing.assert_close(
        torch.func.grad(loss)(problem.c), gradient_of(problem, "reference")[1]
    )


def test_vmap_of_the_reference():
    problem = make_problem((3, 5))
    expected = torch.stack(
        [
            linear_cross_entropy(e, problem.c, problem.targets[0], impl="reference")
            for e in problem.e
        ]
    )
    got = torch.vmap(
        lambda e: linear_cross_entropy(e, problem.c, problem.targets[0], impl="reference")
    )(problem.e)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_activation_checkpointing(impl, use_reentrant):
    problem = make_problem()
    e, c = problem.e.requires_grad_(), problem.c.requires_grad_()

    def head(e, c):
        return linear_cross_entropy(e * 2, c, problem.targets, impl=impl)

    check_checkpoint(head, e, c, use_reentrant=use_reentrant)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("impl", IMPLS)
def test_without_gradients(impl, context):
    problem = make_problem()
    expected = run_ours(problem, impl, needed=())
    with context():
        loss, lse = linear_cross_entropy(
            problem.e.requires_grad_(), problem.c, problem.targets, impl=impl, return_lse=True
        )
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(lse, expected.lse)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("where", ["fake", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_without_values(impl, where, dtype):
    """Shapes, dtypes and strides of results and gradients equal those of real tensors."""
    problem = make_problem(dtype=dtype, bias=True)
    real = run_ours(problem, impl, reduction="none", shift=1, needed=())
    tensors = (problem.e, problem.c, problem.targets, problem.bias)
    mode = FakeTensorMode() if where == "fake" else None
    with mode or contextlib.nullcontext():
        e, c, targets, bias = (mode.from_tensor(x) if mode else x.to("meta") for x in tensors)
        leaves = [x.requires_grad_() for x in (e, c, bias)]
        loss, lse = linear_cross_entropy(
            e, c, targets, bias, impl=impl, reduction="none", shift=1, return_lse=True
        )
        loss.sum().backward()
    for got, expected in ((loss, real.loss), (lse, real.lse)):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert got.stride() == expected.stride()
        assert got.device.type == ("cpu" if where == "fake" else "meta")
    assert all((x.grad.shape, x.grad.dtype) == (x.shape, x.dtype) for x in leaves)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_further_results_of_meta_tensors(impl):
    """Meta tensors have no autocast that could be turned off."""
    problem = make_problem()
    e, c, targets = (x.to("meta") for x in (problem.e, problem.c, problem.targets))
    e.requires_grad_()
    smooth = linear_cross_entropy(e, c, targets, label_smoothing=0.1, impl=impl)
    names = ("lse", "entropy", "mean_logit", "rank")
    ids = targets[..., None]
    found = token_logprobs(e, c, targets, outputs=names, candidates=ids, impl=impl)
    compared = linear_divergence(e, c, e, c, targets=targets, reduction="mean", impl=impl)
    results = [found.logprobs, found.candidate_logprobs, *(getattr(found, x) for x in names)]
    assert [tuple(x.shape) for x in results] == [(6, 5), (6, 5, 1), *[(6, 5)] * 4]
    total = smooth + found.entropy.sum() + found.mean_logit.sum() + compared.divergence
    (grad,) = torch.autograd.grad(total, e)
    assert (grad.shape, grad.is_meta) == (e.shape, True)


def test_double_backward_is_refused():
    problem = make_problem()
    e = problem.e.requires_grad_()
    loss = linear_cross_entropy(e, problem.c, problem.targets, impl="chunked")
    (grad,) = torch.autograd.grad(loss, e, create_graph=True)
    with pytest.raises(NotImplementedError) as caught:
        grad.square().sum().backward()
    assert str(caught.value) == (
        "a mean or sum whose gradients the forward computes has no second derivative in this "
        "implementation; impl='reference' has one"
    )


def test_double_backward_of_the_reference():
    problem = make_problem((3,), 5, 4, dtype=torch.float64, bias=True, ignored=0.0)
    inputs = [x.requires_grad_() for x in (problem.e, problem.c, problem.bias)]

    def loss(e, c, bias):
        return linear_cross_entropy(e, c, problem.targets, bias, softcap=3.0, impl="reference")

    assert torch.autograd.gradgradcheck(loss, inputs)


# The reference is ordinary PyTorch: it keeps the classifier, and copies or nothing of the others.
@pytest.mark.parametrize(
    ("impl", "which"),
    [("reference", "c"), *(("chunked", which) for which in ("e", "c", "targets", "bias"))],
)
def test_modification_between_forward_and_backward_is_caught(impl, which):
    problem = make_problem(bias=True)
    e, c, bias = (x.requires_grad_() for x in (problem.e, problem.c, problem.bias))
    tensors = {"e": e, "c": c, "targets": problem.targets, "bias": bias}
    loss = linear_cross_entropy(e, c, problem.targets, bias, softcap=5.0, impl=impl)
    with torch.no_grad():
        tensors[which].mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_twice():
    _, loss = check_repeated_backward("chunked", make_problem())
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class Seen(TorchDispatchMode):
    """Names of our operators that PyTorch dispatches."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cut_cross_entropy":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def dispatched(monkeypatch):
    """Calls of operators, rather than of their bodies."""
    kind, calls = type(chunked_losses), []
    call = kind.__call__
    monkeypatch.setattr(
        kind, "__call__", lambda self, *a: (calls.append(self._name), call(self, *a))[1]
    )
    return calls


NAMES = ["chunked", "chunked_backward"]


def token_gradients(problem):
    return gradient_of(problem, reduction="sum", recompute=True)


def test_bodies_run_without_the_dispatcher(dispatched):
    token_gradients(make_problem((5,)))
    assert not dispatched


def test_a_mode_sees_the_operators():
    problem = make_problem((5,))
    expected = token_gradients(problem)
    with Seen() as seen:
        got = token_gradients(problem)
    assert seen.names == NAMES
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_a_profiler_sees_the_operators():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        token_gradients(make_problem((5,)))
    found = {event.key for event in recorded.key_averages()}
    assert found >= {f"cut_cross_entropy::{name}" for name in NAMES}


class Default(TorchFunctionMode):
    """Does nothing to what it sees."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_function_mode_sees_the_operator(dispatched):
    problem = make_problem((5,))
    with Default():
        linear_cross_entropy(problem.e, problem.c, problem.targets, impl="chunked")
    assert dispatched == NAMES[:1]


def test_tensors_without_memory_go_to_the_operator(dispatched):
    problem = make_problem((5,))
    e, c, targets = (x.to("meta") for x in (problem.e, problem.c, problem.targets))
    loss = linear_cross_entropy(e.requires_grad_(), c, targets, impl="chunked", recompute=True)
    assert loss.is_meta
    assert dispatched == NAMES[:1]


def test_negative_views_are_resolved(dispatched):
    """The imaginary part of a conjugate has the opposite sign of what its memory holds."""
    problem = make_problem((5,))
    e = torch.complex(torch.zeros_like(problem.e), -problem.e).conj().imag
    assert e.is_neg()
    loss = linear_cross_entropy(e, problem.c, problem.targets, impl="chunked", recompute=True)
    expected = linear_cross_entropy(
        problem.e, problem.c, problem.targets, impl="chunked", recompute=True
    )
    assert torch.equal(loss, expected)
    assert dispatched == NAMES[:1]
