"""When and where lazy logits were asked for, so that they can be computed as if it were then."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cut_cross_entropy.transformers.forward_record import ForwardRecord
from cut_cross_entropy.transformers.recorded import Recipe


@dataclass(eq=False)
class Origin:
    """One call of a head.

    Args:
        record: the forward of the model that made the call.
        requires_grad: whether the logits would have been part of the graph.
        grad_enabled: the grad mode of the call.
        device_type: of the features.
        autocast_dtype: the dtype of autocast, or None outside autocast.
        versions: the tensors that the logits depend on, and their versions then.
        reenter: a head whose weight exists only while its own hooks hold it: what the logits are
            needed for is computed inside a second call of it.
    """

    record: ForwardRecord
    requires_grad: bool
    grad_enabled: bool
    device_type: str
    autocast_dtype: torch.dtype | None
    versions: tuple[tuple[Tensor, int | None], ...]
    reenter: nn.Module | None = None

    @property
    def reenters(self) -> bool:
        """Whether the weight has to be fetched through the head."""
        return self.reenter is not None

    @property
    def model_name(self) -> str:
        """The class of the model."""
        return self.record.model_name

    def without_grad(self) -> "Origin":
        """The same call as a detached result sees it."""
        return replace(self, requires_grad=False, grad_enabled=False)

    def merged(self, other: "Origin") -> "Origin":
        """The origin of a sum of the results of two calls."""
        return replace(
            self,
            requires_grad=self.requires_grad or other.requires_grad,
            grad_enabled=self.grad_enabled or other.grad_enabled,
            versions=(*self.versions, *other.versions),
        )

    def note_read(self, operation: str) -> None:
        """Note that ``operation`` made real logits of lazy ones."""
        self.record.note_read(operation, self.requires_grad and torch.is_grad_enabled())

    def compute(self, recipe: Recipe, function: Callable[[Recipe], Tensor]) -> Tensor:
        """``function(recipe)`` under the grad mode and autocast of the call.

        Raises:
            RuntimeError: a weight has changed since then, or is gone.
        """
        if not torch.compiler.is_compiling():
            self._check_fresh()
        self.record.suspended += 1
        try:
            if self._is_as_now():
                return self._run(recipe, function)
            autocast = torch.autocast(
                self.device_type,
                dtype=self.autocast_dtype,
                enabled=self.autocast_dtype is not None,
            )
            with torch.set_grad_enabled(self.grad_enabled), autocast:
                return self._run(recipe, function)
        finally:
            self.record.suspended -= 1

    def _run(self, recipe: Recipe, function: Callable[[Recipe], Tensor]) -> Tensor:
        if self.reenter is None:
            return function(recipe)
        (features, _), steps = recipe.terms[0], recipe.steps
        # The features are an argument of their own: sharding hooks look for tensors there.
        result = self.reenter(
            features,
            cce_request=lambda head: function(replace(head, steps=(*head.steps, *steps))),
        )
        assert isinstance(result, Tensor)
        return result

    def _check_fresh(self) -> None:
        finished = self.record.finished
        for tensor, version in self.versions:
            if version is not None and tensor._version != version:
                raise RuntimeError(
                    f"{self.model_name}: the logits are computed when they are first read, and a "
                    "weight or an activation that they depend on has changed since the forward "
                    "(optimizer.step() does that). Read outputs.logits before, or pass no labels"
                )
            if finished and tensor.untyped_storage().size() == 0 and tensor.numel():
                raise RuntimeError(
                    f"{self.model_name}: the logits are computed when they are first read, and a "
                    "weight that they depend on was resharded after the forward. Pass no labels "
                    "where you need the logits"
                )

    def _is_as_now(self) -> bool:
        return (
            torch.is_grad_enabled() == self.grad_enabled
            and current_autocast(self.device_type) == self.autocast_dtype
        )


def current_autocast(device_type: str) -> torch.dtype | None:
    """The dtype that autocast uses now for this kind of device, or None outside autocast."""
    if device_type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device_type):
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def tensor_version(tensor: Tensor) -> int | None:
    """A number that each change in place increases; None for a tensor that does not keep it."""
    return None if tensor.is_inference() else tensor._version


def depends_on(*tensors: Any) -> tuple[tuple[Tensor, int | None], ...]:
    """The tensors among ``tensors`` with their versions."""
    return tuple([(t, tensor_version(t)) for t in tensors if t is not None])
