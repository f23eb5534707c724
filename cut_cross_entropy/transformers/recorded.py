"""Logits as a recipe: the factors of the product, and the operations that follow it.

A :class:`Recipe` is what a head and the model's own code have asked for so far. It can be replayed
into real logits (:func:`replay`), or folded into the arguments of ``linear_cross_entropy``
(:func:`fold`).

Shapes: ... leading (batch, time), D features, V classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cut_cross_entropy.distributed.options import is_dtensor

CAST, DEVICE = "cast", "device"
SCALE, DIVIDE, TANH = "scale", "divide", "tanh"
BIAS, CLASSES = "bias", "classes"

Step = tuple[str, Any]
Term = tuple[Tensor, Tensor | None]  # (..., D) and (V, D), or None: the weight of ``reenter``


class Unevaluated:
    """What marks lazy logits (``lazy_logits``), and what the modules that they use know of them."""

    recipe: "Recipe"
    dtype: torch.dtype
    device: torch.device
    origin: Any
    pinned: bool
    value: Tensor | None

    @property
    def shape(self) -> torch.Size:
        """Of the logits."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        raise NotImplementedError

    def materialise(self, operation: str) -> Tensor:
        """The logits in full, because of ``operation``."""
        raise NotImplementedError


@dataclass(eq=False)
class Recipe:
    """``sum(e @ c.T) + bias``, then ``steps`` in order.

    Operations on the leading dimensions are no steps: they are applied to each ``e`` at once, since
    they commute with everything that follows.
    """

    terms: tuple[Term, ...]
    bias: Tensor | None  # (V,)
    steps: tuple[Step, ...] = ()

    def then(self, name: str, value: Any = None) -> "Recipe":
        """The recipe with one more step."""
        return Recipe(self.terms, self.bias, (*self.steps, (name, value)))

    def on_features(self, function: Any) -> "Recipe":
        """The recipe with ``function`` applied to the features of each term."""
        terms = tuple([(function(e), c) for e, c in self.terms])
        return Recipe(terms, self.bias, self.steps)

    @property
    def is_linear(self) -> bool:
        """Whether the steps only cast and scale."""
        return all(name in (CAST, SCALE, DIVIDE) for name, _ in self.steps)

    @property
    def is_divided(self) -> bool:
        """Whether the classes are divided over processes: a DTensor, the head tensor-parallel."""
        return is_dtensor(self.terms[0][1])

    @property
    def has_tanh(self) -> bool:
        """Whether a tanh was recorded: nothing but a scale can follow it."""
        return any(name == TANH for name, _ in self.steps)


@dataclass(eq=False)
class Folded:
    """The arguments of ``linear_cross_entropy`` that give the logits of a recipe."""

    e: Tensor  # (..., D)
    c: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None


def replay(recipe: Recipe) -> Tensor:
    """The logits (..., V), by the operations that the model asked for, in its order."""
    (e, c), *rest = recipe.terms
    if recipe.is_divided:
        logits: Any = product(e, c, recipe.bias).full_tensor()  # type: ignore[attr-defined]
    else:
        logits = F.linear(e, c, recipe.bias)  # type: ignore[arg-type]  # reentry fills the weight in
    for e, c in rest:
        logits = logits + F.linear(e, c)  # type: ignore[arg-type]
    for name, value in recipe.steps:
        logits = _apply(logits, name, value)
    return logits  # type: ignore[no-any-return]


