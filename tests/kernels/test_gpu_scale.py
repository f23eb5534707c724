"""Sizes that overflow 32 bits, many blocks, and bounds on memory, on a GPU."""

import pytest
import torch

from cut_cross_entropy import dispatch, linear_cross_entropy
from cut_cross_entropy.benchmark.data import Shape, make
from tests.kernels.gpu import DEVICE, relative_error, requires_kernels, rounding_error
from tests.support import Problem, full_logits, run, run_ours

pytestmark = [pytest.mark.gpu, requires_kernels]

IMPLS = ("cce", "cce_exact")
# A sum by the exact kernels has its gradients in the forward.
LOSSES = (("cce", "none"), ("cce_exact", "none"), ("cce_exact", "sum"))
MIB = 2**20


@pytest.fixture(autouse=True)
def nothing_left():
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def randn(*shape, seed=0, scale=1.0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16, generator=generator) * scale


def softmax_by_parts(e, c, step):
    """Log-sum-exp (N,) in float32, over parts of the classes."""
    parts = [(e @ part.T).float().logsumexp(1) for part in c.split(step)]
    return torch.stack(parts).logsumexp(0)


@pytest.mark.parametrize(("impl", "reduction"), LOSSES)
def test_classifier_of_more_than_2_to_31_elements(impl, reduction):
    """All rows, those that 32 bits do not reach and those that a wrapped offset would hit."""
    num_classes, dim, tokens, part = 262144, 8448, 256, 16384
    assert num_classes * dim > 2**31
    c = randn(num_classes, dim, scale=3 / dim**0.5).requires_grad_()
    e = randn(tokens, dim, seed=1).requires_grad_()
    targets = torch.arange(num_classes - tokens, num_classes, device=DEVICE)
    loss = linear_cross_entropy(e, c, targets, impl=impl, reduction=reduction)
    (loss.sum()).backward()
    with torch.no_grad():
        lse = torch.stack(
            [(e.float() @ rows.float().T).logsumexp(1) for rows in c.split(part)]
        ).logsumexp(0)
        of_target = (e.double() * c[targets].double()).sum(1)
        losses = lse - of_target
        expected = losses if reduction == "none" else losses.sum()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-3)
        grad_e = torch.zeros_like(e, dtype=torch.float32)
        for first in range(0, num_classes, part):
            rows = c[first : first + part].float()
            p = (e.float() @ rows.T - lse[:, None]).exp()
            here = (targets >= first) & (targets < first + part)
            p[here, targets[here] - first] -= 1
            grad_e += p @ rows
            assert relative_error(c.grad[first : first + part], p.T @ e.float()) < 0.01
        assert relative_error(e.grad, grad_e) < 0.01


def check_first_and_last_tokens(e, c, targets, impl, reduction, tail=512):
    loss = linear_cross_entropy(e, c, targets, impl=impl, reduction=reduction)
    loss.sum().backward()
    with torch.no_grad():
        for rows in (slice(0, tail), slice(len(e) - tail, len(e))):
            logits = e[rows].double() @ c.double().T
            losses = torch.nn.functional.cross_entropy(logits, targets[rows], reduction="none")
            if reduction == "none":
                torch.testing.assert_close(loss[rows].double(), losses, rtol=1e-4, atol=1e-3)
            p = logits.softmax(1)
            p[torch.arange(tail), targets[rows]] -= 1
            assert relative_error(e.grad[rows], p @ c.double()) < 0.01


@pytest.mark.parametrize(("impl", "reduction"), LOSSES)
def test_embeddings_of_more_than_2_to_31_elements(impl, reduction):
    """Tokens at the end, which 32 bits do not reach."""
    tokens, dim, num_classes = 2**18, 8448, 256
    assert tokens * dim > 2**31
    e = randn(tokens, dim).requires_grad_()
    c = randn(num_classes, dim, seed=1, scale=3 / dim**0.5).requires_grad_()
    targets = torch.arange(tokens, device=DEVICE) % num_classes
    check_first_and_last_tokens(e, c, targets, impl, reduction)


@pytest.mark.parametrize(("impl", "reduction"), LOSSES)
def test_more_than_2_to_31_logits(impl, reduction):
    tokens, num_classes, dim = 16384, 262144, 64
    assert tokens * num_classes > 2**31
    e = randn(tokens, dim).requires_grad_()
    c = randn(num_classes, dim, seed=1, scale=4 / dim**0.5).requires_grad_()
    targets = (torch.arange(tokens, device=DEVICE) * 7919) % num_classes
    check_first_and_last_tokens(e, c, targets, impl, reduction)


