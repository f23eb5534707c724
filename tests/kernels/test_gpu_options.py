"""Each option of the kernels on a GPU, in half precision and float32, against plain PyTorch."""

import random
from dataclasses import replace

import pytest
import torch

from tests.kernels.entropies import check_entropies
from tests.kernels.gpu import DEVICE, requires_kernels
from tests.support import check, make_problem, run_ours

pytestmark = [pytest.mark.gpu, requires_kernels, pytest.mark.usefixtures("poison_empty")]

IMPLS = ("cce", "cce_exact")
HALF = (torch.bfloat16, torch.float16)


def problem_of(leading=(5, 61), classes=1100, dim=72, **options):
    """305 tokens are three blocks; 1100 classes five tiles; 72 features no whole step."""
    return make_problem(leading, classes, dim, **options).on(DEVICE)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("flags", ["plain", "bias", "softcap", "both"])
def test_dtype_bias_softcap(impl, dtype, flags):
    problem = problem_of(dtype=dtype, bias=flags in ("bias", "both"))
    check(problem, impl, softcap=5.0 if flags in ("softcap", "both") else None)


def test_default_drops_nothing_where_nothing_may_be_dropped(drops_nothing):
    check(problem_of(dtype=torch.bfloat16, bias=True), "cce")


def test_entropies_of_large_logits():
    check_entropies(DEVICE, torch.float16)


@pytest.mark.parametrize("route", ["filtered", "full_c", "full_e"])
@pytest.mark.parametrize("dtype", HALF)
def test_filtered_paths(route, dtype, drops_nothing, always_filtered):
    from tests.kernels.conftest import ROUTES

    ROUTES[route].check(problem_of(dtype=dtype, bias=True), softcap=8.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("reduction", "shift"), [("mean", 1), ("sum", 0), ("none", 0), ("none", 1), ("sum", 3)]
)
def test_reduction_and_shift(impl, reduction, shift):
    check(problem_of(dtype=torch.bfloat16), impl, reduction=reduction, shift=shift)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ignore_index", [0, 1099, -1])
def test_ignore_index_and_int32(impl, ignore_index):
    problem = problem_of(dtype=torch.bfloat16, ignore_index=ignore_index, target_dtype=torch.int32)
    check(problem, impl, ignore_index=ignore_index, reduction="none")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needed", [("e",), ("c",), ("bias",), ("c", "bias"), ()], ids=str)
def test_needed_gradients(impl, needed):
    results = check(problem_of(dtype=torch.bfloat16, bias=True), impl, needed=needed)
    present = {name for name in ("e", "c", "bias") if f"grad_{name}" in results.named()}
    assert present == set(needed)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lse_weight", [0.0, 10.0])
def test_gradient_of_lse(impl, lse_weight):
    check(problem_of(dtype=torch.bfloat16, bias=True), impl, lse_weight=lse_weight)


