"""Puts a lazy product in the place of a model's head while the model computes its loss."""

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cut_cross_entropy.transformers.forward_record import ForwardRecord, active_record
from cut_cross_entropy.transformers.heads import num_rows
from cut_cross_entropy.transformers.lazy_logits import LazyLogits
from cut_cross_entropy.transformers.origin import Origin, current_autocast, depends_on
from cut_cross_entropy.transformers.recorded import Recipe

Request = Callable[[Recipe], Tensor]

_lock = threading.Lock()


class HeadForward:
    """Stands in for ``head.forward`` while at least one labelled forward runs.

    It is an attribute of the head for that time only. Threads that are in no such forward get the
    head's own forward.
    """

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self.users = 0
        self.instance_forward = head.__dict__.get("forward")
        self.forward = head.forward
        self.is_plain = self.instance_forward is None and type(head).forward is nn.Linear.forward

    def __call__(
        self, *args: Any, cce_request: Request | None = None, **kwargs: Any
    ) -> LazyLogits | Tensor:
        """The head's forward, or its lazy logits.

        With ``cce_request``, what that returns for the recipe of the lazy logits.
        """
        record = active_record()
        if record is None or (record.suspended and cce_request is None) or not args:
            return self.forward(*args, **kwargs)  # type: ignore[no-any-return]
        record.heads_called += 1
        result = self._capture(record, args, kwargs)
        if cce_request is not None:
            assert isinstance(result, LazyLogits)  # as it was in the call that is repeated here
            return cce_request(result.recipe)
        if isinstance(result, LazyLogits) and is_sharded(self.head):
            x = args[0]
            origin = result.origin
            reentering = Origin(
                record,
                origin.requires_grad,
                origin.grad_enabled,
                origin.device_type,
                origin.autocast_dtype,
                depends_on(x),
                self.head,
            )
            return LazyLogits(
                Recipe(((x, None),), None),
                result.dtype,
                result.num_classes,
                result.device,
                reentering,
            )
        return result

    def _capture(
        self, record: ForwardRecord, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> LazyLogits | Tensor:
        if self.is_plain and len(args) == 1 and not kwargs:
            own: Any = self.head._parameters
            if "weight" not in own or "bias" not in own:  # under a parametrization, for one
                own = {"weight": self.head.weight, "bias": self.head.bias}
            lazy = lazy_linear(record, args[0], own["weight"], own["bias"])
            return self.forward(*args) if lazy is None else lazy
        rows = num_rows(self.head)
        with HeadMode(record, () if rows is None else (rows,), args[0].shape[:-1]):
            result: LazyLogits | Tensor = self.forward(*args, **kwargs)
        return result


class HeadMode(TorchFunctionMode):
    """Turns ``F.linear`` of a head into a lazy product.

    Args:
        record: the forward that runs.
        num_classes: capture products with this many classes.
        leading: capture products of features with these leading dimensions only, which tells
            logits from what an adapter computes of the weights themselves; None: of all.
        weights: capture products with these weights only; None: with every weight.
    """

    def __init__(
        self,
        record: ForwardRecord,
        num_classes: tuple[int, ...],
        leading: torch.Size | None = None,
        weights: list[Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.record = record
        self.num_classes = num_classes
        self.leading = leading
        self.weights = weights

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not self.record.suspended:
            lazy = self._linear(*args, **kwargs)
            if lazy is not None:
                return lazy
        return func(*args, **kwargs)

    def _linear(self, input: Any, weight: Any, bias: Any = None) -> LazyLogits | None:
        if weight.shape[0] not in self.num_classes:
            return None
        if self.weights is not None and not any(weight is known for known in self.weights):
            return None
        if self.leading is not None and input.shape[:-1] != self.leading:
            return None
        return lazy_linear(self.record, input, weight, bias)


def lazy_linear(record: ForwardRecord, x: Any, weight: Any, bias: Any) -> LazyLogits | None:
    """``F.linear(x, weight, bias)`` as lazy logits, or None where that is not possible."""
    if not isinstance(x, Tensor):
        record.not_captured = f"its head got {type(x).__name__}"
        return None
    device, dtype = x.device, x.dtype
    autocast_dtype = current_autocast(device.type)
    if not (
        type(weight) is nn.Parameter  # what nearly every call has, without a look at the rest
        and dtype == weight.dtype
        and dtype.is_floating_point
        and type(x) is Tensor
        and x.shape[-1] == weight.shape[-1]
    ):
        reason = _why_not(x, weight, autocast_dtype)
        if reason is not None:
            record.not_captured = reason
            return None
    grad_enabled = torch.is_grad_enabled()
    requires_grad = grad_enabled and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    compiling = torch.compiler.is_compiling()
    origin = Origin(
        record,
        requires_grad,
        grad_enabled,
        device.type,
        autocast_dtype,
        () if compiling else depends_on(x, weight, bias),
    )
    if autocast_dtype is not None and dtype != torch.float64:
        dtype = autocast_dtype
    record.captured += 1
    return LazyLogits(Recipe(((x, weight),), bias), dtype, weight.shape[0], device, origin)


def _why_not(x: Any, weight: Any, autocast_dtype: torch.dtype | None) -> str | None:
    if not isinstance(weight, Tensor):
        return f"the weight of its head is no tensor but a {type(weight).__name__}"
    for tensor in (x, weight):
        if type(tensor).__name__ == "DTensor":
            return "its head is tensor-parallel (a DTensor)"
        if not tensor.is_floating_point():
            return f"its head is quantised ({tensor.dtype})"
    if x.dtype != weight.dtype and autocast_dtype is None:
        return f"its head got {x.dtype} for a weight of {weight.dtype}"
    if x.shape[-1] != weight.shape[-1]:
        return "its head got features of another size than its weight"
    return None


def install(head: nn.Module) -> None:
    """Intercept the calls of ``head`` until :func:`remove`; may be nested."""
    with _lock:
        forward = head.__dict__.get("forward")
        if not isinstance(forward, HeadForward):
            forward = HeadForward(head)
            head.__dict__["forward"] = forward
        forward.users += 1


def remove(head: nn.Module) -> None:
    """Undo one :func:`install`."""
    with _lock:
        forward = head.__dict__["forward"]
        forward.users -= 1
        if forward.users:
            return
        if forward.instance_forward is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = forward.instance_forward


def is_intercepted(head: nn.Module) -> bool:
    """Whether ``head`` is intercepted now."""
    return isinstance(head.__dict__.get("forward"), HeadForward)


def is_sharded(module: nn.Module) -> bool:
    """Whether the module gathers its own parameters around its forward: FSDP, of both kinds."""
    if type(module) is nn.Linear:
        return False
    names = [base.__name__ for base in type(module).__mro__]
    return "FSDPModule" in names or "FullyShardedDataParallel" in names
