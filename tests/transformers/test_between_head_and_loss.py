"""Between head and loss: whatever a model does there, its numbers are those of the unpatched one.

Every case is a forward of its own, run in float64 with and without the patch. The loss and every
gradient have to agree, and whether logits were made in full is held too.
"""

import copy
import types
import warnings
from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass
from typing import Any

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint

from cut_cross_entropy.lazy.logits import LazyLogits
from cut_cross_entropy.transformers import CutCrossEntropyWarning, call_count, cce_patch
from tests.transformers.models import SIZES, VOCAB, batch


def model_with(forward: Any) -> Any:
    """A model whose loss is ``forward(model, hidden, labels)``, with more that trains."""

    class Model(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.temperature = torch.nn.Parameter(torch.tensor(1.7))
            self.scale = torch.nn.Parameter(torch.tensor([2.3]))
            self.vector = torch.nn.Parameter(torch.linspace(-1, 1, VOCAB))

        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
            return forward(self, hidden, labels)

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1})
    return Model(config).double().train()


def step(model):
    """Loss, gradients, and the warnings of the package."""
    model.zero_grad(set_to_none=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = model(**batch())
        loss.backward()
    said = [str(w.message) for w in caught if w.category is CutCrossEntropyWarning]
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, said


def ids(labels):
    return labels.flatten().clamp_min(0)


def ce(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), ids(labels))


def assert_same(expected, actual):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-10, atol=0)
    assert expected[1].keys() == actual[1].keys()
    assert any(grad is not None and grad.any() for grad in expected[1].values())
    for name, grad in expected[1].items():
        if grad is None:
            assert actual[1][name] is None, name
        else:
            torch.testing.assert_close(actual[1][name], grad, rtol=1e-9, atol=1e-10, msg=name)


class Fused(torch.autograd.Function):
    """A loss that computes its gradient in its forward."""

    @staticmethod
    def forward(ctx, logits, targets):
        grad = torch.softmax(logits, -1)
        loss = -grad.gather(1, targets[:, None]).log().mean()
        grad.scatter_add_(1, targets[:, None], grad.new_full((len(targets), 1), -1))
        ctx.save_for_backward(grad / len(targets))
        return loss

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


class FusedInPlace(torch.autograd.Function):
    """The same in the memory of the logits."""

    @staticmethod
    def forward(ctx, logits, targets):
        probabilities = torch.softmax(logits, -1)
        loss = -probabilities.gather(1, targets[:, None]).log().mean()
        logits.copy_(probabilities)
        logits.scatter_add_(1, targets[:, None], probabilities.new_full((len(targets), 1), -1))
        ctx.save_for_backward(logits.detach())
        return loss

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0] / len(ctx.saved_tensors[0]), None


def identity(forward):
    """A function with a gradient that is not that of its forward."""
    return type(
        "Scaled",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda ctx, x: forward(x)),
            "backward": staticmethod(lambda ctx, grad: grad * 0.1),
        },
    )


def fused(logits, labels, function=Fused):
    return function.apply(logits.view(-1, VOCAB), ids(labels))


def without_grad(function):
    def run(model, hidden, labels):
        with torch.no_grad():
            result = function(model, hidden, labels)
        return result

    return run


def head_without_grad(model, hidden, labels):
    with torch.no_grad():
        logits = model.lm_head(hidden)
    return ce(logits * model.scale, labels) + ce(model.lm_head(hidden), labels)


def loss_without_grad(model, hidden, labels):
    logits = model.lm_head(hidden)
    with torch.no_grad():
        log = ce(logits, labels)
    assert not log.requires_grad
    return ce(logits, labels) + 0 * log


def operations_without_grad(model, hidden, labels):
    logits = model.lm_head(hidden)
    with torch.no_grad():
        scaled, cast = logits * model.scale, logits.float().double()
        shifted = logits + model.vector
    assert not any(x.requires_grad for x in (scaled, cast, shifted))
    return ce(logits + 0.5 * scaled, labels) + ce((cast + shifted) * model.scale, labels)


