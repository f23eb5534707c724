"""Heads on a GPU: the kernels against float64 autograd of full logits, and their peak memory."""

import pytest
import torch
import torch.nn.functional as F

from cut_cross_entropy import linear_cross_entropy, linear_divergence, record_filter
from cut_cross_entropy.benchmark.data import Shape, make
from cut_cross_entropy.heads import Head, LowRank
from cut_cross_entropy.heads import divergences as of_heads
from tests.kernels.gpu import DEVICE, relative_error, rounding_error
from training.losses import divergence

pytestmark = pytest.mark.gpu

SHAPE = Shape("test", 32768, 1024)
LARGE = Shape("large", 131072, 1024)
TOKENS = 1000  # the last block of 128 is not full
GROUP = 64  # numbers that share a scale
PART = 4096  # of these groups that are dequantised at a time
MIB = 2**20


class FourBits:
    """A weight in 4 bits with a scale for each GROUP numbers of a row, dequantised on demand."""

    def __init__(self, weight):
        self.shape, self.dtype, self.device = tuple(weight.shape), weight.dtype, weight.device
        self.code = torch.linspace(-1, 1, 16, device=weight.device).to(weight.dtype)
        self.per_row = self.shape[1] // GROUP
        groups = weight.reshape(-1, GROUP)
        self.scale = groups.abs().amax(1, keepdim=True)
        ids = ((groups / self.scale + 1) * 7.5).round().to(torch.uint8)
        self.packed = ids[:, ::2] * 16 + ids[:, 1::2]

    def rows(self, start, stop):
        rows = torch.empty((stop - start, self.shape[1]), dtype=self.dtype, device=self.device)
        here = slice(start * self.per_row, stop * self.per_row)
        parts = [x.split(PART) for x in (rows.view(-1, GROUP), self.packed[here], self.scale[here])]
        for groups, packed, scale in zip(*parts, strict=True):  # ids take 8 bytes each
            ids = torch.stack([packed >> 4, packed & 15], 2).flatten(1).long()
            torch.mul(self.code[ids], scale, out=groups)
        return rows


def rounded(values, dtype):
    """Round, with the gradient of values that are not."""
    return values + (values.to(dtype).double() - values).detach()


class Case:
    """A head, tensors that have a gradient, and the logits in float64 as a function of these.

    Args:
        kind: ``"lora"``, ``"two_adapters"`` with a bias and a softcap, ``"dora"``, ``"four_bits"``
            or ``"qlora"``.
        shape: V and D.
    """

    def __init__(self, kind, shape=SHAPE):
        made = make("structured", TOKENS, shape, device=DEVICE)
        self.targets = made.targets
        self.targets[::7] = -100
        weight = FourBits(made.c) if kind in ("four_bits", "qlora") else made.c
        generator = torch.Generator(DEVICE).manual_seed(1)

        def leaf(*size, scale):
            values = torch.randn(*size, device=DEVICE, generator=generator) * scale
            return values.to(made.e.dtype).requires_grad_()

        self.leaves, adapters, options = [made.e.requires_grad_()], (), {}
        if kind != "four_bits":
            for rank in (4, 17) if kind == "two_adapters" else (16,):
                a = leaf(rank, shape.dim, scale=shape.dim**-0.5)
                b = leaf(shape.num_classes, rank, scale=0.002)
                adapters += ((a, b),)
                self.leaves += [a, b]
        magnitude = bias = None
        if kind == "dora":
            magnitude = (1.1 * made.c.float().norm(dim=1)).requires_grad_()
            self.leaves.append(magnitude)
        if kind == "two_adapters":
            bias, options = leaf(shape.num_classes, scale=0.1), {"softcap": 20.0}
            self.leaves.append(bias)
        low_rank = tuple(LowRank(a, b, 2.0, magnitude=magnitude) for a, b in adapters)
        self.head, self.kind = Head(weight, bias, low_rank=low_rank, **options), kind

    def logits(self, e, *others):
        """The logits of leaves in float64, from factors that are rounded as the head's are."""
        weight, softcap = self.head.weight, self.head.softcap
        matrix = weight if isinstance(weight, torch.Tensor) else weight.rows(0, weight.shape[0])
        others, dtype, x = list(others), matrix.dtype, self.leaves[0]
        weight, scale = matrix.double(), None
        adapters = [(others.pop(0), others.pop(0)) for _ in self.head.low_rank]
        if self.kind == "dora":
            ((a, b),) = adapters
            scale = (others.pop() / (weight + 2 * b @ a).norm(dim=1).detach())[:, None]
            weight = rounded(scale * weight, dtype)
        logits = F.linear(e, weight, *others)
        for (a, b), low_rank in zip(adapters, self.head.low_rank, strict=True):
            hidden = 2 * F.linear(e, a)
            with torch.no_grad():
                error = 2 * F.linear(x, low_rank.a) - hidden
            rows = b if scale is None else rounded(scale * b, dtype)
            logits = logits + F.linear(hidden + error, rows)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def wide_leaves(self):
        return [x.detach().double().requires_grad_() for x in self.leaves]


KINDS = ("lora", "two_adapters", "dora", "four_bits", "qlora")


def assert_few_roundings(ours, exact, most=2.0):
    roundings = [
        relative_error(mine, truth) / rounding_error(truth)
        for mine, truth in zip(ours, exact, strict=True)
    ]
    assert max(roundings) <= most, roundings


