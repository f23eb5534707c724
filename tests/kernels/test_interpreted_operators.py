"""The operators of the kernels as PyTorch sees them, interpreted: schema, fakes, autograd."""

import pytest
import torch

from cut_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from cut_cross_entropy.problem import Filter
from tests.support import check_checkpoint, check_repeated_backward, make_problem, run, run_ours

pytestmark = pytest.mark.interpret

TOLERANCE = 1e-3
BUDGET = 2**20


def settings(tolerance=TOLERANCE, *, filter_e=True, filter_c=True, training=True):
    problem = (-100, None, torch.float32, BUDGET, 0, None, 0, None)
    filter_ = Filter(tolerance, e=filter_e, c=filter_c, max_error=1.1)
    return (*problem, *filter_.flat(), training)


@pytest.fixture
def operators():
    from cut_cross_entropy.operators.losses import cce_gradients, cce_losses

    return cce_losses, cce_gradients


@pytest.mark.parametrize(
    ("layout", "bias", "tolerance"),  # each pair of values
    [
        ("contiguous", False, 0.0),
        ("contiguous", True, TOLERANCE),
        ("transposed", False, TOLERANCE),
        ("transposed", True, 0.0),
    ],
)
def test_opcheck(operators, layout, bias, tolerance):
    losses, gradients = operators
    problem = make_problem((4,), 130, 8, bias=bias)
    e, c = problem.e, problem.c
    if layout == "transposed":
        c = c.T.contiguous().T
    options = settings(tolerance)
    saved = losses(e, c, problem.targets, problem.bias, *options)
    inputs = [None if x is None else x.requires_grad_() for x in (e, c, problem.bias)]
    e, c, b = inputs
    torch.library.opcheck(losses, (e, c, problem.targets, b, *options))
    e, c, b = (None if x is None else x.detach() for x in inputs)
    upstream = (torch.ones_like(saved[0]), torch.ones_like(saved[1]))
    for needed in ((True, True, bias), (False, True, False), (True, False, False)):
        torch.library.opcheck(
            gradients, (*upstream, *saved, e, c, problem.targets, b, *options, *needed)
        )


@pytest.mark.parametrize("impl", ["cce", "cce_exact", "cce_kahan_full_c"])
def test_fullgraph(impl):
    problem = make_problem((3, 4), 130, 8, bias=True)
    options = {"softcap": 5.0, "shift": 1, "reduction": "none", "impl": impl}

    def model(e, c, targets, bias):
        return linear_cross_entropy(torch.sin(e), c, targets, bias, return_lse=True, **options)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, expected = run(compiled, problem), run(model, problem)
    for name, value in expected.named().items():
        torch.testing.assert_close(got.named()[name], value)


def test_module_within_a_compiled_function():
    torch._dynamo.reset()
    problem = make_problem((5,), 130, 8)
    module = LinearCrossEntropy(reduction="sum", return_lse=True, impl="cce")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(run(compiled, problem).grad_c, run(module, problem).grad_c)


@pytest.mark.parametrize("impl", ["cce", "cce_exact"])
@pytest.mark.parametrize("where", ["e", "c", "targets", "bias"])
def test_modification_between_forward_and_backward_is_caught(impl, where):
    problem = make_problem((5,), 130, 8, bias=True)
    e, c, bias = (x.requires_grad_() for x in (problem.e, problem.c, problem.bias))
    tensors = {"e": e, "c": c, "targets": problem.targets, "bias": bias}
    loss = linear_cross_entropy(e, c, problem.targets, bias, impl=impl)
    with torch.no_grad():
        tensors[where].mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    problem = make_problem((5,), 130, 8)
    e, c = problem.e.requires_grad_(), problem.c.requires_grad_()

    def head(e, c):
        return linear_cross_entropy(e * 2, c, problem.targets, impl="cce")

    check_checkpoint(head, e, c, use_reentrant=use_reentrant)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    problem = make_problem((5,), 130, 8)
    expected = run_ours(problem, "cce", needed=())
    with context():
        loss, lse = linear_cross_entropy(
            problem.e.requires_grad_(), problem.c, problem.targets, impl="cce", return_lse=True
        )
    assert not loss.requires_grad
    assert torch.equal(loss, expected.loss)
    assert torch.equal(lse, expected.lse)


def test_training_or_not_the_loss_is_the_same():
    """Evaluation leaves ignored tokens in their places; training moves the others together."""
    problem = make_problem((40,), 130, 8, ignored=0.5)
    training = run_ours(problem, "cce", reduction="none")
    evaluation = run_ours(problem, "cce", reduction="none", needed=())
    torch.testing.assert_close(training.loss, evaluation.loss)


def test_evaluation_keeps_nothing(operators):
    losses, _ = operators
    problem = make_problem((5,), 130, 8)
    inputs = (problem.e, problem.c, problem.targets, None)
    for options in (settings(training=False), settings(0.0), settings(filter_e=False)):
        energy = losses(*inputs, *options)[2]
        filtered = options[-1] and options[8] > 0
        assert (energy.numel() > 0) == filtered, options


def test_inputs_are_not_modified():
    problem = make_problem((5,), 130, 8, bias=True)
    tensors = (problem.e, problem.c, problem.targets, problem.bias)
    copies = [x.clone() for x in tensors]
    run_ours(problem, "cce", softcap=5.0)
    for before, after in zip(copies, tensors, strict=True):
        assert torch.equal(before, after)


def test_backward_twice_and_double_backward():
    problem = make_problem((5,), 130, 8)
    e, _ = check_repeated_backward("cce", problem)
    loss = linear_cross_entropy(e, problem.c, problem.targets, impl="cce")
    (grad,) = torch.autograd.grad(loss, e, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        grad.square().sum().backward()


def test_bfloat16_is_refused_by_the_interpreter():
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 products wrongly"):
        run_ours(make_problem((5,), dtype=torch.bfloat16), "cce")


def test_float64_is_the_library_s():
    """The presets run full precision through the bounded PyTorch path, to the same bits."""
    problem = make_problem(dtype=torch.float64)
    kernels, chunked = (run_ours(problem, impl) for impl in ("cce", "chunked"))
    assert torch.equal(kernels.grad_c, chunked.grad_c)