def product(e: Tensor, c: Any, bias: Tensor | None) -> Tensor:
    """The product with a DTensor of features that every process of its mesh has, a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate

    features = DTensor.from_local(e, c.device_mesh, [Replicate()], run_check=False)
    return F.linear(features, c, bias)


def _apply(logits: Any, name: str, value: Any) -> Any:
    if name in (CAST, DEVICE):
        return logits.to(value)
    if name == SCALE:
        return logits * value
    if name == DIVIDE:
        return logits / value
    if name == TANH:
        return torch.tanh(logits)
    if name == BIAS:
        return logits + value
    return logits[..., value]


def is_foldable(recipe: Recipe) -> bool:
    """Whether :func:`fold` has an answer: the factor after a tanh has to be above 0."""
    after_tanh = None
    for name, value in recipe.steps:
        if name == TANH:
            after_tanh = 1.0
        elif after_tanh is not None:
            after_tanh *= _factor(name, value)
    return after_tanh is None or after_tanh > 0


def fold(recipe: Recipe) -> Folded:
    """The recipe as one product, bias and softcap.

    ``k * tanh(a * x + b)`` is ``softcap=k`` on the logits ``k * (a * x + b)``. A cast changes
    nothing: the loss is computed in high precision from the factors.
    """
    e, c = _one_product(recipe.terms)
    bias, scale, after_tanh = recipe.bias, 1.0, None
    for name, value in recipe.steps:
        factor = _factor(name, value)
        if factor != 1.0 and after_tanh is not None:
            after_tanh *= factor
        elif factor != 1.0:
            scale *= factor
            bias = None if bias is None else bias * factor
        elif name == TANH:
            after_tanh = 1.0
        elif name == BIAS:
            bias = value if bias is None else bias + value
        elif name == CLASSES:
            c, bias = c[value], None if bias is None else bias[value]
    if after_tanh is not None:
        scale, bias = scale * after_tanh, None if bias is None else bias * after_tanh
    if abs(scale - 1) > 1e-12:  # x / k * k is no scale, though it may round
        e = e * scale
    if bias is not None and bias.dtype != c.dtype:
        bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
    return Folded(e, c, bias, after_tanh)


def _factor(name: str, value: Any) -> float:
    """What a step multiplies the logits by."""
    return value if name == SCALE else 1 / value if name == DIVIDE else 1.0


def _one_product(terms: tuple[Term, ...]) -> tuple[Tensor, Tensor]:
    """A sum of products as one: the features side by side, so are the columns of the classifiers.

    The dtype is that of the largest classifier, which is not copied into a wider one.
    """
    if len(terms) == 1:
        e, c = terms[0]
        assert c is not None
        return e, c
    classifiers = [c for _, c in terms if c is not None]
    largest = classifiers[0]
    for c in classifiers:
        largest = c if c.shape[1] > largest.shape[1] else largest
    dtype = largest.dtype
    return (
        torch.cat([e.to(dtype) for e, _ in terms], dim=-1),
        torch.cat([c.to(dtype) for c in classifiers], dim=1),
    )


def as_sum(recipe: Recipe) -> Recipe:
    """The same logits without scales among the steps; only for a linear recipe."""
    scale = 1.0
    for name, value in recipe.steps:
        scale *= _factor(name, value)
    if scale == 1.0:
        return Recipe(recipe.terms, recipe.bias)
    bias = None if recipe.bias is None else recipe.bias * scale
    return Recipe(tuple((e * scale, c) for e, c in recipe.terms), bias)


def add(left: Recipe, right: Recipe) -> Recipe:
    """The sum of two linear recipes; terms with the same features share one product."""
    left, right = as_sum(left), as_sum(right)
    terms = list(left.terms)
    for e, c in right.terms:
        for i, (other_e, other_c) in enumerate(terms):
            if other_e is e and other_c is not None and c is not None:
                terms[i] = (e, other_c + c)
                break
        else:
            terms.append((e, c))
    biases = [bias for bias in (left.bias, right.bias) if bias is not None]
    bias = None if not biases else biases[0] if len(biases) == 1 else biases[0] + biases[1]
    return Recipe(tuple(terms), bias)


def scale_classes(recipe: Recipe, factors: Tensor) -> Recipe:  # factors: (V,)
    """Every class of a linear recipe times its factor."""
    recipe = as_sum(recipe)
    terms = [(e, None if c is None else c * factors[:, None]) for e, c in recipe.terms]
    return Recipe(tuple(terms), None if recipe.bias is None else recipe.bias * factors)