def changed_afterwards(model, hidden, labels):
    """A later change of a tensor that was added to logits does not change them."""
    added = model.vector * 1
    logits = model.lm_head(hidden) + added
    other = model.lm_head(hidden)
    other += added
    added.mul_(0)
    return ce(logits, labels) + ce(other, labels)


GRAD_MODES = {  # none of these needs the logits
    "a part detached": lambda m, h, y: ce(0.3 * m.lm_head(h) + 0.7 * m.lm_head(h).detach(), y),
    "one head, a part detached": lambda m, h, y: (
        lambda x: ce(0.3 * x + 0.7 * x.detach(), y) + ce(x.detach() + 2 * x, y)
    )(m.lm_head(h)),
    "temperature": lambda m, h, y: (lambda x: ce(x, y) + ce(x.detach() / m.temperature, y))(
        m.lm_head(h)
    ),
    "bias": lambda m, h, y: (lambda x: ce(x, y) + ce(x.detach() + m.vector, y))(m.lm_head(h)),
    "scale": lambda m, h, y: (lambda x: ce(x, y) + ce(m.scale * x.detach(), y))(m.lm_head(h)),
    "classes": lambda m, h, y: (lambda x: ce(x, y) + ce(x.detach() * m.vector, y))(m.lm_head(h)),
    "softcap": lambda m, h, y: (
        lambda x: ce(torch.tanh(x / 3) * 3, y) + ce(torch.tanh(x.detach() * m.scale) * 2, y)
    )(m.lm_head(h)),
    "bias, then temperature": lambda m, h, y: ce((m.lm_head(h) + m.vector) / m.temperature, y),
    "head without grad": head_without_grad,
    "loss without grad": loss_without_grad,
    "operations without grad": operations_without_grad,
    "a bias that is changed afterwards": changed_afterwards,
}


def masks(model, hidden, labels):
    logits, mask = model.lm_head(hidden), labels != -100
    targets = ids(labels).view(labels.shape)
    rows, columns = [0, 1, 1], [2, 3, 5]
    loss = F.cross_entropy(logits[mask.numpy()], targets[mask])
    loss = loss + F.cross_entropy(logits[0][mask[0].tolist()], targets[0][mask[0]])
    loss = loss + F.cross_entropy(logits[rows, columns], targets[rows, columns])
    loss = loss + F.cross_entropy(logits[np.array(rows), np.array(columns)], targets[rows, columns])
    return loss + F.cross_entropy(logits[0][range(3)], targets[0][:3])


def narrowed(model, hidden, labels):
    logits = model.lm_head(hidden)
    part = logits.narrow(1, -3, 3)
    return F.cross_entropy(part.flatten(0, 1), ids(labels[:, -3:]))


def permuted(model, hidden, labels):
    logits = einops.rearrange(model.lm_head(hidden), "b t v -> (t b) v")
    return F.cross_entropy(logits, einops.rearrange(labels, "b t -> (t b)"))


def transposed(model, hidden, labels):
    logits = (model.lm_head(hidden).transpose(0, 1) * 2).contiguous().view(-1, VOCAB)
    return F.cross_entropy(logits, labels.t().flatten().clamp_min(0))


def shifted_by_einops(model, hidden, labels):
    logits = einops.rearrange(model.lm_head(hidden)[:, :-1], "b t v -> (b t) v")
    return F.cross_entropy(logits, labels[:, 1:].flatten())


def recorded_in_place(model, hidden, labels):
    logits = model.lm_head(hidden)
    logits *= 2
    logits += model.vector
    logits /= model.temperature
    return ce(logits, labels)


def tensors_of(model, hidden, labels):
    logits = model.lm_head(hidden)
    assert isinstance(logits, torch.Tensor)
    assert torch.is_tensor(logits)
    assert logits.requires_grad
    return ce(torch.as_tensor(logits), labels) + ce(torch.asarray(logits), labels)


NO_LOGITS = {
    "masks and arrays": masks,
    "narrow from the end": narrowed,
    "transposed": transposed,
    "einops": shifted_by_einops,
    "einops that permutes": permuted,
    "in place": recorded_in_place,
    "as_tensor": tensors_of,
}


