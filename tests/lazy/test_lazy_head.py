"""``lazy_head`` with a model that is written by hand, as nanoGPT's is."""

import contextlib
import copy
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cut_cross_entropy.lazy import CutCrossEntropyWarning, lazy_head
from cut_cross_entropy.lazy import record as forward_record
from cut_cross_entropy.lazy.intercept import is_intercepted
from cut_cross_entropy.lazy.logits import LazyLogits
from tests.support import forget_warnings, is_computed

VOCAB, WIDTH = 97, 16


@pytest.fixture(autouse=True)
def every_warning_anew():
    forget_warnings()
    yield
    forget_warnings()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        y = self.norm(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(x)


class GPT(nn.Module):
    """Returns logits and loss; ties its head to its embedding."""

    def __init__(self, softcap=None, z_loss=0.0):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = self.embedding.weight
        self.softcap, self.z_loss = softcap, z_loss

    def forward(self, ids, targets=None):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(x)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        if self.z_loss:
            loss = loss + self.z_loss * logits.logsumexp(-1).square().mean()
        return logits, loss


def gpt(**options):
    torch.manual_seed(0)
    return GPT(**options).double()


def batch():
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1)
    targets[:, -1] = -1
    return ids, targets


def step(model, context=None):
    model.zero_grad(set_to_none=True)
    if context is None:
        loss = model(*batch())[1]
    else:
        with context:
            loss = model(*batch())[1]
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(expected, actual):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_loss_and_gradients_are_those_of_the_model(softcap):
    model = gpt(softcap=softcap)
    expected = step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(expected, step(model, lazy_head(model.lm_head)))
        with lazy_head(model.lm_head, impl="reference") as record:
            logits, _ = model(*batch())
    assert record.losses == 1
    assert repr(record) == "<ForwardRecord of Linear, losses without logits: 1>"
    assert type(logits) is LazyLogits
    assert not is_computed(logits)
    torch.testing.assert_close(logits + 0, model(*batch())[0])


def test_what_needs_the_logits_is_right_and_named():
    model = gpt(z_loss=0.1)
    expected = step(model)
    with pytest.warns(CutCrossEntropyWarning, match="because of 'logsumexp'"):
        actual = step(model, lazy_head(model.lm_head))
    assert_same(expected, actual)


def test_a_block_that_calls_no_head_is_told():
    model = gpt()
    with (
        pytest.warns(CutCrossEntropyWarning, match="lazy_head did nothing: no linear head"),
        lazy_head(model.lm_head),
    ):
        model.embedding(batch()[0])


def test_a_loss_behind_the_block_is_told():
    model, (ids, targets) = gpt(), batch()
    with (
        pytest.warns(CutCrossEntropyWarning, match="head inside the block; lazy_head did nothing"),
        lazy_head(model.lm_head),
    ):
        logits, _ = model(ids)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert_same(model(ids, targets)[1], loss)


def test_a_head_with_backward_hooks_keeps_its_logits():
    model = gpt()
    expected = step(model)
    model.lm_head.register_full_backward_hook(lambda *_: None)
    with pytest.warns(CutCrossEntropyWarning, match="lazy_head did nothing: its head has backward"):
        assert_same(expected, step(model, lazy_head(model.lm_head)))


def test_blocks_may_be_nested():
    student, teacher = gpt(), gpt(softcap=2.0)
    expected = student(*batch())[1], teacher(*batch())[1]
    with lazy_head(student.lm_head) as outer, lazy_head(teacher.lm_head) as inner:
        actual = student(*batch())[1], teacher(*batch())[1]
        with lazy_head(student.lm_head) as innermost:
            again = student(*batch())[1]
    assert (outer.losses, inner.losses, innermost.losses) == (1, 1, 1)
    torch.testing.assert_close((*actual, again), (*expected, expected[0]))
    assert not is_intercepted(student.lm_head)


def test_several_heads_of_one_model():
    model, second = gpt(), nn.Linear(WIDTH, VOCAB).double()

    def loss(ids, targets):
        x = model.embedding(ids)
        logits = 0.5 * model.lm_head(x) + second(x)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    parameters = (model.embedding.weight, *second.parameters())
    expected = torch.autograd.grad(loss(*batch()), parameters)
    with lazy_head(model.lm_head, second) as record:
        actual = torch.autograd.grad(loss(*batch()), parameters)
    assert record.losses == 1
    assert_same(expected, actual)


def test_an_exception_leaves_the_head_alone():
    model = gpt()

    def fails():
        assert is_intercepted(model.lm_head)
        raise ValueError("from the block")

    with pytest.raises(ValueError, match="from the block"), lazy_head(model.lm_head):
        fails()
    assert not is_intercepted(model.lm_head)
    assert type(model(batch()[0])[0]) is torch.Tensor
    step(model, lazy_head(model.lm_head))


def test_other_threads_have_the_logits():
    model, seen = gpt(), []
    with lazy_head(model.lm_head):
        thread = threading.Thread(target=lambda: seen.append(type(model(batch()[0])[0])))
        thread.start()
        thread.join()
        model(*batch())
    assert seen == [torch.Tensor]


