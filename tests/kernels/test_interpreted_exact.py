"""The exact path, interpreted: memory of its chunks, slices of the tokens, library products."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.kernels import exact, launch, step
from cut_cross_entropy.kernels.block_sizes import Tiles
from cut_cross_entropy.kernels.tokens import BackwardTokens, compact_for_backward
from cut_cross_entropy.problem import NO_FILTER, Filter, Needed, PerToken, Problem
from tests.kernels.conftest import ROUTES, take_route
from tests.support import make_problem

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison_empty")]


@pytest.fixture
def chunks(monkeypatch):
    """Record the classes and the number of tokens of every chunk."""
    computed = []
    compute = exact.chunk_gradients

    def record(problem, tokens, classes, out):
        computed.append((classes, tokens.e.shape[0]))
        return compute(problem, tokens, classes, out)

    # Imported later, others would bind the replacement for good.
    importlib.import_module("cut_cross_entropy.kernels.step")
    monkeypatch.setattr(exact, "chunk_gradients", record)
    return computed


@pytest.fixture
def small_chunks(monkeypatch):
    """Let the memory allocated for a chunk hold one tile of 128 classes."""
    monkeypatch.setattr(exact, "MAX_SCRATCH_BYTES", 1)
    monkeypatch.setattr(exact, "MIN_CHUNK_BYTES", 1)


@pytest.mark.parametrize("bias", [False, True])
def test_chunks_borrow_rows_of_dc(bias, chunks, small_chunks):
    """With 64 features, 64 of 197 rows at most, in tiles of 128, while that exceeds one tile."""
    problem = make_problem((133,), 1100, 64, bias=bias, ignored=0.0)
    ROUTES["exact"].check(problem)
    assert [classes for classes, _ in chunks] == [
        (0, 256), (256, 512), (512, 640), (640, 768), (768, 896), (896, 1024), (1024, 1100)
    ]  # fmt: skip


ROWS = (  # tokens, valid tokens, rows that are computed
    (272, 129, 256),
    (271, 128, 255),  # not a multiple of 16 either: that would be another variant of the kernel
    (272, 272, 272),
    (272, 128, 128),
    (272, 1, 128),
    (272, 0, 128),  # one block at least
    (271, 127, 127),
    (271, 260, 271),
    (5, 3, 5),
)


@pytest.mark.parametrize(
    ("path", "tokens", "valid", "rows"),
    [
        *(("exact", *numbers) for numbers in ROWS),
        *((path, *numbers) for path in ("dense", "full_c", "full_e") for numbers in ROWS[:2]),
    ],
)
def test_ignored_tokens_are_not_multiplied(path, tokens, valid, rows, chunks, request):
    problem = make_problem((tokens,), 150, 16, bias=True, ignored=0.0)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    problem.targets[order[valid:]] = -100
    take_route(path, request).check(problem)
    assert {num_rows for _, num_rows in chunks} == {rows}


@pytest.mark.parametrize("impl", ["cce", "cce_exact"])
def test_scaled_gradients_of_float16_do_not_overflow(impl, chunks, small_chunks):
    """256 tokens of mean 1/256 are scaled by 256; a gradient of 300 would then be 76,000."""
    e = torch.full((256, 16), 300.0, dtype=torch.float16, requires_grad=True)
    c = torch.zeros(256, 16, dtype=torch.float16, requires_grad=True)
    targets = torch.zeros(256, dtype=torch.int64)
    linear_cross_entropy(e, c, targets, impl=impl, recompute=True).backward()
    expected = torch.full((256, 16), 300 / 256)
    expected[0] -= 300
    torch.testing.assert_close(c.grad.float(), expected, rtol=2e-3, atol=0)
    assert [classes for classes, _ in chunks] == [(0, 128), (128, 256)], "no row is borrowed"


TOKENS = 253  # bfloat16 rounds the inverse by 0.37 %


def errors(factor, filter_=NO_FILTER):
    """Return those of dE and dC, of the sum of unsure tokens' losses times a factor."""
    dtype = torch.bfloat16
    made = make_problem((TOKENS,), 1100, 64, ignored=0.0)
    e, c = (0.3 * made.e).to(dtype), made.c.to(dtype)
    problem = Problem(e, c, made.targets, None, -100, None, dtype, 2**28)
    saved = step.forward(problem, filter_, training=True)
    upstream = PerToken(torch.full((TOKENS,), factor), torch.zeros(TOKENS))
    found = step.backward(upstream, saved, problem, filter_, Needed(e=True, c=True, bias=False))
    exact = tuple(x.double().requires_grad_() for x in (e, c))
    loss = F.cross_entropy(exact[0] @ exact[1].T, made.targets, reduction="sum") * factor
    pairs = zip((found.e, found.c), torch.autograd.grad(loss, exact), strict=True)
    return [((got.double() - truth).norm() / truth.norm()).item() for got, truth in pairs]


