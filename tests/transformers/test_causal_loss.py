"""The short way for ``ForCausalLMLoss``: what it computes, and where it leaves the work to it."""

import pytest
import torch
import torch.nn.functional as F
from transformers.loss import loss_utils
from transformers.loss.loss_utils import ForCausalLMLoss

from cut_cross_entropy.lazy import logits as lazy_logits
from cut_cross_entropy.lazy.intercept import lazy_linear
from cut_cross_entropy.lazy.record import ForwardRecord
from cut_cross_entropy.transformers import PatchOptions, causal_loss, cce_patch
from cut_cross_entropy.transformers.causal_loss import causal_loss as short_way
from tests.transformers.models import assert_same_step, batch, llama, loss_and_grads

BATCH, TIME, WIDTH, CLASSES = 2, 5, 4, 7


class Setting:
    """Real and lazy logits of the same factors, and labels of which some are ignored."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.e = torch.randn(BATCH, TIME, WIDTH, generator=generator).double().requires_grad_()
        self.c = torch.randn(CLASSES, WIDTH, generator=generator).double().requires_grad_()
        self.labels = torch.randint(0, CLASSES, (BATCH, TIME), generator=generator)
        self.labels[0, 1] = self.labels[1, 4] = -100
        self.real = F.linear(self.e, self.c)
        self.record = ForwardRecord(torch.nn.Identity(), PatchOptions(), self.labels)
        self.lazy = lazy_linear(self.record, self.e, self.c, None)

    def step(self, loss):
        return loss, *torch.autograd.grad(loss, (self.e, self.c))

    def check(self, changed=lambda logits: logits, **kwargs):
        arguments = {"labels": self.labels, "vocab_size": CLASSES} | kwargs
        actual = self.step(short_way(changed(self.lazy), **arguments))
        expected = self.step(ForCausalLMLoss(changed(self.real), **arguments))
        for mine, theirs in zip(actual, expected, strict=True):
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.fixture
def own_calls(monkeypatch):
    """The calls of ``ForCausalLMLoss``."""
    calls = []

    def own(*args, **kwargs):
        calls.append(args)
        return ForCausalLMLoss(*args, **kwargs)

    monkeypatch.setattr(causal_loss, "_OWN", own)
    return calls


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        ctx.mark_dirty(logits)
        return logits.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


SHIFTED = torch.tensor([[1, 2, 0, -100, 6], [5, 5, 3, 0, -100]])


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_items_in_batch": 5},
        {"num_items_in_batch": torch.tensor(6)},
        {"ignore_index": 3, "labels": SHIFTED.clamp_min(0)},
        {"shift_labels": SHIFTED},
        {"shift_labels": SHIFTED.abs() % 7, "num_items_in_batch": 4, "ignore_index": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("changed", [lambda x: x, lambda x: 3 * torch.tanh(x / 3), lambda x: x / 2])
def test_known_arguments_take_the_short_way(own_calls, kwargs, changed):
    Setting().check(changed, **kwargs)
    assert not own_calls


@pytest.mark.filterwarnings("ignore::cut_cross_entropy.lazy.CutCrossEntropyWarning")
@pytest.mark.parametrize(
    ("changed", "kwargs"),
    [
        (lambda x: x, {"cu_seq_lens_q": torch.tensor([0, 5])}),
        (lambda x: x, {"labels": SHIFTED.view(5, 2)}),
        (lambda x: x.index_fill_(-1, torch.tensor(0), -1e4), {}),
        (lambda x: Doubled.apply(x.clone()), {}),
        (lambda x: -3 * torch.tanh(x / 3), {}),
    ],
    ids=["argument", "other shape", "changed", "Function", "softcap < 0"],
)
def test_others_are_left_to_the_function_itself(own_calls, changed, kwargs):
    Setting().check(changed, **kwargs)
    assert len(own_calls) == 1


@pytest.mark.filterwarnings("ignore::cut_cross_entropy.lazy.CutCrossEntropyWarning")
@pytest.mark.parametrize("place", ["cross_entropy", "fixed_cross_entropy"])
def test_a_replacement_of_what_it_calls_is_called(monkeypatch, place):
    """Liger and trainers replace these two for all models."""
    setting = Setting()
    module = F if place == "cross_entropy" else loss_utils
    original, seen = getattr(module, place), []

    def replacement(input, target, *args, **kwargs):
        seen.append(input.shape)
        return 2 * original(input, target, *args, **kwargs)

    monkeypatch.setattr(module, place, replacement)
    setting.check()
    assert len(seen) == 2


def test_a_function_that_computes_something_else_is_not_known(monkeypatch):
    assert causal_loss._is_known()

    def ForCausalLMLoss(
        logits,
        labels,
        vocab_size,
        num_items_in_batch=None,
        ignore_index=-100,
        shift_labels=None,
        **kwargs,
    ):
        kwargs["label_smoothing"] = 0.1
        return loss_utils.ForCausalLMLoss(
            logits * 1.01, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels
        )

    monkeypatch.setattr(causal_loss, "_OWN", ForCausalLMLoss)
    assert not causal_loss._is_known()  # of another module
    ForCausalLMLoss.__module__ = loss_utils.__name__
    assert not causal_loss._is_known()  # other numbers
    monkeypatch.undo()
    monkeypatch.setattr(F.cross_entropy, "__module__", "liger_kernel")
    assert not causal_loss._is_known()
    monkeypatch.undo()
    monkeypatch.setattr(causal_loss, "_OWN", None)
    assert not causal_loss._is_known()


def test_a_training_step_asks_nothing_of_its_logits(monkeypatch):
    """Each function of PyTorch that gets lazy logits costs about 10 microseconds."""
    asked = []
    original = lazy_logits._call
    monkeypatch.setattr(
        lazy_logits, "_call", lambda func, *rest: asked.append(func) or original(func, *rest)
    )
    monkeypatch.setattr(lazy_logits, "_frame_callback", lambda: None)
    model = cce_patch(llama())
    model(**batch()).loss.backward()
    assert asked == []


def test_the_function_is_there_during_the_forward_only():
    model = cce_patch(llama())
    seen = []
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append(model.loss_function))
    model(**batch())
    assert seen == [short_way]
    assert model.loss_function is ForCausalLMLoss
    model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch())
    assert model.loss_function is ForCausalLMLoss


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_function_that_was_assigned_is_called(reduction):
    def half(logits, labels, vocab_size, **kwargs):
        return 0.5 * ForCausalLMLoss(logits, labels, vocab_size, **kwargs)

    model = llama()
    model.loss_function = half
    expected = loss_and_grads(model, num_items_in_batch=7)
    assert_same_step(expected, loss_and_grads(cce_patch(model), num_items_in_batch=7))
    assert model.loss_function is half
