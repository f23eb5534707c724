"""Correct or loud: models and losses that do something else with their logits."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F

from cut_cross_entropy.lazy.intercept import is_intercepted
from cut_cross_entropy.lazy.logits import LazyLogits
from cut_cross_entropy.transformers import (
    CutCrossEntropyWarning,
    call_count,
    cce_patch,
    cce_unpatch,
)
from tests.transformers.models import VOCAB, assert_same_step, batch, llama, loss_and_grads


def pair(loss_function):
    """A model with a loss of its own, and its patched twin."""
    model = llama()
    other = cce_patch(copy.deepcopy(model))
    for m in (model, other):
        m.loss_function = loss_function
    return model, other


def shifted(logits, labels):
    return logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)


class OwnLoss(torch.autograd.Function):
    """A loss that computes its gradient in its forward."""

    @staticmethod
    def forward(ctx, logits, labels):
        logits = logits.float()
        probabilities = logits.softmax(-1)
        ctx.save_for_backward(probabilities / labels.numel())
        return logits.logsumexp(-1).mean()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def test_a_loss_of_its_own_gets_the_gradient_of_the_logits():
    model, patched = pair(lambda logits, labels, **kwargs: OwnLoss.apply(logits, labels))
    expected = loss_and_grads(model)
    with pytest.warns(CutCrossEntropyWarning, match="because of '(softmax|logsumexp)'"):
        actual = loss_and_grads(patched)
    assert_same_step(expected, actual)
    assert not is_intercepted(patched.lm_head)
    with torch.no_grad():
        assert patched(**batch()).loss.ndim == 0


def check_loud_step(loss, name):
    """Check that a patched step is right and warns of an operation; return the patched model."""
    model, patched = pair(loss)
    expected = loss_and_grads(model)
    with pytest.warns(CutCrossEntropyWarning, match=f"because of '{name}'"):
        actual = loss_and_grads(patched)
    assert_same_step(expected, actual)
    return patched


def test_an_accuracy_without_grad_before_the_loss_does_not_change_it():
    def loss(logits, labels, **kwargs):
        with torch.no_grad():
            accuracy = (logits.argmax(-1) == labels).float().mean()
        assert not accuracy.requires_grad
        return F.cross_entropy(*shifted(logits, labels))

    assert call_count(check_loud_step(loss, "argmax")) == 1


def test_a_z_loss_after_the_loss_says_so_once():
    def loss(logits, labels, **kwargs):
        ce = F.cross_entropy(*shifted(logits, labels))
        return ce + 0.1 * logits.logsumexp(-1).square().mean()

    loss_and_grads(check_loud_step(loss, "logsumexp"))  # no second warning


def test_a_loss_of_other_operations_is_right_and_loud():
    def loss(logits, labels, **kwargs):
        log_probs = F.log_softmax(logits[:, :-1].float(), dim=-1)
        picked = log_probs.gather(2, labels[:, 1:, None].clamp_min(0)).squeeze(2)
        return -(picked * (labels[:, 1:] != -100)).mean()

    assert call_count(check_loud_step(loss, "log_softmax")) == 0


SMOOTHED = [
    {"label_smoothing": 0.1},
    {"weight": torch.rand(VOCAB)},
    {"label_smoothing": 0.1, "weight": torch.rand(VOCAB), "reduction": "sum"},
]


@pytest.mark.parametrize("options", SMOOTHED)
def test_label_smoothing_and_class_weights_are_those_of_the_operator(options):
    model, patched = pair(
        lambda logits, labels, **kwargs: F.cross_entropy(*shifted(logits, labels), **options)
    )
    expected = loss_and_grads(model)
    actual = loss_and_grads(patched)
    assert_same_step(expected, actual)
    assert call_count(patched) == 1


def test_a_loss_that_ignores_the_logits_is_told():
    _, patched = pair(lambda logits, labels, **kwargs: torch.zeros((), requires_grad=True))
    with pytest.warns(
        CutCrossEntropyWarning, match="does not use the logits of its head; the patch did nothing"
    ):
        assert patched(**batch()).loss == 0


def test_a_head_with_backward_hooks_keeps_its_logits():
    model = llama()
    expected = loss_and_grads(model)
    seen = []
    model.lm_head.register_full_backward_hook(lambda module, gi, go: seen.append(go[0].shape))
    cce_patch(model)
    with pytest.warns(CutCrossEntropyWarning, match="patch did nothing: its head has backward"):
        actual = loss_and_grads(model)
    assert_same_step(expected, actual)
    assert seen == [(2, 11, VOCAB)]


def test_a_model_without_a_linear_head_is_told():
    class Head(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.table = weight

        def forward(self, x):
            return torch.einsum("btd,vd->btv", x, self.table)

    model = llama()
    expected = loss_and_grads(model)[0]
    model.lm_head = Head(model.lm_head.weight)
    cce_patch(model)
    with pytest.warns(CutCrossEntropyWarning, match="its head does not call F.linear"):
        torch.testing.assert_close(model(**batch()).loss, expected)


def test_a_head_that_is_replaced_is_found_again():
    model = cce_patch(llama())
    loss_and_grads(model)
    model.resize_token_embeddings(VOCAB + 13, mean_resizing=False)
    expected = loss_and_grads(cce_patch(copy.deepcopy(model), train_only=True).train())
    assert_same_step(expected, loss_and_grads(model))
    assert call_count(model) == 2


def test_an_exception_in_forward_leaves_the_head_alone():
    def loss(logits, labels, **kwargs):
        raise ValueError("from the model")

    _, model = pair(loss)
    with pytest.raises(ValueError, match="from the model"):
        model(**batch())
    assert not is_intercepted(model.lm_head)
    assert "forward" not in model.lm_head.__dict__
    model.loss_function = llama().loss_function
    loss_and_grads(model)
    assert call_count(model) == 1


def test_the_head_is_its_own_again_after_the_forward():
    model = cce_patch(llama())
    seen = []
    model.model.register_forward_hook(lambda *_: seen.append(is_intercepted(model.lm_head)))
    model(**batch())
    assert seen == [True]
    assert not is_intercepted(model.lm_head)
    assert type(model.lm_head(torch.zeros(1, 32))) is torch.Tensor


def test_other_threads_see_the_head_as_it_is():
    model = cce_patch(llama())
    inside, done, result = threading.Event(), threading.Event(), []

    def other():
        inside.wait(10)
        result.append(type(model.lm_head(torch.zeros(1, 32))))
        done.set()

    def wait(*_):
        inside.set()
        assert done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    handle = model.model.register_forward_hook(wait)
    output = model(**batch())
    handle.remove()
    thread.join()
    assert result == [torch.Tensor]
    assert output.logits is None


def test_a_patched_part_of_a_patched_model():
    class Outer(type(llama())):
        def forward(self, input_ids=None, labels=None, **kwargs):
            output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
            assert type(output.logits) is LazyLogits  # still lazy here
            return output

    model = Outer(llama().config).train()
    model.load_state_dict(llama().state_dict())
    expected = loss_and_grads(llama())
    cce_patch("llama")
    try:
        cce_patch(model)
        assert_same_step(expected, loss_and_grads(model))
        assert model(**batch()).logits is None
        assert call_count(model) == 2
    finally:
        cce_unpatch("llama")


def test_out_of_range_labels_are_an_error():
    model = cce_patch(llama())
    labels = batch()["labels"]
    labels[0, -1] = VOCAB
    with pytest.raises(ValueError, match="targets must lie in"):
        model(**(batch() | {"labels": labels}))


def test_all_labels_ignored_give_zero():
    model = cce_patch(llama())
    labels = torch.full_like(batch()["labels"], -100)
    loss, grads = loss_and_grads(model, labels=labels)
    assert loss == 0
    assert all(not grad.any() for grad in grads.values())
