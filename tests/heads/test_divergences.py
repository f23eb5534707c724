"""Divergences of models whose heads are more than a matrix: the numbers of autograd in float64."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cut_cross_entropy import budget, linear_divergence
from cut_cross_entropy.heads import Head, LowRank, divergences
from cut_cross_entropy.implementations import chunked_divergence
from tests.heads.test_heads import BUDGET, KINDS, Case, D, N, R, V
from tests.largest import Largest
from training.losses import divergence as divergence_of_logprobs

IMPLS = ("reference", "chunked")


def models(kind, teacher_kind):
    """Return a student with targets for some tokens, and a teacher of the same tokens."""
    student, teacher = Case(kind), Case(teacher_kind)
    with torch.no_grad():
        for leaf in teacher.leaves:
            leaf.mul_(0.9)
    return student, teacher


def run(student, teacher, **options):
    return linear_divergence(
        student.e, student.head, teacher.e, teacher.head, targets=student.targets,
        memory_budget=BUDGET, **options,
    )  # fmt: skip


def truth(student, teacher, beta, temperature=1.0):
    """Divergences, entropies and log-probabilities, 0 where ignored."""
    log_p = (student.logits() / temperature).log_softmax(-1)
    log_q = (teacher.logits().detach() / temperature).log_softmax(-1)
    kept, ids = student.targets != -100, student.targets.clamp_min(0)[..., None]
    found = (
        divergence_of_logprobs(log_p, log_q, beta),
        -(log_p.exp() * log_p).sum(-1),
        log_p.gather(-1, ids)[..., 0],
    )
    return [torch.where(kept, x, 0) for x in found]


def assert_equal(student, found, expected):
    results = found.divergence, found.student_entropy, found.student_logprobs
    torch.testing.assert_close(list(results), expected, rtol=1e-10, atol=1e-11)
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(3, 2, N, generator=generator, dtype=torch.float64)
    ours, theirs = (
        student.gradients((torch.stack(list(x)) * factors).sum()) for x in (results, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("kind", "teacher_kind", "beta"),
    [
        ("lora", "plain", 0.0),
        ("plain", "lora", 0.5),
        ("frozen", "rows_on_demand", 1.0),
        ("rows_on_demand", "dora", 0.3),
        ("two_adapters", "frozen", 0.0),
        ("class_scale", "class_scale", 1.0),
        ("dora", "two_adapters", 0.5),
    ],
)
def test_values_and_gradients(kind, teacher_kind, beta, impl):
    """In blocks of tokens and classes, at a temperature."""
    student, teacher = models(kind, teacher_kind)
    found = run(student, teacher, beta=beta, impl=impl, temperature=0.8)
    assert_equal(student, found, truth(student, teacher, beta, 0.8))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mean_with_weights(impl):
    student, teacher = models("frozen", "rows_on_demand")
    weights = torch.linspace(0.5, 2, 2 * N, dtype=torch.float64).view(2, N).requires_grad_()
    found = run(student, teacher, reduction="mean", token_weights=weights, impl=impl)
    kept = student.targets != -100
    each, *_ = truth(student, teacher, 0.0)
    expected = (weights * each).sum() / torch.where(kept, weights, 0).sum()
    leaves = [*student.leaves, weights]
    ours, theirs = (torch.autograd.grad(x, leaves) for x in (found.divergence, expected))
    torch.testing.assert_close(found.divergence, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("impl", ["chunked", pytest.param("cce", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("student_is", ["on_demand", "a_matrix", "an_adapter_that_is_frozen"])
def test_a_sum_has_its_gradients_in_the_forward(student_is, beta, impl, monkeypatch):
    """Rows are made for each chunk of tokens; entropies and log-probabilities walk again."""
    dtype = torch.float64 if impl == "chunked" else torch.float32
    student, teacher = Case("rows_on_demand", dtype), Case("lora", dtype)
    with torch.no_grad():
        for leaf in teacher.leaves:
            leaf.mul_(0.9)
    weight = (2 * student.head.weight.half).requires_grad_(student_is == "a_matrix")
    a, b = student.leaves[2:]
    low_rank, matrix, leaves = (), weight, [student.e, student.bias]
    if student_is == "an_adapter_that_is_frozen":
        low_rank, matrix = (LowRank(a.detach(), b.detach()),), weight + (b @ a).detach()
    if student_is == "a_matrix":
        leaves.append(weight)
    source = weight if student_is == "a_matrix" else student.head.weight
    head = Head(source, student.bias, low_rank=low_rank, softcap=9.0)
    chosen, walks = [], []
    compute, walk = divergences.sum_by, chunked_divergence.backward
    monkeypatch.setattr(divergences, "sum_by", lambda *x: chosen.append(x) or compute(*x))
    monkeypatch.setattr(chunked_divergence, "backward", lambda *x: walks.append(x) or walk(*x))
    for module, name in (
        (budget, "MIN_PAIRS"),
        (budget, "MIN_PAIRS_WITHOUT_C"),
        (chunked_divergence, "MIN_TOKENS"),
        (divergences, "LEAST_TOKENS"),
    ):
        monkeypatch.setattr(module, name, 1)  # fmt: skip
    weights = torch.linspace(0.5, 2, 2 * N, dtype=dtype).view(2, N)
    found = linear_divergence(
        student.e, head, teacher.e, teacher.head, targets=student.targets, beta=beta, impl=impl,
        token_weights=weights, reduction="sum", memory_budget=8 * BUDGET,
    )  # fmt: skip
    assert len(chosen) == 1
    wide = [x.detach().double().requires_grad_() for x in leaves]
    matrix = wide[2] if student_is == "a_matrix" else matrix.double()
    logits = 9 * torch.tanh((wide[0] @ matrix.T + wide[1]) / 9)
    kept, ids = student.targets != -100, student.targets.clamp_min(0)[..., None]
    log_p, log_q = logits.log_softmax(-1), teacher.logits().detach().double().log_softmax(-1)
    each = torch.where(kept, divergence_of_logprobs(log_p, log_q, beta), 0)
    entropy = torch.where(kept, -(log_p.exp() * log_p).sum(-1), 0)
    logprobs = torch.where(kept, log_p.gather(-1, ids)[..., 0], 0)
    expected = (weights * each).sum()
    close = {"rtol": 1e-9, "atol": 1e-10} if impl == "chunked" else {"rtol": 2e-4, "atol": 2e-4}
    for mine, theirs in (
        (found.divergence, expected), (found.student_entropy, entropy),
        (found.student_logprobs, logprobs),
    ):  # fmt: skip
        torch.testing.assert_close(mine.double(), theirs, **close)
    for mine, theirs in (
        (found.divergence, expected),
        (found.divergence * 3 + found.student_entropy.sum(), 3 * expected + entropy.sum()),
        (found.student_logprobs.sum(), logprobs.sum()),
    ):
        ours = torch.autograd.grad(mine, leaves, retain_graph=True)
        for one, other in zip(
            ours, torch.autograd.grad(theirs, wide, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(one.double(), other, **close)
        if mine is found.divergence:
            assert not walks
    with torch.no_grad():
        linear_divergence(student.e, head, teacher.e, teacher.head, reduction="sum", impl=impl)
    assert len(chosen) == 1


@pytest.mark.parametrize("impl", ["chunked", pytest.param("cce", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("has_matrix", [False, True])
def test_a_checkpoint_of_a_sum(has_matrix, use_reentrant, impl, monkeypatch):
    """The first forward has no gradients, and saves as many numbers as the second one."""
    dtype = torch.float64 if impl == "chunked" else torch.float32
    student, teacher = Case("rows_on_demand", dtype), Case("lora", dtype)
    weight = (2 * student.head.weight.half).requires_grad_(has_matrix)
    head = weight if has_matrix else Head(student.head.weight)
    leaves = [student.e, *([weight] if has_matrix else [])]
    for module, name in (
        (budget, "MIN_PAIRS"),
        (budget, "MIN_PAIRS_WITHOUT_C"),
        (chunked_divergence, "MIN_TOKENS"),
        (divergences, "LEAST_TOKENS"),
    ):
        monkeypatch.setattr(module, name, 1)
    weights, sums = torch.linspace(0.5, 2, 2 * N, dtype=dtype).view(2, N), []
    compute = divergences.sum_by
    monkeypatch.setattr(divergences, "sum_by", lambda *x: sums.append(x) or compute(*x))

    def loss(e):
        found = linear_divergence(
            e, head, teacher.e, teacher.head, token_weights=weights, reduction="sum", impl=impl,
            memory_budget=8 * BUDGET,
        )  # fmt: skip
        return found.divergence + found.student_entropy.sum()

    expected = torch.autograd.grad(loss(student.e), leaves)
    assert len(sums) == 1
    value = checkpoint(loss, student.e, use_reentrant=use_reentrant)
    assert len(sums) == 1
    value.backward()
    assert len(sums) == 2
    for leaf, other in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, other)


def test_a_sum_of_no_tokens_has_gradients_of_0():
    student, teacher = Case("rows_on_demand"), Case("lora")
    head = Head(student.head.weight)
    nothing = torch.zeros(2, N, dtype=torch.bool)
    found = linear_divergence(
        student.e, head, teacher.e, teacher.head, mask=nothing, reduction="sum", impl="chunked"
    )
    (of_e,) = torch.autograd.grad(found.divergence / nothing.sum(), student.e)
    assert of_e.eq(0).all()


def test_every_kind_of_head_is_tried():
    kinds = test_values_and_gradients.pytestmark[0].args[1]
    assert {x for kind in kinds for x in kind[:2]} == set(KINDS)


def test_no_tensor_of_the_size_of_a_weight():
    student, teacher = models("rows_on_demand", "rows_on_demand")
    with Largest() as largest:
        run(student, teacher, beta=0.5).divergence.sum().backward()
    assert largest.elements <= max(V * R, 128 * (D + R) + 2 * N * 128)
    assert student.head.weight.largest <= 128
    assert teacher.head.weight.largest <= 128


def test_the_backward_may_run_twice_and_for_some_tensors_only():
    student, teacher = models("frozen", "plain")
    value = run(student, teacher, beta=1.0).divergence.sum()
    expected = student.gradients(truth(student, teacher, 1.0)[0].sum())
    first = torch.autograd.grad(value, student.leaves, retain_graph=True)
    torch.testing.assert_close(first, expected, rtol=1e-8, atol=1e-11)
    (of_e,) = torch.autograd.grad(value, student.leaves[:1])
    torch.testing.assert_close(of_e, expected[0], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_backward_for_some_tensors_leaves_nothing_for_the_next(kind):
    student, teacher = models(kind, "plain")
    value = run(student, teacher, beta=0.5, impl="chunked").divergence.sum()
    expected = student.gradients(truth(student, teacher, 0.5)[0].sum())
    torch.autograd.grad(value, student.leaves[:1], retain_graph=True)
    found = torch.autograd.grad(value, student.leaves)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


def test_no_saved_tensor_has_the_shape_of_a_head():
    """Hooks that move what is saved, as ``save_on_cpu``, would fill it."""
    student, teacher = models("lora", "two_adapters")
    sizes = []
    pack = lambda tensor: (sizes.append(tensor.numel()), tensor)[1]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = run(student, teacher, beta=0.5, impl="chunked").divergence.sum()
    assert 0 < max(sizes) <= max(student.e.numel(), V * R)
    found = torch.autograd.grad(value, student.leaves)
    expected = student.gradients(truth(student, teacher, 0.5)[0].sum())
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


def test_a_part_that_changes_before_the_backward():
    student, teacher = models("lora", "frozen")
    value = run(student, teacher).divergence.sum()
    with torch.no_grad():
        teacher.head.low_rank[0].b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_options_that_a_head_has_itself():
    student, teacher = models("lora", "plain")
    with pytest.raises(ValueError, match="student: softcap must not be given in addition to a He"):
        run(student, teacher, student_softcap=3.0)
    few = Head(torch.zeros(V - 1, D, dtype=torch.float64))
    with pytest.raises(ValueError, match=f"classes of head_student, V = {V}, got {V - 1}"):
        linear_divergence(student.e, student.head, teacher.e, few)