def two_heads(model, hidden, labels):
    return fused(model.lm_head(hidden), labels) + ce(model.lm_head(0.5 * hidden), labels)


def argument_orders(model, hidden, labels):
    logits = model.lm_head(hidden)
    prior = torch.linspace(0, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
    loss = ce(torch.add(prior, logits, alpha=2), labels)
    loss = loss + ce(torch.add(model.vector, logits, alpha=2), labels)
    loss = loss + ce(torch.add(logits, model.vector, alpha=2), labels)
    loss = loss + ce(torch.sub(prior, logits), labels) + ce(prior / (logits + 9), labels)
    return loss + ce(torch.rsub(logits, prior, alpha=3), labels)


def out(model, hidden, labels):
    logits = model.lm_head(hidden)
    with torch.no_grad():
        result = torch.empty(logits.shape, dtype=logits.dtype)
        torch.mul(logits, 2.0, out=result)
    return ce(logits + result, labels)


def in_place_of_a_view(model, hidden, labels):
    logits = model.lm_head(hidden)
    flat = logits.view(-1, VOCAB)
    logits[..., 3] = -5.0
    logits.mul_(model.scale)
    return F.cross_entropy(flat, ids(labels))


def in_place_of_a_copy(model, hidden, labels):
    logits = model.lm_head(hidden).clone()
    copied = logits[:, :-1].reshape(-1, VOCAB)
    logits.masked_fill_(torch.arange(VOCAB) > 100, -3.0)
    return F.cross_entropy(copied, ids(labels[:, 1:])) + ce(logits, labels)


def in_place_without_grad(model, hidden, labels):
    logits = model.lm_head(hidden) * 1
    with torch.no_grad():
        logits.mul_(2.0)
    return ce(logits, labels)


def in_place_between_functions(model, hidden, labels):
    logits = model.lm_head(hidden)
    loss = fused(logits, labels)
    logits = logits * 1
    logits[..., :9] = model.vector[:9]
    return loss + ce(logits, labels) + fused(logits, labels)


def in_place_argument(model, hidden, labels):
    logits = model.lm_head(hidden)
    F.relu(logits, inplace=True)
    return ce(logits, labels)


def in_place_then_function(model, hidden, labels):
    logits = model.lm_head(hidden)
    logits *= model.scale
    logits += model.vector
    return fused(logits, labels) + ce(logits, labels)


def hooked(model, hidden, labels):
    logits = model.lm_head(hidden)
    logits.register_hook(lambda grad: 0.5 * grad)
    return ce(logits, labels) + fused(logits, labels)


def gradient_of_the_logits(model, hidden, labels):
    logits = model.lm_head(hidden)
    leaf = logits.detach().requires_grad_()
    ce(leaf, labels).backward()
    return (logits * leaf.grad).sum()


def second_order(model, hidden, labels):
    logits = model.lm_head(hidden)
    (grad,) = torch.autograd.grad(logits.logsumexp(-1).mean(), hidden, create_graph=True)
    return ce(logits, labels) + grad.square().sum()


def through_data(model, hidden, labels):
    logits = model.lm_head(hidden)
    logits.data.mul_(2)
    return ce(logits, labels)


def through_numpy(model, hidden, labels):
    logits = model.lm_head(hidden)
    with torch.no_grad():
        logits.detach().numpy()[...] *= 2
    return ce(logits, labels)


def scripted(model, hidden, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        function = torch.jit.script(_loss_of)
    return function(model.lm_head(hidden), ids(labels))


def _loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), targets)


def vectorised(model, hidden, labels):
    targets = ids(labels).view(labels.shape)
    return torch.vmap(F.cross_entropy)(model.lm_head(hidden), targets).mean()


def below_autograd(model, hidden, labels):
    with torch._C.DisableTorchFunctionSubclass():
        return ce(model.lm_head(hidden) * model.scale, labels)


class Pair(torch.nn.Module):
    """A container of arguments that is not a tuple."""

    Arguments = namedtuple("Arguments", ["first", "second"])