def test_accumulated_steps_in_one_block():
    model = gpt()
    expected = step(model)
    model.zero_grad()
    with lazy_head(model.lm_head) as record:
        for _ in range(2):
            (model(*batch())[1] / 2).backward()
    assert record.losses == 2
    assert_same(expected[1], {name: p.grad for name, p in model.named_parameters()})


def test_the_model_itself_is_unchanged():
    model = gpt()
    before = copy.deepcopy(model.state_dict()), set(vars(model.lm_head))
    step(model, lazy_head(model.lm_head))
    assert model.state_dict().keys() == before[0].keys()
    assert set(vars(model.lm_head)) == before[1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"impl": "cee"}, ValueError, "impl must be one of"),
        ({"filter_eps": "low"}, ValueError, "filter_eps must be"),
        ({"filter_mass": 2}, ValueError, "filter_mass must be None or a float from 0 to 1, got 2"),
        ({"memory_budget": 0}, ValueError, "memory_budget must be at least 1 byte, got 0"),
        ({"filter_e_grad": "yes"}, TypeError, "filter_e_grad must be"),
    ],
)
def test_wrong_options_are_errors(options, error, message):
    with pytest.raises(error, match=message), lazy_head(nn.Linear(2, 3), **options):
        pass


def test_a_head_must_be_a_module():
    with pytest.raises(TypeError, match=r"head must be a torch.nn.Module, got Tensor"):
        lazy_head(torch.zeros(2)).__enter__()


def test_a_compiled_model_is_right():
    model = gpt()
    expected = step(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with lazy_head(model.lm_head):
            loss = compiled(*batch())[1]
        model.zero_grad()
        loss.backward()
    assert_same(expected[0], loss.detach())
    assert_same(expected[1], {name: p.grad for name, p in model.named_parameters()})
    torch._dynamo.reset()


LOSSES = {
    "fused": lambda logits, targets: F.cross_entropy(logits, targets),
    "read": lambda logits, targets: logits.logsumexp(-1).sum(),
    "both": lambda logits, targets: F.cross_entropy(logits, targets) + logits.square().sum(),
}


def _gradient(loss, logits):
    loss.backward(inputs=[logits])
    return logits.grad  # refused here by PyTorch before 2.11, which says nothing of the call


@pytest.mark.filterwarnings("ignore::cut_cross_entropy.lazy.CutCrossEntropyWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_backward_to_the_logits_is_right_or_refused(name):
    """Of a loss that was computed without logits it would leave nothing, or a part."""
    head = nn.Linear(WIDTH, VOCAB)
    targets = torch.arange(5)
    logits = head(torch.ones(5, WIDTH))
    expected = _gradient(LOSSES[name](logits, targets), logits)
    with lazy_head(head):
        logits = head(torch.ones(5, WIDTH))
        loss = LOSSES[name](logits, targets)
        if name == "read":
            torch.testing.assert_close(_gradient(loss, logits), expected)
        else:
            with pytest.raises(RuntimeError, match=r"before would miss that part .* gradient"):
                _gradient(loss, logits)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["frozen", "no_grad"])
def test_features_may_change_in_place_where_no_gradient_is_recorded(requires_grad):
    head = nn.Linear(WIDTH, VOCAB).requires_grad_(requires_grad)

    def loss():
        features = torch.linspace(-1, 1, 5 * WIDTH).view(5, WIDTH)
        logits = head(features)
        features.mul_(2)
        return F.cross_entropy(logits, torch.arange(5))

    with torch.set_grad_enabled(not requires_grad):
        expected = loss()
        with lazy_head(head) as record:
            torch.testing.assert_close(loss(), expected)
    assert record.losses == 1


class LogSumExp(torch.autograd.Function):
    """Gets the logits in its forward, where PyTorch leaves out autograd and autocast."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.float().logsumexp(-1).sum()

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        return (grad * logits.float().softmax(-1)).to(logits.dtype)


@pytest.mark.filterwarnings("ignore::cut_cross_entropy.lazy.CutCrossEntropyWarning")
@pytest.mark.parametrize("first", ["autocast", "plain", "inference"])
def test_a_function_gets_the_logits_of_its_own_forward(first):
    """Whatever was on in the forward before."""
    head, features = nn.Linear(WIDTH, VOCAB), torch.linspace(-1, 1, 5 * WIDTH).view(5, WIDTH)

    def result(mode, lazy):
        head.zero_grad()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"),
            torch.inference_mode(mode == "inference"),
            lazy_head(head) if lazy else contextlib.nullcontext(),
        ):
            loss = LogSumExp.apply(head(features))
        if mode != "inference":
            loss.backward()
        return loss.detach(), head.weight.grad

    forward_record._usual_keys.cache_clear()
    for mode in (first, "autocast", "plain", "inference", "plain"):
        torch.testing.assert_close(result(mode, True), result(mode, False), rtol=0, atol=0)
