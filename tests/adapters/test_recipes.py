"""The recipes of the documentation, as they are printed, against plain PyTorch on full logits."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cut_cross_entropy import linear_divergence, token_logprobs

PAGE = (Path(__file__).parents[2] / "docs" / "post_training.md").read_text(encoding="utf-8")
ROWS, TIME, DIM, CLASSES = 4, 7, 16, 60


def recipes():
    """The functions of the page by name."""
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        if "def " in block:
            exec(block, names)
    return names


RECIPES = recipes()


class Batch:
    """Hidden states of three policies, a head, and labels with prompts and padding."""

    def __init__(self):
        random = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
        self.hidden = draw(ROWS, TIME, DIM)
        self.old_hidden = self.hidden + 0.2 * draw(ROWS, TIME, DIM)
        self.reference_hidden = self.hidden + 0.2 * draw(ROWS, TIME, DIM)
        self.weight = draw(CLASSES, DIM) * 2 / DIM**0.5
        self.labels = torch.randint(0, CLASSES, (ROWS, TIME), generator=random)
        self.labels[:, :2] = -100
        self.labels[1, 5:] = -100
        self.advantages = draw(ROWS)
        self.teacher = (draw(ROWS, TIME, 24), draw(CLASSES, 24) * 2 / 24**0.5)
        self.teacher_ids = torch.rand(ROWS, TIME, CLASSES, generator=random).topk(4).indices
        self.teacher_ids[0, 3, 2:] = -1
        found = self.teacher_softmax().log().gather(-1, self.teacher_ids.clamp(min=0))
        self.teacher_logprobs = found.where(self.teacher_ids >= 0, 0)
        self.leaves = [x.requires_grad_() for x in (self.hidden, self.weight)]

    @property
    def student(self):
        return self.hidden, self.weight

    def teacher_softmax(self, temperature=1.0):
        hidden, weight = self.teacher
        return (F.linear(hidden, weight) / temperature).softmax(-1)

    def ours(self):
        """Results of policy, old policy and reference."""
        outputs = ("entropy", "rank")
        policy = token_logprobs(self.hidden, self.weight, self.labels, outputs=outputs)
        with torch.no_grad():
            old, reference = (
                token_logprobs(e, self.weight, self.labels)
                for e in (self.old_hidden, self.reference_hidden)
            )
        return policy, old, reference

    def plain(self):
        """Log-softmax (B, T, V) of the three, and log-probabilities of each row's own tokens."""
        every = [
            F.linear(e, self.weight).log_softmax(-1)
            for e in (self.hidden, self.old_hidden.detach(), self.reference_hidden.detach())
        ]
        every[1:] = [x.detach() for x in every[1:]]
        rows = [
            [
                torch.stack([x[i, t, y] for t, y in enumerate(self.labels[i].tolist()) if y >= 0])
                for i in range(ROWS)
            ]
            for x in every
        ]
        return every, rows


def mean(values):
    return sum(values) / len(values)


def log_sigmoid(x):
    return -torch.log(1 + torch.exp(-x))


def plain_dpo(batch, every, policy, old, reference):
    margins = [p.sum() - r.sum() for p, r in zip(policy, reference, strict=True)]
    return mean([-log_sigmoid(0.1 * (margins[i] - margins[i + 2])) for i in range(2)])


def plain_orpo(batch, every, policy, old, reference):
    shares = [p.mean().exp() for p in policy]  # geometric means of the tokens' probabilities
    odds = [share / (1 - share) for share in shares]
    losses = [
        -policy[i].mean() - 0.1 * log_sigmoid(torch.log(odds[i] / odds[i + 2])) for i in range(2)
    ]
    return mean(losses)


def plain_simpo(batch, every, policy, old, reference):
    return mean([-log_sigmoid(2 * (policy[i].mean() - policy[i + 2].mean()) - 1) for i in range(2)])


DESIRABLE, DIVERGENCE = torch.tensor([True, False, True, False]), torch.tensor(0.3)


