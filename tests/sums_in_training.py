"""What a training loop does with a sum of losses whose gradients come from its forward.

Each use is a function of a loss of (e, c, bias) and of tensors for them; :data:`USES` has its
passes over the logits. Tests of the implementations call them on a CPU, interpreted, and on a GPU.
"""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from cut_cross_entropy import linear_cross_entropy
from tests.support import Problem, check_checkpoint, leaves_of

Loss = Callable[..., Tensor]

SUM, FORWARD, BACKWARD = "loss_and_gradients", "forward", "backward"
"""Names of the passes: the one of a sum, and those that compute the logits twice."""

USES: dict[str, tuple[Callable[[Loss, list[Tensor]], None], list[str]]] = {}


def use(*passes: str) -> Callable[[Callable[[Loss, list[Tensor]], None]], None]:
    """Register a use by its name, with the passes that it may take."""

    def register(function: Callable[[Loss, list[Tensor]], None]) -> None:
        USES[function.__name__] = function, list(passes)

    return register


def record_passes(monkeypatch: pytest.MonkeyPatch, *watched: tuple[object, tuple[str, ...]]):
    """Record the names of the functions of some modules that are called, in a list."""
    made = []

    def watch(module, name):
        function = getattr(module, name)

        def record(*arguments, **options):
            made.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, record)

    for module, names in watched:
        for name in names:
            watch(module, name)
    return made


def check_use(name: str, impl: str, problem: Problem, **options: object) -> list[str]:
    """Run a use with an implementation; return the passes that it may take."""
    check, passes = USES[name]

    def loss(e: Tensor, c: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(e, c, problem.targets, bias, impl=impl, **options)

    check(loss, leaves_of(problem))
    return passes


def assert_same_bits(found: object, expected: object) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@use(FORWARD)
def no_grad(loss, inputs):
    with torch.no_grad():
        assert not loss(*inputs).requires_grad


@use(FORWARD)
def inference_mode(loss, inputs):
    with torch.inference_mode():
        assert not loss(*inputs).requires_grad


@use(FORWARD)
def constants(loss, inputs):
    assert not loss(*(x.detach() for x in inputs)).requires_grad


@use(SUM, FORWARD)
def evaluation_between_steps(loss, inputs):
    """Of a model whose parameters ask for gradients; they are what the step before left."""
    model = nn.ParameterList([nn.Parameter(x.detach()) for x in inputs])
    step = loss(*model)
    step.backward()
    before = [x.grad.clone() for x in model]
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loss(*model), step.detach(), rtol=2e-5, atol=0)
    assert_same_bits([x.grad for x in model], before)


@use(SUM, SUM)
def thrown_away(loss, inputs):
    """A forward without a backward, as of an estimate of speed, leaves no memory behind."""
    loss(*inputs)
    if inputs[0].is_cuda:
        before = torch.cuda.memory_allocated()
        result = loss(*inputs)
        assert torch.cuda.memory_allocated() > before
        del result
        assert torch.cuda.memory_allocated() == before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = loss(*inputs)
        del result
        gc.collect()  # an interpreter of kernels leaves cycles
    events = [x for x in recorded.profiler.kineto_results.events() if x.name() == "[memory]"]
    assert max(x.nbytes() for x in events) >= inputs[1].numel() * 4
    assert sum(x.nbytes() for x in events) == 0
    assert all(x.grad is None for x in inputs)


@use(SUM, SUM, SUM, SUM)
def accumulated(loss, inputs):
    """Gradients of several steps add up in the parameters, by whichever factor each has."""
    once = torch.autograd.grad(loss(*inputs), inputs)
    for factor in (0.5, 0.25, 2.0):
        (factor * loss(*inputs)).backward()
    expected = [x * 0.5 + x * 0.25 + x * 2.0 for x in once]  # powers of two: rounded alike
    assert_same_bits([x.grad for x in inputs], expected)


@use(SUM)
def retained(loss, inputs):
    result = loss(*inputs)
    once = torch.autograd.grad(result, inputs, retain_graph=True)
    twice = torch.autograd.grad(2 * result, inputs, retain_graph=True)
    assert_same_bits(twice, [2 * x for x in once])
    assert_same_bits(torch.autograd.grad(result, inputs[2]), once[2:])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(result, inputs)


@use(SUM)
def differentiated_twice(loss, inputs):
    result = loss(*inputs)
    for each in inputs:
        (grad,) = torch.autograd.grad(result, each, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(grad.float().square().sum(), inputs[1])


@use(SUM)
def batched(loss, inputs):
    result, factors = loss(*inputs), torch.tensor([1.0, -2.0], device=inputs[0].device)
    (rows,) = torch.autograd.grad(
        result, inputs[1], factors, is_grads_batched=True, retain_graph=True
    )
    (once,) = torch.autograd.grad(result, inputs[1])
    assert torch.equal(rows, torch.stack([once, -2 * once]))


@use(SUM, FORWARD, SUM)  # the first for what is expected; a checkpoint's forward needs no gradients
def checkpointed(loss, inputs):
    check_checkpoint(lambda e, c, bias: loss(e * 2, c, bias), *inputs, use_reentrant=False)


@use(SUM, FORWARD, SUM)
def checkpointed_reentrant(loss, inputs):
    check_checkpoint(lambda e, c, bias: loss(e * 2, c, bias), *inputs, use_reentrant=True)


@use(SUM)
def hooked(loss, inputs):
    """Hooks of a tensor and of a parameter see each gradient once."""
    seen = []
    inputs[1].register_hook(lambda grad: seen.append(grad.clone()))
    inputs[1].register_post_accumulate_grad_hook(lambda x: seen.append(x.grad.clone()))
    loss(*inputs).backward()
    assert len(seen) == 2
    assert torch.equal(*seen)


@use(SUM, SUM)
def under_autocast(loss, inputs):
    """Products in half precision, gradients in float32: those of rounded inputs."""
    device = inputs[0].device.type
    half = torch.bfloat16 if device == "cuda" else torch.float16
    wide = [x.detach().float().requires_grad_() for x in inputs]
    narrow = [x.detach().to(half).requires_grad_() for x in inputs[:2]]
    with torch.autocast(device, half):
        found = torch.autograd.grad(loss(*wide), wide)
    assert {x.dtype for x in found} == {torch.float32}
    expected = torch.autograd.grad(loss(*narrow, wide[2]), [*narrow, wide[2]])
    assert_same_bits([x.to(y.dtype) for x, y in zip(found, expected, strict=True)], expected)


@use(*3 * (SUM,))
def repeated(loss, inputs):
    """The same bits from run to run."""
    first = torch.autograd.grad(loss(*inputs), inputs)
    for _ in range(2):
        assert_same_bits(torch.autograd.grad(loss(*inputs), inputs), first)