@pytest.mark.parametrize("filter_", [NO_FILTER, Filter(8e-4)], ids=["exact", "dense"])
@pytest.mark.usefixtures("bfloat16", "small_chunks", "never_filtered")
def test_the_inverse_of_the_number_of_tokens_is_not_rounded(filter_, chunks):
    """A mean errs as if its inverse were a number of bfloat16."""
    least = errors(torch.tensor(1 / TOKENS).bfloat16().item(), filter_)
    assert [classes for classes, _ in chunks[:2]] == [(0, 128), (128, 256)]
    found = errors(1 / TOKENS, filter_)
    assert all(x <= 1.05 * y < 0.0021 for x, y in zip(found, least, strict=True)), (found, least)


@pytest.mark.parametrize("factor", [1e-30, 3e37])
@pytest.mark.usefixtures("bfloat16")
def test_tiny_and_huge_losses(factor):
    assert all(x < 0.002 for x in errors(factor))


@pytest.mark.parametrize(
    ("largest", "scale"),
    [
        (1 / 253, 253),
        (0, 1),
        (torch.inf, 1),
        (torch.nan, 1),
        (1e-38, 1),
        (2e-37, 5e36),
        (3e38, 1e-37),
    ],
)
def test_a_scale_and_its_inverse_are_normal_numbers(largest, scale):
    made = make_problem((3,), 5, 16, ignored=0.0).to(torch.bfloat16)
    problem = Problem(made.e, made.c, made.targets, None, -100, None, torch.bfloat16, 2**28)
    saved = step.forward(problem, NO_FILTER, training=True)
    upstream = PerToken(torch.tensor([0, largest, 0]), torch.zeros(3))
    tokens = compact_for_backward(upstream, saved, problem, 0.0, count_valid=False)
    torch.testing.assert_close(tokens.scale, torch.tensor(float(scale)), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("bfloat16")
def test_captured_gradients_in_bfloat16():
    """The host reads no scale then, so 1 / N is rounded, but nothing else is wrong."""
    with launch.as_captured():
        assert all(x < 0.004 for x in errors(1 / TOKENS))


def test_no_row_is_borrowed_when_dc_is_not_needed(chunks, small_chunks):
    problem = make_problem((133,), 300, 64, ignored=0.0)
    ROUTES["exact"].check(problem, needed=("e",))
    assert [classes for classes, _ in chunks] == [(0, 128), (128, 256), (256, 300)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("path", ["exact", "full_c", "full_e"])
def test_slices_of_many_tokens(path, dtype, chunks, small_chunks, request, monkeypatch):
    """dC is summed over slices of the tokens; logit gradients of one slice are stored at a time."""
    monkeypatch.setattr(exact, "MAX_TOKENS", 128)
    request.getfixturevalue("drops_nothing")
    request.getfixturevalue("always_filtered")
    problem = make_problem((3, 46), 300, 24, bias=True, ignored=0.0).to(dtype)
    ROUTES[path].check(problem)
    first = [((0, 128), 128), ((0, 128), 10), ((128, 256), 128)]
    assert chunks[:3] == first


def test_largest_chunk_is_bounded_in_elements(chunks, monkeypatch):
    """32 bits reach every element of a chunk."""
    monkeypatch.setattr(exact, "MAX_ELEMENTS", 133 * 256)
    problem = make_problem((133,), 1100, 8, ignored=0.0)
    ROUTES["exact"].check(problem)
    assert max(stop - start for (start, stop), _ in chunks) == 256


def tokens_of(problem, lse, a, *, b, scale):
    """Return the tokens of a problem in their order, for natural logarithms ``lse``."""
    return BackwardTokens(
        e=problem.e,
        targets=problem.targets,
        origin=torch.arange(len(a)),
        lse=lse * 1.4426950408889634,
        a=a,
        b=b,
        target_grad=torch.zeros(len(a)),
        scale=torch.tensor(scale),
        shard_mass=None,
        num_valid=None,
    )


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("block_v", [128, 256])  # a tile of 256 classes ends in two halves
def test_logit_gradients_of_a_chunk(block_v, softcap, monkeypatch):
    problem = make_problem((133,), 700, 24, bias=True, ignored=0.0)
    logits = problem.e @ problem.c.T + problem.bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(1)
    a, b = torch.rand(2, 133, generator=torch.Generator().manual_seed(0))
    expected = (logits - lse[:, None]).exp() * a[:, None]
    expected[torch.arange(133), problem.targets] -= b
    if softcap is not None:
        expected *= 1 - (logits / softcap) ** 2
    buffer = torch.full((133, 512), torch.nan)
    tiles = Tiles(block_v, 32, 4, 2, 64, use_tma=False)
    monkeypatch.setattr(exact, "tiles_on", lambda device: tiles)
    call = Problem(
        problem.e, problem.c, problem.targets, problem.bias, -100, softcap, torch.float32, 2**20
    )
    tokens = tokens_of(problem, lse, a, b=b, scale=2.0)
    exact.chunk_gradients(call, tokens, (256, 700), buffer[:, :444])
    torch.testing.assert_close(buffer[:, :444], 2 * expected[:, 256:], rtol=1e-4, atol=1e-5)
    assert buffer[:, 444:].isnan().all()


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.usefixtures("bfloat16")
def test_the_scale_of_logit_gradients_is_taken_out(in_place):
    """Also where one product writes the rows of dC."""
    problem = make_problem((133,), 700, 24, ignored=0.0).to(torch.bfloat16)
    e, c = problem.e.float(), problem.c.float()
    logits = e @ c.T
    lse = logits.logsumexp(1)
    a = torch.rand(133, generator=torch.Generator().manual_seed(0))
    expected = (logits - lse[:, None]).exp() * a[:, None]
    expected[torch.arange(133), problem.targets] -= a
    call = Problem(problem.e, problem.c, problem.targets, None, -100, None, torch.bfloat16, 2**20)
    tokens = tokens_of(problem, lse, a, b=a, scale=3.0)
    grad_c = problem.c.new_empty(700, 24) if in_place else problem.c.new_empty(24, 700).T
    grad_e = exact.exact_gradients(call, tokens, exact.Wanted(True, grad_c, None))
    for found, truth in ((grad_e, expected @ c), (grad_c, expected.T @ e)):
        assert (found.float() - truth).norm() < 0.003 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copied_factors_are_multiplied_in_slices(dtype, monkeypatch):
    """The library may lack products of half precision factors with float32 results."""
    monkeypatch.setattr(exact, "COPIED_BYTES", 4 * (7 + 5) * 70)  # 64 of 150 at a time
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(150, 7, generator=generator).to(dtype).T
    right = torch.randn(150, 5, generator=generator).to(dtype)
    total = torch.randn(7, 5, generator=generator)
    expected = total.double() + left.double() @ right.double()
    exact.add_product(total, left, right)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-5)


def test_the_user_s_precision_of_products_is_restored():
    library = torch.backends.cuda.matmul
    before = library.fp32_precision
    with exact._tf32():
        assert library.fp32_precision == "tf32"
    assert library.fp32_precision == before
    assert torch.get_float32_matmul_precision() == "highest"