def namedtuple_argument(model, hidden, labels):
    logits = model.lm_head(hidden)
    return ce(torch.stack(Pair.Arguments(logits, 2 * logits)).mean(0), labels)


FULL_LOGITS = {  # and the operation that has to be named
    "own function": (lambda m, h, y: fused(m.lm_head(h), y), "softmax"),
    "own function in place": (lambda m, h, y: fused(m.lm_head(h), y, FusedInPlace), "softmax"),
    "own function, and a second head": (two_heads, "softmax"),
    "a view returned by a function": (
        lambda m, h, y: ce(identity(lambda x: x.view_as(x)).apply(m.lm_head(h)), y),
        "view_as",
    ),
    "recorded in a function": (
        lambda m, h, y: ce(identity(lambda x: x * 1.0).apply(m.lm_head(h) * m.scale).double(), y),
        "autograd.Function",
    ),
    "returned by a function": (
        lambda m, h, y: ce(identity(lambda x: x).apply(m.lm_head(h)), y),
        "view_as",
    ),
    "order of arguments": (argument_orders, "add"),
    "out=": (out, "mul"),
    "in place, seen by a view": (in_place_of_a_view, "__setitem__"),
    "in place, not seen by a copy": (in_place_of_a_copy, "masked_fill_"),
    "in place without grad": (in_place_without_grad, "mul_"),
    "in place between functions": (in_place_between_functions, "softmax"),
    "inplace=True": (in_place_argument, "relu"),
    "in place, then a function": (in_place_then_function, "softmax"),
    "a hook": (hooked, "register_hook"),
    "the gradient of the logits": (gradient_of_the_logits, "requires_grad_"),
    "a gradient of a gradient": (second_order, "logsumexp"),
    "data": (through_data, "data"),
    "numpy": (through_numpy, "numpy"),
    "scripted": (scripted, "view"),
    "vmap": (vectorised, "_log_softmax"),
    "below __torch_function__": (below_autograd, "mul"),
    "a namedtuple": (namedtuple_argument, "stack"),
    "softmax and all": (lambda m, h, y: ce(torch.softmax(m.lm_head(h), -1), y), "softmax"),
}


@pytest.mark.parametrize("name", GRAD_MODES | NO_LOGITS)
def test_without_logits(name):
    model = model_with((GRAD_MODES | NO_LOGITS)[name])
    patched = cce_patch(copy.deepcopy(model))
    expected, actual = step(model), step(patched)
    assert_same(expected, actual)
    assert actual[2] == []
    assert call_count(patched) > 0


@pytest.mark.parametrize("name", FULL_LOGITS)
def test_with_full_logits(name):
    forward, operation = FULL_LOGITS[name]
    model = model_with(forward)
    patched = cce_patch(copy.deepcopy(model))
    expected, actual = step(model), step(patched)
    assert_same(expected, actual)
    assert any(f"because of {operation!r}" in message for message in actual[2]), actual[2]


def head_and_loss(reentrant):
    return lambda m, h, y: checkpoint(
        lambda h: ce(m.lm_head(h) * m.scale, y), h, use_reentrant=reentrant
    )


def loss_alone(reentrant):
    return lambda m, h, y: checkpoint(
        lambda x: ce(x * m.scale, y), m.lm_head(h), use_reentrant=reentrant
    )


def head_alone(reentrant):
    return lambda m, h, y: (
        ce(checkpoint(m.lm_head, h, use_reentrant=reentrant), y) + ce(m.lm_head(h), y)
    )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("kind", "losses"), [(head_and_loss, 0), (loss_alone, 1), (head_alone, 1)])
