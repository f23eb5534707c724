"""Heads by Triton's interpreter: chunks of classes, rows made once, and columns of adapters."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from cut_cross_entropy import dispatch, linear_cross_entropy, linear_divergence, record_filter
from cut_cross_entropy.heads import Head, LowRank
from cut_cross_entropy.heads.quantised import ChosenRows
from cut_cross_entropy.kernels import block_sizes, made_rows_pass
from cut_cross_entropy.kernels.filtered import backward, calibrate, measure, passes
from tests.kernels.test_interpreted_filtered import sharp
from tests.support import make_problem
from training.losses import divergence as divergence_of_logprobs

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poison_empty")]


@pytest.mark.parametrize(
    ("impl", "filter_eps", "trains", "softcap"),
    [
        ("cce", "auto", False, None),
        ("cce_exact", None, False, None),
        ("cce_exact", None, False, 6.0),
        ("cce_exact", None, True, None),
    ],
)
def test_gradients_of_an_adapted_head(impl, filter_eps, trains, softcap):
    """If the weight is frozen, the kernels read it and the columns of the adapter."""
    made = make_problem((140,), classes=400, dim=32, bias=True)
    e, weight, bias = (x.requires_grad_() for x in (made.e, made.c, made.bias))
    weight.requires_grad_(trains)
    torch.manual_seed(1)
    a, b = torch.randn(8, 32, requires_grad=True), torch.randn(400, 8, requires_grad=True)
    leaves = [e, bias, a, b, *([weight] if trains else [])]
    head = Head(weight, bias, low_rank=(LowRank(a, b, 0.1),), softcap=softcap)
    budget = 2 * 3 * 40 * 4 * 256  # two chunks
    loss = linear_cross_entropy(
        e, head, made.targets, impl=impl, filter_eps=filter_eps, memory_budget=budget
    )
    ours = torch.autograd.grad(loss, leaves)
    truth = [x.detach().double().requires_grad_(x.requires_grad) for x in (e, bias, a, b, weight)]
    x, shift, down, up, matrix = truth
    logits = F.linear(x, matrix + 0.1 * up @ down, shift)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected_loss = F.cross_entropy(logits, made.targets)
    expected = torch.autograd.grad(expected_loss, [t for t in truth if t.requires_grad])
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
    for mine, theirs in zip(ours, expected, strict=True):
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert error < (1e-5 if impl == "cce_exact" else 4e-3)


class Stored:
    """Rows on demand that count how often each is made."""

    def __init__(self, weight):
        self.weight, self.made = weight, torch.zeros(weight.shape[0], dtype=torch.int64)
        self.shape, self.dtype, self.device = tuple(weight.shape), weight.dtype, weight.device
        self.largest = 0

    def rows(self, start, stop):
        self.made[start:stop] += 1
        self.largest = max(self.largest, stop - start)
        return self.weight[start:stop].clone()


def frozen_case(classes=1100, tokens=300):
    """A frozen head, the matrix that it stands for, and embeddings and targets."""
    made = make_problem((tokens,), classes=classes, dim=32, bias=True, ignored=0.2)
    source = Stored(made.c)
    scale = torch.linspace(0.5, 1.5, classes)
    low_rank = LowRank(torch.randn(4, 32), torch.randn(classes, 4) / 8)
    head = Head(source, made.bias, scale, (low_rank,), logit_scale=0.9)
    matrix = scale[:, None] * (made.c + low_rank.b @ low_rank.a)
    return made, head, source, matrix.double() * 0.9


@pytest.mark.parametrize(
    ("impl", "softcap", "factors"),
    [("cce", None, False), ("cce_exact", 6.0, True), ("cce_exact", None, True)],
)
def test_an_exact_frozen_head_makes_its_rows_once(impl, softcap, factors, monkeypatch):
    """Within the forward, for both products; in chunks of classes and of tokens."""
    monkeypatch.setattr(made_rows_pass, "FEWEST", 256)
    made, head, source, matrix = frozen_case()
    head = dataclasses.replace(head, softcap=softcap)
    e = made.e.requires_grad_()
    options, temperature = {}, 1.0
    if factors:
        temperature = torch.linspace(0.7, 1.4, 300)
        options = {"token_weights": torch.linspace(-1, 1, 300), "temperature": temperature}
    budget = 256 * 4 * (128 + 2 * 36)
    loss = linear_cross_entropy(
        e,
        head,
        made.targets,
        impl=impl,
        filter_eps=None,
        memory_budget=budget,
        reduction="sum",
        **options,
    )
    (3 * loss).backward()
    assert torch.equal(source.made, torch.ones(1100, dtype=torch.int64))
    x = made.e.detach().double().requires_grad_()
    logits = x @ matrix.T + 0.9 * made.bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / torch.as_tensor(temperature).reshape(-1, 1)
    losses = F.cross_entropy(logits, made.targets, reduction="none")
    expected = (losses * options.get("token_weights", 1.0)).sum()
    (expected_grad,) = torch.autograd.grad(3 * expected, x)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    error = (e.grad.double() - expected_grad).norm() / expected_grad.norm()
    assert error < 1e-6


def test_chunks_of_a_frozen_head_whose_logits_rise():
    """A later chunk exceeds the bound of the first, so that the sums before it are scaled."""
    made, _, source, _ = frozen_case()
    made.e[:, 3], made.e[40:60, 3], made.e[250, 3] = 0.0, 1.0, 1.0
    made.c[:, 3], made.c[700, 3], made.c[1050, 3] = 0.0, 110.0, 220.0
    e, targets = made.e.requires_grad_(), made.targets
    targets[45], targets[50] = 700, 1050
    loss = linear_cross_entropy(
        e, Head(source), targets, impl="cce_exact", memory_budget=256 * 4 * (300 + 64)
    )
    loss.backward()
    x = e.detach().double().requires_grad_()
    expected = F.cross_entropy(x @ made.c.double().T, targets)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(e.grad.double(), x.grad, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("leading", [(0,), (5,)])
def test_a_frozen_head_without_a_token_that_counts(leading):
    _, head, *_ = frozen_case()
    e = torch.randn(*leading, 32, requires_grad=True)
    loss = linear_cross_entropy(e, head, torch.full(leading, -100), impl="cce_exact")
    loss.backward()
    assert loss == 0
    assert torch.equal(e.grad, torch.zeros_like(e))


def test_a_frozen_head_in_half_precision():
    """The gradient has the dtype of the embeddings, and is rounded once."""
    made, *_ = frozen_case()
    half = made.to(torch.float16)
    e = half.e.requires_grad_()
    loss = linear_cross_entropy(e, Head(Stored(half.c)), made.targets, impl="cce_exact")
    loss.backward()
    x = half.e.detach().double().requires_grad_()
    expected = F.cross_entropy(x @ half.c.double().T, made.targets)
    (grad,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    rounding = (grad.half().double() - grad).norm()
    assert e.grad.dtype == torch.float16
    assert (e.grad.double() - grad).norm() < 2 * rounding


def adapted_case(kind, on_demand=False):
    """A frozen matrix with columns of its own kind, the logits in float64, and the leaves."""
    made = sharp(150)
    torch.manual_seed(1)
    weight = Stored(made.c) if on_demand else made.c
    classes, dim = made.c.shape
    make = lambda *shape: (torch.randn(*shape) / 8).requires_grad_()
    e, bias = made.e.requires_grad_(), made.bias.requires_grad_()
    a, b, a2, b2 = make(4, dim), make(classes, 4), make(17, dim), make(classes, 17)
    adapters, leaves = (LowRank(a, b, 2.0),), [e, bias, a, b]
    delta = lambda a, b: 2 * b @ a
    if kind == "none":
        adapters, leaves, delta = (), [e, bias], lambda: 0
    elif kind == "two":
        adapters += (LowRank(a2, b2),)
        leaves += [a2, b2]
        delta = lambda a, b, a2, b2: 2 * b @ a + b2 @ a2
    elif kind == "rows":  # of some classes, which are trained
        ids = torch.tensor([5, 1000])
        rows = ChosenRows((classes, 2), torch.float32, e.device, ids=ids)
        change = make(2, dim)
        adapters, leaves = (LowRank(change, rows),), [e, bias, change]
        one_hot = F.one_hot(ids, classes).T.double()
        delta = lambda change: one_hot @ change
    matrix = made.c.double()
    logits = lambda e, bias, *low: F.linear(e, matrix + delta(*low), bias)
    return made, Head(weight, bias, low_rank=adapters), leaves, logits


def gradients_in_float64(loss, leaves):
    wide = [x.detach().double().requires_grad_() for x in leaves]
    value = loss(*wide)
    return value.detach(), torch.autograd.grad(value, wide)


CHUNKS = 2**17
"""A budget for chunks of 768 classes in the forward, and of 1,024 and 76 in the backward."""


@pytest.mark.parametrize("why", ["multiplied softcap", "captured"])
def test_rows_on_demand_are_made_once_where_nothing_can_be_filtered(why, monkeypatch):
    made, head, (e, *_), _ = adapted_case("none", on_demand=True)
    head = dataclasses.replace(head, bias=None)
    if why == "captured":
        monkeypatch.setattr("cut_cross_entropy.kernels.launch.is_captured", lambda tensor: True)
    else:
        head = dataclasses.replace(head, softcap=5.0, logit_scale=0.9)
    linear_cross_entropy(e, head, made.targets, impl="cce").backward()
    assert torch.equal(head.weight.made, torch.full((1100,), 1))


@pytest.mark.parametrize(
    ("kind", "on_demand"),
    [
        ("one", False),
        ("two", False),
        ("rows", False),
        ("none", True),
        ("one", True),
        ("rows", True),
    ],
)
def test_the_filter_of_an_adapted_head(kind, on_demand):
    """Strips are dropped; what is left out is below the rounding of bfloat16, as for a matrix."""
    made, head, leaves, logits = adapted_case(kind, on_demand)
    with record_filter() as records:
        loss = linear_cross_entropy(
            leaves[0], head, made.targets, impl="cce", memory_budget=CHUNKS if on_demand else 2**28
        )
        ours = torch.autograd.grad(loss, leaves)
    expected_loss, expected = gradients_in_float64(
        lambda *wide: F.cross_entropy(logits(*wide), made.targets), leaves
    )
    assert [record.path for record in records] == ["filtered"]
    assert records[0].strips_kept < 0.45
    assert records[0].error_c is None
    if on_demand:  # the targets' logits come first, then the energies, then the gradients
        assert records[0].error_e is None
        assert torch.equal(head.weight.made, torch.full((1100,), 3))
        assert head.weight.largest == 1024
    else:
        assert records[0].error_e < 2
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
    for mine, truth in zip(ours, expected, strict=True):
        rounding = (truth.bfloat16().double() - truth).norm()
        assert (mine.double() - truth).norm() <= 2 * rounding


def test_the_threshold_of_an_adapted_head_follows_the_error(always_filtered, monkeypatch):
    """It is lowered where the tolerance is too large, as for the matrix of the same logits."""
    monkeypatch.setattr(dispatch, "FILTER_TOLERANCE", 16 * dispatch.FILTER_TOLERANCE)
    monkeypatch.setattr(calibrate, "MIN_TOKENS", 0)
    made, head, (e, bias, a, b), logits = adapted_case("one")
    _, (exact, *_) = gradients_in_float64(
        lambda *wide: F.cross_entropy(logits(*wide), made.targets), (e, bias, a, b)
    )

    def error(c, bias=None):
        loss = linear_cross_entropy(e, c, made.targets, bias, impl="cce")
        (grad,) = torch.autograd.grad(loss, e)
        return float((grad - exact).norm() / exact.norm()) / measure.ROUNDING

    assert error(head) > 2
    monkeypatch.setattr(calibrate, "MIN_WORK", 0)
    assert error(head) == pytest.approx(error((made.c + 2 * b @ a).detach(), bias), rel=0.05)
    assert error(head) < 1


@pytest.mark.parametrize("on_demand", [False, True])
def test_one_token_of_an_adapted_head(on_demand):
    """Embeddings (D,) and a target without dimensions."""
    made = make_problem((), classes=150, dim=16, ignored=0.0)
    weight = Stored(made.c) if on_demand else made.c
    e, a, b = made.e.requires_grad_(), torch.ones(4, 16) / 16, torch.ones(150, 4).requires_grad_()
    loss = linear_cross_entropy(
        e, Head(weight, low_rank=(LowRank(a, b),)), made.targets, impl="cce"
    )
    expected = F.cross_entropy(F.linear(e, made.c + b @ a), made.targets)
    torch.testing.assert_close(loss, expected)
    pairs = zip(*(torch.autograd.grad(x, (e, b)) for x in (loss, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=1e-4)


def test_losses_of_tokens_of_an_adapted_head():
    """With a temperature, and upstream gradients of both results."""
    made, head, leaves, logits = adapted_case("two")
    temperature, upstream = torch.linspace(0.7, 1.4, 150), torch.randn(2, 150)

    def value(nll, lse, kept):
        return (upstream[0] * torch.where(kept, nll, 0) + upstream[1] * lse).sum()

    kept = made.targets != -100
    nll, lse = linear_cross_entropy(
        leaves[0],
        head,
        made.targets,
        impl="cce_exact",
        reduction="none",
        return_lse=True,
        temperature=temperature,
    )
    ours = torch.autograd.grad(value(nll, lse, kept), leaves)

    def truth(*wide):
        scaled = logits(*wide) / temperature[:, None]
        losses = F.cross_entropy(scaled, made.targets, reduction="none")
        return value(losses, torch.where(kept, scaled.logsumexp(1), 0), kept)

    _, expected = gradients_in_float64(truth, leaves)
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine.double() - theirs).norm() < 2e-5 * theirs.norm()
    with torch.no_grad():
        again = linear_cross_entropy(
            leaves[0], head, made.targets, impl="cce", reduction="none", temperature=temperature
        )
    torch.testing.assert_close(again, nll, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on_demand", [False, True])
def test_flat_tokens_of_an_adapted_head(on_demand, monkeypatch):
    """They are computed without the filter, next to the others."""
    monkeypatch.setattr(backward, "FLAT_SUPPORT", 100)
    monkeypatch.setattr(dispatch, "FILTER_TOLERANCE", 0.02)
    made, head, leaves, logits = adapted_case("one", on_demand)
    flat = [3, 17, 131]
    with torch.no_grad():
        leaves[0][flat] *= 0.01
    made.targets[flat] = 7
    with record_filter() as records:
        loss = linear_cross_entropy(
            leaves[0], head, made.targets, impl="cce", memory_budget=CHUNKS if on_demand else 2**28
        )
        ours = torch.autograd.grad(loss, leaves)
    assert (records[0].path, records[0].flat_tokens) == ("filtered", 3)
    _, expected = gradients_in_float64(
        lambda *wide: F.cross_entropy(logits(*wide), made.targets), leaves
    )
    for mine, truth in zip(ours, expected, strict=True):
        assert (mine.double() - truth).norm() < 0.02 * truth.norm()
    exact = expected[0][flat]
    assert (ours[0][flat] - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("kind", ["none", "two"])
def test_rows_on_demand_of_flat_data(kind):
    """All gradients are exact, made chunk by chunk, where the filter would keep too much."""
    made, head, leaves, logits = adapted_case(kind, on_demand=True)
    with torch.no_grad():
        leaves[0] *= 0.01
        leaves[1].zero_()
    with record_filter() as records:
        loss = linear_cross_entropy(leaves[0], head, made.targets, impl="cce", memory_budget=CHUNKS)
        ours = torch.autograd.grad(loss, leaves)
    assert [record.path for record in records] == ["dense"]
    _, expected = gradients_in_float64(
        lambda *wide: F.cross_entropy(logits(*wide), made.targets), leaves
    )
    for mine, truth in zip(ours, expected, strict=True):
        assert (mine.double() - truth).norm() < 1e-5 * truth.norm()


def test_rows_on_demand_of_several_superblocks(several_superblocks, monkeypatch):
    """With upstream gradients, a temperature, and strips that are stored in several parts."""
    stored, store = [], passes.strip_gradients

    def recorded(problem, tokens, strips, bias_grad):
        stored.append(strips.rectangle.blocks)
        return store(problem, tokens, strips, bias_grad)

    monkeypatch.setattr(passes, "strip_gradients", recorded)
    monkeypatch.setattr(passes, "STRIP_BYTES", 2**12)
    made, head, leaves, logits = adapted_case("one", on_demand=True)
    targets, upstream = made.targets, torch.linspace(0.5, 1, 150)
    temperature, kept = torch.linspace(0.9, 1.1, 150), made.targets != -100

    def value(loss, lse, kept):
        return (upstream * (torch.where(kept, loss, 0) + 0.1 * lse)).sum()

    with record_filter() as records:
        found = linear_cross_entropy(
            leaves[0],
            head,
            targets,
            impl="cce",
            reduction="none",
            return_lse=True,
            temperature=temperature,
            memory_budget=CHUNKS,
        )
        ours = torch.autograd.grad(value(*found, kept), leaves)
    assert [record.path for record in records] == ["filtered"]
    assert stored == [(0, 1), (1, 2)] * 2

    def truth(*wide):
        scaled = logits(*wide) / temperature[:, None]
        losses = F.cross_entropy(scaled, targets, reduction="none")
        return value(losses, torch.where(kept, scaled.logsumexp(1), 0), kept)

    _, expected = gradients_in_float64(truth, leaves)
    for mine, theirs in zip(ours, expected, strict=True):
        rounding = (theirs.bfloat16().double() - theirs).norm()
        assert (mine.double() - theirs).norm() <= 2 * rounding


def test_rows_on_demand_keep_nothing_of_their_size_for_the_backward():
    """Hooks of saved tensors, such as offloading, see no placeholder of the weight either."""
    made, head, leaves, _ = adapted_case("one", on_demand=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: sizes.append(x.numel()) or x, lambda x: x
    ):
        linear_cross_entropy(leaves[0], head, made.targets, impl="cce").backward()
    assert max(sizes) < made.c.numel()


def test_an_adapted_head_in_half_precision():
    made, _, (e, bias, a, b), _ = adapted_case("one")
    half = [x.detach().half().requires_grad_() for x in (e, bias, a, b)]
    head = Head(made.c.half(), half[1], low_rank=(LowRank(half[2], half[3], 2.0),))
    loss = linear_cross_entropy(half[0], head, made.targets, impl="cce_exact")
    ours = torch.autograd.grad(loss, half)
    matrix = made.c.half().double()

    def truth(e, bias, a, b):
        return F.cross_entropy(F.linear(e, matrix + 2 * b @ a, bias), made.targets)

    _, expected = gradients_in_float64(truth, half)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == torch.float16
        assert (mine.double() - theirs).norm() < 2e-3 * theirs.norm()


def test_an_adapted_head_refuses_a_weight_that_changes_before_the_backward():
    made, head, leaves, _ = adapted_case("one")
    loss = linear_cross_entropy(leaves[0], head, made.targets, impl="cce")
    made.c.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("kind", "impl"), [("rows_on_demand", "cce_exact"), ("dora", "cce")])
def test_a_head_with_trained_parts_makes_its_rows_twice(kind, impl, monkeypatch):
    """For the losses and for the gradients, in chunks of classes and of tokens."""
    monkeypatch.setattr(made_rows_pass, "FEWEST", 256)
    made = make_problem((300,), classes=1100, dim=32, bias=True, ignored=0.2)
    torch.manual_seed(1)
    make = lambda *shape: (torch.randn(*shape) / 4).requires_grad_()
    e, bias, source = made.e.requires_grad_(), made.bias.requires_grad_(), Stored(made.c)
    a, b, magnitude = make(4, 32), make(1100, 4), torch.rand(1100).requires_grad_()
    leaves = [e, bias, a, b]
    low_rank = LowRank(a, b, 0.5)
    if kind == "dora":
        leaves.append(magnitude)
        low_rank = LowRank(a, b, 0.5, magnitude=magnitude)
    head = Head(source, bias, low_rank=(low_rank,))
    temperature, upstream = torch.linspace(0.7, 1.4, 300), torch.randn(2, 300)
    with record_filter() as records:
        nll, lse = linear_cross_entropy(
            e,
            head,
            made.targets,
            impl=impl,
            reduction="none",
            return_lse=True,
            temperature=temperature,
            memory_budget=256 * 4 * (128 + 3 * 36),
        )
        ours = torch.autograd.grad((upstream * torch.stack([nll, lse])).sum(), leaves)
    assert [record.path for record in records] == ["exact"]
    # For DoRA also for the norms, and for the gradient of the scale of each class.
    assert torch.equal(source.made, torch.full((1100,), 4 if kind == "dora" else 2))

    def truth(e, bias, a, b, magnitude=None):
        matrix = made.c.double() + 0.5 * b @ a
        if magnitude is not None:
            matrix = (magnitude / matrix.norm(dim=1).detach())[:, None] * matrix
        logits = F.linear(e, matrix, bias) / temperature[:, None]
        losses = F.cross_entropy(logits, made.targets, reduction="none")
        found = torch.where(made.targets != -100, logits.logsumexp(1), 0)
        return (upstream * torch.stack([losses, found])).sum()

    _, expected = gradients_in_float64(truth, leaves)
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine.double() - theirs).norm() < 2e-5 * theirs.norm()


def test_smoothed_losses_of_a_head_with_trained_parts():
    """Both terms of the loss have a gradient by the parts, and either may come first.

    A backward that does not ask for these leaves nothing behind.
    """
    made = make_problem((20,), classes=300, dim=16, ignored=0.2)
    torch.manual_seed(1)
    make = lambda *shape: (torch.randn(*shape) / 4).requires_grad_()
    e, a, b, magnitude = made.e.requires_grad_(), make(4, 16), make(300, 4), make(300)
    head = Head(made.c, low_rank=(LowRank(a, b, 0.5, magnitude=magnitude),))
    leaves = (e, a, b, magnitude)
    loss = linear_cross_entropy(e, head, made.targets, impl="cce_exact", label_smoothing=0.3)

    def truth(e, a, b, magnitude):
        matrix = made.c.double() + 0.5 * b @ a
        matrix = (magnitude / matrix.norm(dim=1).detach())[:, None] * matrix
        return F.cross_entropy(e @ matrix.T, made.targets, label_smoothing=0.3)

    _, expected = gradients_in_float64(truth, leaves)
    for asked in ((e,), leaves, leaves):
        ours = torch.autograd.grad(loss, asked, retain_graph=True)
        for mine, theirs in zip(ours, expected, strict=False):
            assert (mine.double() - theirs).norm() < 2e-5 * theirs.norm()


def test_a_head_with_trained_parts_in_half_precision():
    """Gradients are scaled into the range of float16 while they are factors."""
    made = make_problem((150,), classes=600, dim=32, ignored=0.2)
    torch.manual_seed(1)
    e, a = made.e.half().requires_grad_(), (torch.randn(4, 32) / 4).half().requires_grad_()
    b, source = (torch.randn(600, 4) / 4).half().requires_grad_(), Stored(made.c.half())
    head = Head(source, low_rank=(LowRank(a, b),))
    loss = 2e-5 * linear_cross_entropy(e, head, made.targets, impl="cce_exact", reduction="sum")
    ours = torch.autograd.grad(1e5 * loss, (e, a, b))
    matrix = source.weight.double()

    def truth(e, a, b):
        logits = e @ (matrix + b @ a).T
        return 2 * F.cross_entropy(logits, made.targets, reduction="sum")

    _, expected = gradients_in_float64(truth, (e, a, b))
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == torch.float16
        assert (mine.double() - theirs).norm() < 2e-3 * theirs.norm()


def test_an_adapted_head_where_the_compiler_takes_no_second_product(monkeypatch):
    """The rows of weight and adapter are joined chunk by chunk there."""
    tiles = dataclasses.replace(block_sizes.tiles_on(torch.device("cpu")), adds_low_rank=False)
    monkeypatch.setattr(block_sizes, "tiles_on", lambda device: tiles)
    made, head, leaves, logits = adapted_case("one")
    loss = linear_cross_entropy(leaves[0], head, made.targets, impl="cce", memory_budget=2**18)
    ours = torch.autograd.grad(loss, leaves)
    _, expected = gradients_in_float64(
        lambda *wide: F.cross_entropy(logits(*wide), made.targets), leaves
    )
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine.double() - theirs).norm() < 2e-5 * theirs.norm()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_divergences_of_heads(beta):
    """The rows of both are made for a block of classes, and the gradient of theirs handed over."""
    made, _, leaves, logits = adapted_case("one")
    source = Stored(made.c)
    e, bias, a, b = leaves
    student = Head(source, bias, low_rank=(LowRank(a, b, 2.0),))
    x, weight = torch.randn(150, 32), torch.randn(made.c.shape[0], 32)
    down, up = torch.randn(4, 32), torch.randn(made.c.shape[0], 4)
    teacher = Head(weight, low_rank=(LowRank(down, up),), softcap=5.0)
    mask = made.targets != -100
    found = linear_divergence(
        e, student, x, teacher, beta=beta, mask=mask, impl="cce", memory_budget=2**19
    )
    divergence, entropy = found.divergence.sum(), found.student_entropy.sum()
    ours = torch.autograd.grad(divergence + 0.3 * entropy, leaves)
    assert source.made.min() == source.made.max()
    log_q = 5 * torch.tanh(x.double() @ (weight + up @ down).double().T / 5)
    log_q = log_q.log_softmax(1)[mask]

    def truth(*wide):
        log_p = logits(*wide).log_softmax(1)[mask]
        entropy = -(log_p.exp() * log_p).sum()
        return divergence_of_logprobs(log_p, log_q, beta).sum() + 0.3 * entropy

    expected_value, expected = gradients_in_float64(truth, leaves)
    torch.testing.assert_close((divergence + 0.3 * entropy).double(), expected_value, rtol=1e-5,
                               atol=1e-5)  # fmt: skip
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine.double() - theirs).norm() < 2e-5 * theirs.norm()
