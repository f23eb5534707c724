"""``torch.func`` and forward-mode differentiation, against the unfused loss in float64."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils._pytree import tree_leaves

from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.operators.losses import chunked_losses, tangents
from cut_cross_entropy.problem import Problem
from tests.support import IMPLS, make_problem

# What PyTorch imports for forward mode scripts functions, and linearize warns about its own graphs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),
]

KERNELS = tuple(pytest.param(impl, marks=pytest.mark.interpret) for impl in ("cce", "cce_exact"))
every_impl = pytest.mark.parametrize("impl", [*IMPLS, *KERNELS])

PROBLEM = make_problem((5,), 130, 8, bias=True)
E, C, B, Y = PROBLEM.e, PROBLEM.c, PROBLEM.bias, PROBLEM.targets
DIRECTION = make_problem((5,), 130, 8, bias=True, seed=1)
BATCH = make_problem((3, 5), 130, 8, seed=2)


def unfused(e, c, targets, bias=None, softcap=None, reduction="mean"):
    logits = e.double() @ c.double().T
    if bias is not None:
        logits = logits + bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction=reduction)


def ours(impl):
    return lambda *inputs, **options: linear_cross_entropy(*inputs, impl=impl, **options)


def tangent_of_dual(loss):
    with forward_ad.dual_level():
        result = loss(forward_ad.make_dual(E, DIRECTION.e), C, Y, B)
        return forward_ad.unpack_dual(result).tangent


def tokens(loss):
    return lambda e: loss(e, C, Y, softcap=5.0, reduction="none")


TRANSFORMS = {
    "jvp of c": lambda loss: jvp(lambda c: loss(E, c, Y), (C,), (DIRECTION.c,)),
    "jvp of all": lambda loss: jvp(
        lambda e, c, b: loss(e, c, Y, b, softcap=5.0, reduction="none"),
        (E, C, B),
        (DIRECTION.e, DIRECTION.c, DIRECTION.bias),
    ),
    "dual tensor": tangent_of_dual,
    "linearize": lambda loss: linearize(lambda c: loss(E, c, Y), C)[1](DIRECTION.c),
    "grad": lambda loss: grad(lambda e, c, b: loss(e, c, Y, b), argnums=(0, 1, 2))(E, C, B),
    "vjp": lambda loss: vjp(lambda c: loss(E, c, Y).float(), C)[1](torch.tensor(2.0)),
    "jacrev": lambda loss: jacrev(tokens(loss))(E),
    "jacfwd": lambda loss: jacfwd(tokens(loss))(E),
    "vmap": lambda loss: vmap(lambda e, y: loss(e, C, y))(BATCH.e, BATCH.targets),
    "vmap of c": lambda loss: vmap(lambda c: loss(E, c, Y), 2)(torch.stack([C, DIRECTION.c], 2)),
    "vmap of grad": lambda loss: vmap(grad(lambda c, e, y: loss(e, c, y)), (None, 0, 0))(
        C, BATCH.e, BATCH.targets
    ),
    "grad of vmap": lambda loss: grad(
        lambda c: vmap(lambda e, y: loss(e, c, y))(BATCH.e, BATCH.targets).sum()
    )(C),
    "vmap of vmap": lambda loss: vmap(vmap(lambda e, y: loss(e[None], C, y[None])))(
        BATCH.e, BATCH.targets.clamp_min(0)
    ),
}


@every_impl
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(impl, name):
    transform = TRANSFORMS[name]
    got, expected = tree_leaves(transform(ours(impl))), tree_leaves(transform(unfused))
    assert len(got) == len(expected) > 0
    for value, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(value.double(), exact.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", ["chunked", "reference", *KERNELS])
def test_batched_gradients_of_an_ordinary_graph(impl):
    def jacobian(loss):
        return torch.autograd.functional.jacobian(tokens(loss), E, vectorize=True)

    torch.testing.assert_close(
        jacobian(ours(impl)).double(), jacobian(unfused).double(), rtol=2e-5, atol=2e-5
    )


@every_impl
@pytest.mark.parametrize("name", ["jvp", "jacfwd", "vmap of jvp", "grad"])
def test_smoothed_losses(impl, name):
    """The mean of the logits is linear in c, and so has the tangent of c as its own."""
    transform = {
        "jvp": lambda loss: jvp(loss, (E, C, B), (DIRECTION.e, DIRECTION.c, DIRECTION.bias)),
        "jacfwd": lambda loss: jacfwd(lambda e: loss(e, C, B))(E),
        "vmap of jvp": lambda loss: vmap(lambda c: jvp(lambda x: loss(E, x, B), (C,), (c,))[1])(
            torch.stack([C, DIRECTION.c])
        ),
        "grad": lambda loss: grad(loss, argnums=(0, 1, 2))(E, C, B),
    }[name]
    got = transform(
        lambda e, c, b: linear_cross_entropy(e, c, Y, b, label_smoothing=0.2, impl=impl)
    )
    expected = transform(
        lambda e, c, b: F.cross_entropy(e.double() @ c.double().T + b, Y, label_smoothing=0.2)
    )
    for value, exact in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(value.double(), exact.double(), rtol=2e-5, atol=2e-5)


def test_smoothed_losses_of_capped_logits_are_refused():
    with pytest.raises(NotImplementedError, match="nor has label_smoothing with a softcap"):
        jvp(
            lambda c: linear_cross_entropy(
                E, c, Y, softcap=5.0, label_smoothing=0.2, impl="chunked"
            ),
            (C,),
            (DIRECTION.c,),
        )


SECOND_DERIVATIVES = {
    "hessian": lambda loss: hessian(lambda e: loss(e, C, Y))(E),
    "jvp of grad": lambda loss: jvp(grad(lambda e: loss(e, C, Y)), (E,), (DIRECTION.e,)),
    "grad of jvp": lambda loss: grad(
        lambda e: jvp(lambda c: loss(e, c, Y), (C,), (DIRECTION.c,))[1]
    )(E),
}


@pytest.mark.parametrize("name", SECOND_DERIVATIVES)
def test_second_derivatives_of_the_reference(name):
    transform = SECOND_DERIVATIVES[name]
    got, expected = tree_leaves(transform(ours("reference"))), tree_leaves(transform(unfused))
    for value, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(value.double(), exact.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", SECOND_DERIVATIVES)
@pytest.mark.parametrize("impl", ["chunked", *KERNELS])
def test_second_derivatives_are_refused(impl, name):
    with pytest.raises(NotImplementedError, match="impl='reference' has one"):
        SECOND_DERIVATIVES[name](ours(impl))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tangent_in_other_dtypes(dtype):
    e, c, v = E.to(dtype), C.to(dtype), DIRECTION.c.to(dtype)
    primal, tangent = jvp(lambda c: linear_cross_entropy(e, c, Y, memory_budget=1), (c,), (v,))
    assert primal.dtype == tangent.dtype == torch.promote_types(dtype, torch.float32)
    expected = jvp(lambda c: unfused(e, c, Y), (c.double(),), (v.double(),))[1]
    torch.testing.assert_close(tangent.double(), expected, rtol=1e-5, atol=1e-5)


def test_tangent_of_the_log_sum_exp():
    def lse(c):
        return linear_cross_entropy(E, c, Y, return_lse=True, impl="chunked")[1]

    got = jvp(lse, (C,), (DIRECTION.c,))[1].double()
    kept = Y != -100
    expected = jvp(
        lambda c: (E.double() @ c.T).logsumexp(1), (C.double(),), (DIRECTION.c.double(),)
    )
    torch.testing.assert_close(got, torch.where(kept, expected[1], 0), rtol=1e-5, atol=1e-5)


@every_impl
def test_target_out_of_range_under_vmap(impl):
    wrong = BATCH.targets.clone()
    wrong[1, 2] = 130
    with pytest.raises(ValueError, match="targets must lie in"):
        vmap(lambda e, y: linear_cross_entropy(e, C, y, impl=impl))(BATCH.e, wrong)


def test_opcheck_of_the_tangents():
    problem = Problem(E, C, Y, B, -100, None, torch.float32, 2**20)
    results = chunked_losses(*problem.flat())
    for directions in ((DIRECTION.e, None, DIRECTION.bias), (None, DIRECTION.c, None)):
        torch.library.opcheck(tangents, (*directions, *results, *problem.flat()))


def test_nothing_outlives_a_dual_level():
    with forward_ad.dual_level():
        e = E.clone().requires_grad_()
        dual = forward_ad.make_dual(C.clone().requires_grad_(), DIRECTION.c)
        loss = linear_cross_entropy(e, dual, Y)
        loss, tangent = forward_ad.unpack_dual(loss)
    assert tangent is not None
    loss.backward()
    expected = grad(lambda e: unfused(e, C, Y))(E)
    torch.testing.assert_close(e.grad, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("transform", [lambda f: lambda c: jvp(f, (c,), (c,))[1], grad])
def test_transforms_within_compiled_code(transform):
    """With ``fullgraph`` the reference; otherwise the loss is taken out of the graph."""

    def compiled(impl, fullgraph):
        torch._dynamo.reset()
        function = transform(lambda c: linear_cross_entropy(E, c, Y, impl=impl))
        return torch.compile(function, backend="aot_eager", fullgraph=fullgraph)

    expected = transform(lambda c: unfused(E, c, Y))(C)
    for impl, fullgraph in (("reference", True), ("chunked", False)):
        got = compiled(impl, fullgraph)(C)
        torch.testing.assert_close(got.double(), expected.double(), rtol=2e-5, atol=2e-5)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="use impl='reference' there"):
        compiled("chunked", True)(C)


# The compiler runs this call eagerly and says once that it cannot look into PyTorch's own question.
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
def test_compiled_code_meets_a_dual_tensor():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda c: linear_cross_entropy(E, c, Y, impl="chunked"), backend="aot_eager"
    )
    compiled(C)
    with forward_ad.dual_level():
        result = compiled(forward_ad.make_dual(C, DIRECTION.c))
        got = forward_ad.unpack_dual(result).tangent
    expected = jvp(lambda c: unfused(E, c, Y), (C,), (DIRECTION.c,))[1]
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)
