"""Heads by chunks of classes: the numbers of PyTorch's autograd in float64, and their memory."""

import gc
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from cut_cross_entropy import (
    LinearCrossEntropy,
    arguments,
    linear_cross_entropy,
    token_logprobs,
)
from cut_cross_entropy.heads import Head, LowRank, RowSource
from cut_cross_entropy.implementations.blocks import Blocks
from tests.largest import Largest
from tests.support import IMPLS

N, D, V, R = 23, 16, 1000, 4
BUDGET = 200 * 2**10  # eight chunks of 128 classes


class Halved:
    """Rows on demand: twice what is stored, so that nobody can use what is stored."""

    def __init__(self, weight):
        self.half = (weight / 2).detach()
        self.shape, self.dtype, self.device = tuple(weight.shape), weight.dtype, weight.device
        self.largest = 0

    def rows(self, start, stop):
        self.largest = max(self.largest, stop - start)
        return self.half[start:stop] * 2


class Case:
    """A head, the matrix that it stands for, and the tensors that have a gradient."""

    def __init__(self, kind, dtype=torch.float64):
        torch.manual_seed(0)
        make = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)
        self.e, self.targets = make(2, N, D), torch.randint(0, V, (2, N))
        self.targets[0, 3:6] = -100
        weight = make(V, D)
        self.bias, a, b, a2, b2 = make(V), make(R, D), make(V, R), make(2, D), make(V, 2)
        scale, magnitude = make(V), make(V)
        self.leaves = [self.e, self.bias]
        source, low_rank, class_scale = weight, (), None
        self.matrix = lambda: weight
        if kind == "frozen":
            weight.requires_grad_(False)
        elif kind == "rows_on_demand":
            source = Halved(weight)
            weight.requires_grad_(False)
        if kind != "plain":
            low_rank = (LowRank(a, b, 0.5),)
            self.leaves += [a, b]
            self.matrix = lambda: weight + 0.5 * b @ a
        if kind == "two_adapters":
            low_rank += (LowRank(a2, b2, 2.0),)
            self.leaves += [a2, b2]
            self.matrix = lambda: weight + 0.5 * b @ a + 2 * b2 @ a2
        elif kind == "class_scale":
            class_scale = scale
            self.leaves.append(scale)
            self.matrix = lambda: scale[:, None] * (weight + 0.5 * b @ a)
        elif kind == "dora":
            low_rank = (LowRank(a, b, 0.5, magnitude=magnitude),)
            self.leaves.append(magnitude)

            def dora():
                merged = weight + 0.5 * b @ a
                return (magnitude / merged.norm(dim=1).detach())[:, None] * merged

            self.matrix = dora
        if weight.requires_grad:
            self.leaves.append(weight)
        self.head = Head(source, self.bias, class_scale, low_rank, logit_scale=0.7, softcap=9.0)

    def logits(self):
        return 9 * torch.tanh(F.linear(self.e, self.matrix(), self.bias) * 0.7 / 9)

    def loss(self):
        return F.cross_entropy(self.logits().flatten(0, 1), self.targets.flatten())

    def gradients(self, value):
        return torch.autograd.grad(value, self.leaves)


KINDS = ("plain", "lora", "frozen", "rows_on_demand", "two_adapters", "class_scale", "dora")


