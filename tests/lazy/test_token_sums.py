"""Trainers without a seam: what they make of a patched model's logits, without the logits."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers

from cut_cross_entropy.lazy import CutCrossEntropyWarning, token_sums
from cut_cross_entropy.lazy.logits import LazyLogits
from cut_cross_entropy.lazy.notices import call_count
from cut_cross_entropy.transformers import cce_patch, cce_unpatch
from tests.lazy import trainers
from tests.support import forget_warnings, is_computed
from tests.transformers.models import SIZES, VOCAB, batch, llama

FALLS_BACK = pytest.mark.filterwarnings("ignore:.*computed in full because:UserWarning")
RANDOM = torch.Generator().manual_seed(5)
CANDIDATES = torch.randint(0, VOCAB, (4, 8, 6), generator=RANDOM)
TEMPERATURES = torch.linspace(0.5, 2.0, 32).view(4, 8, 1)


@pytest.fixture(autouse=True)
def every_warning_anew():
    forget_warnings()
    yield
    forget_warnings()


def counted(function, name, calls):
    def counting(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    return counting


@pytest.fixture
def operators(monkeypatch):
    """Names of the operators' functions in the order of their calls."""
    calls = []
    for name in ("token_logprobs", "class_logits", "mean_logits"):
        monkeypatch.setattr(token_sums, name, counted(getattr(token_sums, name), name, calls))
    return calls


def inputs():
    data = batch(4, 9)
    return data["input_ids"], data["labels"]


def gemma2():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**SIZES, final_logit_softcapping=2.0)
    model = transformers.Gemma2ForCausalLM(config).train()
    model.lm_head.weight.data.mul_(40)
    return model


def logits_of(model):
    return model(inputs()[0]).logits


def shifted(model):
    return logits_of(model)[:, :-1]


def actor(model):
    return trainers.actor(model, inputs()[0], 0.7, torch.float64)


def dpo(model, ld_alpha=None):
    logits = logits_of(model).to(torch.float64)
    logps, lengths = trainers.preference_logps(logits, inputs()[1], ld_alpha=ld_alpha)
    chosen, rejected = logits.split(2, dim=0)
    return logps / lengths, chosen.mean().detach(), rejected.mean().detach()


def kto(model):
    logits = logits_of(model).to(torch.float64)
    logps, _ = trainers.preference_logps(logits, inputs()[1])
    return logps, logits[torch.tensor([True, False, True, True])].nansum().detach()


def mixed(model):
    """Entropies in the other ways, of a view, of probabilities and with a kept dimension."""
    z = shifted(model).double()
    p, logp = z.softmax(-1), torch.log_softmax(z, 2)
    return (
        -(p * logp).sum(dim=-1),
        z.logsumexp(-1, keepdim=True) - (z * p).sum(2, keepdim=True),
        p.gather(-1, CANDIDATES),
        -(logp.exp() * logp)[1:, ::2].sum(-1),
    )