def plain_kto(batch, every, policy, old, reference):
    losses = []
    for i, good in enumerate(DESIRABLE.tolist()):
        difference = policy[i].sum() - reference[i].sum() - 0.3
        value = torch.sigmoid(0.1 * (difference if good else -difference))
        losses.append(1 - value)
    return mean(losses)


def surrogate(ratio, advantage, low, high):
    clipped = torch.clamp(ratio, 1 - low, 1 + high)
    return torch.where(
        ratio * advantage < clipped * advantage, ratio * advantage, clipped * advantage
    )


def plain_grpo(batch, every, policy, old, reference):
    rows = []
    for i, advantage in enumerate(batch.advantages):
        gains = surrogate(torch.exp(policy[i] - old[i]), advantage, 0.2, 0.2)
        inverse = torch.exp(reference[i] - policy[i])
        divergence = inverse - torch.log(inverse) - 1
        rows.append((0.04 * divergence - gains).mean())
    return mean(rows)


def plain_dapo(batch, every, policy, old, reference):
    gains = [
        surrogate(torch.exp(policy[i] - old[i]), batch.advantages[i], 0.2, 0.28)
        for i in range(ROWS)
    ]
    return -torch.cat(gains).mean()


def plain_gspo(batch, every, policy, old, reference):
    ratios = [
        torch.prod(torch.exp(p - o)) ** (1 / len(p)) for p, o in zip(policy, old, strict=True)
    ]
    gains = [surrogate(r, a, 3e-4, 4e-4) for r, a in zip(ratios, batch.advantages, strict=True)]
    return -mean(gains)


def plain_entropy_bonus(batch, every, policy, old, reference):
    shares = every[0][batch.labels >= 0].exp()
    return 0.01 * (shares * shares.log()).sum(-1).mean()


def plain_dft(batch, every, policy, old, reference):
    logprobs = torch.cat(policy)
    return -(logprobs.exp().detach() * logprobs).mean()


def relative_entropy(p, q):
    return (p * (p / q).log()).sum(-1)


def plain_forward_kl(batch, every, policy, old, reference):
    p, q = (F.linear(*batch.student) / 2).softmax(-1), batch.teacher_softmax(2)
    return 4 * relative_entropy(q, p)[batch.labels >= 0].mean()


def plain_jensen_shannon(batch, every, policy, old, reference):
    p, q = every[0].exp(), batch.teacher_softmax()
    both = 0.7 * p + 0.3 * q
    divergence = 0.3 * relative_entropy(q, both) + 0.7 * relative_entropy(p, both)
    return divergence[batch.labels >= 0].mean()


def plain_topk_distillation(batch, every, policy, old, reference):
    losses = []
    for row, time in (batch.labels >= 0).nonzero().tolist():
        ids = batch.teacher_ids[row, time]
        sides = []
        for shares in (every[0].exp(), batch.teacher_softmax()):
            kept = shares[row, time, ids[ids >= 0]]
            sides.append(torch.cat([kept, 1 - kept.sum(0, keepdim=True)]))
        losses.append(relative_entropy(sides[1], sides[0]))
    return mean(losses)


def plain_on_policy_distillation(batch, every, policy, old, reference):
    gains = [
        (p - o).exp() * (r - o) for p, o, r in zip(policy, old, reference, strict=True)
    ]  # the reference stands for the teacher
    return -torch.cat(gains).mean()


def plain_perplexity(batch, every, policy, old, reference):
    losses = F.cross_entropy(every[0].transpose(1, 2), batch.labels, reduction="none")
    return torch.exp(losses.sum(1) / (batch.labels != -100).sum(1))


def plain_top_k_accuracy(batch, every, policy, old, reference):
    kept = batch.labels >= 0
    return (every[0][kept].topk(5).indices == batch.labels[kept][:, None]).any(1).float().mean()


