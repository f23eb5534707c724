"""Methods that compute results for each token: log-probabilities and divergences.

A builder gets a question and gives a function without arguments that computes the scores. It
raises ``NotImplementedError`` for what the method does not have.
"""

import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .data import IGNORE_INDEX
from .questions import Builder, Question, Scores

if TYPE_CHECKING:  # the name may be somebody else's package
    from cut_cross_entropy.options import ImplName

TRL_CHUNK = 32768
"""Classes of a tile, as TRL's own forward passes them."""


def _refuse(question: Question, method: str, *names: str) -> None:
    """Refuse what a method does not have, of ``names`` and a softcap."""
    asked = {
        "ranks": question.rank,
        "candidates of each token": question.candidates is not None,
        "a softcap": question.problem.softcap is not None,
    }
    missing = [name for name in names if asked[name]]
    if missing:
        raise NotImplementedError(f"{method} does not have {' and '.join(missing)}")


def _given(**scores: Tensor | None) -> Scores:
    return {name: values for name, values in scores.items() if values is not None}


def ours(impl: "ImplName") -> Builder:
    """Build ``token_logprobs`` of this package."""

    def build(question: Question) -> Callable[[], Scores]:
        from cut_cross_entropy import token_logprobs

        p = question.problem
        outputs: Any = [name for name in ("entropy", "rank") if getattr(question, name)]

        def run() -> Scores:
            found = token_logprobs(
                p.e,
                p.c,
                p.targets,
                outputs=outputs,
                temperature=question.temperature,
                candidates=question.candidates,
                softcap=p.softcap,
                impl=impl,
            )
            return _given(
                logprobs=found.logprobs,
                entropy=found.entropy,
                rank=found.rank,
                candidates=found.candidate_logprobs,
            )

        return run

    return build


def full_logits(question: Question) -> Callable[[], Scores]:
    """Build log-probabilities from logits that are stored."""
    p = question.problem

    def run() -> Scores:
        logits = p.logits(p.e, p.c) / question.temperature
        logprobs, counted = logits.log_softmax(-1), p.targets != IGNORE_INDEX
        targets = p.targets.clamp(min=0)[:, None]
        chosen = logprobs.gather(-1, targets)[:, 0] * counted
        entropy = rank = candidates = None
        if question.entropy:
            entropy = -(logprobs.exp() * logprobs).sum(-1) * counted
        if question.rank:
            rank = (logits > logits.gather(-1, targets)).sum(-1)
        if question.candidates is not None:
            candidates = logprobs.gather(-1, question.candidates) * counted[:, None]
        return _given(logprobs=chosen, entropy=entropy, rank=rank, candidates=candidates)

    return run


def trl(question: Question) -> Callable[[], Scores]:
    """Build TRL's function; of ranks it has whether the target is the likeliest class."""
    from trl.kernels import ChunkedLogProbFunction

    _refuse(question, "TRL", "candidates of each token")
    p = question.problem
    names = ("entropy",) * question.entropy + ("is_top1",) * question.rank

    def run() -> Scores:
        # As in TRL's own forward: rows with a label, and zeros at the others.
        counted = p.targets != IGNORE_INDEX
        found = ChunkedLogProbFunction.apply(
            p.e[counted], p.c, None, p.targets[counted], question.temperature, TRL_CHUNK,
            p.softcap, 1.0, names,
        )  # fmt: skip
        at = lambda x: None if x is None else x.new_zeros(counted.shape).masked_scatter(counted, x)
        return _given(logprobs=at(found[0]), entropy=at(found[1]), rank=at(found[4]))

    return run


def liger(question: Question) -> Callable[[], Scores]:
    """Build Liger's scaled cross-entropy of each token.

    Its candidates are the same for all tokens; on Hopper GPUs it needs nvidia-cutlass-dsl.
    """
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    _refuse(question, "Liger", "ranks", "candidates of each token", "a softcap")
    p = question.problem

    def run() -> Scores:
        found = Function.apply(
            p.e, p.c, p.targets, question.temperature, IGNORE_INDEX, 1, question.entropy
        )
        nll, entropy = found if question.entropy else (found, None)
        return _given(logprobs=-nll, entropy=entropy)

    return run