STEPS = {  # a trainer's function of a model; operators that ran
    "LLaMA-Factory DPO": (dpo, ["token_logprobs", "mean_logits", "mean_logits"]),
    "LLaMA-Factory LD-DPO": (
        lambda m: dpo(m, 0.5),
        ["token_logprobs", "mean_logits", "mean_logits"],
    ),
    "LLaMA-Factory KTO": (kto, ["token_logprobs", "mean_logits"]),
    "OpenRLHF": (actor, ["token_logprobs", "class_logits"]),
    "TRL": (
        lambda m: trainers.selective_log_softmax(shifted(m), inputs()[0][:, 1:]),
        ["class_logits", "token_logprobs"],
    ),
    "TRL's entropy": (
        lambda m: trainers.entropy_from_log_softmax(shifted(m) / 0.9),
        ["token_logprobs"],
    ),
    "rows": (
        lambda m: torch.stack(
            [
                F.log_softmax(row, dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
                for row, ids in zip(shifted(m), inputs()[0][:, 1:], strict=True)
            ]
        ),
        ["token_logprobs"] * 4,
    ),
    "candidates": (
        lambda m: shifted(m).log_softmax(-1).gather(-1, CANDIDATES),
        ["token_logprobs"],
    ),
    "candidates' logits": (lambda m: shifted(m).gather(2, CANDIDATES), ["class_logits"]),
    "a temperature for each token": (
        lambda m: (shifted(m) / TEMPERATURES).log_softmax(-1).gather(-1, CANDIDATES[..., :1]),
        ["token_logprobs"],
    ),
    "mean": (lambda m: logits_of(m).mean(-1), ["mean_logits"]),
    "cross-entropy": (
        lambda m: F.cross_entropy(
            shifted(m).flatten(0, 1), inputs()[0][:, 1:].flatten(), reduction="none"
        ),
        [],
    ),
    "mixed": (mixed, ["token_logprobs"] * 3),
}


def step(model, function):
    model.zero_grad(set_to_none=True)
    outputs = function(model)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    random = torch.Generator().manual_seed(1)
    total = 0
    for output in outputs:
        weights = torch.randn(output.shape, generator=random, dtype=torch.float64)
        total = total + (output * weights).sum()
    total.backward()
    return [x.detach() for x in outputs], {n: p.grad for n, p in model.named_parameters()}


def assert_same(actual, expected, atol=1e-10):
    for mine, other in zip(actual[0], expected[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=atol)
    for name, grad in expected[1].items():
        torch.testing.assert_close(actual[1][name], grad, rtol=1e-9, atol=atol, msg=name)


@pytest.mark.parametrize(
    ("name", "build"),
    [
        (name, build)
        for name in STEPS
        for build in (llama, gemma2)
        # A temperature for each token after a softcap needs the logits.
        if not (build is gemma2 and name == "a temperature for each token")
    ],
)
def test_values_and_gradients_without_logits(name, build, operators):
    function, expected_operators = STEPS[name]
    plain = build().double()
    patched = cce_patch(copy.deepcopy(plain), lazy_logits=True)
    expected = step(plain, function)
    assert not operators
    with warnings.catch_warnings():
        warnings.simplefilter("error", CutCrossEntropyWarning)  # given where logits are computed
        actual = step(patched, function)
    assert_same(actual, expected)
    assert operators == expected_operators
    assert call_count(patched) >= 1


def in_place(z):
    p, lse = z.detach().softmax(-1), z.detach().clone().logsumexp(-1)
    z.mul_(0.5)
    return z.logsumexp(-1) + lse, (p * z).sum(-1), (z.softmax(-1) * z).sum(-1)


def in_place_after_a_view(z):
    rows, logp = z[0], z.log_softmax(-1)
    z.div_(3)
    return rows.logsumexp(-1), logp.gather(-1, CANDIDATES), z.mean(-1)


def changed_probabilities(z):
    p = z.softmax(-1).float()
    p.add_(2.0)
    return (p * z).sum(-1)


def detached(z):
    p = z.softmax(-1).detach()
    return (p * z).sum(-1), (z.detach().softmax(-1) * z).sum(-1)


def without_grad(z):
    with torch.no_grad():
        entropy = trainers.entropy_from_log_softmax(z)
        lse = z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)
    return z.logsumexp(-1), entropy, lse


OTHER_STEPS = {  # what is not recognised, or must not be taken for what is
    "a sum of probabilities": lambda z: z.softmax(-1)[..., :5].sum(-1),
    "other classes": lambda z: z.softmax(-1)[..., 3:].gather(-1, CANDIDATES.clamp_max(20)),
    "over tokens": lambda z: (z.softmax(1), z.logsumexp(1), z.mean(0)),
    "over all": lambda z: (z.logsumexp((0, 1, 2)), z.sum(), (z.softmax(-1) * z).sum()),
    "a softmax of a softmax": lambda z: z.softmax(-1).log_softmax(-1).gather(-1, CANDIDATES),
    "a scaled softmax": lambda z: (z.softmax(-1) * 2.0 * z).sum(-1),
    "other logits": lambda z: ((z * 0.5).softmax(-1) * z).sum(-1),
    "other tokens": lambda z: (z[:, 1:].softmax(-1) * z[:, :-1]).sum(-1),
    "fewer rows": lambda z: (z.log_softmax(-1).gather(-1, CANDIDATES[:, :3]),),
    "a gather of tokens": lambda z: z.gather(1, CANDIDATES % 8),
    "an exponential": lambda z: z.exp().mean(-1),
    "a softmax times itself": lambda z: (z.softmax(-1) * z.softmax(-1)).sum(-1),
    "a log-softmax times logits": lambda z: (z.log_softmax(-1) * z).sum(-1),
    "a cross-entropy of log-softmax": lambda z: F.cross_entropy(
        z.log_softmax(-1).flatten(0, 1), CANDIDATES[..., 0].flatten(), reduction="none"
    ),
    "nll": lambda z: F.nll_loss(z.log_softmax(-1).flatten(0, 1), CANDIDATES[..., 0].flatten()),
    "kl": lambda z: F.kl_div(z.log_softmax(-1), (z * 0.5).softmax(-1), reduction="none"),
    "a categorical": lambda z: (
        torch.distributions.Categorical(logits=z).entropy(),
        torch.distributions.Categorical(logits=z).log_prob(CANDIDATES[..., 0]),
    ),
    "the largest": lambda z: (z.softmax(-1).amax(-1), z.amax(-1)),
    "a temperature for each token": lambda z: (z / TEMPERATURES).logsumexp(-1),
    "a bias and a temperature": lambda z: ((z + torch.linspace(0, 1, VOCAB)) / 3).logsumexp(-1),
    "a negative factor": lambda z: (z * -0.7).log_softmax(-1).gather(-1, CANDIDATES),
    "in place": in_place,
    "in place after a view": in_place_after_a_view,
    "probabilities changed in place": changed_probabilities,
    "detached": detached,
    "without a gradient": without_grad,
    "views": lambda z: (
        (z.softmax(-1).flatten(0, 1) * z.view(-1, VOCAB)).sum(-1),
        z.transpose(0, 1).logsumexp(-1),
        z[2].unsqueeze(0).logsumexp(-1),
        z[1:, 3].logsumexp(-1),
        z[torch.tensor([0, 2])].logsumexp(-1),
    ),
    "split": lambda z: [part.logsumexp(-1).sum() for part in z.split([3, 5], dim=1)][1],
    "no scale": lambda z: (z * 0).logsumexp(-1),
    "nothing": lambda z: z[:0].logsumexp(-1).sum() + z.mean(),
}


@FALLS_BACK
@pytest.mark.parametrize("build", [llama, gemma2])
@pytest.mark.parametrize("name", OTHER_STEPS)
def test_everything_else_has_the_numbers_of_the_logits(name, build):
    function = lambda model: OTHER_STEPS[name](logits_of(model)[:, 1:].clone())
    plain = build().double()
    patched = cce_patch(copy.deepcopy(plain), lazy_logits=True)
    expected, actual = step(plain, function), step(patched, function)
    assert_same(actual, expected)
    assert [x.dtype for x in actual[0]] == [x.dtype for x in expected[0]]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(mode, operators):
    plain = llama().double().eval()
    patched = cce_patch(copy.deepcopy(plain), lazy_logits=True)
    with mode():
        expected, actual = actor(plain), actor(patched)
    for mine, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)
        assert not mine.requires_grad
    assert operators == ["token_logprobs", "class_logits"]


