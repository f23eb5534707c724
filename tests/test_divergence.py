"""Distillation: divergences and their gradients against float64 autograd of full logits."""

from types import SimpleNamespace

import pytest
import torch

from cut_cross_entropy import linear_divergence
from tests.test_memory import peak_bytes

BETAS = [0.0, 0.3, 0.5, 1.0]
NAMES = ("e_student", "head_student", "student_bias", "e_teacher", "head_teacher", "teacher_bias")


def problem(tokens=13, classes=300, dim=8, teacher_dim=12, dtype=torch.float64, seed=0):
    """Return the tensors of :data:`NAMES`, and targets of which every fourth is ignored."""
    random = torch.Generator().manual_seed(seed)
    tensors = []
    for features in (dim, teacher_dim):
        for shape in ((tokens, features), (classes, features), (classes,)):
            tensors.append(torch.randn(shape, generator=random, dtype=torch.float64).to(dtype))
    targets = torch.randint(0, classes, (tokens,), generator=random)
    targets[::4] = -100
    return dict(zip(NAMES, tensors, strict=True)), targets


def truth(tensors, targets, beta, temperature=1.0, softcaps=(None, None), scales=(1.0, 1.0)):
    """Divergence, entropy and log-probabilities of full logits in float64, by their definitions."""
    x = {name: value.double() for name, value in tensors.items()}
    logprobs = []
    for side, softcap, scale in zip(("student", "teacher"), softcaps, scales, strict=True):
        logits = scale * (x[f"e_{side}"] @ x[f"head_{side}"].T + x[f"{side}_bias"])
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        temperatures = torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1)
        logprobs.append((logits / temperatures.to(logits.device)).log_softmax(1))
    log_p, log_q = logprobs[0], logprobs[1].detach()
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        divergence = (q * (log_q - log_p)).sum(1)
    elif beta == 1:
        divergence = (p * (log_p - log_q)).sum(1)
    else:
        log_m = torch.log((1 - beta) * p + beta * q)
        divergence = beta * (q * (log_q - log_m)).sum(1)
        divergence = divergence + (1 - beta) * (p * (log_p - log_m)).sum(1)
    kept = targets != -100
    entropy = -(p * log_p).sum(1)
    own = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return SimpleNamespace(
        divergence=torch.where(kept, divergence, 0),
        student_entropy=torch.where(kept, entropy, 0),
        student_logprobs=torch.where(kept, own, 0),
    )


def leaves_of(tensors):
    return {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}


def gradients(result, leaves):
    """Gradients of a weighted sum of all results by the student's inputs."""
    random = torch.Generator().manual_seed(1)
    total = 0.0
    for name in ("divergence", "student_entropy", "student_logprobs"):
        values = getattr(result, name)
        weights = torch.randn(values.shape, generator=random, dtype=torch.float64)
        total = total + (values.double() * weights).sum()
    return torch.autograd.grad(total, [leaves[name] for name in NAMES[:3]])


def run(tensors, targets, beta, softcaps=(None, None), scales=(1.0, 1.0), **options):
    return linear_divergence(
        *(tensors[f"{kind}_{side}"] for side in ("student", "teacher") for kind in ("e", "head")),
        beta=beta,
        targets=targets,
        student_bias=tensors["student_bias"],
        teacher_bias=tensors["teacher_bias"],
        student_softcap=softcaps[0],
        teacher_softcap=softcaps[1],
        student_logit_scale=scales[0],
        teacher_logit_scale=scales[1],
        **options,
    )