CALLS = {
    "dpo": (plain_dpo, lambda f, b, p, o, r: f(p, r)),
    "orpo": (plain_orpo, lambda f, b, p, o, r: f(p)),
    "simpo": (plain_simpo, lambda f, b, p, o, r: f(p)),
    "kto": (plain_kto, lambda f, b, p, o, r: f(p, r, DESIRABLE, DIVERGENCE)),
    "grpo": (plain_grpo, lambda f, b, p, o, r: f(p, o, r, b.advantages)),
    "dapo": (plain_dapo, lambda f, b, p, o, r: f(p, o, b.advantages)),
    "gspo": (plain_gspo, lambda f, b, p, o, r: f(p, o, b.advantages)),
    "entropy_bonus": (plain_entropy_bonus, lambda f, b, p, o, r: f(p)),
    "dft": (plain_dft, lambda f, b, p, o, r: f(p)),
    "forward_kl": (
        plain_forward_kl,
        lambda f, b, p, o, r: f(b.student, b.teacher, b.labels),
    ),
    "jensen_shannon": (
        plain_jensen_shannon,
        lambda f, b, p, o, r: f(b.student, b.teacher, b.labels >= 0, beta=0.3),
    ),
    "topk_distillation": (
        plain_topk_distillation,
        lambda f, b, p, o, r: f(b.student, b.labels, b.teacher_ids, b.teacher_logprobs),
    ),
    "on_policy_distillation": (
        plain_on_policy_distillation,
        lambda f, b, p, o, r: f(p, o, r),
    ),
    "perplexity": (plain_perplexity, lambda f, b, p, o, r: f(p)),
    "top_k_accuracy": (plain_top_k_accuracy, lambda f, b, p, o, r: f(p)),
}


def result_and_grads(batch, result):
    """The result, and gradients of the sum of it, if it has any."""
    if not result.requires_grad:
        return result, []
    return result.detach(), torch.autograd.grad(result.sum(), batch.leaves)


@pytest.mark.parametrize("name", CALLS)
def test_recipe(name):
    plain, call = CALLS[name]
    batch = Batch()
    every, rows = batch.plain()
    expected, expected_grads = result_and_grads(batch, plain(batch, every, *rows))
    policy, old, reference = batch.ours()
    result, grads = result_and_grads(batch, call(RECIPES[name], batch, policy, old, reference))
    torch.testing.assert_close(result, expected, check_dtype=False, rtol=1e-5, atol=0)
    assert result.count_nonzero() > 0
    assert len(grads) == len(expected_grads) == (0 if name == "top_k_accuracy" else 2)
    for mine, other in zip(grads, expected_grads, strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


def test_on_policy_distillation_follows_the_reverse_divergence_on_average():
    """Every class is sampled once, with the weight of its probability."""
    batch = Batch()
    hidden, (teacher, teacher_weight) = batch.hidden.flatten(0, 1), batch.teacher
    teacher = teacher.flatten(0, 1)
    expected = linear_divergence(hidden, batch.weight, teacher, teacher_weight, beta=1.0)
    shares = F.linear(hidden, batch.weight).softmax(-1).detach()
    total = 0
    for sampled in range(CLASSES):
        ids = torch.full((len(hidden),), sampled)
        policy = token_logprobs(hidden, batch.weight, ids)
        old = SimpleNamespace(logprobs=policy.logprobs.detach())
        scored = token_logprobs(teacher, teacher_weight, ids)
        losses = [  # of one token at a time
            RECIPES["on_policy_distillation"](
                SimpleNamespace(logprobs=policy.logprobs[i], mask=policy.mask[i]),
                SimpleNamespace(logprobs=old.logprobs[i]),
                SimpleNamespace(logprobs=scored.logprobs[i]),
            )
            for i in range(len(hidden))
        ]
        total = total + (torch.stack(losses) * shares[:, sampled]).sum()
    ours = torch.autograd.grad(total, batch.leaves)
    theirs = torch.autograd.grad(expected.divergence.sum(), batch.leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


def test_every_recipe_of_the_page_is_tested_and_short():
    functions = re.findall(r"^def (\w+)\(.*?\n((?:    .*\n)+)", PAGE, re.MULTILINE)
    assert {name for name, _ in functions} == CALLS.keys()
    assert all(len(body.splitlines()) <= 5 for _, body in functions)
