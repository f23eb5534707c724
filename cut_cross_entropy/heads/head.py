"""Parts of a head, and the products that its logits are the sum of.

Shapes: ... leading (batch, time), D features, V classes, r rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from cut_cross_entropy.device_support import autocast_type
from cut_cross_entropy.validation import FLOAT_DTYPES, check_dense, check_float_dtype

NORM_BYTES = 64 * 2**20
"""Scratch memory of the norms of rows."""


@runtime_checkable
class RowSource(Protocol):
    """A weight (V, D) without a gradient whose rows are made on demand, such as a quantised one."""

    @property
    def shape(self) -> tuple[int, int]:
        """(V, D)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows, in which the products are computed outside autocast."""

    @property
    def device(self) -> torch.device:
        """Of the rows."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows of the classes from ``start`` up to ``stop``, (stop - start, D)."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """An adapter that adds ``scale * dropout(e) @ a.T @ b.T`` to the logits (LoRA).

    Args:
        a: (r, D).
        b: (V, r), or a :class:`RowSource`.
        scale: ``alpha / r`` for LoRA, ``alpha / sqrt(r)`` for rsLoRA.
        dropout: function of the embeddings (..., D), such as an ``nn.Dropout``; None for the
            identity.
        magnitude: (V,), for DoRA: the logits of weight and adapter are multiplied by ``magnitude``
            over the norms of the rows ``weight + scale * b @ a``, which count as constants.

    Raises:
        TypeError: a scale that is no number, or a dropout that cannot be called.
        ValueError: a scale that is not finite.
    """

    a: Tensor
    b: Tensor | RowSource
    scale: float = 1.0
    dropout: Callable[[Tensor], Tensor] | None = None
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float, torch.SymFloat)):
            raise TypeError(f"scale must be a float, got {type(self.scale).__name__}")
        if not -math.inf < self.scale < math.inf:
            raise ValueError(f"scale must be a finite float, got {self.scale!r}")
        if self.dropout is not None and not callable(self.dropout):
            raise TypeError(
                "dropout must be a function of the embeddings, such as an nn.Dropout, got "
                f"{type(self.dropout).__name__}"
            )