@pytest.mark.parametrize("impl", ["cce", "cce_exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_mean(kind, impl):
    case = Case(kind)
    with record_filter() as records:
        loss = linear_cross_entropy(
            case.leaves[0], case.head, case.targets, impl=impl, memory_budget=16 * MIB
        )
        ours = torch.autograd.grad(loss, case.leaves)
    by_filter = impl == "cce" and kind != "dora"
    (record,) = records
    assert record.path in (("filtered", "dense") if by_filter else ("exact",))
    if kind in ("lora", "four_bits", "qlora") and by_filter:
        assert record.path == "filtered"
    wide = case.wide_leaves()
    expected = F.cross_entropy(case.logits(*wide), case.targets)
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-4)
    # Autograd adds what the weight and each adapter contribute to dE in bfloat16.
    most = 2.5 if kind == "two_adapters" else 2.0
    assert_few_roundings(ours, torch.autograd.grad(expected, wide), most)


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_losses_of_tokens(kind):
    """With a temperature, and upstream gradients of both results."""
    case = Case(kind)
    generator = torch.Generator(DEVICE).manual_seed(2)
    temperature = torch.rand(TOKENS, device=DEVICE, generator=generator) + 0.7
    upstream = torch.rand(2, TOKENS, device=DEVICE, generator=generator)
    found = linear_cross_entropy(
        case.leaves[0],
        case.head,
        case.targets,
        impl="cce",
        reduction="none",
        return_lse=True,
        temperature=temperature,
        memory_budget=16 * MIB,
    )
    ours = torch.autograd.grad((upstream * torch.stack(found)).sum(), case.leaves)
    wide = case.wide_leaves()
    logits = case.logits(*wide) / temperature[:, None]
    lse = torch.where(case.targets != -100, logits.logsumexp(1), 0)
    expected = F.cross_entropy(logits, case.targets, reduction="none"), lse
    for mine, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=4e-6, atol=2e-4)
    exact = torch.autograd.grad((upstream * torch.stack(expected)).sum(), wide)
    assert_few_roundings(ours, exact)


@pytest.mark.parametrize("kind", ["lora", "four_bits", "qlora"])
def test_peak_memory(kind):
    """No copy of the weight, nor half of one: gradients, one chunk of rows, and small change."""
    case, budget = Case(kind, LARGE), 48 * MIB

    def step():
        loss = linear_cross_entropy(
            case.leaves[0], case.head, case.targets, impl="cce", memory_budget=budget
        )
        torch.autograd.grad(loss, case.leaves)

    step()  # compiles, and lets the library take its workspace
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = sum(2 * x.numel() * x.element_size() for x in case.leaves)
    assert peak <= budget + gradients + 16 * MIB
    assert peak < LARGE.num_classes * LARGE.dim * 2 / 2


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_divergences(beta):
    """Rows of both heads are made in blocks; a teacher that is close, as in training."""
    student, teacher = Case("qlora"), Case("lora")
    noise = torch.randn_like(teacher.leaves[0], dtype=torch.float32)
    with torch.no_grad():
        teacher.leaves[0] += 0.1 * teacher.leaves[0].float().std() * noise
    mask = student.targets != -100
    found = linear_divergence(
        student.leaves[0], student.head, teacher.leaves[0], teacher.head, beta=beta, mask=mask,
        memory_budget=32 * MIB,
    ).divergence  # fmt: skip
    ours = torch.autograd.grad(found.sum() / mask.sum(), student.leaves)
    wide = student.wide_leaves()
    log_p = student.logits(*wide).log_softmax(1)
    log_q = teacher.logits(*teacher.wide_leaves()).detach().log_softmax(1)
    expected = torch.where(mask, divergence(log_p, log_q, beta), 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-4)
    assert_few_roundings(ours, torch.autograd.grad(expected.sum() / mask.sum(), wide))


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("has_matrix", [False, True])
def test_mean_of_divergences(has_matrix, beta, monkeypatch):
    """In the forward: of a frozen student in 4 bits, and of one whose matrix trains."""
    needed = []
    choose = of_heads.needed_in_the_forward
    monkeypatch.setattr(
        of_heads, "needed_in_the_forward", lambda *x: needed.append(choose(*x)) or needed[-1]
    )
    student, teacher = Case("four_bits"), Case("qlora")
    noise = torch.randn_like(teacher.leaves[0], dtype=torch.float32)
    with torch.no_grad():
        teacher.leaves[0] += 0.1 * teacher.leaves[0].float().std() * noise
    head, leaves = student.head, list(student.leaves)
    matrix = head.weight.rows(0, SHAPE.num_classes).requires_grad_()
    if has_matrix:
        head, leaves = matrix, [*leaves, matrix]
    mask = student.targets != -100
    found = linear_divergence(
        leaves[0], head, teacher.leaves[0], teacher.head, beta=beta, mask=mask, reduction="mean",
        memory_budget=512 * MIB,
    ).divergence  # fmt: skip
    assert (needed[0].e, needed[0].c) == (True, has_matrix)
    ours = torch.autograd.grad(found, leaves)
    wide = [x.detach().double().requires_grad_() for x in (leaves[0], matrix)]
    log_p = F.linear(*wide).log_softmax(1)
    log_q = teacher.logits(*teacher.wide_leaves()).detach().log_softmax(1)
    expected = torch.where(mask, divergence(log_p, log_q, beta), 0).sum() / mask.sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-4)
    assert_few_roundings(ours, torch.autograd.grad(expected, wide[: len(leaves)]))
