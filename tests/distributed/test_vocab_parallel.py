"""Four processes that hold a vocabulary together, against one process with all of it."""

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cut_cross_entropy import VocabParallelOptions, linear_cross_entropy
from tests.distributed.processes import Cases, assert_passed
from tests.distributed.sharded import check, rows
from tests.support import IMPLS, check_checkpoint, make_problem
from tests.test_snippets import PLACEHOLDERS

WORLD = 4
RAGGED = ((0, 1), (1, 130), (130, 130), (130, 300))  # one class; and none at all
PLAIN = ("chunked", "reference")
OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none-shift-bias-softcap": {"reduction": "none", "shift": 2, "bias": True, "softcap": 5.0},
    "bias": {"bias": True, "reduction": "none"},
    "only-e": {"needed": ("e",)},
    "only-c": {"needed": ("c",)},
    "no-gradient": {"needed": ()},
}
CASES = Cases()
case = CASES.add


@case(*((impl, name) for impl in PLAIN for name in OPTIONS))
def options(rank, impl, name):
    """Tokens are ignored, and most targets live on another process, with every option."""
    own = dict(OPTIONS[name])
    problem = make_problem(bias=own.pop("bias", False))
    check(problem, impl, **own)


@case(*PLAIN)
def ragged(rank, impl):
    start, stop = RAGGED[rank]
    problem = make_problem(bias=True)
    check(problem, impl, VocabParallelOptions(start, stop), softcap=5.0)


@case(*PLAIN)
def all_targets_on_one_process(rank, impl):
    problem = make_problem(ignored=0.0)
    problem.targets.clamp_(max=70)
    check(problem, impl)


@case(*PLAIN)
def all_ignored(rank, impl):
    problem = make_problem(ignored=1.0)
    ours = check(problem, impl)
    assert ours.loss == 0
    assert not ours.grad_e.any()


@case()
def no_tokens(rank):
    check(make_problem((0,)), "chunked")


@case(*PLAIN)
def parts_of_the_gradient(rank, impl):
    """``reduce_e_grad=False`` leaves each its part, and the sum of the parts is the gradient."""
    check(make_problem(), impl, VocabParallelOptions.from_vocab(300, reduce_e_grad=False))


@case(*((impl, dtype) for impl in PLAIN for dtype in ("float64", "bfloat16", "float16")))
def dtypes(rank, impl, dtype):
    problem = make_problem(dtype=getattr(torch, dtype), bias=True)
    check(problem, impl, softcap=5.0)


@case()
def small_budget(rank):
    check(make_problem(), "chunked", memory_budget=1)


@case()
def the_same_as_one_process(rank):
    """Not within a budget of errors only: float32 results differ in the last digits at most."""
    problem = make_problem()
    own = VocabParallelOptions.from_vocab(300)
    whole = linear_cross_entropy(problem.e, problem.c, problem.targets, reduction="none")
    part = rows(problem, own)
    mine = linear_cross_entropy(
        part.e, part.c, part.targets, reduction="none", vocab_parallel_options=own
    )
    torch.testing.assert_close(mine, whole, rtol=1e-6, atol=1e-6)


