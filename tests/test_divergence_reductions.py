"""Means and sums of divergences, whose gradients the forward computes, against full logits."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cut_cross_entropy import budget, divergence_dispatch
from cut_cross_entropy.divergence_problem import DivergenceProblem
from cut_cross_entropy.implementations import chunked_divergence
from cut_cross_entropy.kernels import divergence_columns, divergence_logits, divergence_sum
from cut_cross_entropy.kernels.launch import HostCopy
from cut_cross_entropy.problem import Needed, Problem
from tests.support import names_of_launches
from tests.test_divergence import BETAS, NAMES, leaves_of, problem, run, truth
from tests.test_memory import peak_bytes

IMPLS = ["reference", "chunked", pytest.param("cce", marks=pytest.mark.interpret)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A few tokens are enough for gradients in the forward."""
    monkeypatch.setattr(budget, "MIN_PAIRS", 1)
    monkeypatch.setattr(budget, "MIN_PAIRS_WITHOUT_C", 1)
    monkeypatch.setattr(chunked_divergence, "MIN_TOKENS", 1)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched."""
    return names_of_launches(divergence_logits, monkeypatch)


def token_weights(dtype=torch.float64):
    weights = torch.linspace(-0.5, 2, 13, dtype=dtype)
    weights[3] = 0
    return weights


def expected_loss(found, targets, reduction, weights, num_items):
    kept = targets != -100
    values = found.divergence if weights is None else found.divergence * weights.double()
    if reduction == "none":
        return values
    if num_items is not None:
        return values.sum() / num_items
    if reduction == "sum":
        return values.sum()
    return values.sum() / (kept.sum() if weights is None else weights.double()[kept].sum())


def grads_of(loss, leaves, names=NAMES[:3]):
    return torch.autograd.grad(loss * 3, [leaves[name] for name in names])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("reduction", "weighted", "num_items"),
    [("mean", False, None), ("mean", True, None), ("sum", True, None), ("mean", True, 5),
     ("none", True, None)],
)  # fmt: skip
def test_values_and_gradients(impl, beta, reduction, weighted, num_items):
    dtype = torch.float32 if impl == "cce" else torch.float64
    tensors, targets = problem(dtype=dtype)
    exact, leaves = leaves_of({name: x.double() for name, x in tensors.items()}), leaves_of(tensors)
    weights = token_weights() if weighted else None
    options = {"temperature": 0.7, "softcaps": (3.0, 5.0), "scales": (0.5, -1.5)}
    reference = truth(exact, targets, beta, **options)
    loss = expected_loss(reference, targets, reduction, weights, num_items)
    ours = run(
        leaves, targets, beta, impl=impl, reduction=reduction, token_weights=weights,
        num_items_in_batch=num_items, **options,
    )  # fmt: skip
    limit = 5e-6 if impl == "cce" else 1e-9
    torch.testing.assert_close(ours.divergence.double(), loss, rtol=limit, atol=limit)
    for name in ("student_entropy", "student_logprobs"):
        mine, other = getattr(ours, name), getattr(reference, name)
        torch.testing.assert_close(mine.double(), other, rtol=limit, atol=limit)
    found = grads_of(ours.divergence.sum(), leaves)
    for mine, other in zip(found, grads_of(loss.sum(), exact), strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - other).norm() <= 10 * limit * other.norm()


def limit_chunks(monkeypatch, most):
    for module in (divergence_sum, divergence_dispatch):
        monkeypatch.setattr(module, "divergence_tokens_per_chunk", lambda *problems: most)
    monkeypatch.setattr(chunked_divergence, "tokens_per_chunk", lambda *problems: most)


@pytest.mark.interpret
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("most", [1, 4, 100])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": torch.linspace(0.5, 2, 13), "softcaps": (None, 2.0)},
        {"scales": (1.0, 2.0), "softcaps": (4.0, None)},
    ],
    ids=["plain", "temperature of each token", "one multiplier"],
)
def test_chunks_of_kernels(beta, most, options, monkeypatch, launched):
    """Chunks of one token, of some, and one chunk; the logits of each are computed once."""
    limit_chunks(monkeypatch, most)
    if most == 4:
        for name, value in {"LONG_ROW": 300, "LONG_BLOCK": 128, "WIDE_BLOCK": 256}.items():
            monkeypatch.setattr(divergence_logits, name, value)
    tensors, targets = problem(dtype=torch.float32)
    chunks = -(-int((targets != -100).sum()) // most)
    exact, leaves = leaves_of({name: x.double() for name, x in tensors.items()}), leaves_of(tensors)
    expected = truth(exact, targets, beta, **options).divergence.sum()
    ours = run(leaves, targets, beta, impl="cce", reduction="sum", **options).divergence
    torch.testing.assert_close(ours.double(), expected, rtol=5e-6, atol=5e-6)
    kernels = ["sums_kernel", "combine_sums_kernel", "logit_gradients_kernel"]
    kernels += ["mixture_sums_kernel"] * (0 < beta < 1)
    assert sorted(launched) == sorted(kernels * chunks)
    found = grads_of(ours, leaves)
    assert len(launched) == len(kernels) * chunks  # the backward launches none
    for mine, other in zip(found, grads_of(expected, exact), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=5e-5)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("most", [1, 4, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_chunks_without_kernels(beta, most, dtype, monkeypatch):
    """With slices of the classes where rows of the classifiers are copied in float32."""
    limit_chunks(monkeypatch, most)
    tensors, targets = problem(dtype=dtype)
    exact, leaves = leaves_of({name: x.double() for name, x in tensors.items()}), leaves_of(tensors)
    options = {"temperature": torch.linspace(0.5, 2, 13), "softcaps": (4.0, None)}
    expected = truth(exact, targets, beta, **options).divergence.sum()
    ours = run(
        leaves, targets, beta, impl="chunked", reduction="sum", memory_budget=2**15, **options
    ).divergence
    limit = 1e-6 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(ours.double(), expected, rtol=limit, atol=limit)
    limit = 1e-6 if dtype == torch.float64 else 3e-3
    for mine, other in zip(grads_of(ours, leaves), grads_of(expected, exact), strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - other).norm() <= limit * other.norm()


@pytest.mark.parametrize("impl", ["chunked", pytest.param("cce", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("ignored", [False, True])
def test_some_gradients(impl, needed, ignored, monkeypatch, launched):
    """In half precision, of weights of order 1e-6, which float16 does not represent."""
    limit_chunks(monkeypatch, 2)
    tensors, targets = problem(tokens=5, dtype=torch.float16, classes=140)
    if not ignored:
        targets[::4] = 0
    exact = leaves_of({name: x.double() for name, x in tensors.items()})
    names = [NAMES[i] for i in needed]
    leaves = {name: x.requires_grad_(name in names) for name, x in tensors.items()}
    weights = torch.tensor([1e-6, 2e-6, 3e-6, -1e-6, 1e-6])
    expected = (truth(exact, targets, 0.3).divergence * weights).sum()
    ours = run(leaves, targets, 0.3, impl=impl, reduction="sum", token_weights=weights).divergence
    assert launched.count("logit_gradients_kernel") == (2 if ignored else 3) * (impl == "cce")
    found = torch.autograd.grad(ours, [leaves[name] for name in names])
    for mine, other in zip(found, grads_of(expected / 3, exact, names), strict=True):
        assert mine.dtype == torch.float16
        error = (mine.double() - other).norm() / other.half().double().sub(other).norm()
        assert (mine.double() - other).norm() < 1e-3 * other.norm() or error < 2


@pytest.mark.parametrize("impl", ["chunked", pytest.param("cce", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_close_teacher(impl, beta, monkeypatch):
    """If the models nearly agree, the error is relative to their small difference."""
    limit_chunks(monkeypatch, 4)
    tensors, targets = problem(teacher_dim=8, dtype=torch.float32)
    for name in NAMES[:3]:
        noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(3))
        tensors[name.replace("student", "teacher")] = tensors[name] + 1e-3 * noise
    exact, leaves = leaves_of({name: x.double() for name, x in tensors.items()}), leaves_of(tensors)
    expected = grads_of(truth(exact, targets, beta).divergence.sum(), exact)
    found = grads_of(run(leaves, targets, beta, impl=impl, reduction="sum").divergence, leaves)
    for mine, other in zip(found, expected, strict=True):
        # Two roundings to bfloat16 are 3e-3.
        assert (mine.double() - other).norm() < 1e-3 * other.norm()


@pytest.mark.parametrize("impl", ["chunked", pytest.param("cce", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_entropies_and_logprobs_keep_their_gradients(impl, beta):
    """Also beside a mean; and a second backward of the same graph."""
    tensors, targets = problem(dtype=torch.float32)
    exact, leaves = leaves_of({name: x.double() for name, x in tensors.items()}), leaves_of(tensors)

    def loss(result):
        return (result.divergence + 0.3 * result.student_entropy.sum()) / 7 - (
            0.2 * result.student_logprobs.sum()
        )

    expected = truth(exact, targets, beta)
    expected.divergence = expected.divergence.sum()
    ours = run(leaves, targets, beta, impl=impl, reduction="sum")
    total = loss(ours)
    names = [leaves[name] for name in NAMES[:3]]
    right = torch.autograd.grad(loss(expected), [exact[name] for name in NAMES[:3]])
    for _ in range(2):
        found = torch.autograd.grad(total, names, retain_graph=True)
        for mine, other in zip(found, right, strict=True):
            torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=2e-5)
    (entropy_alone,) = torch.autograd.grad(ours.student_entropy.sum(), leaves["e_student"])
    (right,) = torch.autograd.grad(
        truth(exact, targets, beta).student_entropy.sum(), exact["e_student"]
    )
    torch.testing.assert_close(entropy_alone.double(), right, rtol=1e-4, atol=2e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("impl", ["cce", "chunked"])
def test_checkpoint(impl, launched):
    """Nothing is computed for the forward that will run again."""
    tensors, targets = problem(dtype=torch.float32)
    leaves, again = leaves_of(tensors), leaves_of(tensors)
    options = {"impl": impl, "reduction": "mean", "token_weights": token_weights(torch.float32)}
    expected = grads_of(run(leaves, targets, 0.3, **options).divergence, leaves)
    launched.clear()
    compute = lambda e: run({**again, "e_student": e}, targets, 0.3, **options).divergence
    loss = checkpoint(compute, again["e_student"], use_reentrant=False)
    assert "logit_gradients_kernel" not in launched
    for mine, other in zip(grads_of(loss, again), expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.interpret
def test_gradients_wait_where_activations_are_offloaded(launched):
    tensors, targets = problem(dtype=torch.float32)
    leaves, others = leaves_of(tensors), leaves_of(tensors)
    options = {"impl": "cce", "reduction": "mean"}
    expected = grads_of(run(leaves, targets, 0.3, **options).divergence, leaves)
    launched.clear()
    with torch.autograd.graph.save_on_cpu():
        loss = run(others, targets, 0.3, **options).divergence
    assert "logit_gradients_kernel" not in launched
    for mine, other in zip(grads_of(loss, others), expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_transformed(impl):
    tensors, targets = problem(dtype=torch.float32)
    leaves = leaves_of(tensors)
    loss = lambda e: (
        run({**tensors, "e_student": e}, targets, 0.3, impl=impl, reduction="mean").divergence
    )
    (expected,) = torch.autograd.grad(loss(leaves["e_student"]), leaves["e_student"])
    torch.testing.assert_close(torch.func.grad(loss)(tensors["e_student"]), expected)


@pytest.mark.interpret
def test_weights_that_train(launched):
    tensors, targets = problem(dtype=torch.float32)
    leaves, weights = leaves_of(tensors), token_weights(torch.float32).requires_grad_()
    ours = run(leaves, targets, 0.0, impl="cce", reduction="sum", token_weights=weights)
    (found,) = torch.autograd.grad(ours.divergence, weights)
    expected = truth(tensors, targets, 0.0).divergence.float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_tokens(impl, reduction):
    for tokens, divisor in ((0, None), (5, None), (5, torch.tensor(0.0))):
        if divisor is not None and (reduction == "sum" or impl != "cce"):
            continue
        tensors, targets = problem(tokens=tokens, dtype=torch.float32)
        leaves = leaves_of(tensors)
        result = run(
            leaves, torch.full_like(targets, -100), 0.5, impl=impl, reduction=reduction,
            num_items_in_batch=divisor,
        )  # fmt: skip
        if divisor is None:
            assert result.divergence.item() == 0
        for grad in grads_of(result.divergence, leaves):
            assert (grad == 0).all()


@pytest.mark.parametrize("impl", ["chunked", pytest.param("cce", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_compiled(impl, beta):
    tensors, targets = problem(dtype=torch.float32)
    eager, leaves = leaves_of(tensors), leaves_of(tensors)
    options = {"impl": impl, "reduction": "mean"}
    expected = grads_of(run(eager, targets, beta, **options).divergence, eager)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(**tensors):
        return run(tensors, targets, beta, **options).divergence

    for mine, other in zip(grads_of(compiled(**leaves), leaves), expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.interpret
@pytest.mark.parametrize("by_kernels", [False, True])
@pytest.mark.parametrize("has_targets", [False, True])
def test_operator(has_targets, by_kernels):
    from cut_cross_entropy.operators.divergences import divergence_sum

    tensors, targets = problem(tokens=5, classes=20, dtype=torch.float32)
    flat = []
    for name, leaf in (("student", True), ("teacher", False)):
        e, c, bias = (
            tensors[x].requires_grad_(leaf) for x in (f"e_{name}", f"head_{name}", f"{name}_bias")
        )
        flat += [e, c, targets, bias, -100, None, torch.float32, 1 << 20, 0, None, 0, None]
    for loss_only in (False, True):
        torch.library.opcheck(
            divergence_sum,
            (*flat, 0.5, has_targets, by_kernels, torch.rand(5), 1e-3, True, True, True, loss_only),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


@pytest.mark.interpret
def test_without_gradients(launched):
    tensors, targets = problem(dtype=torch.float32)
    found = run(tensors, targets, 0.3, impl="cce", reduction="mean").divergence
    expected = truth(tensors, targets, 0.3).divergence.sum() / (targets != -100).sum()
    torch.testing.assert_close(found.double(), expected, rtol=5e-6, atol=5e-6)
    with torch.no_grad():
        again = run(leaves_of(tensors), targets, 0.3, impl="cce", reduction="mean").divergence
    torch.testing.assert_close(again, found)
    assert "logit_gradients_kernel" not in launched


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("frozen_head", "least"), [(False, "MIN_PAIRS"), (True, "MIN_PAIRS_WITHOUT_C")]
)
def test_too_few_tokens_for_a_chunk(frozen_head, least, monkeypatch, launched):
    """The budget decides whether the gradients wait for the backward."""
    tensors, targets = problem(dtype=torch.float32)
    leaves = leaves_of(tensors)
    if frozen_head:
        leaves["head_student"] = tensors["head_student"]
        leaves["student_bias"] = tensors["student_bias"]
    names = NAMES[:1] if frozen_head else NAMES[:3]
    chunks = {}
    for fewest in (1, 1000):
        monkeypatch.setattr(budget, least, fewest)
        launched.clear()
        ours = run(leaves, targets, 0.0, impl="cce", memory_budget=2**18, reduction="mean")
        chunks[fewest] = launched.count("logit_gradients_kernel")
        grads_of(ours.divergence, leaves, names)
    assert chunks[1] > 0
    assert chunks[1000] == 0
    assert "logit_gradients_kernel" in launched


@pytest.mark.parametrize("filter_eps", [None, 2.0**-12])
def test_memory_of_kernels(filter_eps, monkeypatch):
    """Logits of both models fit the budget, and what the backward takes for dC in its dtype."""
    for module in (divergence_logits, divergence_columns):
        monkeypatch.setattr(module, "launch", lambda kernel, grid, **arguments: None)
    monkeypatch.setattr(divergence_columns, "LEAST_PRODUCTS", 0)
    monkeypatch.setattr(divergence_columns, "LEAST_ROWS", 64)
    for module in (budget, divergence_columns):
        monkeypatch.setattr(module, "FILTER_DIRECTIONS", 4)
    chosen = []

    def half(energies, tolerance):
        order, _ = rank(torch.rand_like(energies), 0.5)
        chosen.append(len(order) // 2)
        return order, HostCopy(torch.tensor(chosen[-1]))

    rank = divergence_columns.rank_classes
    monkeypatch.setattr(divergence_columns, "rank_classes", half)
    tensors, targets = problem(tokens=512, classes=4096, dtype=torch.float32)
    budget_bytes = 2**21  # the logits of one model have 8 MiB
    leaves = leaves_of(tensors)

    def compute():
        result = run(
            leaves, targets, 0.5, impl="cce", memory_budget=budget_bytes, reduction="mean",
            filter_eps=filter_eps,
        )  # fmt: skip
        torch.autograd.grad(result.divergence, [leaves[name] for name in NAMES[:3]])

    compute()
    assert bool(chosen) == bool(filter_eps)
    peak, largest = peak_bytes(compute)
    results = sum(leaves[name].numel() for name in NAMES[:3]) * 4
    of_c = leaves["head_student"].numel() * 4
    assert peak <= budget_bytes + of_c + results + 60 * 512 * 8
    assert largest <= (budget_bytes + of_c) // 2


@pytest.mark.interpret
def test_no_filter_takes_no_memory(monkeypatch):
    """A budget that the filter's memory would exceed: one chunk without it, and with the option."""
    tensors, targets = problem(tokens=8, classes=4096, dtype=torch.float32)
    leaves = leaves_of(tensors)
    chunks = []
    choose = budget.divergence_tokens_per_chunk

    def record(*arguments):
        chunks.append(choose(*arguments))
        return chunks[-1]

    monkeypatch.setattr(divergence_sum, "divergence_tokens_per_chunk", record)
    monkeypatch.setattr(budget, "MIN_PAIRS_WITHOUT_C", 1)
    leaves["head_student"] = tensors["head_student"]
    leaves["student_bias"] = tensors["student_bias"]
    found = {}
    for filter_eps in (None, 2.0**-12):
        chunks.clear()
        run(
            leaves, targets, 0.0, impl="cce", memory_budget=2**20, reduction="mean",
            filter_eps=filter_eps,
        )  # fmt: skip
        found[filter_eps] = list(chunks)
    # 8 bytes a class for the logits of both models; the filter's are those of some 70 tokens.
    assert found[None][0] > 28
    assert found[2.0**-12] == [0, *found[None]]