def test_checkpoints_inside_the_forward(kind, losses, reentrant):
    model = model_with(kind(reentrant))
    patched = cce_patch(copy.deepcopy(model))
    expected, actual = step(model), step(patched)
    assert_same(expected, actual)
    assert call_count(patched) == losses
    if kind is not loss_alone:
        assert any("runs inside a checkpoint" in message for message in actual[2])
    elif reentrant:  # which differentiates the logits that it is given
        assert any("because of 'requires_grad ='" in message for message in actual[2])
    else:
        assert actual[2] == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_forward(reentrant):
    model = model_with(lambda m, h, y: ce(m.lm_head(h) * m.scale, y))
    patched = cce_patch(copy.deepcopy(model))

    def around(m):
        start = torch.zeros((), dtype=torch.float64, requires_grad=True)
        run = lambda zero: m(**batch()) + zero
        return lambda **_: checkpoint(run, start, use_reentrant=reentrant)

    results = []
    for m in (model, patched):
        m.zero_grad(set_to_none=True)
        loss = around(m)()
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in m.named_parameters()}))
    assert_same(*results)
    assert call_count(patched) >= 1


def test_a_loss_on_tensors_saved_to_the_host():
    def forward(model, hidden, labels):
        with torch.autograd.graph.save_on_cpu():
            return ce(model.lm_head(hidden) * model.scale, labels)

    model = model_with(forward)
    patched = cce_patch(copy.deepcopy(model))
    expected, actual = step(model), step(patched)
    assert_same(expected, actual)
    assert actual[2] == []


@dataclass
class Output:
    loss: Any
    logits: Any


@dataclass(frozen=True)
class Frozen:
    loss: Any
    logits: Any


class Labelled(dict):
    note = "kept"


class Sequence(tuple):
    pass


Named = namedtuple("Named", ["loss", "logits"])
CONTAINERS = {
    "namedtuple": Named,
    "dataclass": Output,
    "frozen dataclass": Frozen,
    "dict subclass": lambda loss, logits: Labelled(loss=loss, logits=logits),
    "OrderedDict": lambda loss, logits: OrderedDict(loss=loss, logits=logits),
    "UserDict": lambda loss, logits: UserDict(loss=loss, logits=logits),
    "BatchEncoding": lambda loss, logits: transformers.BatchEncoding(
        {"loss": loss, "logits": logits}
    ),
    "deque": lambda loss, logits: deque([loss, logits], maxlen=2),
    "tuple subclass": lambda loss, logits: Sequence((loss, logits)),
    "torch.return_types": lambda loss, logits: torch.return_types.max((loss, logits)),
    "namespace": lambda loss, logits: types.SimpleNamespace(loss=loss, logits=logits),
    "nested": lambda loss, logits: transformers.modeling_outputs.CausalLMOutput(
        loss=loss, logits=Named(loss, {"inner": [logits]})
    ),
}


def logits_of(output):
    """Return the object in the place of the logits."""
    if isinstance(output, (tuple, deque)) or hasattr(output, "keys"):
        output = list(output.values()) if hasattr(output, "keys") else list(output)
        found = output[1]
    else:
        found = output.logits
    return found.logits["inner"][0] if isinstance(found, Named) else found


@pytest.mark.parametrize("name", CONTAINERS)
def test_outputs_of_any_kind(name):
    def forward(model, hidden, labels):
        logits = model.lm_head(hidden)
        return CONTAINERS[name](ce(logits, labels), logits)

    model = model_with(forward)
    patched = cce_patch(copy.deepcopy(model))
    expected, actual = model(**batch()), patched(**batch())
    assert type(actual) is type(expected)
    assert logits_of(actual) is None
    assert getattr(actual, "note", None) == getattr(expected, "note", None)
    with torch.no_grad():
        expected, actual = model.eval()(**batch()), patched.eval()(**batch())
    assert type(logits_of(actual)) is LazyLogits
    torch.testing.assert_close(logits_of(actual) + 0, logits_of(expected))


class Int8(torch.Tensor):
    """A weight that computes its linear layer and knows nothing else, as those of libraries do."""

    @staticmethod
    def __new__(cls, weight):
        tensor = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
        tensor.scale = weight.abs().amax() / 127
        tensor.values = (weight / tensor.scale).round().to(torch.int8)
        return tensor

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight = args[:2]
            return F.linear(x, weight.values.to(x.dtype) * weight.scale)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"Int8 dispatch: {func}")


