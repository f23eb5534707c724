"""Operations that lazy logits record, and those that make them real."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

from cut_cross_entropy.lazy.intercept import lazy_linear
from cut_cross_entropy.lazy.logits import LazyLogits
from cut_cross_entropy.lazy.record import ForwardRecord
from cut_cross_entropy.transformers import CutCrossEntropyWarning
from cut_cross_entropy.transformers.utils import PatchOptions
from tests.support import is_computed

BATCH, TIME, DIM, CLASSES = 2, 5, 7, 11


class Setting:
    """Factors with gradients, the real logits and the lazy ones."""

    def __init__(self, bias=True, dtype=torch.float32, **options):
        generator = torch.Generator().manual_seed(0)
        make = lambda *shape: torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
        self.e, self.c = make(BATCH, TIME, DIM), make(CLASSES, DIM)
        self.bias = make(CLASSES) if bias else None
        self.targets = torch.randint(0, CLASSES, (BATCH, TIME), generator=generator)
        self.targets[0, 0] = -100
        self.record = ForwardRecord(torch.nn.Identity(), PatchOptions(**options), self.targets)
        self.real = F.linear(self.e, self.c, self.bias)
        self.lazy = lazy_linear(self.record, self.e, self.c, self.bias)

    def loss_and_grads(self, logits):
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), self.targets.reshape(-1))
        inputs = [x for x in (self.e, self.c, self.bias) if x is not None]
        return [loss, *torch.autograd.grad(loss, inputs)]


VECTOR = torch.linspace(-1, 1, CLASSES)
PER_TOKEN = torch.linspace(0.5, 2, BATCH * TIME).reshape(BATCH, TIME, 1)

SAME_TOKENS = {  # the same tokens in the same order, so that the loss can be compared
    "nothing": lambda x: x,
    "float": lambda x: x.float(),
    "to_dtype": lambda x: x.to(torch.float64).to(dtype=torch.float32),
    "to_device": lambda x: x.to("cpu"),
    "to_other": lambda x: x.to(torch.zeros(1)),
    "type": lambda x: x.type(torch.float32),
    "contiguous_clone": lambda x: x.contiguous().clone(),
    "view": lambda x: x.view(-1, CLASSES),
    "view_size": lambda x: x.view(BATCH * TIME, -1),
    "view_tuple": lambda x: x.view((-1, x.size(-1))),
    "reshape": lambda x: torch.reshape(x, (-1, CLASSES)),
    "flatten": lambda x: x.flatten(0, 1),
    "torch_flatten": lambda x: torch.flatten(x, 0, -2),
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
    "index_none": lambda x: x[:, None][:, 0],
    "scale": lambda x: 3.0 * (x * 2) * 0.25,
    "divide": lambda x: x / 5.0,
    "scale_by_number_tensor": lambda x: x * torch.tensor(0.3),
    "softcap": lambda x: 2.0 * torch.tanh(x / 2.0),
    "softcap_method": lambda x: (x / 2.0).tanh() * 2.0,
    "scale_then_softcap": lambda x: torch.tanh(x * 0.3 / 2.0) * 2.0,
    "tanh_only": lambda x: torch.tanh(x),
    "add_vector": lambda x: x + VECTOR,
    "vector_first": lambda x: VECTOR[None, None] + x,
    "add_then_scale": lambda x: (x + VECTOR) / 3,
    "classes": lambda x: x[..., :CLASSES],
    "inplace": lambda x: x.contiguous().clone().mul_(0.5).div_(0.3),
    "augmented": lambda x: _augmented(x),
}
NO_BIAS = {  # recorded for logits without a bias only
    "per_token": lambda x: x * PER_TOKEN,
    "per_token_divided": lambda x: x / PER_TOKEN,
}
LINEAR = {
    "per_class": lambda x: x * VECTOR,
    "per_class_first": lambda x: VECTOR[None] * x,
    "sum": lambda x: x + x * 0.5,
    "torch_add": lambda x: torch.add(x, x * VECTOR),
}
OTHER_TOKENS = {
    "shift": lambda x: x[..., :-1, :].contiguous(),
    "one_row": lambda x: x[0],
    "one_token": lambda x: x[:, -1],
    "mask": lambda x: x[torch.tensor([[True] * 4 + [False]] * 2)],
    "rows": lambda x: x[torch.tensor([1, 0])],
    "rows_and_columns": lambda x: x[torch.tensor([1, 0]), torch.tensor([2, 3])],
    "fewer_classes": lambda x: x[..., 2:9],
    "narrow": lambda x: x.narrow(1, 1, 3),
    "ellipsis": lambda x: x[1, ...],
}


def _augmented(x):
    x = x.clone()
    x *= 0.5
    x /= 4
    x += VECTOR
    return x


@pytest.mark.parametrize("index", [[[1, 0], [2, 3]], [[True, False]]])
@pytest.mark.filterwarnings("ignore:.*non-tuple sequence")
def test_a_list_of_lists_is_the_index_that_pytorch_takes_it_for(index):
    setting = Setting()
    with pytest.warns(CutCrossEntropyWarning, match="'__getitem__'"):
        actual = setting.lazy[index].softmax(-1)
    torch.testing.assert_close(actual, setting.real[index].softmax(-1))


@pytest.mark.parametrize("name", [*SAME_TOKENS, *LINEAR])
def test_recorded_operations_give_the_loss_and_gradients_of_the_real_ones(name):
    operation = (SAME_TOKENS | LINEAR)[name]
    setting = Setting()
    expected = setting.loss_and_grads(operation(setting.real))
    lazy = operation(setting.lazy)
    assert isinstance(lazy, LazyLogits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = setting.loss_and_grads(lazy)
    assert setting.record.losses == 1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NO_BIAS)
def test_scales_per_token_are_recorded_without_a_bias(name):
    setting = Setting(bias=False)
    expected = setting.loss_and_grads(NO_BIAS[name](setting.real))
    lazy = NO_BIAS[name](setting.lazy)
    assert isinstance(lazy, LazyLogits)
    torch.testing.assert_close(setting.loss_and_grads(lazy), expected, rtol=1e-4, atol=1e-6)
    assert setting.record.losses == 1


@pytest.mark.parametrize("name", [*SAME_TOKENS, *LINEAR, *OTHER_TOKENS, *NO_BIAS])
def test_recorded_operations_replay_to_the_real_logits(name):
    operation = (SAME_TOKENS | LINEAR | OTHER_TOKENS | NO_BIAS)[name]
    setting = Setting(bias=name not in NO_BIAS)
    lazy, real = operation(setting.lazy), operation(setting.real)
    assert isinstance(lazy, LazyLogits)
    assert lazy.shape == real.shape == lazy.size()
    assert (lazy.dtype, lazy.device, lazy.ndim) == (real.dtype, real.device, real.dim())
    assert (lazy.numel(), len(lazy), lazy.requires_grad) == (real.numel(), len(real), True)
    setting.record.finished = True
    torch.testing.assert_close(lazy.materialise("test"), real, rtol=1e-5, atol=1e-6)


COMPUTING = {
    "argmax": lambda x: x.argmax(-1),
    "softmax": lambda x: F.softmax(x, dim=-1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "transpose": lambda x: x.transpose(1, 2),
    "sub": lambda x: x - 1,
    "neg": lambda x: -x,
    "pow": lambda x: x**2,
    "cat": lambda x: torch.cat([x, x], dim=1),
    "stack": lambda x: torch.stack((x,)),
    "where": lambda x: torch.where(torch.tensor(True), x, 0.0),
    "mean": lambda x: torch.mean(x, dim=(0, 1)),
    "__getitem__": lambda x: x[..., 3],
    "mul": lambda x: torch.tanh(x) * torch.ones(CLASSES),
    "tanh": lambda x: torch.tanh(torch.tanh(x)),
    "masked_fill": lambda x: x.masked_fill(VECTOR > 0, -1.0),
    "T": lambda x: x[0].T,
    "unbind": lambda x: x.unbind(0)[0],
}


@pytest.mark.parametrize("name", COMPUTING)
def test_other_operations_compute_the_logits_and_say_so(name):
    setting = Setting()
    expected = COMPUTING[name](setting.real)
    with pytest.warns(CutCrossEntropyWarning, match=f"computed in full because of '{name}'"):
        actual = COMPUTING[name](setting.lazy)
    torch.testing.assert_close(actual, expected)
    if actual.is_floating_point():
        inputs = (setting.e, setting.c, setting.bias)
        torch.testing.assert_close(
            torch.autograd.grad(actual.sum(), inputs, allow_unused=True),
            torch.autograd.grad(expected.sum(), inputs, allow_unused=True),
        )


def test_a_change_in_place_is_seen_by_the_loss():
    setting = Setting()
    real = setting.real.clone()
    real[..., 3] = -5.0
    expected = setting.loss_and_grads(real)
    with pytest.warns(CutCrossEntropyWarning, match="__setitem__"):
        setting.lazy[..., 3] = -5.0
    actual = setting.loss_and_grads(setting.lazy)
    torch.testing.assert_close(actual, expected)
    assert setting.record.losses == 0


def test_a_change_in_place_of_a_view_is_seen_by_the_whole():
    setting = Setting()
    real = setting.real.clone()
    real[:, :-1][..., 3] = -5.0
    expected = setting.loss_and_grads(real)
    flat = setting.lazy.view(-1, CLASSES)
    with pytest.warns(CutCrossEntropyWarning, match="__setitem__"):
        setting.lazy[:, :-1][..., 3] = -5.0
    actual = setting.loss_and_grads(flat)
    torch.testing.assert_close(actual, expected)
    assert torch.equal(setting.lazy.detach() + 0, real)


def test_a_retained_gradient_is_that_of_the_logits():
    setting = Setting()
    setting.real.retain_grad()
    F.cross_entropy(setting.real.flatten(0, 1), setting.targets.flatten()).backward()
    with pytest.warns(CutCrossEntropyWarning, match="retain_grad"):
        setting.lazy.retain_grad()
    F.cross_entropy(setting.lazy.flatten(0, 1), setting.targets.flatten()).backward()
    torch.testing.assert_close(setting.lazy.grad, setting.real.grad)


def test_what_the_operator_lacks_takes_the_ordinary_path_and_says_so_once():
    setting = Setting()
    soft = torch.softmax(torch.randn(BATCH * TIME, CLASSES), -1)
    expected = F.cross_entropy(setting.real.flatten(0, 1), soft)
    with pytest.warns(CutCrossEntropyWarning, match="soft targets"):
        actual = F.cross_entropy(setting.lazy.flatten(0, 1), soft)
    F.cross_entropy(setting.lazy.flatten(0, 1), soft)  # no second warning
    torch.testing.assert_close(actual, expected)
    assert setting.record.losses == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{"weight": torch.linspace(0.5, 1, CLASSES)}, {"label_smoothing": 0.1}]
)
def test_class_weights_and_label_smoothing(options, reduction):
    setting = Setting()
    targets = setting.targets.flatten()
    options = {**options, "reduction": reduction}
    expected = F.cross_entropy(setting.real.flatten(0, 1), targets, **options)
    actual = F.cross_entropy(setting.lazy.flatten(0, 1), targets, **options)
    torch.testing.assert_close(actual, expected)
    assert setting.record.losses == 1


def test_a_softcap_below_zero_takes_the_ordinary_path():
    setting = Setting()
    capped = lambda x: torch.tanh(x) * -2.0
    expected = setting.loss_and_grads(capped(setting.real))
    with pytest.warns(CutCrossEntropyWarning, match="softcap below 0"):
        actual = setting.loss_and_grads(capped(setting.lazy))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_reduction_and_ignore_index_are_those_of_the_call(reduction, ignore_index):
    setting = Setting()
    targets = setting.targets.flatten().clamp_min(0)
    kwargs = {"reduction": reduction, "ignore_index": ignore_index}
    expected = F.cross_entropy(setting.real.flatten(0, 1), targets, **kwargs)
    actual = F.cross_entropy(setting.lazy.flatten(0, 1), targets, **kwargs)
    torch.testing.assert_close(actual, expected)
    assert actual.shape == expected.shape


def test_a_loss_module_is_the_same_call():
    setting = Setting()
    targets = setting.targets.flatten().clamp_min(0)
    module = torch.nn.CrossEntropyLoss(ignore_index=2)
    actual = module(setting.lazy.flatten(0, 1), targets)
    torch.testing.assert_close(actual, module(setting.real.flatten(0, 1), targets))
    assert setting.record.losses == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_loss_is_that_of_the_logits(dtype):
    setting = Setting(dtype=dtype)
    targets = setting.targets.flatten()
    for cast in (lambda x: x, lambda x: x.float()):
        expected = F.cross_entropy(cast(setting.real).flatten(0, 1), targets)
        actual = F.cross_entropy(cast(setting.lazy).flatten(0, 1), targets)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.float() * PER_TOKEN.double(),
        lambda x: x.bfloat16() * VECTOR.bfloat16(),
        lambda x: x.bfloat16() + x.float(),
        lambda x: x.bfloat16() + x.bfloat16(),
        lambda x: x.float() + VECTOR.double(),
    ],
    ids=["per token", "per class", "sum", "sum of low precision", "vector"],
)
def test_the_dtype_of_logits_is_that_which_they_announce(operation):
    setting = Setting(bias=False, dtype=torch.float64)
    lazy, real = operation(setting.lazy), operation(setting.real)
    assert type(lazy) is LazyLogits
    setting.record.finished = True
    assert lazy.materialise("test").dtype == lazy.dtype == real.dtype
    torch.testing.assert_close(lazy.materialise("test"), real, rtol=0.02, atol=0.02)


def test_autocast_is_that_of_the_head():
    setting = Setting()
    with torch.autocast("cpu", torch.bfloat16):
        real = F.linear(setting.e, setting.c, setting.bias)
        lazy = lazy_linear(setting.record, setting.e, setting.c, setting.bias)
    assert lazy.dtype == real.dtype == torch.bfloat16
    setting.record.finished = True
    assert torch.equal(lazy.materialise("test"), real)
    loss = F.cross_entropy(lazy.float().flatten(0, 1), setting.targets.flatten())
    assert loss.dtype == torch.float32
    exact = F.cross_entropy(setting.real.flatten(0, 1), setting.targets.flatten())
    assert loss != exact  # rounded to bfloat16 as in the head
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)


def test_grad_mode_is_that_of_the_head():
    setting = Setting()
    with torch.no_grad():
        without = lazy_linear(setting.record, setting.e, setting.c, setting.bias)
    setting.record.finished = True
    assert not without.requires_grad
    assert not without.materialise("test").requires_grad
    with torch.no_grad():
        assert setting.lazy.materialise("test").requires_grad
    assert not setting.lazy.detach().requires_grad
    assert not setting.lazy.detach().materialise("test").requires_grad


def test_a_changed_weight_is_refused():
    setting = Setting()
    setting.record.finished = True
    with torch.no_grad():
        setting.c.add_(1)
    with pytest.raises(RuntimeError, match=r"has changed since the forward \(optimizer.step"):
        setting.lazy.materialise("test")


def test_lazy_logits_are_tensors_without_a_look_at_their_values():
    setting = Setting()
    lazy, real = setting.lazy, setting.real
    assert not hasattr(lazy, "keys")
    assert isinstance(lazy, torch.Tensor)
    assert torch.is_tensor(lazy)
    assert (lazy.stride(), lazy.is_contiguous()) == (real.stride(), True)
    assert (lazy[:, 1:].stride(), lazy[:, 1:].is_contiguous()) == (real[:, 1:].stride(), False)
    assert not lazy.is_leaf
    assert lazy.layout is torch.strided
    assert not is_computed(lazy)
    with pytest.warns(CutCrossEntropyWarning, match="__deepcopy__"):
        assert torch.equal(copy.deepcopy(lazy.detach()), real)


def test_features_and_weights_that_do_not_fit_are_left_to_pytorch():
    setting = Setting()
    record = setting.record
    assert lazy_linear(record, setting.e.bfloat16(), setting.c, None) is None
    assert "bfloat16" in record.not_captured
    assert lazy_linear(record, setting.e, setting.c[:, :3], None) is None
    assert lazy_linear(record, setting.e, torch.ones(3, DIM, dtype=torch.int8), None) is None
    assert "quantised" in record.not_captured
