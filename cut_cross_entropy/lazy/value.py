"""The state of lazy logits: what they are, without the object that stands for them in a model."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from cut_cross_entropy.lazy.call import HeadCall, tensor_version
from cut_cross_entropy.lazy.recipe import Recipe, replay
from cut_cross_entropy.lazy.record import ForwardRecord, saved_tensors_hooks

View = Callable[[Tensor], Tensor]


class Unevaluated:
    """Marks the objects that stand for logits which are not computed."""


class StandIn(Unevaluated):
    """Stands for logits that are not computed where it cannot be a tensor.

    Attributes:
        lazy: the logits.
    """

    lazy: "LazyValue"

    @property
    def shape(self) -> torch.Size:
        """Of the whole logits."""
        return self.lazy.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.lazy.ndim

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.lazy.ndim


class Storage:
    """Logits that several views may share, computed once.

    Args:
        recipe: how to compute them.
        call: the conditions under which to compute them.
    """

    value: Tensor | None = None
    version: int | None = None
    shared = False  # whether a view of them exists
    given_out = False  # whether the value is what counts, whatever is done to it

    def __init__(self, recipe: Recipe, call: HeadCall) -> None:
        self.recipe = recipe
        self.call = call
        self.handles: list[Any] = []  # weak references to the tensors that stand for them

    def compute(self) -> Tensor:
        """Return the logits, with a gradient if their factors require one."""
        if self.value is None:
            recipe = self.recipe
            live = len(recipe.leaves()) > 0 or (
                self.call.reenter is not None and not recipe.terms[0][2]
            )
            if torch.compiler.is_compiling():
                with torch.set_grad_enabled(live):
                    self.value = self.call.compute(recipe, replay)
            else:
                with torch.set_grad_enabled(live), _as_outside(self.call.record):
                    self.value = self.call.compute(recipe, replay)
                self.version = tensor_version(self.value)
        return self.value

    @property
    def is_changed(self) -> bool:
        """Whether the value is not that of the recipe any more, or may not be."""
        if self.given_out:
            return True
        value = self.value
        if value is None or torch.compiler.is_compiling():
            return False
        return tensor_version(value) != self.version


@contextlib.contextmanager
def _as_outside(record: ForwardRecord) -> Iterator[None]:
    """Keep what is computed once, and kept, out of scopes that end before it does.

    A checkpoint counts the tensors saved inside it, and would miss these when it recomputes; the
    tensors of a transform of ``torch.func`` are dead after it.
    """
    with contextlib.ExitStack() as scopes:
        if saved_tensors_hooks() != record.saved_tensors_hooks:
            same = lambda tensor: tensor
            scopes.enter_context(torch.autograd.graph.saved_tensors_hooks(same, same))
        if torch._C._are_functorch_transforms_active():
            scopes.enter_context(temporarily_clear_interpreter_stack())
        yield


class LazyValue:
    """Logits (..., V) that are not computed.

    Args:
        recipe: how to compute them.
        dtype: of the logits.
        num_classes: size of their last dimension.
        device: where the model's code expects them.
        call: the call of the head that they come from.
        geometry: a tensor on the meta device with their shape and strides; None in compiled code.
        storage: of the logits that these are a view of, and the ``views`` that lead from there.
        base: the logits that the last of these views was taken of.
        requires_grad: whether a factor requires a gradient; None: look.

    Attributes:
        used: whether a gradient of theirs goes to the factors without passing through their value.
        hooked: whether somebody waits for the gradient of their value.
        sums: sums over their classes that were computed, see ``token_sums``.
        has_softmax: whether a softmax of them was recorded.
        source: the logits that probabilities were made of.
    """

    __slots__ = (
        *("recipe", "dtype", "num_classes", "device", "call", "geometry", "storage", "views"),
        *("requires_grad", "base", "used", "hooked", "_value", "sums", "has_softmax", "source"),
    )

    def __init__(
        self,
        recipe: Recipe,
        dtype: torch.dtype,
        num_classes: int,
        device: torch.device,
        call: HeadCall,
        geometry: Tensor | None,
        storage: Storage | None = None,
        views: tuple[View, ...] = (),
        base: "LazyValue | None" = None,
        requires_grad: bool | None = None,
    ) -> None:
        self.recipe = recipe
        self.dtype = dtype
        self.num_classes = num_classes
        self.device = device
        self.call = call
        self.geometry = geometry
        self.storage = Storage(recipe, call) if storage is None else storage
        self.views = views
        if requires_grad is None:
            requires_grad = len(recipe.leaves()) > 0 or (  # Dynamo knows no bool of a list
                call.reenter is not None and not recipe.terms[0][2] and call.uses[0].requires_grad
            )
        self.requires_grad = requires_grad
        self.base = base
        self.used = self.hooked = self.has_softmax = False
        self.sums: Any = None
        self.source: LazyValue | None = None
        self._value: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the logits."""
        if self.geometry is not None:
            return self.geometry.shape
        return torch.Size((*self.recipe.terms[0][0].shape[:-1], self.num_classes))

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.recipe.terms[0][0].ndim

    def numel(self) -> int:
        """Return the number of elements."""
        return self.shape.numel()

    @property
    def is_changed(self) -> bool:
        """Whether the value counts, and not the recipe."""
        return self.storage.is_changed

    def note_use(self) -> None:
        """Note that a loss, or other logits, was made of the recipe."""
        if self.requires_grad:
            lazy: LazyValue | None = self
            while lazy is not None:
                lazy.used = True
                lazy = lazy.base

    def check_unused(self, operation: str) -> None:
        """Raise for an ``operation`` that asks for the whole gradient of these logits.

        Raises:
            RuntimeError: a part of the gradient does not pass through their value.
        """
        if self.used:
            raise RuntimeError(
                f"{self.call.model_name}: {operation} of logits that a loss, or other logits, were "
                "computed from before would miss that part of their gradient. Ask for it before "
                "the logits are used, or use cce_unpatch for this model"
            )

    @property
    def is_hooked(self) -> bool:
        """Whether somebody waits for the gradient of their value, or of what they are a view of."""
        return self.hooked or (self.base is not None and self.base.is_hooked)

    def derived(
        self,
        recipe: Recipe,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        geometry: Tensor | None = None,
    ) -> "LazyValue":
        """Return the result of an operation, in memory of its own."""
        self.note_use()
        if geometry is None:
            geometry = self.geometry
            if geometry is not None and not geometry.is_contiguous():
                geometry = torch.empty_like(geometry)
        return LazyValue(
            recipe,
            self.dtype if dtype is None else dtype,
            self.num_classes,
            self.device if device is None else device,
            call=self.call,
            geometry=geometry,
        )

    def view(
        self, recipe: Recipe, view: View, geometry: Tensor | None, num_classes: int | None = None
    ) -> "LazyValue":
        """Return the result of an operation that shares memory with these logits."""
        self.storage.shared = True
        return LazyValue(
            recipe,
            self.dtype,
            self.num_classes if num_classes is None else num_classes,
            self.device,
            call=self.call,
            geometry=geometry,
            storage=self.storage,
            views=(*self.views, view),
            base=self,
            requires_grad=self.requires_grad,
        )

    def replace(self, changed: "LazyValue") -> None:
        """Become what an operation in place has made of these logits."""
        self.recipe, self.call = changed.recipe, changed.call
        self.storage.recipe, self.storage.call = changed.recipe, changed.call
        self.storage.value, self._value = None, None
        self.used = False
        self.requires_grad = changed.requires_grad

    def compute(self) -> Tensor:
        """Return the logits."""
        if self.base is None:
            return self.storage.compute()
        base = self.base.compute()
        if self._value is None or self._value[0] is not base:
            with torch.enable_grad():
                self._value = (base, self.views[-1](base))
        return self._value[1]

    def materialise(self, operation: str, with_grad: bool | None = None) -> Tensor:
        """Return the logits, noting that ``operation`` needs them.

        Args:
            with_grad: whether a gradient of what it computes reaches the factors; None: if a
                gradient is recorded now.
        """
        record = self.call.record
        if record.finished and self.storage.value is not None:
            return self.compute()
        value = self.compute()
        if with_grad is None:
            with_grad = not self.requires_grad or torch.is_grad_enabled()
        record.note_read(self.call.uses, operation, with_grad)
        return value
