"""Logits as a recipe: a sum of products, and the operations that follow it.

A :class:`Recipe` records what a head and the model's code after it asked for. :func:`replay`
computes the logits from it, :func:`fold` the arguments of ``linear_cross_entropy``.

Shapes: ... leading (batch, time), D features, V classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cut_cross_entropy.distributed.options import is_dtensor
from cut_cross_entropy.heads.head import GivenProducts, Head, Product, RowSource, rows_of

CAST, DEVICE = "cast", "device"
SCALE, DIVIDE, TANH = "scale", "divide", "tanh"
BIAS, CLASSES = "bias", "classes"
SOFTMAX, LOG_SOFTMAX, EXP, TIMES = "softmax", "log_softmax", "exp", "times"
"""Over the classes; the product is with other steps after the logits that the softmax was of."""

Step = tuple[str, Any]


@dataclass(frozen=True, eq=False)
class ScaledRows:
    """A classifier that is not one tensor: ``weight * scale[:, None]``, made by chunks.

    Args:
        weight: (V, D).
        scale: (V,), or None for 1.
    """

    weight: Tensor | RowSource
    scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(V, D)."""
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight."""
        return self.weight.dtype

    @property
    def requires_grad(self) -> bool:
        """Whether a tensor of it does."""
        return any(x.requires_grad for x in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the rows are made of."""
        return [x for x in (self.weight, self.scale) if isinstance(x, Tensor)]

    def detach(self) -> "ScaledRows":
        """Return the same rows without a gradient."""
        return self.with_tensors(lambda x: x.detach())

    def with_tensors(self, function: Callable[[Tensor], Tensor]) -> "ScaledRows":
        """Return the rows with ``function`` applied to each tensor."""
        weight = function(self.weight) if isinstance(self.weight, Tensor) else self.weight
        return ScaledRows(weight, None if self.scale is None else function(self.scale))

    def matrix(self) -> Tensor:
        """Return all rows, (V, D)."""
        rows = rows_of(self.weight, 0, self.weight.shape[0])
        return rows if self.scale is None else rows * self.scale[:, None]

    def product(self, e: Tensor) -> Tensor:
        """Multiply features (..., D) by all rows at once."""
        rows = rows_of(self.weight, 0, self.weight.shape[0])
        if not isinstance(self.weight, Tensor):
            rows = rows.to(e.dtype)
        logits = F.linear(e, rows)
        return logits if self.scale is None else logits * self.scale


Term = tuple[Tensor, Tensor | ScaledRows | None, bool]
"""Features (..., D), classifier (V, D), and whether the classifier is a constant here.

The classifier is None where only a second call of its head can provide it. The flag detaches it
when it is used, since a sharded weight must not be referenced by another tensor.
"""


