"""Liger's distillation losses, computed by ours: against its own functions.

Its kernels run in Triton's interpreter.
"""

import pytest
import torch
from liger_kernel import chunked_loss, ops, transformers
from liger_kernel.chunked_loss import functional as chunked_functional
from liger_kernel.chunked_loss import jsd_loss

from cut_cross_entropy import adapters
from tests.adapters.parity import assert_same

NAME = "LigerFusedLinearJSDFunction"
TOKENS, CLASSES = 9, 150
BETAS = [0.0, 0.3, 1.0]


def inputs(dtype=torch.float32, classes=CLASSES, scale=3):
    """Hidden states, weight and bias of a student and of a wider teacher; labels (N,)."""
    random = torch.Generator().manual_seed(0)
    tensors = []
    for dim, num_classes in ((16, classes), (24, CLASSES)):
        hidden = torch.randn(TOKENS, dim, generator=random)
        weight = torch.randn(num_classes, dim, generator=random) * scale / dim**0.5
        tensors += [hidden, weight, torch.randn(num_classes, generator=random)]
    labels = torch.randint(0, classes, (TOKENS,), generator=random)
    labels[[2, 5]] = -100
    return [x.to(dtype) for x in tensors], labels


def step(function, *tensors, factor=-1.7):
    """Results of ``function``, and gradients of the first one times ``factor``."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    (results[0] * factor).backward()
    return [x.detach() for x in results], [x.grad for x in leaves]


@pytest.mark.interpret
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_values_and_gradients_are_those_of_the_kernels(beta, with_labels, temperature):
    (hidden, weight, _, teacher, teacher_weight, _), labels = inputs()
    labels = labels if with_labels else None
    module = transformers.LigerFusedLinearJSD(beta, temperature=temperature)

    def call(hidden, weight):
        return module(hidden, weight, teacher, teacher_weight, labels)

    def by_function(hidden, weight):
        return transformers.functional.liger_fused_linear_jsd(
            hidden, weight, teacher, teacher_weight, labels, beta, -100, temperature
        )

    original = ops.LigerFusedLinearJSDFunction
    theirs = step(call, hidden, weight)
    with adapters.liger() as adapter:
        ours = step(call, hidden, weight)
        assert adapter.calls == 1
        assert_same(step(by_function, hidden, weight), ours)
        assert adapter.calls == 2
    assert ops.LigerFusedLinearJSDFunction is original
    assert_same(ours, theirs)
    assert_same(step(call, hidden, weight), theirs)
    assert adapter.calls == 2


def test_the_kernels_without_a_token():
    (hidden, weight, _, teacher, teacher_weight, _), labels = inputs()
    labels.fill_(-100)
    with adapters.liger():
        (loss,), grads = step(
            lambda h, w: transformers.LigerFusedLinearJSD()(h, w, teacher, teacher_weight, labels),
            hidden,
            weight,
        )
    assert loss == 0
    assert all(grad.count_nonzero() == 0 for grad in grads)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 1.6])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("hard", "soft", "both"), [(0.5, 0.5, True), (0.2, 0.7, False), (0.0, 1.0, False)]
)
def test_values_and_gradients_are_those_of_the_chunked_loss(
    beta, temperature, bias, hard, soft, both
):
    (hidden, weight, shift, teacher, teacher_weight, teacher_shift), labels = inputs()
    module = chunked_loss.LigerFusedLinearJSDLoss(
        hard, soft, beta, -100, temperature, compiled=False, return_soft_hard_loss=both
    )

    def call(hidden, weight, shift=None):
        return module(
            hidden, weight, teacher, teacher_weight, labels, shift, teacher_shift if bias else None
        )

    student = (hidden, weight, shift) if bias else (hidden, weight)
    original = jsd_loss.LigerFusedLinearJSDFunction
    theirs = step(call, *student)
    with adapters.liger() as adapter:
        ours = step(call, *student)
    assert adapter.calls == 1
    assert jsd_loss.LigerFusedLinearJSDFunction is original
    assert len(ours[0]) == (3 if both else 1)
    assert_same(ours, theirs)


@pytest.mark.parametrize("bias", [False, True])
def test_classes_that_only_the_teacher_has(bias):
    (hidden, weight, shift, teacher, teacher_weight, teacher_shift), labels = inputs(classes=140)
    student = (hidden, weight, shift) if bias else (hidden, weight)
    original = chunked_functional.liger_fused_linear_jsd

    def call(hidden, weight, shift=None):
        options = (0.4, 0.6, 0.5, -100, 1.0, False)
        return chunked_functional.liger_fused_linear_jsd(
            hidden, weight, teacher, teacher_weight, labels, shift, teacher_shift, *options
        )

    theirs = step(call, *student)
    with adapters.liger() as adapter:
        assert chunked_functional.liger_fused_linear_jsd is not original
        ours = step(call, *student)
    assert adapter.calls == 1
    assert chunked_functional.liger_fused_linear_jsd is original
    assert_same(ours, theirs)


@pytest.mark.parametrize("beta", BETAS)
def test_bfloat16_is_closer_to_float64_than_the_chunked_loss(beta):
    tensors, labels = inputs(torch.bfloat16, scale=8)

    def call(function, dtype):
        student = [x.to(dtype) for x in tensors[:2]]
        teacher = [x.to(dtype) for x in tensors[3:5]]
        options = (None, None, 0.0, 1.0, beta, -100, 1.0, False)
        return step(lambda h, w: function.apply(h, w, *teacher, labels, *options), *student)

    function = jsd_loss.LigerFusedLinearJSDFunction
    (truth,), grads = call(function, torch.float64)
    (theirs,), _ = call(function, torch.bfloat16)
    with adapters.liger():
        (ours,), our_grads = call(jsd_loss.LigerFusedLinearJSDFunction, torch.bfloat16)
    assert ours.dtype == torch.float32
    assert abs(ours - truth) < 1e-5 * truth < 0.1 * abs(theirs - truth)
    for mine, exact in zip(our_grads, grads, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - exact).norm() < 4e-3 * exact.norm()


def test_a_function_that_has_moved(monkeypatch):
    """And nothing is replaced: the seams that were found stay as they were."""
    original = ops.LigerFusedLinearScaledCrossEntropyFunction

    class Moved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, student_input, student_weight, teacher_logits):
            return student_input

    monkeypatch.setattr(jsd_loss, NAME, Moved)
    message = r"liger-kernel 0\.\d.* has liger_kernel\.chunked_loss\.jsd_loss\.LigerFusedLinearJSD"
    with pytest.raises(RuntimeError, match=message):
        adapters.liger()
    assert ops.LigerFusedLinearScaledCrossEntropyFunction is original
    assert jsd_loss.LigerFusedLinearJSDFunction is Moved
