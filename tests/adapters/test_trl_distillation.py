"""The divergence of TRL's distillation trainer, computed by ours, against its own function."""

import pytest
import torch
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer import distillation_trainer

from cut_cross_entropy import adapters, budget

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def inputs(bias=True, tokens=9, dtype=torch.float32):
    """Hidden states, weight and bias of a student and of a wider teacher."""
    random = torch.Generator().manual_seed(0)
    tensors = []
    for dim in (16, 24):
        hidden, shift = torch.randn(tokens, dim, generator=random), None
        weight = torch.randn(150, dim, generator=random) * 3 / dim**0.5
        if bias:
            shift = torch.randn(150, generator=random)
        tensors += [hidden, weight, shift]
    return [x if x is None else x.to(dtype) for x in tensors]


def step(function, tensors, *options):
    """Both results, and gradients of a weighted sum of the divergences."""
    leaves = [x if x is None else x.clone().requires_grad_() for x in tensors]
    results = function.apply(*leaves, *options)
    weights = torch.randn(len(tensors[0]), generator=torch.Generator().manual_seed(1))
    (results[0] * weights).sum().backward()
    return results, [x if x is None else x.grad for x in leaves]


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options", [(1.0,), (0.7, 0.5, 2.0, 1.5, None), (2.0, 1.0, None, 0.5, 3.0)]
)
def test_values_and_gradients_are_those_of_trl(beta, bias, options):
    tensors = inputs(bias)
    theirs, their_grads = step(ChunkedDivergenceFunction, tensors, beta, *options)
    with adapters.trl() as adapter:
        function = distillation_trainer.ChunkedDivergenceFunction
        ours, our_grads = step(function, tensors, beta, *options)
    assert adapter.calls == 1
    assert distillation_trainer.ChunkedDivergenceFunction is ChunkedDivergenceFunction
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
        assert mine.requires_grad == other.requires_grad
        assert mine.abs().sum() > 0
    assert [x is None for x in our_grads] == [x is None for x in their_grads]
    for mine, other in zip(our_grads[:3], their_grads[:3], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["chunked", pytest.param("cce", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_items", [None, 20, torch.tensor(20)])
def test_loss_of_the_trainer(impl, beta, num_items, monkeypatch):
    monkeypatch.setattr(budget, "MIN_PAIRS", 1)  # gradients in the forward
    student, weight, shift, teacher, teacher_weight, teacher_shift = inputs(tokens=10)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])

    def loss():
        leaves = [x.clone().requires_grad_() for x in (student.reshape(2, 5, -1), weight, shift)]
        results = distillation_trainer._chunked_divergence_loss(
            leaves[0],
            teacher.reshape(2, 5, -1),
            leaves[1],
            teacher_weight,
            mask,
            beta,
            num_items,
            student_lm_head_bias=leaves[2],
            teacher_lm_head_bias=teacher_shift,
            student_logit_scale=0.5,
            teacher_final_logit_softcapping=3.0,
            temperature=0.9,
        )
        results[0].backward()
        return *results, *(x.grad for x in leaves)

    theirs = loss()
    with adapters.trl(impl=impl) as adapter:
        ours = loss()
    assert adapter.calls == 1
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=1e-5, atol=1e-6)


def test_loss_without_tokens():
    student, weight, _, teacher, teacher_weight, _ = inputs(bias=False, tokens=10)
    hidden, others = student.reshape(2, 5, -1).requires_grad_(), teacher.reshape(2, 5, -1)
    with adapters.trl():
        loss, entropies, count = distillation_trainer._chunked_divergence_loss(
            hidden, others, weight, teacher_weight, torch.zeros(2, 5), 0.5
        )
    loss.backward()
    assert (loss.item(), entropies.item(), count.item()) == (0, 0, 0)
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_half_precision(dtype, beta):
    tensors = inputs(bias=False, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        theirs, their_grads = step(ChunkedDivergenceFunction, tensors, beta)
        with adapters.trl():
            function = distillation_trainer.ChunkedDivergenceFunction
            ours, our_grads = step(function, tensors, beta)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    for mine, other in zip(our_grads[:2], their_grads[:2], strict=True):
        assert mine.dtype == other.dtype == dtype
        assert (mine - other).norm() < 2e-2 * other.norm()


def test_partitioned_head_is_refused():
    tensors = inputs()
    tensors[1] = tensors[1][:0]
    tensors[1].ds_id = 0
    with adapters.trl(), pytest.raises(NotImplementedError, match="ZeRO-3"):
        distillation_trainer.ChunkedDivergenceFunction.apply(*tensors, 0.5)
    hidden, weight, _, teacher, teacher_weight, _ = tensors
    with adapters.trl(), pytest.raises(NotImplementedError, match="ZeRO-3"):
        distillation_trainer._chunked_divergence_loss(
            hidden, teacher, weight, teacher_weight, torch.ones(9), 0.5
        )