@dataclass(eq=False)
class Recipe:
    """``sum(e @ c.T) + bias``, then ``steps`` in order.

    Each factor carries the grad mode of the operations that it went through: what was detached, or
    was computed where no gradient is recorded, does not require a gradient. Operations on the
    leading dimensions are not steps: they are applied to each ``e`` at once, since they commute
    with everything that follows.
    """

    terms: tuple[Term, ...]
    bias: Tensor | None  # (V,)
    steps: tuple[Step, ...] = ()
    _leaves: list[Tensor] | None = None

    def then(self, name: str, value: Any = None) -> "Recipe":
        """Return the recipe with one more step."""
        return Recipe(self.terms, self.bias, (*self.steps, (name, value)))

    def on_features(self, function: Any) -> "Recipe":
        """Return the recipe with ``function`` applied to the features of each term."""
        terms = tuple([(function(e), c, constant) for e, c, constant in self.terms])
        return Recipe(terms, self.bias, self.steps)

    def detached(self) -> "Recipe":
        """Return the recipe of the same logits without a gradient."""
        return Recipe(
            tuple([(e.detach(), c, True) for e, c, _ in self.terms]),
            None if self.bias is None else self.bias.detach(),
            tuple([(n, v.detach() if isinstance(v, Tensor) else v) for n, v in self.steps]),
        )

    def with_leaves(self, leaves: Sequence[Tensor], others: Sequence[Tensor]) -> "Recipe":
        """Return the recipe with ``others`` in the place of its ``leaves``."""

        def other(tensor: Any) -> Any:
            for leaf, replacement in zip(leaves, others, strict=True):
                if tensor is leaf:
                    return replacement
            return tensor

        def replaced(c: Any) -> Any:
            return c.with_tensors(other) if isinstance(c, ScaledRows) else other(c)

        return Recipe(
            tuple(
                [
                    (other(e), c if constant else replaced(c), constant)
                    for e, c, constant in self.terms
                ]
            ),
            other(self.bias),
            tuple([(name, other(value)) for name, value in self.steps]),
        )

    def leaves(self) -> list[Tensor]:
        """Return the factors that require a gradient, each once; the same list each time."""
        if self._leaves is None:
            self._leaves = self._find_leaves()
        return self._leaves

    def _find_leaves(self) -> list[Tensor]:
        tensors: list[Any] = [self.bias, *[value for _, value in self.steps]]
        for e, c, constant in self.terms:
            tensors.append(e)
            if not constant:
                tensors += c.tensors() if isinstance(c, ScaledRows) else (c,)
        leaves = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
        if len(self.terms) > 1:
            leaves = list({id(leaf): leaf for leaf in leaves}.values())
        return leaves

    @property
    def is_linear(self) -> bool:
        """Whether the logits are a sum of products and a bias: the steps cast, scale and add."""
        return all(name in (CAST, SCALE, DIVIDE, BIAS) for name, _ in self.steps)

    @property
    def is_divided(self) -> bool:
        """Whether the classes are divided over processes: a DTensor, the head tensor-parallel."""
        c = self.terms[0][1]
        return type(c) is not nn.Parameter and is_dtensor(c)

    @property
    def is_matrix(self) -> bool:
        """Whether the classifier is one tensor; otherwise it is a :class:`Head`."""
        return len(self.terms) == 1 and not isinstance(self.terms[0][1], ScaledRows)

    @property
    def is_normalised(self) -> bool:
        """Whether a softmax was recorded: these are no logits any more."""
        return any(name in (SOFTMAX, LOG_SOFTMAX) for name, _ in self.steps)

    @property
    def has_tanh(self) -> bool:
        """Whether a tanh was recorded: only a scale can follow it."""
        return any(name == TANH for name, _ in self.steps)


@dataclass(eq=False)
class Folded:
    """The arguments of ``linear_cross_entropy`` that give the logits of a recipe."""

    e: Tensor  # (..., D)
    c: Tensor | Head  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float = 1.0


