"""Data for measurements: embeddings, classifier and targets like those of a trained model.

Timings and errors of a filter depend on the data, so random normal embeddings say nothing about
training. *Broad* has the tail of a real vocabulary: its parameters were fitted to the output layer
of Gemma 3 270M on English prose. *Structured*: every token has a few likely classes, neighbouring
tokens share clusters of related classes, and a Zipf background lies under both; its tail is ten
times narrower than a real one. *Diffuse*: 48 likely classes a token over a Zipf background of about
5 %, a tail that no two tokens share: a stress case for anything that drops parts of the gradient.
``flat`` is a freshly initialised model.
"""

import dataclasses
import lzma
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import SHAPES, Shape

__all__ = ["KINDS", "SHAPES", "Problem", "Shape", "ignore", "make", "read"]

KINDS = ("broad", "structured", "diffuse", "flat", "randn")
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Problem:
    """e (N, D), c (V, D), targets (N,)."""

    e: Tensor
    c: Tensor
    targets: Tensor
    softcap: float | None = None

    def logits(self, e: Tensor, c: Tensor) -> Tensor:
        """Full logits, in float32 (float64 of float64), capped as the problem's."""
        logits = F.linear(e, c).to(torch.promote_types(e.dtype, torch.float32))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def part(self, tokens: slice) -> "Problem":
        """The problem of some of the tokens."""
        return dataclasses.replace(self, e=self.e[tokens], targets=self.targets[tokens])


@dataclass(frozen=True)
class _Numbers:
    """Random numbers, reproducible on one device; ``dtype`` is that of the problem."""

    dtype: torch.dtype
    device: str | torch.device
    generator: torch.Generator

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device, generator=self.generator)

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(*size, device=self.device, generator=self.generator)

    def below(self, stop: int, *size: int) -> Tensor:
        return torch.randint(stop, size, device=self.device, generator=self.generator)


def make(
    kind: str,
    num_tokens: int,
    shape: Shape,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Problem:
    """Data of one kind; the same seed gives the same data on the same device.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    draw = _Numbers(dtype, device, torch.Generator(device=device).manual_seed(seed))
    if kind == "broad":
        return _broad(num_tokens, shape, draw)
    if kind in ("structured", "diffuse"):
        return _trained_like(kind, num_tokens, shape, draw)
    scale = 1.0 if kind == "randn" else 0.02
    e = draw.normal(num_tokens, shape.dim).to(dtype)
    c = draw.normal(shape.num_classes, shape.dim)
    targets = draw.below(shape.num_classes, num_tokens)
    return Problem(e, c.mul_(scale).to(dtype), targets, shape.softcap)


def read(path: Path, device: str | torch.device = "cpu") -> Problem:
    """A problem from a file with the tensors e, c and t, as ``research.hidden`` writes it.

    A file whose name ends in ``.xz`` is decompressed.

    Raises:
        ValueError: the file lacks one of them.
    """
    with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
        saved = torch.load(file, weights_only=True)
    missing = {"e", "c", "t"} - set(saved)
    if missing:
        raise ValueError(f"{path} must hold tensors e, c and t, lacks {', '.join(sorted(missing))}")
    return Problem(saved["e"].to(device), saved["c"].to(device), saved["t"].long().to(device))


def ignore(problem: Problem, fraction: float, seed: int = 0) -> Problem:
    """The same problem with a share of its targets ignored, at random places.

    Raises:
        ValueError: a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"ignored must be a fraction from 0 to below 1, got {fraction}")
    if fraction == 0:
        return problem
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(problem.targets.shape[0], generator=generator).argsort()
    chosen = order[: round(fraction * len(order))].to(problem.targets.device)
    targets = problem.targets.clone()
    targets[chosen] = IGNORE_INDEX
    return dataclasses.replace(problem, targets=targets)


