"""One call of a head: the conditions under which its lazy logits are computed later."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cut_cross_entropy.device_support import current_autocast
from cut_cross_entropy.lazy.recipe import Recipe
from cut_cross_entropy.lazy.record import ForwardRecord, Uses


@dataclass(eq=False, slots=True)
class HeadCall:
    """One call of a head, or what a sum of several has in common.

    Args:
        record: the forward of the model that made the call.
        uses: how the logits of the call, or of the calls of a sum, were used.
        device_type: of the features.
        autocast_dtype: the dtype of autocast, or None outside autocast.
        versions: the tensors that the logits depend on, and their versions then.
        reenter: a head whose weight exists only while its own hooks hold it: results are computed
            inside a second call of it.
    """

    record: ForwardRecord
    uses: tuple[Uses, ...]
    device_type: str
    autocast_dtype: torch.dtype | None
    versions: tuple[tuple[Tensor, int | None], ...]
    reenter: nn.Module | None = None

    @property
    def model_name(self) -> str:
        """The class of the model."""
        return self.record.model_name

    def merged(self, other: "HeadCall") -> "HeadCall":
        """Return the call of a sum of the results of two calls."""
        if other is self:
            return self
        return replace(
            self,
            uses=(*self.uses, *[use for use in other.uses if use not in self.uses]),
            versions=(*self.versions, *other.versions),
        )

    def compute(self, recipe: Recipe, function: Callable[[Recipe], Tensor]) -> Tensor:
        """Return ``function(recipe)`` under the autocast of the call.

        Raises:
            RuntimeError: a weight has changed since then, or is gone.
        """
        self._check_fresh()
        self.record.suspended += 1
        try:
            if current_autocast(self.device_type) == self.autocast_dtype:
                return self._run(recipe, function)
            autocast = torch.autocast(
                self.device_type,
                dtype=self.autocast_dtype,
                enabled=self.autocast_dtype is not None,
            )
            with autocast:
                return self._run(recipe, function)
        finally:
            self.record.suspended -= 1

    def _run(self, recipe: Recipe, function: Callable[[Recipe], Tensor]) -> Tensor:
        if self.reenter is None:
            return function(recipe)
        (features, _, constant), steps = recipe.terms[0], recipe.steps

        def request(head: Recipe) -> Tensor:
            bias = head.bias
            if constant:
                head = Recipe(tuple([(e, c, True) for e, c, _ in head.terms]), None)
                bias = None if bias is None else bias.detach()
            return function(Recipe(head.terms, bias, (*head.steps, *steps)))

        # The features are an argument of their own: sharding hooks look for tensors there.
        result = self.reenter(features, cce_request=request)
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


def tensor_version(tensor: Tensor) -> int | None:
    """Return a number that each change in place increases; None for a tensor without one."""
    try:
        return tensor._version
    except RuntimeError:  # of inference mode
        return None


def depends_on(*tensors: Any) -> tuple[tuple[Tensor, int | None], ...]:
    """Return the tensors among ``tensors`` with their versions."""
    return tuple([(t, tensor_version(t)) for t in tensors if t is not None])