@pytest.mark.parametrize(
    "tokens", [8192, 8193, 16384, 16500, 33000]
)  # a superblock is 64 blocks of 128
@pytest.mark.parametrize("impl", ["cce", "cce_kahan_full_e"])
def test_several_superblocks(tokens, impl, always_filtered):
    made = make("structured", tokens, Shape("test", 8192, 256), device=DEVICE)
    problem = Problem(made.e, made.c, made.targets)
    ours = run_ours(problem, impl, lse_weight=0.0)
    truth = run(full_logits, problem.to(torch.float64), lse_weight=0.0)
    for name in ("grad_e", "grad_c"):
        exact = truth.named()[name]
        assert relative_error(ours.named()[name], exact) <= 2 * rounding_error(exact), name


def in_use() -> int:
    return torch.cuda.memory_allocated()


def warm_up(problem, **options):
    """Compile, and let the library take its workspace, which stays."""
    run_ours(problem, "cce", **options)
    run_ours(problem, "cce_exact", **options)


def leaves_of(made):
    return made.e.requires_grad_(), made.c.requires_grad_()


def test_memory_kept_by_the_forward():
    tokens, shape = 4096, Shape("test", 65536, 512)
    made = make("structured", tokens, shape, device=DEVICE)
    warm_up(Problem(made.e, made.c, made.targets))
    e, c = leaves_of(made)
    for needed, allowed in ((True, tokens * shape.num_classes // 128 + 4 * MIB), (False, 2 * MIB)):
        with torch.set_grad_enabled(needed):
            before = in_use()
            loss = linear_cross_entropy(e, c, made.targets, impl="cce")
            assert in_use() - before <= allowed
            del loss


@pytest.mark.parametrize("name", ["gemma2"])
def test_peak_on_trained_like_data(name):
    """At most 15 % above the gradients, at the shape of a real model."""
    from cut_cross_entropy.benchmark.data import SHAPES

    shape = SHAPES[name]
    made = make("structured", 8192, shape, device=DEVICE)
    few = Problem(made.e[:256], made.c, made.targets[:256])
    run_ours(few, "cce", softcap=shape.softcap, needed=("e",))
    e, c = leaves_of(made)
    peak = peak_above(e, c, made.targets, impl="cce", softcap=shape.softcap)
    gradients = (e.numel() + c.numel()) * 2
    assert peak <= 1.15 * gradients, f"{peak / MIB:.0f} of {gradients / MIB:.0f} MiB"


def peak_above(e, c, targets, **options) -> int:
    """Most bytes in use during a step, above what was in use before; gradients included."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = in_use()
    loss = linear_cross_entropy(e, c, targets, **options)
    grads = torch.autograd.grad(loss, (e, c))
    torch.cuda.synchronize()
    del grads
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(
    ("impl", "recompute"),
    [
        ("cce", False),
        ("cce_exact", False),
        ("cce_exact", True),
        ("cce_kahan_full_c", False),
        ("cce_kahan_full_e", False),
    ],
)
@pytest.mark.parametrize("kind", ["structured", "diffuse", "flat", "randn"])
@pytest.mark.parametrize("budget", [64 * MIB, 256 * MIB])
def test_peak_is_bounded_on_any_data(impl, recompute, kind, budget, monkeypatch):
    monkeypatch.setattr(dispatch, "FEW_PRODUCTS_BY_HALF", 0.0)
    tokens, shape = 4096, Shape("test", 65536, 1024)
    made = make(kind, tokens, shape, device=DEVICE)
    warm_up(Problem(made.e, made.c, made.targets))
    e, c = leaves_of(made)
    options = {"impl": impl, "memory_budget": budget, "recompute": recompute}
    peak_above(e, c, made.targets, **options)  # compile, as warm_up does for losses with an lse
    peak = peak_above(e, c, made.targets, **options)
    gradients = (e.numel() + c.numel()) * 2
    accumulator = e.numel() * 4
    kept = (
        tokens * shape.num_classes // 128 + e.numel() * 2
    )  # bytes of the strips; compacted tokens
    allowed = gradients + accumulator + kept + budget + 8 * MIB
    if impl != "cce" and not recompute:
        allowed += c.numel() * 4  # sums in float32 that wait for the backward
    assert peak <= allowed, f"{peak / MIB:.0f} of {allowed / MIB:.0f} MiB"


def test_memory_is_given_back():
    made = make("structured", 2048, Shape("test", 32768, 512), device=DEVICE)
    warm_up(Problem(made.e, made.c, made.targets))
    before = in_use()
    for _ in range(3):
        run_ours(Problem(made.e, made.c, made.targets), "cce")
    assert in_use() == before