def _trained_like(kind: str, num_tokens: int, shape: Shape, draw: _Numbers) -> Problem:
    num_classes, dim = shape.num_classes, shape.dim
    dtype, device = draw.dtype, draw.device
    randn, rand = draw.normal, draw.uniform

    # Every class has a direction of its own, one of its cluster, and one for its frequency.
    cluster_size = 256
    num_clusters = -(-num_classes // cluster_size)
    own = randn(num_classes, dim).div_(math.sqrt(dim))
    center = randn(num_clusters, dim).div_(math.sqrt(dim))
    member = draw.below(num_clusters, num_classes)
    common = randn(dim).div_(math.sqrt(dim))
    cluster_share, run = 0.6, 256  # weight of the cluster; tokens that share topics
    log_frequency = -torch.log(torch.arange(num_classes, device=device) + 2.7)
    if kind == "structured":
        likely_classes, topics, background = 40, 8, 0.006
        exponents = 0.2 + 0.9 * rand(num_tokens, 1)  # tokens differ in how sure they are
    else:
        likely_classes, topics, background = 48, 0, 0.05
        exponents = 0.2 + 0.5 * rand(num_tokens, 1)

    # Ids by a Zipf law; a class drawn twice for a token counts once.
    draws = torch.exp(rand(num_tokens, likely_classes) * math.log(num_classes)).long() - 1
    likely = draws.clamp(0, num_classes - 1).sort(dim=1).values
    order = rand(num_tokens, likely_classes).argsort(dim=1)
    likely = likely.gather(1, order)
    twice = (likely[:, :, None] == likely[:, None, :]).tril(-1).any(2)
    rank = torch.arange(1, likely_classes + 1, device=device)
    share = torch.exp(-exponents * rank.log())
    share = share / share.sum(1, keepdim=True)

    # A logit is the background's plus a height. Products of unrelated directions add normal noise,
    # which lifts the background's mass by half its variance; heights are raised by as much.
    background_mass = log_frequency.exp().sum().log()
    wanted = (share / background).log() + background_mass
    topic_heights = torch.linspace(10.0, 8.0, topics, device=device)
    lift = torch.zeros(num_tokens, 1, device=device)
    for _ in range(3):
        heights = torch.where(twice, 0, wanted + lift - log_frequency[likely])
        square = heights.square().sum(1, keepdim=True) + 100
        square += ((topic_heights / cluster_share) ** 2).sum()
        lift = square / (2 * dim)
    e = (10.0 * common).expand(num_tokens, dim).clone()
    for i in range(likely_classes):
        e += heights[:, i : i + 1] * own[likely[:, i]]
    if topics:
        runs = -(-num_tokens // run)
        shared = draw.below(num_clusters, runs, topics)
        topic = (center[shared] * (topic_heights / cluster_share)[None, :, None]).sum(1)
        e += topic.repeat_interleave(run, 0)[:num_tokens]
    c = own  # in place: the largest tensor here, and its directions have been used
    c += cluster_share * center[member]
    c += (log_frequency / 10)[:, None] * common
    problem = Problem(e.to(dtype), c.to(dtype), torch.empty_like(likely[:, 0]), shape.softcap)

    # Targets are drawn from the model's own distribution, so that its loss is its entropy.
    problem.targets.copy_(_draw_targets(problem, draw.generator))
    return problem


def _draw_targets(problem: Problem, generator: torch.Generator) -> Tensor:
    """Draw a class for every token from its distribution, (N,)."""
    drawn = []
    for e in problem.e.split(512):
        logits = problem.logits(e, problem.c)
        noise = torch.empty_like(logits).exponential_(generator=generator).log_()
        drawn.append(logits.sub_(noise).argmax(1))
    return torch.cat(drawn)


BROAD_FREQUENCY = 1.5  # scale of the classes' mean logits, which are logistic
BROAD_CONTENT = 2.1  # deviation of a token's logits from these
BROAD_SLOT = (4.0, 8.0)  # what a token adds to the logits of one group of related classes
BROAD_GROUP = 2048  # classes in a group
BROAD_SURE = (0.42, 9.0)  # share of tokens that are sure of a class; what they add at most


def _broad(num_tokens: int, shape: Shape, draw: _Numbers) -> Problem:
    """Make data whose probabilities fall as slowly as those of a large real vocabulary.

    Logits of trained models are about normal over the classes, with a deviation of 4: the tail is
    lognormal, and the number of classes that hold a share of the probability grows in proportion
    to V. Here as there, 3 parts make a logit: the frequency of the class; the content of the
    token, whose directions have variances that fall like 1 / k and which it partly shares with its
    neighbours; and what distinguishes it, a group of related classes and, for some, one class.
    """
    num_classes, dim = shape.num_classes, shape.dim
    dtype, device = draw.dtype, draw.device
    randn, rand = draw.normal, draw.uniform

    root = math.sqrt(dim)
    groups = -(-num_classes // BROAD_GROUP)
    center = randn(groups, dim).div_(root)
    member = draw.below(groups, num_classes)
    c = randn(num_classes, dim).mul_(math.sqrt(0.75) / root)
    c.add_(center[member], alpha=0.5)
    # Column 0 is the frequency, column 1 what all rows have in common.
    c[:, 0] = torch.logit(rand(num_classes), eps=1e-6) / root
    c[:, 1] = 0.5

    directions = min(dim - 2, 512)
    content = math.sqrt(0.45) * randn(num_tokens, directions)
    for share, run in ((0.27, 1000), (0.08, 16), (0.2, 4)):
        common = math.sqrt(share) * randn(-(-num_tokens // run), directions)
        content += common.repeat_interleave(run, 0)[:num_tokens]
    spectrum = torch.arange(1, directions + 1, device=device, dtype=torch.float32).pow(-0.575)
    content *= spectrum * (BROAD_CONTENT * root / spectrum.norm())

    least, most = BROAD_SLOT
    slot = center[draw.below(groups, num_tokens)]
    e = slot * (2 * (least + (most - least) * rand(num_tokens, 1)))
    e[:, 2 : 2 + directions] += content
    e[:, 0] = BROAD_FREQUENCY * root
    e[:, 1] = -20.0  # a softcap bends the likely classes' logits little when all are shifted down
    problem = Problem(e.to(dtype), c.to(dtype), torch.empty(0), shape.softcap)

    share, height = BROAD_SURE
    sure = rand(num_tokens, 1)
    own = c[_draw_targets(problem, draw.generator)]
    own[:, :2] = 0
    e += torch.where(sure < share, sure * (height / share), 0) * own
    problem = dataclasses.replace(problem, e=e.to(dtype))
    return dataclasses.replace(problem, targets=_draw_targets(problem, draw.generator))