def assert_equal(case, value, expected):
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(case.gradients(value), case.gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss(kind, impl):
    case = Case(kind)
    loss = linear_cross_entropy(case.e, case.head, case.targets, impl=impl, memory_budget=BUDGET)
    assert_equal(case, loss, case.loss())


def test_a_head_that_is_a_matrix_takes_no_chunks(monkeypatch):
    """Loss and gradients have the same bits as without a head, and the same route."""
    monkeypatch.setattr(arguments, "ClassRows", None)
    case = Case("plain", torch.float32)
    head = Head(case.head.weight, case.bias, softcap=9.0)
    leaves = [case.e, case.head.weight, case.bias]
    loss = linear_cross_entropy(case.e, head, case.targets)
    expected = linear_cross_entropy(case.e, head.weight, case.targets, case.bias, softcap=9.0)
    assert loss == expected
    pairs = zip(*(torch.autograd.grad(x, leaves) for x in (loss, expected)), strict=True)
    assert all(ours.equal(theirs) for ours, theirs in pairs)


def test_the_options_of_a_loss():
    case = Case("lora")
    generator = torch.Generator().manual_seed(1)
    class_weights = torch.rand(V, generator=generator, dtype=torch.float64)
    temperature = torch.rand(2, N, generator=generator, dtype=torch.float64) + 0.5
    loss_function = LinearCrossEntropy(
        shift=1, label_smoothing=0.1, class_weights=class_weights, memory_budget=BUDGET
    )
    shifted = case.logits()[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(
        shifted, case.targets[:, 1:].flatten(), class_weights, label_smoothing=0.1
    )
    assert_equal(case, loss_function(case.e, case.head, case.targets), expected)
    per_token, lse = linear_cross_entropy(
        case.e,
        case.head,
        case.targets,
        reduction="none",
        return_lse=True,
        temperature=temperature,
        memory_budget=BUDGET,
    )
    logits = case.logits() / temperature[..., None]
    kept = case.targets != -100
    expected_lse = torch.where(kept, logits.logsumexp(-1), 0)
    nll = F.cross_entropy(logits.flatten(0, 1), case.targets.flatten(), reduction="none")
    upstream = torch.randn(2, N, generator=generator, dtype=torch.float64)
    value = (upstream * (per_token + 0.1 * lse)).sum()
    assert_equal(case, value, (upstream * (nll.view(2, N) + 0.1 * expected_lse)).sum())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_outputs_of_tokens(kind):
    case = Case(kind)
    candidates = torch.randint(0, V, (2, N, 5))
    candidates[0, 0, 2] = -1
    found = token_logprobs(
        case.e,
        case.head,
        case.targets,
        outputs=("lse", "entropy", "mean_logit", "log_sum_sq", "rank", "max_logit"),
        candidates=candidates,
        top_k=3,
        memory_budget=BUDGET,
    )
    logits = case.logits()
    logprobs, kept = logits.log_softmax(-1), case.targets != -100
    targets = case.targets.clamp_min(0)[..., None]
    expected = {
        "logprobs": logprobs.gather(-1, targets)[..., 0],
        "lse": logits.logsumexp(-1),
        "entropy": -(logprobs.exp() * logprobs).sum(-1),
        "mean_logit": logits.mean(-1),
        "log_sum_sq": (2 * logprobs).logsumexp(-1),
        "max_logit": logits.amax(-1),
        "rank": (logits > logits.gather(-1, targets)).sum(-1).int(),
        "top_ids": logits.topk(3).indices,
        "top_logprobs": logprobs.topk(3).values,
        "candidate_logprobs": torch.where(
            candidates >= 0, logprobs.gather(-1, candidates.clamp_min(0)), 0
        ),
    }
    total = expected_total = 0
    for i, (name, values) in enumerate(expected.items()):
        ours = getattr(found, name)
        torch.testing.assert_close(ours[kept], values[kept], rtol=1e-10, atol=1e-11)
        assert not ours[~kept].any(), name
        if ours.requires_grad:
            total = total + (i + 1) * ours.sum()
            expected_total = expected_total + (i + 1) * values[kept].sum()
    assert_equal(case, total, expected_total)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_more_of_the_likeliest_classes_than_the_last_chunk_has(impl):
    torch.manual_seed(0)
    e, weight, a, b = torch.randn(3, 8), torch.randn(130, 8), torch.randn(2, 8), torch.randn(130, 2)
    head = Head(weight, low_rank=(LowRank(a, b),))
    targets = torch.tensor([1, 129, -100])
    found = token_logprobs(e, head, targets, top_k=5, memory_budget=1, impl=impl)
    expected = F.linear(e, weight + b @ a).topk(5).indices
    assert torch.equal(found.top_ids[:2], expected[:2])


def test_normalised_over_a_support():
    case = Case("lora")
    support = torch.cat([case.targets[..., None], torch.randint(0, V, (2, N, 6))], -1)
    support = torch.where(case.targets[..., None] == -100, -1, support)
    found = token_logprobs(case.e, case.head, case.targets, support=support, memory_budget=BUDGET)
    kept = case.targets != -100
    masked = torch.full((2, N, V), -torch.inf, dtype=torch.float64)
    masked = masked.scatter(-1, support.clamp_min(0), 0.0)
    expected = (case.logits() + masked).log_softmax(-1)
    expected = expected.gather(-1, case.targets.clamp_min(0)[..., None])[..., 0][kept]
    assert_equal(case, found.logprobs.sum(), expected.sum())


@pytest.mark.parametrize("magnitude", [False, True])
def test_dropout_of_an_adapter(magnitude):
    """The mask is that of the same call; the embeddings of the weight are not dropped."""
    case = Case("dora" if magnitude else "lora")
    adapter = case.head.low_rank[0]
    masks = []

    def dropout(x):
        masks.append(torch.rand_like(x) < 0.5)
        return x * masks[-1] * 2

    low = LowRank(adapter.a, adapter.b, adapter.scale, dropout, adapter.magnitude)
    head = Head(case.head.weight, case.bias, low_rank=(low,))
    loss = linear_cross_entropy(case.e, head, case.targets, memory_budget=BUDGET)
    assert len(masks) == 1
    dropped = case.e * masks[0] * 2
    weight, hidden = head.weight, 0.5 * F.linear(F.linear(dropped, adapter.a), adapter.b)
    logits = F.linear(case.e, weight, case.bias) + hidden
    if magnitude:
        norm = (weight + 0.5 * adapter.b @ adapter.a).norm(dim=1).detach()
        factor = adapter.magnitude / norm
        logits = F.linear(case.e, weight, case.bias) + factor * hidden
        logits = logits + (factor - 1) * F.linear(dropped, weight)
    expected = F.cross_entropy(logits.flatten(0, 1), case.targets.flatten())
    assert_equal(case, loss, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_the_logits_of_pytorch(dtype):
    case = Case("frozen")
    losses = F.cross_entropy(case.logits().flatten(0, 1), case.targets.flatten(), reduction="none")
    exact = [losses.detach(), *case.gradients(losses.mean())]
    half = Case("frozen", torch.float32)
    half.targets = case.targets
    with torch.no_grad():
        for ours, other in zip(half.leaves, case.leaves, strict=True):
            ours.copy_(other)
        half.head.weight.copy_(case.head.weight)

    def results(losses):
        return [x.double() for x in (losses.detach(), *half.gradients(losses.mean()))]

    with torch.autocast("cpu", dtype):
        ours = results(
            linear_cross_entropy(
                half.e, half.head, half.targets, memory_budget=BUDGET, reduction="none"
            ).flatten()
        )
        logits = F.linear(half.e, half.head.weight, half.bias)
        adapter = half.head.low_rank[0]
        logits = logits + 0.5 * F.linear(F.linear(half.e, adapter.a), adapter.b)
        logits = 9 * torch.tanh(logits * 0.7 / 9)
        plain = results(
            F.cross_entropy(logits.float().flatten(0, 1), half.targets.flatten(), reduction="none")
        )
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        # Both round weight, hidden states and adapter: that is most of either error.
        assert (mine - truth).norm() <= 1.1 * (theirs - truth).norm() + 1e-6 * truth.norm()


def test_nothing_is_left_when_the_graph_is_gone():
    case = Case("dora")
    loss = linear_cross_entropy(case.e, case.head, case.targets, memory_budget=BUDGET)
    state = weakref.ref(_rows_of_graph(loss))
    loss.backward()
    del loss
    gc.collect()
    assert state() is None


def _rows_of_graph(loss):
    """The object that makes the rows of chunks, found from the graph of a loss."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "rows"):
            return node.rows
        nodes += [following for following, _ in node.next_functions]
    raise AssertionError("no chunk of rows in the graph")


def test_the_backward_may_run_twice_and_for_some_tensors_only():
    case = Case("lora")
    loss = linear_cross_entropy(case.e, case.head, case.targets, memory_budget=BUDGET)
    expected = case.gradients(case.loss())
    first = torch.autograd.grad(loss, case.leaves, retain_graph=True)
    torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-12)
    (grad_b,) = torch.autograd.grad(loss, [case.head.low_rank[0].b], retain_graph=True)
    torch.testing.assert_close(grad_b, expected[3], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(case.gradients(loss), expected, rtol=1e-10, atol=1e-12)


def test_a_part_that_changes_before_the_backward():
    case = Case("lora")
    loss = linear_cross_entropy(case.e, case.head, case.targets, memory_budget=BUDGET)
    with torch.no_grad():
        case.head.low_rank[0].b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", ["frozen", "rows_on_demand"])
def test_no_tensor_of_the_size_of_the_weight(kind):
    """Forward and backward: the largest is the gradient of an adapter, or a chunk."""
    case = Case(kind)
    with Largest() as largest:
        loss = linear_cross_entropy(case.e, case.head, case.targets, memory_budget=BUDGET)
        loss.backward()
    assert largest.elements <= max(V * R, 128 * (D + R) + 2 * N * 128)
    assert largest.elements < V * D / 2
    if kind == "rows_on_demand":
        assert case.head.weight.largest == 128


@pytest.mark.parametrize("kind", ["frozen", "lora"])
def test_a_frozen_weight_costs_no_product_for_its_gradient(kind, monkeypatch):
    case = Case(kind)
    product, shapes = Blocks.product, set()

    def counted(self, left, right):
        shapes.add((left.shape[0], right.shape[1]))
        return product(self, left, right)

    monkeypatch.setattr(Blocks, "product", counted)
    linear_cross_entropy(case.e, case.head, case.targets, memory_budget=BUDGET).backward()
    columns = R if kind == "frozen" else D + R
    chunks = {128, V % 128}
    assert {shape for shape in shapes if shape[0] in chunks} == {(n, columns) for n in chunks}


def test_a_source_of_rows_is_a_protocol():
    assert isinstance(Halved(torch.zeros(3, 2)), RowSource)
    assert not isinstance(torch.nn.Linear(2, 3), RowSource)


def lora(a=(2, 5), b=(3, 2), dtype=torch.float32, device="cpu", **options):
    parts = (torch.zeros(shape, dtype=dtype, device=device) for shape in (a, b))
    return Head(torch.zeros(3, 5), low_rank=(LowRank(*parts, **options),))


WEIGHT = torch.zeros(3, 2)
FLOATS = "must be one of torch.float32, torch.bfloat16, torch.float16, torch.float64"
BAD = {
    "weight must be a torch.Tensor": lambda: Head(torch.nn.Linear(3, 4)),
    "weight must have shape (V, D)": lambda: Head(torch.zeros(3)),
    "dtype of weight must be a floating point": lambda: Head(torch.zeros(3, 4, dtype=torch.int8)),
    "bias must have shape (3,), got (4,)": lambda: Head(WEIGHT, torch.zeros(4)),
    "bias must be a torch.Tensor, got float": lambda: Head(WEIGHT, 1.0),
    "bias must be on the device of weight, cpu, got meta": lambda: Head(
        WEIGHT, torch.zeros(3, device="meta")
    ),
    f"the dtype of class_scale {FLOATS}, got torch.int64": lambda: Head(
        WEIGHT, class_scale=torch.ones(3).long()
    ),
    "low_rank must be a tuple, got LowRank": lambda: Head(
        WEIGHT, low_rank=LowRank(torch.zeros(2, 5), torch.zeros(3, 2))
    ),
    "low_rank[0] must be a LowRank, got tuple": lambda: Head(
        WEIGHT, low_rank=((torch.zeros(2, 5), torch.zeros(3, 2)),)
    ),
    "low_rank[0].b must have shape (3, 2), got (3, 1)": lambda: lora(b=(3, 1)),
    "low_rank[0].a must have shape (r, D), r > 0, got (5,)": lambda: lora(a=(5,)),
    "low_rank[0].a must have shape (r, D), r > 0, got (0, 5)": lambda: lora(a=(0, 5), b=(3, 0)),
    "low_rank[0].a must be on the device of weight, cpu, got meta": lambda: lora(device="meta"),
    f"the dtype of low_rank[0].a {FLOATS}, got torch.int32": lambda: lora(dtype=torch.int32),
    f"the dtype of low_rank[0].magnitude {FLOATS}, got torch.int64": lambda: lora(
        magnitude=torch.ones(3).long()
    ),
    "scale must be a float, got str": lambda: lora(scale="2"),
    "scale must be a finite float, got nan": lambda: lora(scale=float("nan")),
    "dropout must be a function of the embeddings, such as an nn.Dropout, got float": lambda: lora(
        dropout=0.1
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_a_head_that_does_not_fit(message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        BAD[message]()


@pytest.mark.parametrize(
    ("made", "got"),
    [
        (torch.zeros(3, 3), r"\(3, 3\) on cpu"),
        (torch.zeros(3, 2, device="meta"), r"\(3, 2\) on meta"),
        (None, "NoneType"),
    ],
)
def test_rows_that_do_not_fit(made, got):
    source = Halved(torch.zeros(3, 2))
    source.rows = lambda start, stop: made
    e, targets = torch.zeros(4, 2), torch.zeros(4).long()
    message = rf"rows\(0, 3\) of Halved must be a tensor \(3, 2\) on cpu, got {got}"
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(e, Head(source), targets)


def test_a_row_source_may_leave_out_the_index_of_its_device():
    """As ``torch.device("cuda")`` does; tensors there say which one they are on, or the reverse."""
    weight, a, b = torch.randn(3, 2), torch.randn(1, 2), torch.randn(3, 1)
    source = Halved(weight)
    source.device = torch.device("cpu", 0)
    e, targets = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    losses = [
        linear_cross_entropy(e, Head(rows, low_rank=(LowRank(a, b),)), targets)
        for rows in (source, Halved(weight))
    ]
    assert torch.equal(*losses)


def test_a_magnitude_and_another_adapter():
    adapter = LowRank(torch.zeros(2, 5), torch.zeros(3, 2), magnitude=torch.ones(3))
    with pytest.raises(NotImplementedError, match="must be the only one of a head, got 2"):
        Head(torch.zeros(3, 5), low_rank=(adapter, adapter))


@pytest.mark.parametrize(
    "option", [{"bias": torch.zeros(V)}, {"softcap": 3.0}, {"logit_scale": 2.0}]
)
def test_options_that_the_head_has_itself(option):
    case = Case("lora", torch.float32)
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} must not be given in addition to a Head"):
        linear_cross_entropy(case.e, case.head, case.targets, **option)


def test_a_target_out_of_range():
    case = Case("lora")
    case.targets[1, 1] = V
    with pytest.raises(ValueError, match="targets"):
        linear_cross_entropy(case.e, case.head, case.targets)


def test_features_that_do_not_fit():
    case = Case("plain", torch.float32)
    with pytest.raises(ValueError, match="e and c must agree in their last dimension"):
        linear_cross_entropy(case.e[..., :-1], case.head, case.targets)


def test_what_a_head_cannot_be_combined_with():
    case = Case("lora", torch.float32)
    loss = lambda e: linear_cross_entropy(e, case.head, case.targets)
    with pytest.raises(NotImplementedError, match=r"a Head cannot be transformed by torch\.func"):
        torch.func.grad(loss)(case.e.detach())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_within_a_checkpoint(use_reentrant):
    case = Case("dora")

    def loss(e):
        return linear_cross_entropy(e, case.head, case.targets, memory_budget=BUDGET)

    value = torch.utils.checkpoint.checkpoint(loss, case.e, use_reentrant=use_reentrant)
    value.backward()
    expected = case.gradients(case.loss())
    for leaf, grad in zip(case.leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-10, atol=1e-12)


def test_without_gradients():
    case = Case("lora")
    with torch.no_grad():
        loss = linear_cross_entropy(case.e, case.head, case.targets, memory_budget=BUDGET)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, case.loss().detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("leading", [(0,), (3,)], ids=["empty", "all_ignored"])
def test_no_token_that_counts(leading):
    """The loss is 0, and so are the gradients, which exist."""
    case = Case("lora")
    e = torch.randn(*leading, D, dtype=torch.float64, requires_grad=True)
    targets = torch.full(leading, -100)
    loss = linear_cross_entropy(e, case.head, targets, memory_budget=BUDGET)
    assert loss == 0
    loss.backward()
    assert not e.grad.any()
    assert not case.head.low_rank[0].b.grad.any()
