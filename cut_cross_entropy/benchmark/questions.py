"""Results for each token: what is asked of a method, and the errors of its answers."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .data import IGNORE_INDEX, Problem
from .kinds import Kind
from .measure import relative_error

Scores = dict[str, Tensor]
"""Results by name: one value for each token, or several, or the mean of all."""

TEMPERATURE = 0.7
CANDIDATES = 64
ENTROPY_BONUS = 0.01
SEQUENCE = 512  # tokens that share an advantage


@dataclass(frozen=True)
class Question:
    """Question to a method; its inputs are those of the problem.

    Args:
        problem: of the model that is trained.
        temperature: that the logits are divided by.
        entropy, rank: whether these are asked for.
        candidates: class ids, (N, K), int64, whose log-probabilities are asked for.
        teacher: of the same classes, for a divergence.
        beta: that the divergence has: 0 KL(teacher | student), 1 the reverse, 0.5 Jensen-Shannon.
        weights: upstream gradients of the scores that have one; None for that of a mean.
    """

    problem: Problem
    temperature: float = 1.0
    entropy: bool = False
    rank: bool = False
    candidates: Tensor | None = None
    teacher: Problem | None = None
    beta: float = 0.0
    weights: dict[str, Tensor | None] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "Question":
        """Return the question with inputs of another dtype, which need gradients."""
        convert = lambda x: x.detach().to(dtype).requires_grad_()
        changed = lambda p: dataclasses.replace(p, e=convert(p.e), c=convert(p.c))
        teacher = None if self.teacher is None else changed(self.teacher)
        return dataclasses.replace(self, problem=changed(self.problem), teacher=teacher)

    def rows(self, tokens: Tensor) -> "Question":
        """Return the question of some of the tokens, by their numbers; e becomes a leaf."""

        def part(problem: Problem) -> Problem:
            e = problem.e.detach()[tokens].requires_grad_()
            return dataclasses.replace(problem, e=e, targets=problem.targets[tokens])

        return dataclasses.replace(
            self,
            problem=part(self.problem),
            teacher=None if self.teacher is None else part(self.teacher),
            candidates=None if self.candidates is None else self.candidates[tokens],
            weights={k: w if w is None else w[tokens] for k, w in self.weights.items()},
        )

    def gradients(self, scores: Scores, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of the weighted sum of the scores."""
        names = [name for name in scores if name in self.weights]
        return torch.autograd.grad(
            [scores[name] for name in names], inputs, [self.weights[name] for name in names]
        )

    def total(self, scores: Scores) -> float:
        """Weighted sum of the scores."""
        terms = (
            scores[name].detach().double() * (1.0 if weight is None else weight)
            for name, weight in self.weights.items()
            if name in scores
        )
        return float(sum(term.sum() for term in terms))


Builder = Callable[[Question], Callable[[], Scores]]


def ask(problem: Problem, kind: Kind, seed: int = 0) -> Question:
    """Ask a question of a kind about a problem; the same seed asks the same.

    Upstream gradients are those of a policy gradient, one normal advantage for every 512 tokens,
    with an entropy bonus of 0.01; candidates are random classes; of a divergence the mean counts.
    The teacher is the student with a tenth of noise on its embeddings and its classifier.
    """
    n, device = len(problem.targets), problem.e.device
    generator = torch.Generator(device=device).manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator, device=device)
    counted = (problem.targets != IGNORE_INDEX).float()
    share = counted / counted.sum().clamp(min=1)
    temperature = TEMPERATURE if "temperature" in kind.additions else 1.0
    if kind.subject == "divergence":
        beta = 1.0 if "reverse" in kind.additions else 0.5 * ("jsd" in kind.additions)
        teacher = dataclasses.replace(
            problem, e=_with_noise(problem.e, generator), c=_with_noise(problem.c, generator)
        )
        weights: dict[str, Tensor | None] = {"divergence": share, "mean": None}
        return Question(problem, temperature, teacher=teacher, beta=beta, weights=weights)
    advantages = randn(-(-n // SEQUENCE)).repeat_interleave(SEQUENCE)[:n]
    weights = {"logprobs": advantages * share}
    candidates = None
    if "entropy" in kind.additions:
        weights["entropy"] = ENTROPY_BONUS * share
    if "candidates" in kind.additions:
        size, classes = (n, CANDIDATES), problem.c.shape[0]
        candidates = torch.randint(classes, size, generator=generator, device=device)
        weights["candidates"] = randn(*size) * share[:, None] / CANDIDATES
    return Question(
        problem,
        temperature,
        "entropy" in kind.additions,
        "rank" in kind.additions,
        candidates,
        weights=weights,
    )


def _with_noise(x: Tensor, generator: torch.Generator, share: float = 0.1) -> Tensor:
    result = x.detach().clone()
    scale = share * result[:1024].float().square().mean().sqrt()
    for block in result.split(8192):  # a random array of all classes would be the largest here
        noise = torch.randn(block.shape, generator=generator, device=x.device)
        block.copy_(block.float() + scale * noise)
    return result


def errors(
    question: Question,
    scores: Scores,
    gradients: dict[str, Tensor],
    full_logits: Builder,
    tokens: int = 256,
) -> dict[str, float]:
    """Compare scores and gradients with full logits.

    Scores and dE are compared with float64 at some tokens, spread evenly; the weighted sum of the
    scores, ``loss_error``, and dC with float32 at all tokens.

    Args:
        question: what was asked.
        scores: the answers to all tokens.
        gradients: of the inputs that need one, by their names, ``"e"`` and ``"c"``; may be empty.
        full_logits: the method to compare with.
        tokens: how many to compare with float64.

    Returns:
        ``error_NAME`` and ``rounding_NAME`` of gradients: relative Frobenius norms of the error,
        and of the rounding of the exact one to the dtype. ``error_NAME`` of scores: largest
        difference; for ``rank`` the share of wrong ones. ``loss_error``.
    """
    counted = (question.problem.targets != IGNORE_INDEX).nonzero()[:, 0]
    chosen = counted[:: max(1, len(counted) // tokens)][:tokens]
    dtype = question.problem.e.dtype
    rounding = lambda grad: relative_error(grad.to(dtype), grad)
    few = question.rows(chosen).to(torch.float64)
    exact = full_logits(few)()
    found = {}
    for name, values in scores.items():
        if name == "mean":
            continue
        right = exact[name].detach()
        mine = values.detach()[chosen]
        if name == "rank":
            wrong = mine != (right == 0) if mine.dtype == torch.bool else mine != right
            found["error_rank"] = wrong.double().mean().item()
        else:
            found[f"error_{name}"] = (mine.double() - right).abs().max().item()
    if "e" in gradients:
        (right,) = few.gradients(exact, [few.problem.e])
        found["error_e"] = relative_error(gradients["e"][chosen].double(), right)
        found["rounding_e"] = rounding(right)
    del few, exact
    total, whole = 0.0, question.to(torch.float32)
    grad_c = torch.zeros_like(whole.problem.c)
    for block in torch.arange(len(question.problem.targets), device=chosen.device).split(512):
        part = whole.rows(block)
        answers = full_logits(part)()
        total += part.total(answers)
        if "c" in gradients:
            grad_c += part.gradients(answers, [part.problem.c])[0]
    found["loss_error"] = abs(question.total(scores) - total)
    if "c" in gradients:
        found["error_c"] = relative_error(gradients["c"], grad_c)
        found["rounding_c"] = rounding(grad_c)
    return found
