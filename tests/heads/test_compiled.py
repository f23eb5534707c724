"""Heads in compiled code: left out of its graph, or joined where there is to be one graph."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cut_cross_entropy import linear_cross_entropy, linear_divergence, token_logprobs
from cut_cross_entropy.heads import Head, LowRank, compiled
from cut_cross_entropy.heads.compiled import joined
from tests.heads.test_heads import BUDGET, Case

CALLS = {
    "loss": lambda e, head, targets: linear_cross_entropy(e, head, targets, memory_budget=BUDGET),
    "logprobs": lambda e, head, targets: token_logprobs(
        e, head, targets, outputs=("entropy",), memory_budget=BUDGET
    ).logprobs.mean(),
    "divergence": lambda e, head, targets: linear_divergence(
        e, head, e.detach() * 1.1, head.weight, mask=targets != -100, memory_budget=BUDGET
    ).divergence.sum(),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def graphs_of(name, case, **options):
    """Count the graphs of code that is compiled; its value and gradients are those without."""

    def value(e):
        return 2 * CALLS[name](e.tanh(), case.head, case.targets)

    expected = value(case.e)
    counter = CompileCounterWithBackend("aot_eager")
    found = torch.compile(value, backend=counter, **options)(case.e)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pairs = zip(
        *(torch.autograd.grad(x, case.leaves, allow_unused=True) for x in (found, expected)),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    return counter.frame_count


@pytest.mark.parametrize(
    ("name", "kind"),
    [("loss", "rows_on_demand"), ("loss", "dora"), ("logprobs", "lora"), ("divergence", "frozen")],
)
def test_the_call_is_left_out_of_the_graph(name, kind):
    """The graph is what is before, and what is behind; a part that trains loses no gradient."""
    assert graphs_of(name, Case(kind)) > 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [("loss", "dora"), ("loss", "two_adapters"), ("logprobs", "frozen"), ("divergence", "frozen")],
)
def test_tensors_are_joined_for_a_single_graph(name, kind):
    assert graphs_of(name, Case(kind), fullgraph=True) == 1


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["lora", "matrix"])
def test_exported(name, strict, kind):
    """``torch.export`` has a graph and, unless it is strict, no compiler that could break it."""
    case = Case("lora")
    with torch.no_grad():
        low = case.head.low_rank[0]
        tensors = [x.clone() for x in (case.e, case.head.weight, low.a, low.b)]

    class Loss(torch.nn.Module):
        def forward(self, e, weight, a, b):
            head = Head(weight, low_rank=[LowRank(a, b, 0.5)]) if kind == "lora" else Head(weight)
            return CALLS[name](e, head, case.targets)

    program = torch.export.export(Loss(), tuple(tensors), strict=strict)
    other = [x + 0.1 for x in tensors]
    torch.testing.assert_close(program.module()(*other), Loss()(*other), rtol=1e-12, atol=1e-12)


def test_a_compiler_that_does_not_say_what_it_wants(monkeypatch):
    """The question is asked of names of PyTorch that are not public."""
    monkeypatch.delattr(torch._dynamo.symbolic_convert, "InstructionTranslator")
    assert not compiled._wants_one_graph()


def test_rows_on_demand_and_a_single_graph():
    case = Case("rows_on_demand")
    call = torch.compile(CALLS["loss"], backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        call(case.e, case.head, case.targets)
    with pytest.raises(NotImplementedError, match="compile with fullgraph=False, which leaves the"):
        joined(
            case.head.products(case.e), torch.float64
        )  # what newer releases of PyTorch say is the reason


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_head_that_compiled_code_makes(kind, fullgraph):
    case = Case(kind)
    head = case.head

    def value(e):
        made = Head(head.weight * 1, head.bias, low_rank=head.low_rank, softcap=9.0)
        return linear_cross_entropy(e, made, case.targets, memory_budget=BUDGET)

    expected = value(case.e)
    found = torch.compile(value, backend="aot_eager", fullgraph=fullgraph)(case.e)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pairs = zip(*(torch.autograd.grad(x, case.leaves) for x in (found, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_adapters_in_float32_leave_the_products_in_half_precision():
    case = Case("frozen", torch.float32)
    weight = case.head.weight.to(torch.bfloat16)
    head = Head(weight, low_rank=case.head.low_rank)
    e = case.e.detach().to(torch.bfloat16).requires_grad_()
    leaves = [e, head.low_rank[0].a, head.low_rank[0].b]
    dtypes = set()

    def backend(graph, inputs):
        joins = [x for x in graph.graph.nodes if x.target is torch.cat]
        dtypes.update(x.meta["example_value"].dtype for x in joins)
        return graph.forward

    def value(e):
        return linear_cross_entropy(e, head, case.targets, memory_budget=BUDGET)

    found, expected = torch.compile(value, backend=backend, fullgraph=True)(e), value(e)
    assert dtypes == {torch.bfloat16}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    pairs = zip(*(torch.autograd.grad(x, leaves) for x in (found, expected)), strict=True)
    for ours, theirs in pairs:
        assert (ours - theirs).norm() <= 0.01 * theirs.norm()