@case()
def subgroups(rank):
    """Two groups of two, each with a vocabulary and data of its own."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    problem = make_problem((7 + rank // 2,), classes=100 + rank // 2, seed=rank // 2)
    classes = problem.c.shape[0]
    check(problem, "chunked", VocabParallelOptions.from_vocab(classes, groups[rank // 2]))


@case()
def autocast(rank):
    problem = make_problem()
    own = VocabParallelOptions.from_vocab(300)
    part = rows(problem, own)
    e, c = part.e.requires_grad_(), part.c.requires_grad_()
    for impl in PLAIN:
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(e, c, part.targets, impl=impl, vocab_parallel_options=own)
            expected = linear_cross_entropy(problem.e, problem.c, problem.targets, impl=impl)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        assert e.grad.dtype == c.grad.dtype == torch.float32
        e.grad = c.grad = None


@case(*PLAIN)
def out_of_range(rank, impl):
    """The same error on every process; where nobody looks (a GPU) NaN, no plausible number."""
    problem = make_problem((5,), ignored=0.0)
    problem.targets[3] = 300
    own = VocabParallelOptions.from_vocab(300)
    part = rows(problem, own)
    with pytest.raises(ValueError, match=r"targets must lie in \[0, V\) with V = 300"):
        linear_cross_entropy(part.e, part.c, part.targets, impl=impl, vocab_parallel_options=own)


@case("chunked", "reference")
def out_of_range_unseen(rank, impl):
    from cut_cross_entropy.distributed import collectives

    problem = make_problem((5,), ignored=0.0)
    problem.targets[3] = 300
    own = VocabParallelOptions.from_vocab(300)
    part = rows(problem, own)
    e = part.e.requires_grad_()
    original, collectives.check_target_range = collectives.check_target_range, lambda *_: None
    try:
        loss = linear_cross_entropy(
            e, part.c, part.targets, impl=impl, vocab_parallel_options=own, reduction="none"
        )
    finally:
        collectives.check_target_range = original
    assert torch.equal(loss.isnan(), torch.tensor([False, False, False, True, False]))
    loss.sum().backward()
    assert not e.grad[:3].isnan().any()
    if impl == "chunked":
        assert e.grad[3].isnan().all()


@case(*PLAIN)
def no_second_derivative(rank, impl):
    own = VocabParallelOptions.from_vocab(300)
    part = rows(make_problem(), own)
    e = part.e.requires_grad_()
    loss = linear_cross_entropy(e, part.c, part.targets, impl=impl, vocab_parallel_options=own)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(loss, e, create_graph=True)


@case(*((impl, reduction) for impl in PLAIN for reduction in ("mean", "sum", "none")))
def own_tokens(rank, impl, reduction):
    """Sequence parallel: each process has tokens of its own, and as many gradients of them."""
    from cut_cross_entropy.utils import compute_z_loss

    problem = make_problem((WORLD, 6), bias=True, ignored=0.3)
    problem.targets[2] = -100  # a process without a token that counts
    tokens = problem.targets.numel()
    own = VocabParallelOptions.from_vocab(300, gather_e=True)
    part = rows(problem, own)
    leaves = [x.clone().requires_grad_() for x in (problem.e[rank], part.c, part.bias)]
    settings = {"impl": impl, "reduction": reduction, "return_lse": True, "softcap": 5.0}
    weights = torch.rand(WORLD, 6, generator=torch.Generator().manual_seed(0))

    def objective(loss, lse, targets, weights):
        z = compute_z_loss(lse, targets, reduction="sum") / tokens
        return (loss * weights).sum() + z if reduction == "none" else loss + z

    e, c, bias = leaves
    mine, lse = linear_cross_entropy(
        e, c, problem.targets[rank], bias, vocab_parallel_options=own, **settings
    )
    objective(mine, lse, problem.targets[rank], weights[rank]).backward()

    wholes = [x.clone().requires_grad_() for x in (problem.e, problem.c, problem.bias)]
    loss, all_lse = linear_cross_entropy(
        wholes[0], wholes[1], problem.targets, wholes[2], **settings
    )
    objective(loss, all_lse, problem.targets, weights).backward()
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    close(mine, loss[rank] if reduction == "none" else loss)
    close(lse, all_lse[rank])
    close(e.grad, wholes[0].grad[rank])
    here = slice(own.start, own.stop)
    close(c.grad, wholes[1].grad[here])
    close(bias.grad, wholes[2].grad[here])


@case()
def own_tokens_with_shift_under_autocast(rank):
    problem = make_problem((WORLD, 2, 6))
    own = VocabParallelOptions.from_vocab(300, gather_e=True)
    part = rows(problem, own)
    e, c = problem.e[rank].clone().requires_grad_(), part.c.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(
            e, c, problem.targets[rank], shift=1, reduction="none", vocab_parallel_options=own
        )
        expected = linear_cross_entropy(
            problem.e, problem.c, problem.targets, shift=1, reduction="none"
        )
    torch.testing.assert_close(loss, expected[rank])
    loss.sum().backward()
    assert e.grad.shape == (2, 6, 16)
    assert e.grad.dtype == torch.float32
    assert not e.grad[:, -1].any()
    assert e.grad[:, :-1].any()


@case(*((impl, reentrant) for impl in PLAIN for reentrant in (False, True)))
def activation_checkpointing(rank, impl, reentrant):
    own = VocabParallelOptions.from_vocab(300)
    part = rows(make_problem(), own)
    e, c = part.e.requires_grad_(), part.c.requires_grad_()

    def head(e, c):
        return linear_cross_entropy(e * 2, c, part.targets, impl=impl, vocab_parallel_options=own)

    check_checkpoint(head, e, c, use_reentrant=reentrant)


@case(*PLAIN)
def inference(rank, impl):
    own = VocabParallelOptions.from_vocab(300)
    problem = make_problem()
    part = rows(problem, own)
    with torch.inference_mode():
        loss = linear_cross_entropy(
            part.e, part.c, part.targets, impl=impl, vocab_parallel_options=own
        )
    torch.testing.assert_close(loss, linear_cross_entropy(problem.e, problem.c, problem.targets))


@case()
def block_of_the_page(rank):
    """The first block of docs/distributed.md, as a reader would run it in every process."""
    page = (Path(__file__).parents[2] / "docs/distributed.md").read_text(encoding="utf-8")
    code = page.split("```py\n", 1)[1].split("```", 1)[0]
    names = {"vocab_size": 50}
    exec(PLACEHOLDERS, names)
    exec(code, names)
    whole = linear_cross_entropy(names["embeddings"], names["classifier"], names["labels"])
    torch.testing.assert_close(names["loss"], whole)


@case(*PLAIN)
def compiled(rank, impl):
    """``torch.compile`` traces the call as a whole, exchanges included."""
    own = VocabParallelOptions.from_vocab(300)
    part = rows(make_problem(bias=True), own)
    results = []
    for backend in (None, "aot_eager"):
        torch._dynamo.reset()
        e, c, bias = (x.clone().requires_grad_() for x in (part.e, part.c, part.bias))

        def model(e, c, bias):
            return linear_cross_entropy(
                torch.sin(e), c, part.targets, bias, impl=impl, vocab_parallel_options=own
            )

        run = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
        loss = run(e, c, bias)
        loss.backward()
        results.append((loss.detach(), e.grad, c.grad, bias.grad))
    torch.testing.assert_close(results[0], results[1])


@case()
def compiled_with_own_tokens(rank):
    own = VocabParallelOptions.from_vocab(300, gather_e=True)
    problem = make_problem((WORLD, 6))
    part = rows(problem, own)
    results = []
    for backend in (None, "aot_eager"):
        torch._dynamo.reset()
        e, c = (x.clone().requires_grad_() for x in (problem.e[rank], part.c))

        def model(e, c):
            return linear_cross_entropy(
                e, c, problem.targets[rank], reduction="none", vocab_parallel_options=own
            )

        run = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
        loss = run(e, c)
        loss.sum().backward()
        results.append((loss.detach(), e.grad, c.grad))
    torch.testing.assert_close(results[0], results[1])


@case(*((impl, gather) for impl in PLAIN for gather in (False, True)))
def nothing_to_learn_from(rank, impl, gather):
    """Rows of one token, shifts beyond the end, no tokens at all, and only ignored ones."""
    for leading, shift, ignored in (
        ((3, 1), 1, 0.0),
        ((2, 3), 5, 0.0),
        ((0,), 0, 0.0),
        ((2, 0), 1, 0.0),
        ((2, 3), 0, 1.0),
    ):
        problem = make_problem(leading, classes=11, bias=True, ignored=ignored)
        shards = VocabParallelOptions.from_vocab(11, gather_e=gather)
        own = slice(shards.start, shards.stop)
        inputs = problem.e, problem.c[own].clone(), problem.bias[own].clone()
        e, c, bias = (x.requires_grad_() for x in inputs)
        for reduction in ("mean", "sum", "none"):
            loss, lse = linear_cross_entropy(
                e,
                c,
                problem.targets,
                bias,
                shift=shift,
                reduction=reduction,
                return_lse=True,
                impl=impl,
                vocab_parallel_options=shards,
            )
            assert lse.shape == (*leading[:-1], max(leading[-1] - shift, 0))
            assert torch.count_nonzero(loss) == torch.count_nonzero(lse) == 0
            for grad in torch.autograd.grad(loss.sum() + lse.sum(), (e, c, bias)):
                assert torch.count_nonzero(grad) == 0


@case()
def reductions_of_releases(rank):
    """Results of each process's classes, put together by the functions of Apple's releases."""
    from cut_cross_entropy.vocab_parallel import utils

    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    own = logits[:, 3 * rank : 3 * rank + 3]
    torch.testing.assert_close(utils.vp_reduce_lse(own.logsumexp(1), None), logits.logsumexp(1))
    targets = torch.tensor([0, 3, 7, 11, 5])
    here = targets // 3 == rank
    correct = torch.where(here, own.gather(1, (targets % 3)[:, None])[:, 0], 0)
    total = utils.vp_reduce_correct_logit(correct, None, torch.float64)
    torch.testing.assert_close(total, logits.gather(1, targets[:, None])[:, 0].double())
    e = torch.ones(2, 3, requires_grad=True)
    for reduce in (True, False):
        options = VocabParallelOptions(0, 3, reduce_e_grad=reduce)
        hooked = utils.vp_reduce_e_grad_hook(e, options)
        # The gradient of the sum is one tensor for both terms, and only one of them is reduced.
        other = torch.ones(2, 3, requires_grad=True)
        grads = torch.autograd.grad(((hooked + other) * (rank + 1.0)).sum(), (e, other))
        assert torch.equal(grads[0], torch.full((2, 3), 10.0 if reduce else rank + 1.0))
        assert torch.equal(grads[1], torch.full((2, 3), rank + 1.0))


@pytest.mark.parametrize("name", CASES)
def test_vocab_parallel(outcomes, name):
    assert_passed(outcomes[name])


assert set(PLAIN) < set(IMPLS)