def assert_same(ours, theirs, rtol=1e-9, atol=1e-9):
    for name in ("divergence", "student_entropy", "student_logprobs"):
        torch.testing.assert_close(
            getattr(ours, name).double(), getattr(theirs, name), rtol=rtol, atol=atol
        )


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "softcaps": (3.0, 5.0), "scales": (0.5, -1.5)},
        {"temperature": torch.linspace(0.5, 2, 13, dtype=torch.float64), "softcaps": (None, 2.0)},
    ],
    ids=["plain", "all", "temperature of each token"],
)
def test_values_and_gradients(impl, beta, options):
    tensors, targets = problem()
    exact, leaves = leaves_of(tensors), leaves_of(tensors)
    expected = truth(exact, targets, beta, **options)
    # One byte: the smallest blocks, so that both walks have several of tokens and classes.
    ours = run(leaves, targets, beta, impl=impl, memory_budget=1, **options)
    assert_same(ours, expected)
    assert ours.mask.tolist() == (targets != -100).tolist()
    for mine, other in zip(gradients(ours, leaves), gradients(expected, exact), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(beta, dtype):
    tensors, targets = problem(dtype=dtype)
    exact = leaves_of({name: x.double() for name, x in tensors.items()})
    expected = truth(exact, targets, beta)
    leaves = leaves_of(tensors)
    ours = run(leaves, targets, beta)
    assert ours.divergence.dtype == torch.float32
    assert_same(ours, expected, rtol=1e-5, atol=2e-5)
    limit = 1e-4 if dtype == torch.float32 else 1e-2
    for mine, other in zip(gradients(ours, leaves), gradients(expected, exact), strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - other).norm() < limit * other.norm()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("beta", BETAS)
def test_teacher_has_no_gradient(impl, beta):
    tensors, targets = problem()
    leaves = leaves_of(tensors)
    run(leaves, targets, beta, impl=impl).divergence.sum().backward()
    assert [leaves[name].grad is None for name in NAMES] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_teacher_in_inference_mode(impl, reduction):
    """Autograd does not save what inference mode makes, but the same memory under another name."""
    tensors, targets = problem()
    leaves = leaves_of(tensors)
    expected = run(leaves, targets, 0.3, impl=impl, reduction=reduction).divergence.sum()
    wanted = torch.autograd.grad(expected, [leaves[name] for name in NAMES[:3]])
    with torch.inference_mode():
        made = {name: tensors[name].clone() for name in NAMES[3:]}
        made_targets = targets.clone()
    student = {name: leaves[name] for name in NAMES[:3]}
    found = run({**student, **made}, made_targets, 0.3, impl=impl, reduction=reduction)
    result = found.divergence.sum()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    got = torch.autograd.grad(result, list(student.values()))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("beta", BETAS)
def test_only_a_head_that_trains_has_a_gradient(beta):
    tensors, targets = problem()
    leaves = leaves_of(tensors)
    whole = torch.autograd.grad(run(leaves, targets, beta).divergence.sum(), leaves["e_student"])
    frozen = {**tensors, "e_student": leaves["e_student"]}
    result = run(frozen, targets, beta).divergence.sum()
    result.backward(retain_graph=True)
    torch.testing.assert_close(leaves["e_student"].grad, whole[0])
    result.backward()
    torch.testing.assert_close(leaves["e_student"].grad, 2 * whole[0])


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("beta", BETAS)
def test_equal_models_do_not_diverge(impl, beta):
    tensors, targets = problem(teacher_dim=8, dtype=torch.float32)
    tensors.update({name.replace("student", "teacher"): tensors[name] for name in NAMES[:3]})
    leaves = leaves_of(tensors)
    result = run(leaves, targets, beta, impl=impl)
    assert (result.divergence >= 0).all()
    assert result.divergence.max() < 1e-6
    result.divergence.sum().backward()
    assert leaves["e_student"].grad.abs().max() < 1e-5


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("beta", BETAS)
def test_without_tokens(impl, beta):
    for tokens, ignored in ((0, 0), (5, 5)):
        tensors, targets = problem(tokens=tokens)
        leaves = leaves_of(tensors)
        result = run(leaves, torch.full_like(targets, -100), beta, impl=impl)
        assert result.divergence.tolist() == [0.0] * ignored
        result.divergence.sum().backward()
        for name in NAMES[:3]:
            assert leaves[name].grad.count_nonzero() == 0


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("beta", BETAS)
def test_nan_stays_in_its_token(impl, beta):
    for side in ("e_student", "e_teacher"):
        tensors, targets = problem()
        tensors[side][[0, 2]] = torch.nan  # of which the first is ignored
        found = run(tensors, targets, beta, impl=impl).divergence
        assert found.isnan().nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("beta", BETAS)
def test_classes_that_both_models_rule_out(impl, beta):
    tensors, targets = problem()
    targets[targets != -100] %= 290
    some = {name: x if x.shape[0] == 13 else x[:290] for name, x in tensors.items()}
    for side in ("student", "teacher"):
        tensors[f"{side}_bias"][290:] = -torch.inf
    exact, leaves = leaves_of(some), leaves_of(tensors)
    expected, ours = truth(exact, targets, beta), run(leaves, targets, beta, impl=impl)
    assert_same(ours, expected)
    for mine, other in zip(gradients(ours, leaves), gradients(expected, exact), strict=True):
        assert (mine[other.shape[0] :] == 0).all()
        torch.testing.assert_close(mine[: other.shape[0]], other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_class_that_one_model_rules_out(impl):
    tensors, targets = problem()
    tensors["student_bias"][7] = -torch.inf
    targets[targets == 7] = 8
    kept = targets != -100
    assert (run(tensors, targets, 0.0, impl=impl).divergence[kept] == torch.inf).all()
    assert run(tensors, targets, 0.5, impl=impl).divergence.isfinite().all()
    assert run(tensors, targets, 1.0, impl=impl).divergence.isfinite().all()


def test_mask_without_targets_in_any_leading_shape():
    tensors, targets = problem(tokens=12)
    expected = run(tensors, targets, 0.3)
    for name in ("e_student", "e_teacher"):
        tensors[name] = tensors[name].reshape(3, 4, -1)
    found = run(tensors, None, 0.3, mask=(targets != -100).reshape(3, 4))
    assert found.student_logprobs is None
    torch.testing.assert_close(found.divergence, expected.divergence.reshape(3, 4))
    assert found.mask.shape == (3, 4)


def test_autocast():
    tensors, targets = problem(dtype=torch.float32)
    rounded = {name: x if "bias" in name else x.bfloat16().float() for name, x in tensors.items()}
    leaves = leaves_of(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(leaves, targets, 0.5)
    torch.testing.assert_close(ours.divergence, run(rounded, targets, 0.5).divergence)
    ours.divergence.sum().backward()
    assert leaves["e_student"].grad.dtype == torch.float32


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_compiled(beta):
    tensors, targets = problem(dtype=torch.float32)
    eager, leaves = leaves_of(tensors), leaves_of(tensors)
    expected = gradients(run(eager, targets, beta), eager)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(**tensors):
        return run(tensors, targets, beta)

    found = gradients(compiled(**leaves), leaves)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_operators(beta):
    from cut_cross_entropy.operators.divergences import divergence

    tensors, targets = problem(tokens=5, classes=20)
    flat = []
    for name, leaf in (("student", True), ("teacher", False)):
        e, c, bias = (
            tensors[x].requires_grad_(leaf) for x in (f"e_{name}", f"head_{name}", f"{name}_bias")
        )
        flat += [e, c, targets, bias, -100, None, torch.float64, 1 << 20, 0, None, 0, None]
    torch.library.opcheck(divergence, (*flat, beta, True, False))
    torch.autograd.gradcheck(
        lambda e, c, bias: divergence(e, c, targets, bias, *flat[4:], beta, True, False)[:3],
        (flat[0], flat[1], flat[3]),
    )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_memory(beta):
    """Scratch memory of forward and backward is within the budget; no logits of either model."""
    tensors, targets = problem(tokens=512, classes=8192, dtype=torch.float32)
    budget = 2**20  # the logits of one model have 16 MiB
    leaves = leaves_of(tensors)

    def compute():
        result = run(leaves, targets, beta, memory_budget=budget)
        total = result.divergence.sum() + result.student_entropy.sum()
        total = total + result.student_logprobs.sum()
        torch.autograd.grad(total, [leaves[name] for name in NAMES[:3]])

    compute()  # what is made once, such as caches, does not count
    peak, largest = peak_bytes(compute)
    results = sum(leaves[name].numel() for name in NAMES[:3]) * 4
    per_token = 40 * 512 * 8  # results and their gradients, the rows that count, e in float32
    assert peak <= budget + results + per_token
    assert largest <= max(budget // 4, leaves["head_student"].numel() * 4)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_ignore_index(impl):
    """Another value of ignored targets; without targets any value is without effect."""
    tensors, targets = problem()
    targets[targets == 0] = 1
    expected = run(tensors, targets, 0.5, impl=impl)
    found = run(tensors, torch.where(targets == -100, 0, targets), 0.5, impl=impl, ignore_index=0)
    torch.testing.assert_close(vars(found), vars(expected), rtol=0, atol=0)
    every = run(tensors, None, 0.5, impl=impl, ignore_index=0)
    assert every.mask.all()
    assert (every.divergence > 0).all()