@dataclass(frozen=True, eq=False)
class Product:
    """One term of the logits: ``(features @ rows.T) * scale``.

    Args:
        features: (..., K).
        rows: (V, K).
        scale: (V,), or None for 1.
    """

    features: Tensor
    rows: Tensor | RowSource
    scale: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Head:
    """A head that is more than a matrix; stands for ``c`` wherever a classifier is expected.

    The logits are ``softcap(logit_scale * (class_scale * (e @ weight.T + adapters) + bias))``. They
    are computed by chunks of classes: no copy of the weight is larger than a chunk, whose size
    ``memory_budget`` decides. A weight that requires no gradient, or is made on demand, costs no
    gradient.

    Args:
        weight: (V, D), or a :class:`RowSource` that makes its rows on demand.
        bias: (V,).
        class_scale: (V,), factor of each class.
        low_rank: adapters. Those with a magnitude (DoRA) have to be the only one.
        logit_scale: factor of the logits, bias included, before the softcap.
        softcap: logits become ``softcap * tanh(logits / softcap)``.

    Raises:
        TypeError: a weight that is neither a tensor nor a :class:`RowSource`, or another part that
            is not a tensor of floats.
        ValueError: shapes or devices that do not fit.
        NotImplementedError: several adapters of which one has a magnitude.

    Examples:
        >>> from cut_cross_entropy import linear_cross_entropy
        >>> weight, a, b = torch.randn(11, 8), torch.randn(2, 8), torch.zeros(11, 2)
        >>> head = Head(weight, low_rank=(LowRank(a, b, scale=0.5),))
        >>> linear_cross_entropy(torch.randn(3, 8), head, torch.tensor([1, 2, -100])).shape
        torch.Size([])
    """

    weight: Tensor | RowSource
    bias: Tensor | None = None
    class_scale: Tensor | None = None
    low_rank: tuple[LowRank, ...] = ()
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weight, (Tensor, RowSource)):
            raise TypeError(
                "weight must be a torch.Tensor or have shape, dtype, device and rows(start, stop), "
                f"got {type(self.weight).__name__}"
            )
        if len(self.weight.shape) != 2:
            raise ValueError(f"weight must have shape (V, D), got {tuple(self.weight.shape)}")
        if self.weight.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"the dtype of weight must be a floating point type, got {self.weight.dtype}: pass "
                "a RowSource, which makes rows of such a weight"
            )
        num_classes, dim = self.weight.shape
        expected: list[tuple[str, Any, tuple[int, ...]]] = [
            ("bias", self.bias, (num_classes,)),
            ("class_scale", self.class_scale, (num_classes,)),
        ]
        if not isinstance(self.low_rank, (tuple, list)):
            raise TypeError(f"low_rank must be a tuple, got {type(self.low_rank).__name__}")
        for i, adapter in enumerate(self.low_rank):
            if not isinstance(adapter, LowRank):
                raise TypeError(f"low_rank[{i}] must be a LowRank, got {type(adapter).__name__}")
            check_dense(f"low_rank[{i}].a", adapter.a)
            if adapter.a.ndim != 2 or adapter.a.shape[0] == 0:
                raise ValueError(
                    f"low_rank[{i}].a must have shape (r, D), r > 0, got {tuple(adapter.a.shape)}"
                )
            rank = adapter.a.shape[0]
            expected += [
                (f"low_rank[{i}].a", adapter.a, (rank, dim)),
                (f"low_rank[{i}].b", adapter.b, (num_classes, rank)),
                (f"low_rank[{i}].magnitude", adapter.magnitude, (num_classes,)),
            ]
            if adapter.magnitude is not None and len(self.low_rank) > 1:
                raise NotImplementedError(
                    "an adapter with a magnitude (DoRA) must be the only one of a head, got "
                    f"{len(self.low_rank)} adapters: merge the others into the weight"
                )
        for name, part, shape in expected:
            if part is None:
                continue
            if not (name.endswith(".b") and isinstance(part, RowSource)):
                check_dense(name, part)
                check_float_dtype(name, part)
            if tuple(part.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(part.shape)}")
            if not _is_same(part.device, self.weight.device):
                raise ValueError(
                    f"{name} must be on the device of weight, {self.weight.device}, "
                    f"got {part.device}"
                )

    def products(self, e: Tensor) -> list[Product]:
        """Return the terms of the logits of ``e`` (..., D), before bias, scale and softcap."""
        terms: list[Product] = []
        base_scale = self.class_scale
        for adapter in self.low_rank:
            x = e if adapter.dropout is None else adapter.dropout(e)
            hidden = F.linear(x.to(adapter.a.dtype), adapter.a) * adapter.scale
            scale = self.class_scale
            if adapter.magnitude is not None:
                factor = adapter.magnitude / self._norms(adapter)
                scale = _times(scale, factor)
                if x is e:
                    base_scale = scale
                else:  # the product with the weight is that of dropped embeddings, but for e @ W
                    terms.append(Product(x, self.weight, _times(self.class_scale, factor - 1)))
            terms.append(Product(hidden, adapter.b, scale))
        return [Product(e, self.weight, base_scale), *terms]

    def _norms(self, adapter: LowRank) -> Tensor:
        """Norms (V,) of the rows of weight and adapter together."""
        num_classes, dim = self.weight.shape
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        norms = torch.empty(num_classes, dtype=wide, device=adapter.a.device)
        step = max(128, NORM_BYTES // (2 * dim * wide.itemsize))
        # Not a decorator: the compiler knows no decorated method of a head that it makes.
        with torch.no_grad(), torch.autocast(autocast_type(adapter.a.device), enabled=False):
            for start in range(0, num_classes, step):
                stop = min(start + step, num_classes)
                rows = torch.addmm(
                    rows_of(self.weight, start, stop).to(wide),
                    rows_of(adapter.b, start, stop).to(wide),
                    adapter.a.to(wide),
                    alpha=adapter.scale,
                )
                torch.linalg.vector_norm(rows, dim=1, out=norms[start:stop])
        assert adapter.magnitude is not None
        return norms.to(adapter.magnitude.dtype)


@dataclass(frozen=True, eq=False)
class GivenProducts(Head):
    """A head whose products are known already, with features of their own.

    Args:
        given: the terms; the weight is that of the first.
    """

    given: tuple[Product, ...] = ()

    def products(self, e: Tensor) -> list[Product]:
        """Return the terms as they were given."""
        return list(self.given)


def _times(left: Tensor | None, right: Tensor) -> Tensor:
    return right if left is None else left * right


def _is_same(device: torch.device, other: torch.device) -> bool:
    """Whether two devices are one; a row source may leave out the index of the current one."""
    indices = {x.index for x in (device, other) if x.index is not None}
    return device.type == other.type and len(indices) < 2


def rows_of(weight: Any, start: int, stop: int) -> Tensor:
    """Return some rows of a tensor or a :class:`RowSource`."""
    if isinstance(weight, Tensor):
        return weight[start:stop]
    rows: Tensor = weight.rows(start, stop)
    shape = (stop - start, weight.shape[1])
    is_tensor = isinstance(rows, Tensor)
    if not is_tensor or rows.shape != shape or rows.device.type != weight.device.type:
        got = f"{tuple(rows.shape)} on {rows.device}" if is_tensor else type(rows).__name__
        raise ValueError(
            f"rows({start}, {stop}) of {type(weight).__name__} must be a tensor {shape} on "
            f"{weight.device}, got {got}"
        )
    return rows