@pytest.mark.parametrize(("least", "chunk"), [(0, (128, True)), (1e12, (192, False))])
def test_no_filter_takes_no_memory_for_short_products(least, chunk, monkeypatch):
    """Chunks are as long as without a filter unless their products are long enough for it."""
    monkeypatch.setattr(divergence_columns, "LEAST_PRODUCTS", least)
    tensors, targets = problem(tokens=600, classes=4096, dtype=torch.float32)
    options = {"bias": None, "ignore_index": -100, "softcap": None, "memory_budget": 2**23}
    student, teacher = (
        Problem(e, c, targets, compute_dtype=torch.float32, **options)
        for e, c in ((tensors[NAMES[0]], tensors[NAMES[1]]), (tensors[NAMES[3]], tensors[NAMES[4]]))
    )
    compared = DivergenceProblem(student, teacher, 0.0, has_targets=False)
    needed = Needed(e=True, c=False, bias=False)
    assert divergence_sum._chunk(compared, needed, 600, tolerance=1e-4) == chunk
    assert divergence_sum._chunk(compared, needed, 600, tolerance=0.0) == (192, False)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_filter_where_factors_are_copied(dtype, monkeypatch):
    """Without products of half precision into float32, columns would be copied in float32."""
    called = []
    monkeypatch.setattr(divergence_columns, "LEAST_PRODUCTS", 0)
    rank = divergence_columns.rank_classes
    monkeypatch.setattr(divergence_columns, "rank_classes", lambda *x: called.append(1) or rank(*x))
    monkeypatch.setattr(divergence_columns, "FILTER_DIRECTIONS", 4)
    tensors, targets = problem(dtype=torch.float32)
    for used in (dtype, torch.float32):
        leaves = leaves_of({name: x.to(used) for name, x in tensors.items()})
        called.clear()
        run(leaves, targets, 0.0, impl="cce", reduction="sum", filter_eps=2.0**-10)
        assert bool(called) == (used == torch.float32)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_memory_without_kernels(beta, softcap):
    tensors, targets = problem(tokens=512, classes=8192, dtype=torch.float32)
    budget_bytes = 2**21  # the logits of one model have 16 MiB
    leaves = leaves_of(tensors)

    def compute():
        result = run(
            leaves, targets, beta, impl="chunked", memory_budget=budget_bytes, reduction="mean",
            softcaps=(softcap, softcap),
        )  # fmt: skip
        torch.autograd.grad(result.divergence, [leaves[name] for name in NAMES[:3]])

    compute()
    peak, largest = peak_bytes(compute)
    results = sum(leaves[name].numel() for name in NAMES[:3]) * 4
    assert peak <= budget_bytes + 2 * results + 40 * 512 * 8
    assert largest <= max(budget_bytes // 4, leaves["head_student"].numel() * 4)