def verl(question: Question) -> Callable[[], Scores]:
    """Build verl's kernel, which always computes the entropy."""
    _hollow("verl", "verl.utils", "verl.utils.kernel")
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    _refuse(question, "verl", "ranks", "candidates of each token", "a softcap")
    p = question.problem

    def run() -> Scores:
        logprobs, entropy = linear_cross_entropy(
            p.e, p.c, p.targets, question.temperature, "none", None
        )
        return {"logprobs": logprobs, "entropy": entropy}

    return run


def _hollow(*packages: str) -> None:
    """Import modules of packages without what their ``__init__`` imports, such as Ray.

    Raises:
        ImportError: a package is not installed.
    """
    for name in packages:
        parent, _, last = name.rpartition(".")
        roots = sys.modules[parent].__path__ if parent else sys.path
        found = [str(Path(root) / last) for root in roots if (Path(root) / last).is_dir()]
        if not found:
            raise ImportError(f"{name} is not installed")
        if name not in sys.modules:
            package = sys.modules[name] = types.ModuleType(name)
            package.__path__ = found


def our_divergence(impl: "ImplName") -> Builder:
    """Build ``linear_divergence`` of this package; where gradients are asked for, its mean."""

    def build(question: Question) -> Callable[[], Scores]:
        from cut_cross_entropy import linear_divergence

        p, teacher = question.problem, _teacher(question)

        def run() -> Scores:
            trains = torch.is_grad_enabled() and (p.e.requires_grad or p.c.requires_grad)
            found = linear_divergence(
                p.e,
                p.c,
                teacher.e,
                teacher.c,
                beta=question.beta,
                temperature=question.temperature,
                mask=p.targets != IGNORE_INDEX,
                student_softcap=p.softcap,
                teacher_softcap=teacher.softcap,
                reduction="mean" if trains else "none",
                impl=impl,
            )
            return {"mean" if trains else "divergence": found.divergence}

        return run

    return build


def full_logits_divergence(question: Question) -> Callable[[], Scores]:
    """Build a divergence from logits that are stored."""
    p, teacher, beta = question.problem, _teacher(question), question.beta
    softmax = lambda x: (x.logits(x.e, x.c) / question.temperature).log_softmax(-1)
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)

    def run() -> Scores:
        student = softmax(p)
        with torch.no_grad():
            target = softmax(teacher)
        if beta in (0.0, 1.0):
            found = kl(student, target) if beta else kl(target, student)
        else:
            mixture = torch.logaddexp(student + math.log1p(-beta), target + math.log(beta))
            found = beta * kl(target, mixture) + (1 - beta) * kl(student, mixture)
        return {"divergence": found * (p.targets != IGNORE_INDEX)}

    return run


def trl_divergence(question: Question) -> Callable[[], Scores]:
    """Build TRL's function, which computes the student's entropy too."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    p, teacher = question.problem, _teacher(question)

    def run() -> Scores:
        counted = p.targets != IGNORE_INDEX
        found = ChunkedDivergenceFunction.apply(
            p.e[counted], p.c, None, teacher.e[counted], teacher.c, None, question.beta,
            question.temperature, 1.0, p.softcap, 1.0, teacher.softcap,
        )[0]  # fmt: skip
        return {"divergence": found.new_zeros(counted.shape).masked_scatter(counted, found)}

    return run


def liger_divergence(question: Question) -> Callable[[], Scores]:
    """Build Liger's mean divergence, which computes the gradients in the forward."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    _refuse(question, "Liger's divergence", "a softcap")
    p, teacher = question.problem, _teacher(question)

    def run() -> Scores:
        value = LigerFusedLinearJSDFunction.apply(
            p.e, p.c, teacher.e, teacher.c, p.targets, question.beta, IGNORE_INDEX,
            question.temperature,
        )  # fmt: skip
        return {"mean": value}

    return run


def _teacher(question: Question) -> Any:
    if question.teacher is None:
        raise ValueError("a divergence needs a teacher")
    return question.teacher


def mean_nll(build: Builder) -> Callable[[Any], Callable[[], Tensor]]:
    """Build the mean loss of a problem from log-probabilities."""

    def build_loss(problem: Any) -> Callable[[], Tensor]:
        run = build(Question(problem))

        def loss() -> Tensor:
            counted = problem.targets != IGNORE_INDEX
            logprobs = run()["logprobs"]
            value: Tensor = -(logprobs * counted).sum() / counted.sum().clamp(min=1)
            return value

        return loss

    return build_loss
