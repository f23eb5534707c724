"""Losses that are summed: their gradients come from the forward, and three products are enough."""

import functools
import math
from itertools import pairwise

import pytest
import torch

from cut_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from cut_cross_entropy.implementations import blocks, chunked, chunked_sum
from cut_cross_entropy.implementations.blocks import Blocks
from cut_cross_entropy.operators import sums
from cut_cross_entropy.problem import Needed, Problem
from tests.sums_in_training import BACKWARD, FORWARD, SUM, USES, check_use, record_passes
from tests.support import (
    check,
    check_checkpoint,
    check_sure_token,
    leaves_of,
    make_problem,
    run_ours,
)
from tests.test_memory import peak_bytes

pytestmark = pytest.mark.usefixtures("poison_empty")

chunked_loss = functools.partial(linear_cross_entropy, impl="chunked")


@pytest.fixture
def passes(monkeypatch):
    """Record which passes over the logits are made."""
    return record_passes(monkeypatch, (chunked_sum, (SUM,)), (chunked, (FORWARD, BACKWARD)))


@pytest.fixture
def small_chunks(monkeypatch):
    """Let chunks be as small as the budget has them."""
    monkeypatch.setattr(chunked_sum, "MIN_TOKENS", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("ignored", [0.0, 0.25])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_several_chunks(dtype, softcap, ignored, reduction, passes, small_chunks):
    """Of the 65 tokens, and for half precision inputs also several slices of c at a time."""
    problem = make_problem((5, 13), 300, 16, bias=True, ignored=ignored, dtype=dtype)
    budget = 20 * 300 * torch.promote_types(dtype, torch.float32).itemsize
    options = {"softcap": softcap, "reduction": reduction, "shift": 1, "memory_budget": budget}
    check(problem, "chunked", return_lse=False, **options)
    assert passes == ["loss_and_gradients"]
    tensors = (problem.e[0], problem.c, problem.targets, problem.bias)
    call = Problem(*tensors, -100, softcap, dtype, budget)
    assert 1 < chunked_sum.tokens_per_chunk(call, Needed(True, True, True)) < 20


def test_a_chunk_takes_the_memory_of_the_gradient_of_c_on_a_gpu():
    """The rest is unused until the backward. On a CPU larger chunks are not faster."""
    sizes = {}
    for device in ("cpu", "meta"):
        e, c = (torch.empty(n, 512, device=device) for n in (1, 2**16))
        call = Problem(e, c, e, None, -100, None, torch.float32, 2**28)
        for with_c in (False, True):
            needed = Needed(True, with_c, False)
            sizes[device, with_c] = chunked_sum.tokens_per_chunk(call, needed)
    assert sizes["cpu", True] == sizes["cpu", False] == sizes["meta", False]
    assert sizes["cpu", True] == 992
    assert sizes["meta", True] == 1489


RANDOM = torch.Generator().manual_seed(5)
PER_TOKEN = torch.rand((5, 13), generator=RANDOM, dtype=torch.float64) + 0.3
FACTORS = {
    "class_weights": {"class_weights": torch.rand(300, generator=RANDOM, dtype=torch.float64)},
    "token_weights": {"token_weights": PER_TOKEN - 0.6},  # a few are negative
    "both": {
        "token_weights": (PER_TOKEN > 0.7).double(),
        "class_weights": torch.rand(300, generator=RANDOM, dtype=torch.float64),
    },
    "temperature": {"temperature": 0.7},
    "temperatures": {"temperature": PER_TOKEN},
    "negative": {"temperature": PER_TOKEN, "logit_scale": -1.5},
    "items": {"num_items_in_batch": torch.tensor(7)},
    "all": {
        "token_weights": PER_TOKEN,
        "class_weights": torch.rand(300, generator=RANDOM, dtype=torch.float64),
        "temperature": PER_TOKEN,
        "num_items_in_batch": 7,
    },
}
"""Options with which the gradient of each token has a factor that the forward knows."""


def factors_in(dtype, name):
    return {
        key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in FACTORS[name].items()
    }


def compare_with_reference(impl, problem, rtol, atol, **options):
    """Loss and gradients of a sum, whose factor from above is not 1."""
    results = []
    for name, made in ((impl, problem), ("reference", problem.to(torch.float64))):
        inputs = leaves_of(made)
        loss = linear_cross_entropy(*inputs[:2], made.targets, inputs[2], impl=name, **options)
        results.append((loss.detach(), *torch.autograd.grad(3 * loss, inputs)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol)


@pytest.fixture
def multiplications(monkeypatch):
    """Record the multiplications of each product with a block of logits."""
    made = []
    for name in ("product", "store_product", "add_product"):
        function = getattr(Blocks, name)

        def record(self, left, right, *others, function=function, **named):
            made.append(left.shape[0] * left.shape[1] * right.shape[1])
            return function(self, left, right, *others, **named)

        monkeypatch.setattr(Blocks, name, record)
    return made


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_known_factors_take_three_products(
    name, softcap, reduction, passes, multiplications, small_chunks
):
    problem = make_problem((5, 13), 300, 16, bias=True, dtype=torch.float64)
    options = {"softcap": softcap, "shift": 1, "memory_budget": 20 * 300 * 8, **FACTORS[name]}
    if reduction == "sum":
        options.pop("num_items_in_batch", None)  # which divides a mean
    compare_with_reference("chunked", problem, 1e-9, 1e-12, reduction=reduction, **options)
    assert passes == ["loss_and_gradients"]
    num_kept = int((problem.targets[:, 1:] != -100).sum())
    assert len(multiplications) > 3, "several chunks"
    assert sum(multiplications) == 3 * num_kept * 300 * 16


@pytest.mark.parametrize("name", ["both", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_factors_in_other_dtypes(name, dtype, passes):
    problem = make_problem((5, 13), bias=True, dtype=dtype)
    rtol = 2 * torch.finfo(dtype).eps
    tolerances = {"rtol": rtol, "atol": 1e-6} if dtype == torch.bfloat16 else {}
    compare_with_reference(
        "chunked", problem, **{"rtol": 1e-4, "atol": 1e-6, **tolerances}, **factors_in(dtype, name)
    )
    assert passes == ["loss_and_gradients"]


def test_weights_that_are_learned_take_four_products(passes):
    """Their gradients are the losses of the tokens, which a sum does not return."""
    problem = make_problem((5, 13), dtype=torch.float64)
    grads = []
    for impl in ("chunked", "reference"):
        weights = PER_TOKEN.clone().requires_grad_()
        e = problem.e.detach().requires_grad_()
        loss = linear_cross_entropy(e, problem.c, problem.targets, token_weights=weights, impl=impl)
        grads.append(torch.autograd.grad(loss, (e, weights)))
    assert passes == ["forward", "backward"]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


def test_smoothing_takes_four_products(passes):
    problem = make_problem(bias=True)
    loss = chunked_loss(*leaves_of(problem)[:2], problem.targets, label_smoothing=0.1)
    loss.backward()
    assert "loss_and_gradients" not in passes


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_loss_of_0_may_have_a_gradient(factor):
    """Its tokens' weights cancel. Only of a batch without labels is the gradient 0 regardless."""
    e = torch.ones(2, 4).requires_grad_()
    c, targets = torch.eye(7)[:, :4].contiguous(), torch.tensor([1, 1])
    weights = torch.tensor([1.0, -1.0])
    for labels, finite in ((targets, False), (torch.full_like(targets, -100), True)):
        loss = chunked_loss(e, c, labels, token_weights=weights, reduction="sum")
        (grad,) = torch.autograd.grad(loss, e, torch.tensor(factor))
        assert loss == 0
        assert grad.isfinite().all() == finite


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_of_weighted_losses(use_reentrant, passes):
    problem = make_problem((5, 13), bias=True)
    inputs = leaves_of(problem)

    def head(e, c, bias):
        return chunked_loss(e * 2, c, problem.targets, bias, **factors_in(e.dtype, "all"))

    check_checkpoint(head, *inputs, use_reentrant=use_reentrant)
    assert passes == ["loss_and_gradients", "forward", "loss_and_gradients"]


def check_compiled(model, problem, **options):
    """Gradients of three times a loss, compiled in one graph, are those without."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, **options)
    ours, expected = leaves_of(problem), leaves_of(problem)
    for function, (e, c, bias) in ((compiled, ours), (model, expected)):
        (3 * function(e, c, problem.targets, bias)).backward()
    for got, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.grad, exact.grad)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_weighted_losses_compiled(backend, passes):
    problem = make_problem((5, 13), bias=True)

    def model(e, c, targets, bias):
        options = factors_in(torch.float32, "all")
        return chunked_loss(torch.sin(e), c, targets, bias, shift=1, **options)

    check_compiled(model, problem, backend=backend)
    assert passes == 2 * ["loss_and_gradients"]


def test_a_second_derivative_of_weighted_losses_is_refused():
    problem = make_problem((5, 13), bias=True)
    inputs = leaves_of(problem)
    loss = chunked_loss(*inputs[:2], problem.targets, inputs[2], **factors_in(torch.float32, "all"))
    (grad,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), inputs[1])


@pytest.fixture
def half_products(monkeypatch):
    """Products of half precision factors with a float32 result, as on CUDA."""

    def add(self, left, right, out, alpha=1.0, beta=1.0):
        assert left.dtype == right.dtype == self.problem.compute_dtype
        out.addmm_(left.float(), right.float(), beta=beta, alpha=alpha)

    store = functools.partialmethod(add, beta=0.0)
    monkeypatch.setattr(blocks, "has_wide_products", lambda device: True)
    monkeypatch.setattr(Blocks, "add_product", add)
    monkeypatch.setattr(Blocks, "store_product", store)


HALF_BUDGET = 600 * (5 * 304 + 4 * 4 * 16)  # about 512 tokens of two chunks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("classes", [304, 301])
def test_half_products(dtype, softcap, classes, passes, half_products, monkeypatch):
    """The logits of a part of each chunk exist, its factors in half precision for all of it."""
    monkeypatch.setattr(chunked_sum, "ALIGNED", 8)
    shapes, log_softmax = [], torch.log_softmax

    def record(logits, *others, **named):
        shapes.append(tuple(logits.shape))
        return log_softmax(logits, *others, **named)

    monkeypatch.setattr(torch, "log_softmax", record)
    problem = make_problem((900,), classes, 16, bias=True, ignored=0.1, dtype=dtype)
    check(problem, "chunked", return_lse=False, softcap=softcap, memory_budget=HALF_BUDGET)
    assert passes == ["loss_and_gradients"]
    kept = int((problem.targets != -100).sum())
    parts = [256] * (kept // 256) + [kept % 256]
    assert shapes[: len(parts)] == [(rows, 304) for rows in parts]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_half_products_do_not_round_the_gradients_of_targets(softcap, half_products):
    """They are the largest of a token: the error is little above that of rounding the results."""
    problem = make_problem((600,), 304, 64, dtype=torch.bfloat16, ignored=0.0)
    logits = problem.e.float() @ problem.c.float().T
    problem.targets.copy_(logits.topk(2, dim=1).indices[:, 1])  # unsure, and not of the likeliest
    wide = problem.to(torch.float64)
    grads = []
    for impl, made in (("chunked", problem), ("reference", wide)):
        inputs = [x.detach().requires_grad_() for x in (made.e, made.c)]
        loss = linear_cross_entropy(*inputs, made.targets, softcap=softcap, impl=impl)
        grads.append(torch.autograd.grad(loss, inputs))
    for got, exact in zip(*grads, strict=True):
        rounding = (exact.bfloat16().double() - exact).norm()
        assert (got.double() - exact).norm() <= 1.35 * rounding


@pytest.mark.parametrize("name", ["both", "negative", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_known_factors_and_half_products(name, dtype, passes, half_products):
    problem = make_problem((5, 13), bias=True, dtype=dtype)
    eps = torch.finfo(dtype).eps
    compare_with_reference("chunked", problem, 2 * eps, eps / 4, **factors_in(dtype, name))
    assert passes == ["loss_and_gradients"]


def test_small_weights_and_float16_products(half_products):
    """Gradients of logits are scaled into the range of float16; the weights are all far below."""
    problem = make_problem((5, 13), bias=True)
    inputs = leaves_of(problem)

    def gradients(weights):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = chunked_loss(
                *inputs[:2], problem.targets, inputs[2], token_weights=weights, reduction="sum"
            )
        return torch.autograd.grad(loss, inputs)

    weights = 1e-9 * PER_TOKEN.float()
    small, large = gradients(weights), gradients(2**30 * weights)
    assert all(torch.equal(2**30 * x, y) for x, y in zip(small, large, strict=True))


@pytest.mark.parametrize("needed", [("e", "c", "bias"), ("e",)])
def test_half_products_under_autocast(needed, half_products, passes):
    """All of the classifier is converted at once if it has a gradient, else a slice at a time."""
    problem = make_problem((40,), 600, 16, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run_ours(problem, "chunked", return_lse=False, needed=needed)
        expected = run_ours(problem, "reference", return_lse=False, needed=needed)
    for name, value in expected.named().items():
        torch.testing.assert_close(ours.named()[name], value, rtol=1e-2, atol=2e-4)
    assert passes == ["loss_and_gradients"]


def test_half_products_of_a_target_out_of_range(half_products, monkeypatch):
    monkeypatch.setattr(blocks, "check_target_range", lambda *arguments: None)
    problem = make_problem((5,), ignored=0.0, dtype=torch.bfloat16)
    problem.targets[2] = 300
    results = run_ours(problem, "chunked", return_lse=False)
    assert results.loss.isnan()
    assert results.grad_e.isnan().all(1).tolist() == [False, False, True, False, False]
    assert results.grad_c.isnan().all()


@pytest.mark.parametrize(("classes", "dim"), [(256000, 2304), (32064, 3072), (50257, 768)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("half", [False, True])
def test_products_of_aligned_slices(classes, dim, dtype, half, monkeypatch):
    """Those that begin elsewhere, or have a length that is not a multiple of 8, are far slower."""
    monkeypatch.setattr(blocks, "has_wide_products", lambda device: half)
    e, c = (torch.empty(n, dim, device="meta", dtype=dtype) for n in (1, classes))
    call = Problem(e, c, e, None, -100, None, torch.bfloat16, 2**28)
    for needed in (Needed(True, True, False), Needed(True, False, False)):
        slices = chunked_sum._class_slices(call, needed)
        assert slices[0].start == 0
        assert slices[-1].stop == classes
        assert all(a.stop == b.start and b.start % 256 == 0 for a, b in pairwise(slices))
        assert len(slices) == 1 or not (half and dtype == torch.bfloat16) or classes == 50257
    assert not half or chunked_sum._width(call) % 8 == 0


@pytest.mark.parametrize("needed", [("e",), ("c",), ("bias",), ("e", "c"), ("c", "bias")])
def test_only_what_is_needed_is_computed(needed, passes):
    results = check(make_problem(bias=True), "chunked", return_lse=False, needed=needed)
    names = ("e", "c", "bias")
    assert [getattr(results, f"grad_{x}") is not None for x in names] == [
        x in needed for x in names
    ]
    assert passes == ["loss_and_gradients"]


@pytest.mark.parametrize("leading", [(0,), (4,)])
def test_no_token_counts(leading, passes):
    problem = make_problem(leading, bias=True, ignored=1.0)
    inputs = leaves_of(problem)
    loss = chunked_loss(*inputs[:2], problem.targets, inputs[2])
    loss.backward()
    assert loss == 0
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in inputs)
    assert passes == ["loss_and_gradients"]


@pytest.mark.parametrize("name", USES)
def test_in_a_training_loop(name, passes):
    assert check_use(name, "chunked", make_problem((40,), 3000, 64, bias=True)) == passes


@pytest.mark.parametrize(
    "options", [{"recompute": True}, {"memory_budget": 1}, {"return_lse": True}]
)
def test_what_computes_the_logits_again(options, passes):
    check(make_problem(), "chunked", **{"return_lse": False, **options})
    assert passes == ["forward", "backward"]


def test_offloaded_activations_have_no_gradients_among_them(passes):
    problem = make_problem()
    with torch.autograd.graph.save_on_cpu():
        loss = chunked_loss(problem.e.requires_grad_(), problem.c, problem.targets)
    loss.backward()
    assert passes == ["forward", "backward"]


def test_the_module_takes_the_option(passes):
    problem = make_problem()
    module = LinearCrossEntropy(impl="chunked", recompute=True)
    module(problem.e.requires_grad_(), problem.c, problem.targets).backward()
    assert passes == ["forward", "backward"]
    assert "recompute=True" in repr(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_factor_rounds_nothing_twice(dtype):
    problem = make_problem((40,), bias=True, dtype=dtype)
    inputs = leaves_of(problem)
    loss = chunked_loss(*inputs[:2], problem.targets, inputs[2], reduction="sum") / 3
    wide = [x.detach().float().requires_grad_() for x in inputs]
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        sums = chunked_loss(*wide[:2], problem.targets, wide[2], reduction="sum") / 3
    grads, expected = torch.autograd.grad(loss, inputs), torch.autograd.grad(sums, wide)
    for grad, exact in zip(grads, expected, strict=True):
        assert torch.equal(grad, exact.to(dtype))


@pytest.mark.parametrize("miss", [1e-3, 1e-6, 1e-9])
def test_gradients_of_sure_tokens(miss):
    """In float32, 1 - p has an error of 6 % at 1e-6; the sum of all others has seven digits."""
    check_sure_token("chunked", miss, rtol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(backend, dynamic, passes):
    def model(e, c, targets, bias):
        return chunked_loss(torch.sin(e), c, targets, bias, shift=1)

    check_compiled(model, make_problem(bias=True), backend=backend, dynamic=dynamic)
    assert passes == 2 * ["loss_and_gradients"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_allocates_the_gradients_and_nothing_else(dtype, monkeypatch):
    monkeypatch.setattr(sums, "SCALED_BYTES", 2**12)
    problem = make_problem((600,), 2048, 32, bias=True, ignored=0.0, dtype=dtype)
    inputs = leaves_of(problem)
    loss = chunked_loss(*inputs[:2], problem.targets, inputs[2])
    peak, _ = peak_bytes(lambda: torch.autograd.grad(loss, inputs, retain_graph=True))
    assert peak <= sum(x.nbytes for x in inputs) + 2**13
    retained = torch.autograd.grad(loss, inputs, retain_graph=True)
    peak, _ = peak_bytes(lambda: last_gradients(loss, inputs, retained))
    if dtype == torch.float32 and hasattr(torch._C._autograd, "_get_current_graph_task_keep_graph"):
        assert peak <= 2**13, "the sums become the gradients"


def last_gradients(loss, inputs, expected):
    """Gradients of a graph that is not retained, which are those of one that is."""
    grads = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("budget", [2**23, 2**25])
def test_peak_memory(dtype, softcap, budget, passes):
    """Sums in float32 wait for their factor; their product with it is made as well."""
    tokens, classes, dim = 600, 2048, 32
    problem = make_problem((tokens,), classes, dim, bias=True, dtype=dtype)
    inputs = leaves_of(problem)

    def compute():
        loss = chunked_loss(
            *inputs[:2], problem.targets, inputs[2], softcap=softcap, memory_budget=budget
        )
        torch.autograd.grad(loss, inputs)

    compute()
    peak, _ = peak_bytes(compute)
    assert passes == 2 * ["loss_and_gradients"]
    wide = torch.promote_types(dtype, torch.float32).itemsize
    results = sum(x.nbytes for x in inputs)
    sums = (2 * tokens * dim + classes * (dim + 1)) * wide  # of e also for the tokens that count
    assert peak <= max(budget, results) + sums + 20 * tokens * wide


def test_batched_gradients_in_the_last_backward():
    """The factor of a sum is a batch then, which the sum cannot be overwritten with."""
    problem = make_problem(dtype=torch.float32)
    e, c = problem.e.requires_grad_(), problem.c.requires_grad_()
    loss = linear_cross_entropy(e, c, problem.targets, impl="chunked")
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy((e @ c.T).flatten(0, -2), problem.targets.flatten()),
        (e, c),
    )
    factors = torch.tensor([1.0, -2.0, 0.5])
    batched = torch.autograd.grad(loss, (e, c), factors, is_grads_batched=True)
    for grad, wanted in zip(batched, expected, strict=True):
        for one, factor in zip(grad, factors, strict=True):
            torch.testing.assert_close(one, factor * wanted, rtol=1e-4, atol=1e-6)
