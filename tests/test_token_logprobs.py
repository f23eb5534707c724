"""``token_logprobs`` against plain autograd on full logits, in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from cut_cross_entropy import token_logprobs
from tests.support import Problem, make_problem

DIFFERENTIABLE = (
    "logprobs",
    "lse",
    "entropy",
    "mean_logit",
    "log_sum_sq",
    "candidate_logprobs",
)
OUTPUTS = ("lse", "entropy", "mean_logit", "log_sum_sq", "rank", "max_logit")
IMPLS = ("chunked", "reference")
SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "softcap, scale and temperature": {"softcap": 4.0, "logit_scale": 0.7, "temperature": 1.5},
    "negative scale": {"softcap": 4.0, "logit_scale": -0.5},
    "temperature per token": {"temperature": "per token"},
    "temperature per sequence": {"temperature": "per sequence"},
}


def random_like(x: Tensor, seed: int) -> Tensor:
    """Numbers without a pattern, which transforms allow."""
    places = torch.arange(x.numel(), dtype=torch.float64).reshape(x.shape)
    return torch.sin(1 + seed + 7 * places.square()).to(x.dtype)


def extras(problem: Problem, settings: dict, seed: int = 3) -> dict:
    """Temperatures and class ids for the targets of a problem."""
    random = torch.Generator().manual_seed(seed)
    shape, num_classes = tuple(problem.targets.shape), problem.c.shape[0]
    made = dict(settings)
    if isinstance(made.get("temperature"), str):
        size = shape if made["temperature"] == "per token" else (shape[0], *[1] * (len(shape) - 1))
        made["temperature"] = torch.rand(size, generator=random, dtype=torch.float64) + 0.5
    made["candidates"] = torch.randint(-1, num_classes, (*shape, 4), generator=random)
    return made


def some_support(problem: Problem, seed: int = 4) -> Tensor:
    """Rows of each kind: with the target, without it, empty, with an id twice."""
    random = torch.Generator().manual_seed(seed)
    shape = (*problem.targets.shape, 6)
    support = torch.randint(-1, problem.c.shape[0], shape, generator=random, dtype=torch.int32)
    rows = support.view(-1, 6)
    targets = problem.targets.reshape(-1).int()
    rows[::2, 3] = targets[::2].clamp_min(0)
    rows[4, 4] = rows[4, 3]
    rows[1] = -1
    return support


def plain(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    candidates: Tensor | None = None,
    support: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    top_k: int = 0,
) -> dict[str, Tensor]:
    """All results, as one would write them with the logits at hand."""
    z = logit_scale * (e @ c.T + (0 if bias is None else bias))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature[..., None]
    z = z / temperature
    kept = targets != ignore_index
    safe = torch.where(kept, targets, 0).long()[..., None]
    log_p = z.log_softmax(-1)
    normalised, lse = log_p, z.logsumexp(-1)
    if support is not None:
        allowed = torch.zeros_like(z, dtype=torch.bool)
        for place in range(support.shape[-1]):
            ids = support[..., place, None].long()
            allowed |= (torch.arange(z.shape[-1]) == ids) & (ids >= 0)
        allowed |= ~allowed.gather(-1, safe)  # nothing to normalise over but all classes
        masked = z.masked_fill(~allowed, -torch.inf)
        normalised, lse = masked.log_softmax(-1), masked.logsumexp(-1)
    z_t = z.gather(-1, safe)
    ahead = (z > z_t) | ((z == z_t) & (torch.arange(z.shape[-1]) < safe))
    ids = z.topk(top_k, dim=-1).indices
    results = {
        "logprobs": normalised.gather(-1, safe)[..., 0],
        "lse": lse,
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "mean_logit": z.mean(-1),
        "log_sum_sq": log_p.exp().square().sum(-1).log(),
        "rank": ahead.sum(-1).int(),
        "max_logit": z.amax(-1),
        "top_ids": ids,
        "top_logprobs": log_p.gather(-1, ids),
    }
    if candidates is not None:
        found = normalised.gather(-1, candidates.clamp_min(0))
        results["candidate_logprobs"] = torch.where(candidates >= 0, found, 0)
    for name, x in results.items():
        results[name] = torch.where(kept.reshape(*kept.shape, *[1] * (x.ndim - kept.ndim)), x, 0)
    return results


def leaves(problem: Problem, needed: tuple[str, ...] = ("e", "c", "bias")) -> dict[str, Tensor]:
    named = {"e": problem.e, "c": problem.c, "bias": problem.bias}
    return {
        name: x.detach().clone().requires_grad_(name in needed)
        for name, x in named.items()
        if x is not None
    }


def objective(results: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """A sum of results with random weights, which are their upstream gradients."""
    total = torch.zeros((), dtype=torch.float64)
    for seed, name in enumerate(names):
        x = results[name]
        total = (
            total + (torch.where(x.isfinite(), x, 0).double() * random_like(x.double(), seed)).sum()
        )
    return total


def gradients(total: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    wanted = {name: x for name, x in tensors.items() if x.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values())), strict=True))


def close(name: str, got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, msg=lambda message: f"{name}: {message}")


def compare(
    problem: Problem, names: tuple[str, ...], impl: str, needed=("e", "c", "bias"), **options
):
    ours, theirs = leaves(problem, needed), leaves(problem, needed)
    outputs = tuple(name for name in names if name in OUTPUTS)
    got = token_logprobs(
        ours["e"],
        ours["c"],
        problem.targets,
        outputs=outputs,
        bias=ours.get("bias"),
        impl=impl,
        memory_budget=1,
        **options,
    )
    expected = plain(theirs["e"], theirs["c"], problem.targets, bias=theirs.get("bias"), **options)
    for name in {*names, "logprobs"}:
        close(name, getattr(got, name), expected[name])
    asked = tuple(name for name in names if name in DIFFERENTIABLE)
    if asked and needed:
        got_grads = gradients(objective(vars(got), asked), ours)
        for name, grad in gradients(objective(expected, asked), theirs).items():
            close(f"gradient of {name}", got_grads[name], grad)
    return got


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "mixed"])
def test_each_output_alone_and_all_together(name, impl, settings):
    problem = make_problem(dtype=torch.float64, bias=True)
    names = DIFFERENTIABLE if name == "mixed" else (name,)
    compare(problem, names, impl, **extras(problem, settings))


@pytest.mark.parametrize("settings", ["plain", "softcap, scale and temperature"])
@pytest.mark.parametrize("impl", IMPLS)
def test_support(impl, settings):
    problem = make_problem(dtype=torch.float64, bias=True)
    options = extras(problem, SETTINGS[settings])
    compare(
        problem, ("logprobs", "candidate_logprobs"), impl, support=some_support(problem), **options
    )
    compare(problem, DIFFERENTIABLE, impl, support=some_support(problem), **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_support_of_the_target_alone_is_certain(impl):
    problem = make_problem(dtype=torch.float64, ignored=0.0)
    tensors = leaves(problem)
    got = token_logprobs(
        tensors["e"], tensors["c"], problem.targets, support=problem.targets[..., None], impl=impl
    )
    assert not got.logprobs.any()
    for grad in gradients(got.logprobs.sum(), tensors).values():
        assert not grad.any()


SUBSETS = [s for n in range(1, 4) for s in itertools.combinations(("e", "c", "bias"), n)]


@pytest.mark.parametrize("needed", SUBSETS, ids="+".join)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_needed_gradients(needed, softcap):
    problem = make_problem(dtype=torch.float64, bias=True)
    options = extras(problem, {"softcap": softcap})
    compare(problem, DIFFERENTIABLE, "chunked", needed, **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_ranks_maxima_and_likeliest_classes(impl):
    problem = make_problem(dtype=torch.float64, bias=True)
    got = compare(problem, ("rank", "max_logit", "top_ids", "top_logprobs"), impl, top_k=5)
    assert got.rank.dtype == torch.int32
    assert not got.rank.requires_grad
    assert not got.top_logprobs.requires_grad
    first = got.top_ids[..., 0] == problem.targets
    assert torch.equal((got.rank == 0) & got.mask, first & got.mask)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_tie_goes_to_the_lower_id(impl):
    e, c = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[2.0, 0.0]] * 3 + [[1.0, 0.0]])
    got = token_logprobs(e, c, torch.tensor([0, 1, 3]), outputs=("rank",), impl=impl)
    assert got.rank.tolist() == [0, 1, 3]


@pytest.mark.parametrize("impl", IMPLS)
def test_shift_moves_all_that_belongs_to_a_target(impl):
    problem = make_problem((3, 6), dtype=torch.float64)
    options = extras(problem, {"temperature": "per token"})
    options["support"] = some_support(problem)
    got = token_logprobs(
        problem.e,
        problem.c,
        problem.targets,
        shift=2,
        outputs=OUTPUTS,
        top_k=2,
        impl=impl,
        **options,
    )
    moved = {name: x[:, 2:] for name, x in options.items()}
    expected = plain(problem.e[:, :-2], problem.c, problem.targets[:, 2:], top_k=2, **moved)
    for name, x in expected.items():
        assert getattr(got, name).shape == x.shape
        torch.testing.assert_close(getattr(got, name), x)
    assert torch.equal(got.mask, problem.targets[:, 2:] != -100)


def test_nothing_is_computed_that_was_not_asked_for():
    problem = make_problem()
    got = token_logprobs(problem.e, problem.c, problem.targets)
    absent = {name for name, x in vars(got).items() if x is None}
    assert absent == set(vars(got)) - {"logprobs", "mask"}
    assert got.logprobs.dtype == torch.float32
    assert got.mask.dtype == torch.bool


def test_nothing_is_kept_without_gradients():
    problem = make_problem(bias=True)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    tensors = leaves(problem)
    options = extras(problem, {})
    for context in (torch.no_grad(), torch.inference_mode()):
        with hooks, context:
            got = token_logprobs(
                tensors["e"], tensors["c"], problem.targets, outputs=OUTPUTS, top_k=2, **options
            )
        assert not got.logprobs.requires_grad
    assert not saved


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_an_empty_batch_stays_in_the_graph(impl, shape):
    e = torch.zeros(*shape, 8, requires_grad=True)
    c = torch.randn(11, 8, requires_grad=True)
    targets = torch.zeros(shape, dtype=torch.int64)
    got = token_logprobs(
        e,
        c,
        targets,
        outputs=OUTPUTS,
        candidates=targets[..., None],
        support=targets[..., None],
        top_k=2,
        impl=impl,
    )
    total = sum(getattr(got, name).sum() for name in DIFFERENTIABLE)
    for grad, x in zip(torch.autograd.grad(total, (e, c)), (e, c), strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_probabilities_of_all_classes_add_up_to_1(impl):
    problem = make_problem((5,), 150, ignored=0.0)
    every = torch.arange(150).expand(5, 150)
    got = token_logprobs(problem.e, problem.c, problem.targets, candidates=every, impl=impl)
    total = got.candidate_logprobs.exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(5))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1.0, 30.0, 300.0])
def test_log_probabilities_and_entropies_stay_in_range(impl, size):
    problem = make_problem((64,), 400)
    every = torch.arange(400).expand(64, 400)
    got = token_logprobs(
        size * problem.e,
        problem.c,
        problem.targets,
        outputs=("entropy",),
        candidates=every,
        top_k=3,
        impl=impl,
    )
    assert got.logprobs.max() <= 0
    assert got.candidate_logprobs.max() <= 0
    assert got.top_logprobs.max() <= 0
    if impl != "reference":
        assert got.entropy.min() >= 0


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_tokens_are_0_and_have_no_gradient(impl):
    problem = make_problem(dtype=torch.float64)
    ignored = problem.targets == -100
    tensors = leaves(problem)
    with torch.no_grad():
        tensors["e"][ignored] = torch.nan
    got = token_logprobs(
        tensors["e"],
        tensors["c"],
        problem.targets,
        outputs=OUTPUTS,
        top_k=2,
        impl=impl,
        support=some_support(problem),
        **extras(problem, {}),
    )
    assert torch.equal(got.mask, ~ignored)
    for name, x in vars(got).items():
        assert not x[ignored].any(), name
    found = gradients(objective(vars(got), DIFFERENTIABLE), tensors)
    assert not found["e"][ignored].any()
    assert found["c"].isfinite().all()


def test_a_token_does_not_depend_on_its_batch():
    problem = make_problem((64,), 500, ignored=0.0)
    whole = token_logprobs(problem.e, problem.c, problem.targets, outputs=OUTPUTS)
    for some in (slice(0, 1), slice(5, 20), slice(60, 64)):
        part = token_logprobs(problem.e[some], problem.c, problem.targets[some], outputs=OUTPUTS)
        for name in ("logprobs", *OUTPUTS):
            torch.testing.assert_close(
                getattr(part, name), getattr(whole, name)[some], rtol=2e-6, atol=2e-6
            )


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_entropy_of_large_logits(offset):
    """An error of at most 2e-6 at logits of 30, and 5e-6 with an offset of 100."""
    random = torch.Generator().manual_seed(0)
    e = torch.eye(32)
    c = (torch.rand(2000, 32, generator=random) * 2 + 28).float() + offset
    targets = torch.randint(0, 2000, (32,), generator=random)
    got = token_logprobs(e, c, targets, outputs=("entropy",), impl="chunked", memory_budget=1)
    exact = plain(e.double(), c.double(), targets)["entropy"]
    assert (got.entropy.double() - exact).abs().max() <= (2e-6 if offset == 0 else 5e-6)


def test_a_nearly_certain_target_keeps_its_digits():
    """The logarithm of 1 - 1e-9 and the gradient, which is as small, have all of their digits."""
    e = torch.tensor([[1.0]])
    c = torch.tensor([[20.0], [0.0], [-1.0]], requires_grad=True)
    got = token_logprobs(e, c, torch.tensor([0]), impl="chunked")
    exact_c = c.detach().double().requires_grad_()
    exact = (e.double() @ exact_c.T).log_softmax(1)[:, 0]
    torch.testing.assert_close(got.logprobs.double(), exact, rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(got.logprobs.sum(), c)
    (exact_grad,) = torch.autograd.grad(exact.sum(), exact_c)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_not_a_number_comes_out_as_such(impl):
    problem = make_problem((4,), ignored=0.0)
    e = problem.e.clone()
    e[1, 3] = torch.nan
    got = token_logprobs(e, problem.c, problem.targets, outputs=OUTPUTS, impl=impl)
    for name in ("logprobs", "lse", "entropy", "mean_logit", "log_sum_sq", "max_logit"):
        assert torch.equal(getattr(got, name).isnan(), torch.tensor([False, True, False, False]))
    assert got.rank[1] == -1


@pytest.mark.parametrize("impl", IMPLS)
def test_a_class_of_no_probability(impl):
    """A bias of -inf, which masks a class, leaves entropy and gradients finite."""
    problem = make_problem(dtype=torch.float64, bias=True, ignored=0.0)
    problem.bias[7] = -torch.inf
    problem.targets[problem.targets == 7] = 8
    tensors = leaves(problem, ("e", "c"))
    names = ("logprobs", "lse", "entropy", "log_sum_sq")
    got = token_logprobs(
        tensors["e"], tensors["c"], problem.targets, bias=problem.bias, outputs=names[1:], impl=impl
    )
    left = torch.arange(300) != 7
    shorter = Problem(
        problem.e,
        problem.c[left],
        torch.where(problem.targets > 7, problem.targets - 1, problem.targets),
        problem.bias[left],
    )
    theirs = leaves(shorter, ("e", "c"))
    expected = plain(theirs["e"], theirs["c"], shorter.targets, bias=shorter.bias)
    for name in names:
        torch.testing.assert_close(getattr(got, name), expected[name])
    found = gradients(objective(vars(got), names), tensors)
    wanted = gradients(objective(expected, names), theirs)
    torch.testing.assert_close(found["e"], wanted["e"])
    torch.testing.assert_close(found["c"][left], wanted["c"])
    assert not found["c"][7].any()


def ask_for_everything(e, c, bias, targets, candidates, support, temperature, **options):
    return token_logprobs(
        e,
        c,
        targets,
        outputs=OUTPUTS,
        candidates=candidates,
        support=support,
        temperature=temperature,
        bias=bias,
        top_k=2,
        **options,
    )


def loss_of_everything(*inputs):
    got = ask_for_everything(*inputs, softcap=4.0, impl="chunked")
    return objective(vars(got), DIFFERENTIABLE), got.rank, got.top_ids


def everything(problem: Problem) -> tuple[Tensor, ...]:
    made = extras(problem, {"temperature": "per token"})
    support = some_support(problem)
    return problem.targets, made["candidates"], support, made["temperature"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_fullgraph(impl, softcap):
    """A model that ends in the function compiles in one graph, forward and backward."""
    torch._dynamo.reset()
    problem = make_problem(dtype=torch.float64, bias=True)
    others = everything(problem)

    def model(e, c, bias):
        got = ask_for_everything(torch.sin(e), c, bias, *others, softcap=softcap, impl=impl)
        return got.logprobs, got.lse, got.entropy, got.mean_logit, got.log_sum_sq, got.rank

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for function in (model, compiled):
        tensors = leaves(problem)
        *values, rank = function(*tensors.values())
        total = sum((x * random_like(x, i)).sum() for i, x in enumerate(values))
        results.append((*values, rank, *gradients(total, tensors).values()))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    torch._dynamo.reset()


def test_transforms():
    """``vmap`` of ``grad``, as per-example gradients have it."""
    problem = make_problem((3, 5), dtype=torch.float64, bias=True, ignored=0.0)
    batch = everything(problem)

    def example(e, targets, candidates, support, temperature):
        def of(c):
            return loss_of_everything(
                e, c, problem.bias, targets, candidates, support, temperature
            )[0]

        return torch.func.grad(of)(problem.c)

    got = torch.func.vmap(example)(problem.e, *batch)
    for i in range(3):
        expected = example(problem.e[i], *(x[i] for x in batch))
        torch.testing.assert_close(got[i], expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_derivatives_that_do_not_exist_are_refused():
    problem = make_problem((4,))
    with pytest.raises(NotImplementedError, match="token_logprobs has no second and no forward"):
        torch.func.jvp(
            lambda e: token_logprobs(e, problem.c, problem.targets).logprobs,
            (problem.e,),
            (problem.e,),
        )
    e = problem.e.requires_grad_()
    (grad,) = torch.autograd.grad(
        token_logprobs(e, problem.c, problem.targets).logprobs.sum(), e, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="token_logprobs has no second and no forward"):
        grad.sum().backward()


def test_operators():
    """Schema, fake and autograd of each operator, as PyTorch checks them."""
    from cut_cross_entropy.operators import token_outputs as ops
    from cut_cross_entropy.outputs import Asked
    from cut_cross_entropy.problem import Problem as Call

    problem = make_problem((4,), bias=True)
    e, c, bias = leaves(problem).values()
    flat = Call(
        e, c, problem.targets, bias, -100, 3.0, torch.float32, 2**20, multiplier=torch.ones(4)
    ).flat()
    weights = torch.full((300,), 1 / 300)
    for asked in (Asked(), Asked(True, True, True, True, True, 2)):
        torch.library.opcheck(ops.token_outputs, (*flat, weights, *asked.flat()))
    ids = torch.tensor([[0, -1], [5, 5], [299, 3], [1, 2]])
    torch.library.opcheck(ops.logits_of_classes, (*flat, ids))
    torch.library.opcheck(ops.weighted_sum_of_rows, (c, weights, torch.float32, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    """Logits are never rounded: factors in half precision are exact in float32 products."""
    problem = make_problem((40,), 500, 64, dtype=dtype, bias=True)
    got = token_logprobs(
        problem.e, problem.c, problem.targets, outputs=OUTPUTS, bias=problem.bias, impl="chunked"
    )
    exact = plain(
        problem.e.double(), problem.c.double(), problem.targets, bias=problem.bias.double()
    )
    for name in ("logprobs", "lse", "entropy", "log_sum_sq", "mean_logit", "max_logit"):
        found = getattr(got, name)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact[name], rtol=1e-6, atol=4e-6)
    wide = problem.to(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        cast = token_logprobs(wide.e, wide.c, wide.targets, outputs=OUTPUTS, bias=wide.bias)
    torch.testing.assert_close(cast.logprobs, got.logprobs)
