"""The rows of a head's products for a chunk of classes, side by side, and their gradients.

Shapes: V classes, K features of all products together.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cut_cross_entropy.heads.head import Product, rows_of


class ClassRows:
    """The rows (V, K) of several products, of which no more than a chunk exists at a time.

    Those of a chunk are made again where autograd wants them in the backward pass. Gradients of the
    parts are written chunk by chunk into one tensor for each, and handed over after the last.

    Args:
        products: the terms; those that require no gradient have to come first.
        dtype: of the rows.
    """

    def __init__(self, products: list[Product], dtype: torch.dtype) -> None:
        self.parts = [(p.rows, p.scale) for p in products]
        self.dtype = dtype
        widths = [p.rows.shape[1] for p in products]
        self.num_classes, self.width = products[0].rows.shape[0], sum(widths)
        self.frozen_columns = 0
        for p, width in zip(products, widths, strict=True):
            if requires_grad(p):
                break
            self.frozen_columns += width
        found = [x for part in self.parts for x in part if isinstance(x, Tensor)]
        self._leaves = list({id(x): x for x in found if x.requires_grad}.values())
        self._versions = [(x, x._version) for x in found if not x.is_inference()]
        self._grads: list[Tensor] | None = None  # of chunks that autograd sees
        self._grads_of_all: list[Tensor] | None = None  # by a function of all rows

    def anchor(self) -> Tensor | None:
        """Return a scalar through which the gradients reach the parts; None if they need none.

        It is not an attribute: the graph behind it refers to these rows.
        """
        if not self._leaves or not torch.is_grad_enabled():
            return None
        return _Handed.apply(self, *self._leaves)  # type: ignore[no-any-return]

    @contextmanager
    def chunk(self, anchor: Tensor | None, classes: slice) -> Iterator[Tensor]:
        """Yield the rows of some classes, which autograd does not keep inside the block."""
        rows = self.make(classes) if anchor is None else _Chunk.apply(anchor, self, classes)
        storage = rows.untyped_storage().data_ptr()

        def pack(saved: Tensor) -> Any:
            if saved.numel() == 0 or saved.untyped_storage().data_ptr() != storage:
                return saved
            return saved.shape, saved.stride(), saved.storage_offset()

        def unpack(packed: Any) -> Tensor:
            return packed if isinstance(packed, Tensor) else self.make(classes).as_strided(*packed)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield rows

    @torch.no_grad()
    def make(self, classes: slice) -> Tensor:
        """Return the rows of some classes.

        Raises:
            RuntimeError: a part has changed since the rows were first asked for.
        """
        for tensor, version in self._versions:
            if tensor._version != version:
                raise RuntimeError(
                    "a part of the head was modified by an inplace operation between the loss and "
                    "its backward"
                )
        parts = []
        for rows, scale in self.parts:
            part = rows_of(rows, classes.start, classes.stop)
            if scale is not None:
                part = part * scale[classes, None]
            parts.append(part.to(self.dtype))
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)

    @torch.no_grad()
    def add_gradient(self, classes: slice, grad: Tensor) -> None:
        """Take the gradient of the rows of a chunk but for their frozen columns."""
        if self._grads is None:
            self._grads = self._zeros()
        self._add_to(self._grads, classes, grad)

    @torch.no_grad()
    def add_gradient_of_all(self, classes: slice, grad: Tensor) -> None:
        """Take the same of a function that computes the gradients of all rows."""
        if self._grads_of_all is None:
            self._grads_of_all = self._zeros()
        self._add_to(self._grads_of_all, classes, grad)

    def forget_gradients(self) -> None:
        """Drop what such a function left in an earlier backward that did not ask for the parts'.

        For the start of its own backward. Others may have left theirs in this pass already.
        """
        self._grads_of_all = None

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in self._leaves]

    def _add_to(self, grads: list[Tensor], classes: slice, grad: Tensor) -> None:
        def of(leaf: Tensor) -> Tensor:
            return next(g for x, g in zip(self._leaves, grads, strict=True) if x is leaf)

        first = -self.frozen_columns
        for rows, scale in self.parts:
            start, first = first, first + rows.shape[1]
            if start < 0:
                continue
            own = grad[:, start:first]
            if isinstance(rows, Tensor) and rows.requires_grad:
                of_rows = own if scale is None else own * scale[classes, None]
                of(rows)[classes] += of_rows
            if scale is not None and scale.requires_grad:
                wide = torch.promote_types(own.dtype, torch.float32)
                part = rows_of(rows, classes.start, classes.stop)
                of_scale = torch.linalg.vecdot(own.to(wide), part.to(wide))
                of(scale)[classes] += of_scale

    def hand_over(self) -> list[Tensor | None]:
        """Return the gradients of all chunks, in the order of the leaves."""
        found = [x for x in (self._grads, self._grads_of_all) if x is not None]
        self._grads = self._grads_of_all = None
        if not found:
            return [None for _ in self._leaves]
        if len(found) == 1:
            return list(found[0])
        return [x.add_(y) for x, y in zip(*found, strict=True)]


def requires_grad(product: Product) -> bool:
    """Whether the rows of a product require a gradient."""
    parts = (product.rows, product.scale)
    return any(isinstance(x, Tensor) and x.requires_grad for x in parts)


class _Handed(Function):
    """Has the parts of a head as its inputs; its gradient is asked for after that of all chunks."""

    @staticmethod
    def forward(ctx: Any, rows: ClassRows, *leaves: Tensor) -> Tensor:
        ctx.rows = rows
        return leaves[0].new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, *ctx.rows.hand_over()


class _Chunk(Function):
    """The rows of a chunk, whose gradient goes into the tensors of :class:`ClassRows`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows: ClassRows, classes: slice) -> Tensor:
        ctx.rows, ctx.classes = rows, classes
        ctx.save_for_backward(anchor)
        return rows.make(classes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.rows.add_gradient(ctx.classes, grad[:, ctx.rows.frozen_columns :])
        (anchor,) = ctx.saved_tensors
        return torch.zeros_like(anchor), None, None