@FALLS_BACK
@pytest.mark.parametrize("under_autocast", [False, True])
def test_half_precision_is_that_of_the_trainer(under_autocast):
    """The dtypes are those of full logits, the values closer to float64."""
    exact = llama().to(torch.bfloat16)
    patched = cce_patch(copy.deepcopy(exact), lazy_logits=True)
    plain = copy.deepcopy(exact)
    if under_autocast:
        plain, patched = plain.float(), patched.float()

    def results(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
            z = shifted(model)
            logp = z.log_softmax(-1)
            found = [logp.gather(-1, CANDIDATES), z.logsumexp(-1), (logp.exp() * logp).sum(-1)]
            return [*found, z.mean(-1), z.float().div_(0.7).logsumexp(-1)]

    expected, actual = results(plain), results(patched)
    for mine, other in zip(actual, expected, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine.float(), other.float(), rtol=0.02, atol=0.02)


@FALLS_BACK
def test_ids_that_are_no_class_are_the_error_of_gather():
    patched = cce_patch(llama(), lazy_logits=True)
    for bad in (-100, VOCAB):
        ids = CANDIDATES[..., :1].clone()
        ids[0, 0, 0] = bad
        with pytest.raises(RuntimeError, match="out of bounds"):
            shifted(patched).log_softmax(-1).gather(-1, ids)


def test_changed_weights_are_an_error():
    patched = cce_patch(llama(), lazy_logits=True)
    logits = logits_of(patched)
    with torch.no_grad():
        patched.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="has changed since the forward"):
        logits.logsumexp(-1)


def test_calls_that_stay_as_they_are():
    model = cce_patch(llama(), lazy_logits=True)
    ids = inputs()[0]
    assert type(logits_of(model)) is LazyLogits
    assert type(model(ids, use_cache=True).logits) is torch.Tensor  # generation
    assert model(ids, labels=ids).logits is None  # training with labels, as ever
    assert not is_computed(logits_of(model))
    cce_unpatch(model)
    assert type(logits_of(model)) is torch.Tensor
    assert type(logits_of(cce_patch(model))) is torch.Tensor
    cce_patch(model, lazy_logits=True, train_only=True).eval()
    assert type(logits_of(model)) is torch.Tensor
    with pytest.raises(TypeError, match="lazy_logits must be True or False, got 1"):
        cce_patch(llama(), lazy_logits=1)


@FALLS_BACK
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_sums_inside_a_checkpoint(use_reentrant):
    def function(model):
        z = logits_of(model).double()
        lse = z.logsumexp(-1)
        entropy = torch.utils.checkpoint.checkpoint(
            lambda z: z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1), z, use_reentrant=use_reentrant
        )
        return lse, entropy

    plain = llama().double()
    patched = cce_patch(copy.deepcopy(plain), lazy_logits=True)
    assert_same(step(patched, function), step(plain, function))


@FALLS_BACK
def test_generation_is_the_same():
    plain = llama().eval()
    patched = cce_patch(copy.deepcopy(plain), lazy_logits=True)
    prompt = inputs()[0]
    results = [
        model.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=use_cache)
        for model in (plain, patched)
        for use_cache in (True, False)
    ]
    assert all(torch.equal(result, results[0]) for result in results)