@pytest.mark.parametrize("path", ["exact", "dense", "filtered", "full_c", "full_e"])
def test_memory_budget_forces_several_passes(path, request, drops_nothing):
    from tests.kernels.conftest import ROUTES

    fixture = {"dense": "never_filtered", "exact": "drops_nothing"}.get(path, "always_filtered")
    request.getfixturevalue(fixture)
    problem = problem_of(classes=2200, dtype=torch.bfloat16, bias=True)
    ROUTES[path].check(problem, memory_budget=1, softcap=8.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_non_contiguous_inputs(impl):
    problem = problem_of((8, 61), dtype=torch.bfloat16, bias=True)
    strided = {
        "e": problem.e.transpose(0, 1).contiguous().transpose(0, 1),
        "c": problem.c.T.contiguous().T,
        "targets": problem.targets.repeat_interleave(2, dim=-1)[..., ::2],
        "bias": problem.bias.repeat_interleave(3)[::3],
    }
    check(replace(problem, **strided), impl, shift=1, reduction="none")


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_are_not_aligned(impl):
    """A storage that begins 2 bytes off, and rows of 146 bytes: no tensor descriptors."""
    problem = problem_of(dim=73, dtype=torch.bfloat16)
    moved = torch.empty(problem.e.numel() + 1, dtype=torch.bfloat16, device=DEVICE)[1:]
    moved = moved.view_as(problem.e).copy_(problem.e)
    assert moved.data_ptr() % 16
    check(replace(problem, e=moved), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("tokens", "classes", "dim"), [(1, 2, 8), (128, 256, 64), (129, 257, 65)])
def test_sizes_at_the_edges_of_blocks(impl, tokens, classes, dim):
    check(problem_of((tokens,), classes, dim, dtype=torch.bfloat16, ignored=0.0), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_ignored_and_empty(impl, reduction):
    for leading, ignored in (((300,), 1.0), ((0,), 0.0)):
        problem = problem_of(leading, dtype=torch.bfloat16, bias=True, ignored=ignored)
        results = run_ours(problem, impl, reduction=reduction, softcap=5.0)
        for name, value in results.named().items():
            assert torch.count_nonzero(value) == 0, name


@pytest.mark.parametrize("impl", IMPLS)
def test_outlier_token(impl):
    """Its sum overflows relative to the first bound, so its block is repaired."""
    problem = problem_of(dtype=torch.bfloat16, ignored=0.0)
    problem.e[2, 7] *= 300
    check(problem, impl, reduction="none")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_inputs_are_never_plausible(impl, value):
    problem = problem_of(dtype=torch.bfloat16, ignored=0.0)
    clean = run_ours(problem, impl, reduction="none")
    problem.e[1, 3, 5] = value
    results = run_ours(problem, impl, reduction="none")
    good = torch.ones_like(clean.loss, dtype=torch.bool)
    good[1, 3] = False
    assert not torch.isfinite(results.loss[1, 3])
    assert torch.equal(results.loss[good], clean.loss[good])
    assert torch.isnan(results.grad_e[1, 3]).all()
    assert torch.isnan(results.grad_c).all()


@pytest.mark.parametrize("wrong", [-1, 1100, 2**40])
def test_targets_out_of_range(wrong, monkeypatch):
    problem = problem_of(dtype=torch.bfloat16, ignored=0.0)
    problem.targets[0, 3] = wrong
    results = run_ours(problem, "cce", reduction="none")
    assert torch.isnan(results.loss[0, 3])
    assert torch.isfinite(results.loss).sum() == results.loss.numel() - 1
    assert torch.isnan(results.grad_e[0, 3]).all()
    assert torch.isnan(run_ours(problem, "cce").loss)
    monkeypatch.setenv("CCE_DEBUG", "1")
    with pytest.raises(ValueError, match=rf"targets must lie in .* got {wrong} "):
        run_ours(problem, "cce")


def test_float32_runs_through_the_library_to_the_same_bits():
    problem = problem_of(dtype=torch.float32, bias=True)
    kernels, chunked = (run_ours(problem, impl) for impl in ("cce", "chunked"))
    assert torch.equal(kernels.grad_c, chunked.grad_c)


@pytest.mark.parametrize("dtype", HALF)
def test_auto_means_the_kernels(dtype):
    problem = problem_of(dtype=dtype, bias=True)
    for name, value in run_ours(problem, "cce").named().items():
        assert torch.equal(run_ours(problem, "auto").named()[name], value), name


def test_auto_skips_nothing_in_a_small_sum():
    """Whose launches would take longer than the products."""
    problem = problem_of(dtype=torch.bfloat16, bias=True)
    exact = run_ours(problem, "cce_exact", return_lse=False, reduction="mean").named()
    for name, value in (
        run_ours(problem, "auto", return_lse=False, reduction="mean").named().items()
    ):
        assert torch.equal(exact[name], value), name


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl):
    problem = problem_of(bias=True)
    rounded = run_ours(problem.to(torch.bfloat16), impl)
    with torch.autocast("cuda", torch.bfloat16):
        results = run_ours(problem, impl)
    for name, value in results.named().items():
        assert value.dtype == torch.float32, name
        expected = rounded.named()[name].float()
        scale = 0.01 * expected.abs().max().item()  # the bias is not rounded here
        torch.testing.assert_close(value, expected, rtol=0.02, atol=scale)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph(impl, backend):
    from tests.support import run

    problem = problem_of(dtype=torch.bfloat16, bias=True)
    from cut_cross_entropy import linear_cross_entropy

    def model(e, c, targets, bias):
        return linear_cross_entropy(e * 2, c, targets, bias, return_lse=True, impl=impl, shift=1)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    got, expected = run(compiled, problem), run(model, problem)
    for name, value in expected.named().items():
        torch.testing.assert_close(got.named()[name], value)


# Few shapes: each new divisibility by 16 compiles the kernels again.
@pytest.mark.parametrize("seed", range(12))
def test_fuzz(seed):
    """Failures name the seed, from which everything follows."""
    choose = random.Random(seed)
    tokens, classes = choose.choice([(37, 515), (901, 4099), (2048, 8192)])
    dim = choose.choice([64, 200, 1024]) if classes == 8192 else choose.choice([33, 101, 513])
    both = choose.random() < 0.5
    options = {
        "softcap": 6.0 if both else None,
        "reduction": choose.choice(["mean", "sum", "none"]),
        "memory_budget": choose.choice([1, 2**20, 2**28]),
        "lse_weight": choose.choice([0.0, 0.3]),
        "needed": choose.choice([("e", "c", "bias"), ("e", "c"), ("c",), ("e",)]),
    }
    impl = choose.choice([*IMPLS, "cce_kahan_full_c", "cce_kahan_full_e"])
    dtype = choose.choice(HALF)
    ignored = choose.choice([0.0, 0.3, 0.95])
    print(f"{seed=} {tokens=} {classes=} {dim=} {impl=} {dtype=} {ignored=} {options=}")
    problem = problem_of(
        (tokens,), classes, dim, dtype=dtype, bias=both, ignored=ignored, seed=seed
    )
    check(problem, impl, **options)