def test_a_weight_of_another_kind_takes_the_ordinary_path():
    model = model_with(lambda m, h, y: ce(m.lm_head(h), y))
    model.lm_head.weight = torch.nn.Parameter(Int8(model.lm_head.weight.detach()), False)
    expected = step(model)
    actual = step(cce_patch(model))
    assert_same(expected, actual)
    assert any("the weight of its head is a tensor subclass (Int8)" in m for m in actual[2])


def test_two_patched_models_one_inside_the_other():
    inner = cce_patch(model_with(lambda m, h, y: _output(m.lm_head(h), y)))

    def forward(model, hidden, labels):
        output = inner(input_ids=batch()["input_ids"], labels=labels)
        own = _output(model.lm_head(hidden), labels)
        return Output(own.loss + output.loss, [own.logits, output.logits])

    outer = cce_patch(model_with(forward))
    output = outer(**batch())
    assert output.logits == [None, None]
    assert call_count(outer) == call_count(inner) == 1
    with torch.no_grad():
        read = outer.eval()(**batch()).logits
    assert [tuple((logits + 0).shape) for logits in read] == [(2, 11, VOCAB)] * 2


def _output(logits, labels):
    return Output(ce(logits, labels), logits)


@pytest.mark.parametrize("all_ignored", [False, True])
def test_the_shape_of_an_unreduced_loss_follows_from_shapes(all_ignored):
    labels = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    labels[:, -1] = -100
    if all_ignored:
        labels[:] = -100
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4
    )
    encoder_decoder = cce_patch(transformers.T5ForConditionalGeneration(config), reduction="none")
    encoder_decoder.config.decoder_start_token_id = 0
    assert encoder_decoder(input_ids=labels.clamp_min(0), labels=labels).loss.shape == (2, 7)
    config = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1})
    causal = cce_patch(transformers.LlamaForCausalLM(config), reduction="none")
    assert causal(input_ids=labels.clamp_min(0), labels=labels).loss.shape == (2, 6)
    shifted = causal(input_ids=labels.clamp_min(0), labels=labels, shift_labels=labels)
    assert shifted.loss.shape == (2, 7)


