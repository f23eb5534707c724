"""The kernels of divergences, interpreted, against float64 autograd of full logits."""

import pytest
import torch

from cut_cross_entropy import linear_divergence
from cut_cross_entropy.kernels import divergence as walks
from cut_cross_entropy.kernels import divergence_logits as kernels
from tests.support import names_of_launches
from tests.test_divergence import (
    BETAS,
    NAMES,
    assert_same,
    gradients,
    leaves_of,
    problem,
    run,
    truth,
)
from tests.test_memory import peak_bytes

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison_empty")]


@pytest.fixture(autouse=True)
def several_parts(monkeypatch):
    """Blocks are summed in parts."""
    monkeypatch.setattr(kernels, "BLOCK", 64)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched."""
    return names_of_launches(kernels, monkeypatch)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({}, 1),
        ({}, 2**28),
        ({"temperature": 0.7, "softcaps": (3.0, 5.0), "scales": (0.5, -1.5)}, 1),
        ({"temperature": torch.linspace(0.5, 2, 13), "softcaps": (None, 2.0)}, 2**28),
        ({"scales": (1.0, 2.0), "softcaps": (4.0, None)}, 2**28),
    ],
    ids=["many blocks", "one block", "all", "temperature of each token", "one multiplier"],
)
def test_values_and_gradients(beta, options, budget, launched):
    tensors, targets = problem(dtype=torch.float32)
    exact, leaves = leaves_of({name: x.double() for name, x in tensors.items()}), leaves_of(tensors)
    expected = truth(exact, targets, beta, **options)
    ours = run(leaves, targets, beta, impl="cce", memory_budget=budget, **options)
    assert_same(ours, expected, rtol=2e-6, atol=5e-6)
    for mine, other in zip(gradients(ours, leaves), gradients(expected, exact), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=2e-5)
    walks = ["sums_kernel", "combine_sums_kernel"] + ["mixture_sums_kernel"] * (0 < beta < 1)
    assert list(dict.fromkeys(launched)) == [*walks, "logit_gradients_kernel"]
    assert (launched.count("sums_kernel") > 1) == (budget == 1)


@pytest.mark.parametrize(
    ("beta", "needed", "result"),
    [
        (0.0, (0,), "divergence"),
        (0.5, (1,), "divergence"),
        (1.0, (2,), "divergence"),
        (0.0, (1,), "student_entropy"),
        (0.0, (2,), "student_logprobs"),
    ],
)
def test_one_result_and_one_gradient(beta, needed, result):
    tensors, targets = problem(tokens=5, dtype=torch.float16, classes=140)
    tensors["student_bias"] = tensors["student_bias"].float()
    exact = leaves_of({name: x.double() for name, x in tensors.items()})
    names = [NAMES[i] for i in needed]
    leaves = {name: x.requires_grad_(name in names) for name, x in tensors.items()}
    # Of order 1e-6, which float16 does not represent.
    expected = (getattr(truth(exact, targets, beta), result) * 1e-6).sum()
    ours = (getattr(run(leaves, targets, beta, impl="cce"), result) * 1e-6).sum()
    for mine, other in zip(
        torch.autograd.grad(ours, [leaves[x] for x in names]),
        torch.autograd.grad(expected, [exact[x] for x in names]),
        strict=True,
    ):
        error = (mine.double() - other).norm() / other.half().double().sub(other).norm()
        relative = (mine.double() - other).norm() / other.norm()
        assert relative < 1e-3 or error < 2


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_sums_do_not_depend_on_the_order_of_the_logits(beta):
    """The maximum rises from block to block, by more in all than an exponential can."""
    tensors, targets = problem(classes=300, dtype=torch.float32)
    for side in ("student", "teacher"):
        tensors[f"{side}_bias"] += torch.linspace(-100, 100, 300)
    expected = truth(tensors, targets, beta)
    ours = run(tensors, targets, beta, impl="cce", memory_budget=1)
    assert_same(ours, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_equal_models_do_not_diverge(beta):
    tensors, targets = problem(dtype=torch.float32)
    for kind in ("e_{}", "head_{}", "{}_bias"):
        tensors[kind.format("teacher")] = tensors[kind.format("student")]
    leaves = leaves_of(tensors)
    found = run(leaves, targets, beta, impl="cce").divergence
    assert (found >= 0).all()
    assert found.max() < 1e-6
    (grad,) = torch.autograd.grad(found.sum(), leaves["e_student"])
    assert grad.abs().max() < 1e-4


@pytest.mark.parametrize("beta", BETAS)
def test_nan_stays_in_its_token(beta):
    for side in ("e_student", "e_teacher"):
        tensors, targets = problem(dtype=torch.float32)
        tensors[side][[0, 2]] = torch.nan  # of which the first is ignored
        found = run(tensors, targets, beta, impl="cce").divergence
        assert found.isnan().nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("budget", [1, 2**28])
def test_classes_that_are_ruled_out(budget):
    tensors, targets = problem(dtype=torch.float32)
    targets[targets != -100] = 150 + targets[targets != -100] % 100
    some = {name: x if x.shape[0] == 13 else x[140:290] for name, x in tensors.items()}
    for side in ("student", "teacher"):
        for ruled_out in (slice(140), slice(290, None)):  # the first block has no class
            tensors[f"{side}_bias"][ruled_out] = -torch.inf
    shifted = torch.where(targets == -100, targets, targets - 140)
    for beta in BETAS:
        exact = leaves_of({name: x.double() for name, x in some.items()})
        leaves = leaves_of(tensors)
        expected = truth(exact, shifted, beta)
        ours = run(leaves, targets, beta, impl="cce", memory_budget=budget)
        assert_same(ours, expected, rtol=1e-5, atol=1e-5)
        for mine, other in zip(gradients(ours, leaves), gradients(expected, exact), strict=True):
            if mine.shape[0] == 300:
                assert (mine[:140] == 0).all()
                assert (mine[290:] == 0).all()
                mine = mine[140:290]
            torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=2e-5)
    tensors["student_bias"][200] = -torch.inf
    targets[targets == 200] = 201
    kept = targets != -100
    found = {beta: run(tensors, targets, beta, impl="cce").divergence for beta in (0.0, 0.5, 1.0)}
    assert (found[0.0][kept] == torch.inf).all()
    assert found[0.5].isfinite().all()
    assert found[1.0].isfinite().all()


@pytest.mark.parametrize(("beta", "side"), [(0.0, "student"), (1.0, "teacher")])
def test_classes_that_one_model_rules_out_and_the_other_all_but(beta, side):
    tensors, targets = problem(dtype=torch.float32)
    targets[targets != -100] %= 100
    for name in ("student", "teacher"):
        tensors[f"{name}_bias"][128:] = -torch.inf if name == side else -1e5
    ours, expected = (
        run(tensors, targets, beta, impl=impl).divergence for impl in ("cce", "chunked")
    )
    assert expected.isfinite().all()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_without_tokens():
    tensors, targets = problem(dtype=torch.float32)
    leaves = leaves_of(tensors)
    result = run(leaves, torch.full_like(targets, -100), 0.5, impl="cce")
    assert (result.divergence == 0).all()
    assert all((grad == 0).all() for grad in gradients(result, leaves))


def test_target_out_of_range():
    tensors, targets = problem(dtype=torch.float32)
    targets[5] = 300
    with pytest.raises(ValueError, match="300"):
        run(tensors, targets, 0.0, impl="cce")


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_memory(beta, monkeypatch):
    """Scratch memory is within the budget; no logits of either model. The kernels allocate none."""
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, **arguments: None)
    tensors, targets = problem(tokens=512, classes=4096, dtype=torch.float32)
    budget = 2**20  # the logits of one model have 8 MiB
    leaves = leaves_of(tensors)

    def compute():
        result = run(leaves, targets, beta, impl="cce", memory_budget=budget)
        torch.autograd.grad(result.divergence.sum(), [leaves[name] for name in NAMES[:3]])

    compute()  # what is made once, such as caches, does not count
    peak, largest = peak_bytes(compute)
    results = sum(leaves[name].numel() for name in NAMES[:3]) * 4
    assert peak <= budget + results + 60 * 512 * 8
    assert largest <= max(budget // 2, leaves["head_student"].numel() * 4)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_blocks_are_bounded_in_elements(beta, monkeypatch, launched):
    """32 bits reach every element of a block, whatever the budget."""
    monkeypatch.setattr(walks, "MAX_ELEMENTS", 13 * 128)
    tensors, targets = problem(dtype=torch.float32)
    leaves = leaves_of(tensors)
    ours = run(leaves, targets, beta, impl="cce")
    assert_same(ours, truth(tensors, targets, beta), rtol=2e-6, atol=5e-6)
    gradients(ours, leaves)
    assert launched.count("logit_gradients_kernel") == 3


def test_float64_takes_no_kernel(launched):
    tensors, targets = problem()
    assert_same(run(tensors, targets, 0.3, impl="cce"), truth(tensors, targets, 0.3))
    assert not launched


def test_compiled():
    tensors, targets = problem(dtype=torch.float32)
    eager, leaves = leaves_of(tensors), leaves_of(tensors)
    expected = gradients(run(eager, targets, 0.3, impl="cce"), eager)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(**tensors):
        return run(tensors, targets, 0.3, impl="cce")

    for mine, other in zip(gradients(compiled(**leaves), leaves), expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_refused_without_kernels(monkeypatch):
    from cut_cross_entropy import dispatch

    monkeypatch.setattr(dispatch, "kernels_unavailable", lambda device: "no Triton")
    x = torch.randn(2, 8)
    with pytest.raises(RuntimeError, match=r"impl='cce' cannot run here: no Triton"):
        linear_divergence(x, x, x, x, impl="cce")