def lazy_recipe(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Recipe:
    """Return the recipe of ``F.linear(x, weight, bias)`` in the grad mode of this moment."""
    if torch.is_grad_enabled():
        return Recipe(((x, weight, False),), bias)
    return Recipe(
        ((x.detach() if x.requires_grad else x, weight, True),),
        bias.detach() if bias is not None and bias.requires_grad else bias,
    )


def replay(recipe: Recipe) -> Tensor:
    """Compute the logits (..., V) by the recorded operations, in their order."""
    (e, c, constant), *rest = recipe.terms
    if recipe.is_divided:
        logits: Any = product(e, classifier(c, constant), recipe.bias).full_tensor()  # type: ignore[attr-defined]
    else:
        logits = _logits(e, c, constant, recipe.bias)
    for e, c, constant in rest:
        logits = logits + _logits(e, c, constant)
    of_softmax = None
    for name, value in recipe.steps:
        if of_softmax is None and name in (SOFTMAX, LOG_SOFTMAX):
            of_softmax = logits
        if name == TIMES:
            other = of_softmax
            for step in value:
                other = _apply(other, *step)
            logits = logits * other
        else:
            logits = _apply(logits, name, value)
    return logits  # type: ignore[no-any-return]


def _logits(e: Tensor, c: Any, constant: bool, bias: Tensor | None = None) -> Tensor:
    c = classifier(c, constant)
    if not isinstance(c, ScaledRows):
        return F.linear(e, c, bias)
    logits = c.product(e)
    return logits if bias is None else logits + bias


def classifier(c: Any, constant: bool) -> Any:
    """Return the classifier of a term, detached where it is a constant."""
    assert c is not None  # a second call of the head has filled it in
    return c.detach() if constant and c.requires_grad else c


def product(e: Tensor, c: Any, bias: Tensor | None) -> Tensor:
    """Multiply by a DTensor features that every process of its mesh has; returns a DTensor."""
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
    if name == SOFTMAX:
        return torch.softmax(logits, -1, dtype=value)
    if name == LOG_SOFTMAX:
        return torch.log_softmax(logits, -1, dtype=value)
    if name == EXP:
        return logits.exp()
    return logits[..., value]


def is_foldable(recipe: Recipe) -> bool:
    """Return whether :func:`fold` has an answer.

    The factor after a tanh has to be above 0, and nothing may be normalised.
    """
    after_tanh = None
    for name, value in recipe.steps:
        if name in (SOFTMAX, LOG_SOFTMAX):
            return False
        if name == TANH:
            after_tanh = 1.0
        elif after_tanh is not None:
            after_tanh *= _factor(name, value)
    return after_tanh is None or after_tanh > 0


def fold(recipe: Recipe, with_scale: bool = False, as_matrix: bool = False) -> Folded:
    """Return the recipe as one product, bias and softcap.

    ``k * tanh(a * x + b)`` is ``softcap=k`` on the logits ``k * (a * x + b)``. A cast changes
    nothing: the loss is computed in high precision from the factors.

    Args:
        recipe: that :func:`is_foldable` accepts.
        with_scale: leave a factor of the logits, which must not be 0, to the operator, which does
            not round it into features and bias.
        as_matrix: return one tensor as the classifier, a copy where there is none; otherwise a
            classifier that is not one tensor is a :class:`Head`.
    """
    products: list[Product] = []
    e: Tensor
    c: Any
    if as_matrix or recipe.is_matrix or torch.compiler.is_compiling() or _has_dtensor(recipe):
        e, c = _one_product(recipe.terms)
        if not recipe.steps and recipe.bias is None:
            return Folded(e, c, None, None)
    else:
        products, with_scale = _products(recipe.terms), True
        e, c = products[0].features, products[0].rows
    bias, scale, after_tanh = recipe.bias, 1.0, None
    for name, value in recipe.steps:
        factor = _factor(name, value)
        if factor != 1.0 and after_tanh is not None:
            after_tanh *= factor
        elif factor != 1.0:
            scale *= factor
            if not with_scale:
                bias = None if bias is None else bias * factor
        elif name == TANH:
            after_tanh = 1.0
        elif name == BIAS:
            value = value / scale if with_scale and scale != 1.0 else value
            bias = value if bias is None else bias + value
        elif name == CLASSES:
            bias = None if bias is None else bias[value]
            if products:
                products = [_some_classes(p, value) for p in products]
                c = products[0].rows
            else:
                c = c[value]
    if after_tanh is not None:
        scale *= after_tanh
        if not with_scale:
            bias = None if bias is None else bias * after_tanh
    logit_scale = 1.0
    if abs(scale - 1) > 1e-12:  # x / k * k does not scale, though it may round
        if with_scale:
            logit_scale = scale
        else:
            e = e * scale
    if bias is not None and bias.dtype != c.dtype:
        bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
    if products:
        head = GivenProducts(
            c, bias, logit_scale=logit_scale, softcap=after_tanh, given=tuple(products)
        )
        return Folded(e, head, None, None)
    return Folded(e, c, bias, after_tanh, logit_scale)


def _has_dtensor(recipe: Recipe) -> bool:
    return any(isinstance(c, Tensor) and is_dtensor(c) for _, c, _ in recipe.terms)


def _products(terms: tuple[Term, ...]) -> list[Product]:
    """Return the terms as products, that with most features first."""
    products = []
    for e, c, constant in terms:
        c = classifier(c, constant)
        if isinstance(c, ScaledRows):
            products.append(Product(e, c.weight, c.scale))
        else:
            products.append(Product(e, c))
    first = max(products, key=lambda p: p.rows.shape[1])
    return [first, *[p for p in products if p is not first]]


def _some_classes(product: Product, classes: Any) -> Product:
    """Return the product with some of its classes."""
    rows: Any
    if isinstance(product.rows, Tensor):
        rows = product.rows[classes]
    else:
        rows = RowsOfClasses(product.rows, range(product.rows.shape[0])[classes])
    return Product(
        product.features, rows, None if product.scale is None else product.scale[classes]
    )


class RowsOfClasses:
    """Some consecutive rows of a source.

    Args:
        source: makes the rows of all classes.
        classes: those that are left.
    """

    def __init__(self, source: RowSource, classes: range) -> None:
        self._source, self._first = source, classes.start
        self.shape = (len(classes), source.shape[1])
        self.dtype, self.device = source.dtype, source.device

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows of the classes from ``start`` up to ``stop`` of those that are left."""
        return self._source.rows(self._first + start, self._first + stop)


def _factor(name: str, value: Any) -> float:
    """Return the factor of the logits that a step is."""
    return value if name == SCALE else 1 / value if name == DIVIDE else 1.0


def _matrix(c: Any) -> Tensor:
    return c.matrix() if isinstance(c, ScaledRows) else c  # type: ignore[no-any-return]


def _one_product(terms: tuple[Term, ...]) -> tuple[Tensor, Tensor]:
    """Return a sum of products as one: features side by side, and so the classifiers' columns.

    The dtype is that of the largest classifier, which is not copied into a wider one.
    """
    if len(terms) == 1:
        e, c, constant = terms[0]
        return e, _matrix(classifier(c, constant))
    classifiers = [_matrix(classifier(c, constant)) for _, c, constant in terms]
    largest = classifiers[0]
    for c in classifiers:
        largest = c if c.shape[1] > largest.shape[1] else largest
    dtype = largest.dtype
    return (
        torch.cat([e.to(dtype) for e, _, _ in terms], dim=-1),
        torch.cat([c.to(dtype) for c in classifiers], dim=1),
    )


def as_sum(recipe: Recipe) -> Recipe:
    """Return the same logits without steps; only for a linear recipe."""
    scale, bias = 1.0, recipe.bias
    for name, value in recipe.steps:
        factor = _factor(name, value)
        if name == BIAS:
            bias = value if bias is None else bias + value
        elif factor != 1.0:
            scale *= factor
            bias = None if bias is None else bias * factor
    if scale == 1.0:
        return Recipe(recipe.terms, bias)
    return Recipe(tuple([(e * scale, c, constant) for e, c, constant in recipe.terms]), bias)


def add(left: Recipe, right: Recipe) -> Recipe:
    """Return the sum of two linear recipes; terms with the same features share one product."""
    left, right = as_sum(left), as_sum(right)
    terms = list(left.terms)
    for e, c, constant in right.terms:
        for i, (other_e, other_c, other_constant) in enumerate(terms):
            if other_e is e and isinstance(other_c, Tensor) and isinstance(c, Tensor):
                both = classifier(other_c, other_constant) + classifier(c, constant)
                terms[i] = (e, both, False)
                break
        else:
            terms.append((e, c, constant))
    biases = [bias for bias in (left.bias, right.bias) if bias is not None]
    bias = None if not biases else biases[0] if len(biases) == 1 else biases[0] + biases[1]
    return Recipe(tuple(terms), bias)


def _scaled(c: Any, factors: Tensor) -> Any:
    if torch.compiler.is_compiling() or is_dtensor(c):
        return c * factors[:, None]
    if isinstance(c, ScaledRows):
        return ScaledRows(c.weight, factors if c.scale is None else c.scale * factors)
    return ScaledRows(c, factors)


def scale_classes(recipe: Recipe, factors: Tensor) -> Recipe:  # factors: (V,)
    """Multiply each class of a linear recipe by its factor."""
    recipe = as_sum(recipe)
    terms = [
        (e, _scaled(classifier(c, constant), factors), False) for e, c, constant in recipe.terms
    ]
    return Recipe(tuple(terms), None if recipe.bias is None else recipe.bias * factors)
