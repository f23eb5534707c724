"""Problems for an adapter and a trainer's own function, and a comparison of the two."""

import pytest
import torch

TOKENS, CLASSES, DIM = 12, 150, 16

of_axolotl_options = pytest.mark.parametrize(
    ("beta", "temperature", "hard", "soft", "bias"),
    [
        (0.0, 1.0, 0.3, 0.7, True),
        (0.4, 1.0, 0.3, 0.7, False),
        (1.0, 1.0, 0.0, 1.0, False),
        (0.0, 1.7, 0.3, 0.7, False),
        (0.4, 1.7, 0.0, 1.0, True),
        (1.0, 1.7, 1.0, 0.0, False),
    ],
)


def problem(tokens=TOKENS, classes=CLASSES, dim=DIM, dtype=torch.float32, seed=0):
    """Hidden states (N, D), a classifier (V, D) with peaked softmax, targets (N,)."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=random, dtype=torch.float64)
    weight = torch.randn(classes, dim, generator=random, dtype=torch.float64) * 3 / dim**0.5
    targets = torch.randint(0, classes, (tokens,), generator=random)
    return hidden.to(dtype), weight.to(dtype), targets


def step(function, *tensors):
    """Outputs of ``function(*leaves)``, and gradients of a weighted sum of those that have one."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=random).to(x.device) for x in outputs]
    terms = [(x * w).sum() for x, w in zip(outputs, weights, strict=True) if x.requires_grad]
    sum(terms).backward()
    return [x.detach() for x in outputs], [x.grad for x in leaves]


def assert_same(ours, theirs, rtol=1e-4, atol=1e-5):
    """Equal outputs and gradients, in number, shape and value."""
    for mine, other in zip(ours, theirs, strict=True):
        assert len(mine) == len(other)
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=rtol, atol=atol)
            assert a.abs().sum() > 0  # zeros would prove nothing


def plain(hidden, weight, targets, temperature=1.0, softcap=None):
    """Log-probabilities and entropies of full logits."""
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = (
        logits / torch.as_tensor(temperature, device=logits.device).unsqueeze(-1)
    ).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[..., None]).squeeze(-1), entropy


def topk_problem(bias, candidates=5):
    """Two rows of a student with prompts and padding, and its teacher's likeliest classes.

    Returns:
        Hidden states (2, 6, D), weight (V, D), bias (V,) if asked for; and ids, log-probabilities
        and mask (2, 6, K) of candidates, as axolotl pads them, and labels (2, 6).
    """
    hidden, weight, labels = problem()
    random = torch.Generator().manual_seed(2)
    teacher = (3 * torch.randn(2, 6, CLASSES, generator=random)).log_softmax(-1)
    logprobs, ids = teacher.topk(candidates)
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, 5] = mask[1, 2, 3:] = 0
    logprobs, ids = logprobs.masked_fill(mask == 0, -1e9), ids.masked_fill(mask == 0, 0)
    labels = labels.view(2, 6).clone()
    labels[0, :2] = labels[1, 4] = -100
    student = [hidden.view(2, 6, DIM), weight]
    if bias:
        student.append(torch.randn(CLASSES, generator=random))
    return student, (ids, logprobs, mask, labels)
