"""Temperature, label smoothing, weights and divisors of ``linear_cross_entropy``."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from cut_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from tests.support import IMPLS, make_problem

SHAPE = (3, 5)


def problem():
    return make_problem(SHAPE, dtype=torch.float64, bias=True)


def logits_of(e, c, bias, softcap=None, logit_scale=1.0, temperature=1.0):
    z = logit_scale * (e @ c.T + bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[..., None]
    return z / temperature


def compare(ours, theirs):
    """Two functions of (e, c, bias): equal values and gradients with random upstream."""
    made = problem()
    results = []
    for function in (ours, theirs):
        tensors = [x.clone().requires_grad_() for x in (made.e, made.c, made.bias)]
        loss = function(*tensors, made.targets)
        random = torch.Generator().manual_seed(0)
        upstream = torch.randn(loss.shape, generator=random, dtype=torch.float64)
        results.append((loss.detach(), *torch.autograd.grad(loss, tensors, upstream)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def plain_cross_entropy(logits, targets, **options):
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), **options)
    return loss.reshape(targets.shape) if loss.ndim else loss


WEIGHTS = torch.rand(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TOKEN_WEIGHTS = torch.rand(SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
SMOOTHED = list(itertools.product((0.0, 0.1, 1.0), (None, WEIGHTS), (None, 3.0)))


@pytest.mark.parametrize(("smoothing", "weights", "softcap"), SMOOTHED)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", IMPLS)
def test_smoothing_and_class_weights_have_the_meaning_of_pytorch(
    impl, reduction, smoothing, weights, softcap
):
    options = {"reduction": reduction, "label_smoothing": smoothing}
    compare(
        lambda e, c, b, y: linear_cross_entropy(
            e, c, y, b, class_weights=weights, softcap=softcap, impl=impl, **options
        ),
        lambda e, c, b, y: plain_cross_entropy(
            logits_of(e, c, b, softcap), y, weight=weights, **options
        ),
    )


@pytest.mark.parametrize(
    "temperature", [0.7, torch.tensor(0.7), TOKEN_WEIGHTS + 0.5, TOKEN_WEIGHTS[:, :1] + 0.5]
)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_scale_softcap_and_temperature_in_this_order(impl, softcap, temperature):
    options = {"softcap": softcap, "logit_scale": 0.4, "temperature": temperature}
    smoothing = {"label_smoothing": 0.1}
    compare(
        lambda e, c, b, y: linear_cross_entropy(e, c, y, b, impl=impl, **options, **smoothing),
        lambda e, c, b, y: plain_cross_entropy(logits_of(e, c, b, **options), y, **smoothing),
    )


@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
@pytest.mark.parametrize("impl", IMPLS)
def test_token_weights(impl, class_weights):
    made = problem()
    kept = made.targets != -100
    total = TOKEN_WEIGHTS * kept
    if class_weights is not None:
        total = total * class_weights[made.targets.clamp_min(0)]

    def plain(e, c, b, y, reduction):
        losses = plain_cross_entropy(
            logits_of(e, c, b), y, weight=class_weights, reduction="none", label_smoothing=0.2
        )
        losses = losses * TOKEN_WEIGHTS
        if reduction == "none":
            return losses
        return losses.sum() / (total.sum() if reduction == "mean" else 1)

    for reduction in ("mean", "sum", "none"):
        compare(
            lambda e, c, b, y, reduction=reduction: linear_cross_entropy(
                e,
                c,
                y,
                b,
                token_weights=TOKEN_WEIGHTS,
                class_weights=class_weights,
                label_smoothing=0.2,
                reduction=reduction,
                impl=impl,
            ),
            lambda e, c, b, y, reduction=reduction: plain(e, c, b, y, reduction),
        )


def test_token_weights_are_shifted_with_their_targets_and_have_a_gradient():
    made = problem()
    weights = TOKEN_WEIGHTS.clone().requires_grad_()
    ours = linear_cross_entropy(
        made.e, made.c, made.targets, token_weights=weights, shift=1, reduction="none"
    )
    losses = linear_cross_entropy(made.e, made.c, made.targets, shift=1, reduction="none")
    torch.testing.assert_close(ours, losses * weights[:, 1:])
    (grad,) = torch.autograd.grad(ours.sum(), weights)
    torch.testing.assert_close(grad, F.pad(losses, (1, 0)))


def test_a_weight_of_an_ignored_token_does_not_count():
    made = problem()
    weights = TOKEN_WEIGHTS.masked_fill(made.targets == -100, torch.nan)
    expected = linear_cross_entropy(made.e, made.c, made.targets, token_weights=TOKEN_WEIGHTS)
    ours = linear_cross_entropy(made.e, made.c, made.targets, token_weights=weights)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("weights", [{"token_weights": torch.zeros(SHAPE)}, {}])
def test_a_mean_without_weight_is_0(weights):
    made = problem()
    targets = made.targets if weights else torch.full_like(made.targets, -100)
    e = made.e.requires_grad_()
    loss = linear_cross_entropy(
        e, made.c, targets, class_weights=WEIGHTS, label_smoothing=0.1, **weights
    )
    loss.backward()
    assert loss == 0
    assert not e.grad.any()


@pytest.mark.parametrize(
    "items", [7, torch.tensor(7), torch.tensor([7]), torch.tensor([[7.0]], dtype=torch.float16)]
)
def test_number_of_items(items):
    """The loss keeps its shape and dtype, whatever those of the number."""
    made = problem()
    arguments = (made.e, made.c, made.targets)
    options = {"label_smoothing": 0.1, "class_weights": WEIGHTS}
    total = linear_cross_entropy(*arguments, reduction="sum", **options)
    ours = linear_cross_entropy(*arguments, num_items_in_batch=items, **options)
    torch.testing.assert_close(ours, total / 7)


def test_no_item_and_nothing_to_learn():
    made = problem()
    e, nothing = made.e.requires_grad_(), torch.full_like(made.targets, -100)
    loss = linear_cross_entropy(e, made.c, nothing, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss == 0
    assert not e.grad.any()
    wrong = linear_cross_entropy(e, made.c, made.targets, num_items_in_batch=torch.tensor(0))
    assert wrong == torch.inf  # there are losses: a wrong number is not hidden


def test_module_has_the_options_and_moves_its_weights():
    made = problem()
    module = LinearCrossEntropy(
        temperature=0.7, logit_scale=2.0, label_smoothing=0.1, class_weights=WEIGHTS.float()
    ).double()
    assert module.class_weights.dtype == torch.float64
    assert set(module.state_dict()) == {"class_weights"}
    ours = module(made.e, made.c, made.targets, token_weights=TOKEN_WEIGHTS, num_items_in_batch=4)
    expected = linear_cross_entropy(
        made.e,
        made.c,
        made.targets,
        temperature=0.7,
        logit_scale=2.0,
        label_smoothing=0.1,
        class_weights=WEIGHTS.float().double(),
        token_weights=TOKEN_WEIGHTS,
        num_items_in_batch=4,
    )
    torch.testing.assert_close(ours, expected)
    assert repr(module) == (
        "LinearCrossEntropy(temperature=0.7, logit_scale=2.0, label_smoothing=0.1)"
    )
    assert not LinearCrossEntropy().state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_temperature_does_not_round_half_precision_factors(dtype):
    """1 / 3 is no number of half precision: dividing the embeddings would round them once more."""
    made = make_problem((64,), 500, 64, dtype=dtype)
    ours = linear_cross_entropy(
        made.e, made.c, made.targets, temperature=3.0, reduction="none", impl="chunked"
    )
    exact = F.cross_entropy(made.e.double() @ made.c.double().T / 3, made.targets, reduction="none")
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=4e-6)