def test_a_warning_points_at_the_line_of_the_user():
    model = cce_patch(model_with(lambda m, h, y: m.lm_head(h).logsumexp(-1).mean()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**batch())
    assert [w.filename for w in caught if w.category is CutCrossEntropyWarning] == [__file__]


def doubled(logits):
    logits.register_hook(lambda grad: 2 * grad)


def hook_after(use, hook=doubled, of=lambda logits: logits):
    """A loss that asks for the gradient of its logits after ``use`` of them, and uses them then."""

    def forward(model, hidden, labels):
        logits = model.lm_head(hidden)
        hooked = of(logits)
        loss = use(logits, labels)
        hook(hooked)
        model.kept = hooked
        return loss + ce(hooked, labels)

    return forward


def detached_for_a_metric(logits, labels):
    assert torch.isfinite(ce(logits.detach() / 0.9, labels))
    with torch.no_grad():
        assert torch.isfinite(ce(logits / 0.9, labels))
    return 0


def copy_then_in_place(logits, labels):
    loss = ce(logits / 0.9, labels)
    logits.mul_(0.7)
    return loss


def hooks_on_a_node(logits):
    logits.grad_fn.register_prehook(lambda grads: (2 * grads[0],))


def view_of_before(model, hidden, labels):
    model.kept = logits = model.lm_head(hidden)
    view = logits.flatten(0, 1)
    doubled(logits)
    return F.cross_entropy(view, ids(labels))


HOOKED = {
    "hook, before any use": hook_after(lambda x, y: 0),
    "retain_grad, before any use": hook_after(lambda x, y: 0, lambda x: x.retain_grad()),
    "node, before any use": hook_after(lambda x, y: 0, hooks_on_a_node),
    "hook, after a metric": hook_after(detached_for_a_metric),
    "retain_grad, after a metric": hook_after(detached_for_a_metric, lambda x: x.retain_grad()),
    "hook, before a view of before is used": view_of_before,
    "hook, after a loss from full logits": hook_after(lambda x, y: x.logsumexp(-1).mean()),
    "hook, after a copy and a change in place": hook_after(copy_then_in_place),
    "hook on a view of used logits": hook_after(
        lambda x, y: ce(x / 0.9, y), of=lambda x: x.transpose(0, 1)
    ),
    "retain_grad of a copy of used logits": hook_after(
        lambda x, y: ce(x / 0.9, y), lambda x: x.retain_grad(), lambda x: x * 0.5
    ),
    "requires_grad_ after a use": hook_after(lambda x, y: ce(x, y), lambda x: x.requires_grad_()),
}


@pytest.mark.parametrize("name", HOOKED)
def test_a_hook_sees_the_whole_gradient(name):
    model = model_with(HOOKED[name])
    patched = cce_patch(copy.deepcopy(model))
    expected, actual = step(model), step(patched)
    assert_same(expected, actual)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a tensor that does not retain it
        wanted, got = model.kept.grad, patched.kept.grad
    assert ("retain_grad" in name) == (wanted is not None)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def test_views_of_logits_that_become_a_leaf():
    def forward(model, hidden, labels):
        logits = model.lm_head(hidden).detach()
        view = logits.transpose(0, 1)
        logits.requires_grad_()
        model.kept = logits
        loss = ce(logits, labels) + model.scale.sum()
        return loss + (ce(view, labels.T) if view.requires_grad else 0)

    model = model_with(forward)
    patched = cce_patch(copy.deepcopy(model))
    assert_same(step(model), step(patched))
    torch.testing.assert_close(patched.kept.grad, model.kept.grad, rtol=1e-9, atol=1e-10)


INCOMPLETE = {
    "a hook, after a copy": hook_after(lambda x, y: ce(x / 0.9, y)),
    "retain_grad, after a copy": hook_after(lambda x, y: ce(x / 0.9, y), lambda x: x.retain_grad()),
    "a node, after a copy": hook_after(lambda x, y: ce(x / 0.9, y), hooks_on_a_node),
    "torch.autograd.grad, after a copy": hook_after(
        lambda x, y: ce(x / 0.9, y), lambda x: torch.autograd.grad(x.square().sum(), [x])
    ),
    "a hook, after a copy of a view": hook_after(lambda x, y: ce(x[:, :-1] / 0.9, y[:, :-1])),
    "a hook, after a sum": hook_after(lambda x, y: ce(x.detach() + x, y)),
    "a hook, after a loss": hook_after(ce),
    "retain_grad, after a loss": hook_after(ce, lambda x: x.retain_grad()),
    "a hook, after a function of the model's own": hook_after(fused),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_a_hook_that_would_miss_a_part_of_the_gradient_is_refused(name):
    model = model_with(INCOMPLETE[name])
    assert step(model)[1]["lm_head.weight"].any()
    with pytest.raises(RuntimeError, match=r"before the logits are used, or use cce_unpatch"):
        step(cce_patch(model))


def test_the_gradient_of_logits_after_the_forward():
    model = cce_patch(model_with(lambda m, h, y: _output(m.lm_head(h), y)).eval())
    for hook in (doubled, lambda logits: logits.retain_grad()):
        with pytest.raises(RuntimeError, match="use cce_unpatch for this model"):
            hook(model(**batch()).logits)


def test_a_hook_in_compiled_code():
    model = model_with(INCOMPLETE["retain_grad, after a copy"])
    compiled = torch.compile(cce_patch(model), backend="eager")
    with pytest.raises(RuntimeError, match="use cce_unpatch for this model"):
        compiled(**batch())


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_features_that_change_in_place_in_compiled_code(grad):
    """The unpatched model compiles without a gradient only; with one the loss is the same."""

    def forward(model, hidden, labels):
        logits = model.lm_head(hidden)
        hidden.mul_(3)
        return ce(logits, labels)

    model = model_with(forward)
    with torch.no_grad():
        expected = model(**batch())
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        actual = torch.compile(cce_patch(model), backend="aot_eager")(**batch())
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
