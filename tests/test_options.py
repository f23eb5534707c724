"""Each option of the loss against plain PyTorch in float64, values and gradients."""

import numpy as np
import pytest
import torch

from tests.support import IMPLS, check, make_problem, run_ours

pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    pytest.mark.parametrize("impl", IMPLS),
]


@pytest.mark.parametrize(
    ("dtype", "bias", "softcap"),  # each pair of values; 5: about 2 deviations, so tanh does bend
    [
        (torch.float32, False, None),
        (torch.float32, True, 5.0),
        (torch.bfloat16, False, 5.0),
        (torch.bfloat16, True, None),
        (torch.float16, False, None),
        (torch.float16, True, 5.0),
        (torch.float64, False, 5.0),
        (torch.float64, True, None),
    ],
)
def test_dtype_bias_softcap(impl, dtype, bias, softcap):
    check(make_problem(dtype=dtype, bias=bias), impl, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_bias_with_half_precision_classifier(impl, dtype):
    problem = make_problem(dtype=dtype, bias=True)
    object.__setattr__(problem, "bias", problem.bias.float())
    results = check(problem, impl)
    assert results.grad_bias.dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [0, False, 1, True, 3])  # 4 of 5 would leave too little to see
def test_reduction_and_shift(impl, reduction, shift):
    check(make_problem(), impl, reduction=reduction, shift=shift)


@pytest.mark.parametrize("shift", [0, 1, 4])  # 4 = T - 1: the largest allowed
@pytest.mark.parametrize("ignore_index", [-100, 0, 7, 299, -1, 300])  # in range, edges, outside
def test_ignore_index(impl, ignore_index, shift):
    problem = make_problem(ignore_index=ignore_index)
    check(problem, impl, ignore_index=ignore_index, shift=shift, reduction="none")


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy(impl, integer):
    expected = run_ours(make_problem(ignore_index=3), impl, ignore_index=3, shift=1)
    options = {"ignore_index": integer(3), "shift": integer(1)}
    actual = run_ours(make_problem(ignore_index=3), impl, **options)
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.grad_e, expected.grad_e)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_target_dtype(impl, dtype, shift):
    problem = make_problem(target_dtype=dtype)
    assert problem.targets.dtype == dtype
    check(problem, impl, shift=shift, reduction="sum")


def test_softcap_takes_an_int(impl):
    as_int, as_float = (run_ours(make_problem(), impl, softcap=cap) for cap in (5, 5.0))
    assert torch.equal(as_int.loss, as_float.loss)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_lse_alone_is_differentiable(impl, reduction):
    """Weight 0 for the loss would leave the budget blind; here the lse is all there is."""
    problem = make_problem(bias=True)
    with_loss = check(problem, impl, reduction=reduction, lse_weight=0.1)
    without = check(problem, impl, reduction=reduction, lse_weight=0.0)
    assert not torch.equal(with_loss.grad_bias, without.grad_bias)


@pytest.mark.parametrize("filter_eps", [None, "auto", "high", 0.1, 0])
def test_filter_and_accumulation_options_leave_exact_implementations_alone(impl, filter_eps):
    problem = make_problem()
    changed = run_ours(
        problem,
        impl,
        filter_eps=filter_eps,
        accum_e_fp32=True,
        accum_c_fp32=True,
        filter_e_grad=False,
        filter_c_grad=False,
    )
    default = run_ours(problem, impl)
    for name, value in default.named().items():
        assert torch.equal(changed.named()[name], value), name


def test_without_return_lse_the_loss_alone_comes_back(impl):
    from cut_cross_entropy import linear_cross_entropy

    problem = make_problem()
    loss = linear_cross_entropy(problem.e, problem.c, problem.targets, impl=impl)
    assert loss.shape == () and loss.dtype == torch.float32  # noqa: PT018 - one fact
    assert torch.equal(loss, run_ours(problem, impl).loss)
