"""Puts a lazy product in the place of a model's head while the model computes its loss."""

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cut_cross_entropy.distributed.options import is_dtensor
from cut_cross_entropy.transformers.forward_record import ForwardRecord, active_record
from cut_cross_entropy.transformers.gathering import (
    own_parameter,
    product_of,
    promised_dtype,
)
from cut_cross_entropy.transformers.heads import num_rows
from cut_cross_entropy.transformers.lazy_logits import LazyLogits
from cut_cross_entropy.transformers.lazy_shards import (
    LazyShards,
    lazy_shards,
    why_not_vocab_parallel,
)
from cut_cross_entropy.transformers.origin import Origin, current_autocast, depends_on
from cut_cross_entropy.transformers.recorded import Recipe, Unevaluated

Request = Callable[[Recipe], Tensor]

_lock = threading.Lock()


class HeadForward:
    """Stands in for ``head.forward`` while at least one labelled forward runs.

    It is an attribute of the head for that time only. Threads that are in no such forward get the
    head's own forward. A head that gathers its weight is not called at first (see ``gathering``).

    Args:
        head: what the model calls.
        gathers: whether it has its weight only while it is called.
    """

    def __init__(self, head: nn.Module, gathers: bool) -> None:
        self.head = head
        self.product = product = product_of(head)
        self.users = 0
        self.instance_forward = product.__dict__.get("forward")
        self.forward = product.forward
        self.is_plain = self.instance_forward is None and type(product).forward is nn.Linear.forward
        self.gathers = gathers
        self.instance_call = head.__dict__.get("_compiled_call_impl")
        self.defers = self.gathers and self.is_plain and self.instance_call is None

    @property
    def is_spread(self) -> bool:
        """Whether only all processes together can read its weight."""
        return self.gathers or is_dtensor(own_parameter(self.product, "weight"))

    def __call__(
        self, *args: Any, cce_request: Request | None = None, **kwargs: Any
    ) -> LazyLogits | LazyShards | Tensor:
        """The head's forward, or its lazy logits.

        With ``cce_request``, what that returns for the recipe of the lazy logits.
        """
        record = active_record()
        if record is None or (record.suspended and cce_request is None) or not args:
            return self.forward(*args, **kwargs)  # type: ignore[no-any-return]
        if cce_request is not None:
            return self._answer(record, cce_request, args, kwargs)
        record.heads_called += 1
        result = self._capture(record, args, kwargs)
        if self.gathers and isinstance(result, LazyLogits):
            return self._deferred(record, args[0], result.dtype)
        return result

    def call(self, *args: Any, **kwargs: Any) -> LazyLogits | LazyShards | Tensor:
        """The whole call of a head that defers: no hook of it runs yet."""
        record = active_record()
        if record is None or record.suspended or kwargs or len(args) != 1:
            return self.head._call_impl(*args, **kwargs)  # type: ignore[no-any-return]
        x = args[0]
        record.heads_called += 1
        record.captured += 1
        return self._deferred(
            record, x, promised_dtype(self.head, x, current_autocast(x.device.type))
        )

    def _deferred(self, record: ForwardRecord, x: Tensor, dtype: torch.dtype) -> LazyLogits:
        grad_enabled = torch.is_grad_enabled()
        origin = Origin(
            record,
            grad_enabled
            and (x.requires_grad or any(p.requires_grad for p in self.head.parameters())),
            grad_enabled,
            x.device.type,
            current_autocast(x.device.type),
            depends_on(x),
            self.head,
        )
        num_classes = num_rows(self.product)
        assert num_classes is not None
        return LazyLogits(Recipe(((x, None),), None), dtype, num_classes, x.device, origin)

    def _answer(
        self,
        record: ForwardRecord,
        request: Request,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """What ``request`` makes of the recipe, while the weight is there."""
        suspended, record.suspended = record.suspended, 0
        try:
            result = self._capture(record, args, kwargs)
        finally:
            record.suspended = suspended
        if not isinstance(result, LazyLogits):
            raise RuntimeError(
                f"{record.model_name}: its head did not give the product that it promised: "
                f"{record.not_captured}. Use cce_unpatch for this model"
            )
        return request(result.recipe)

    def _capture(
        self, record: ForwardRecord, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> LazyLogits | LazyShards | Tensor:
        product = self.product
        if self.is_plain and len(args) == 1 and not kwargs:
            weight, bias = own_parameter(product, "weight"), own_parameter(product, "bias")
            lazy = lazy_linear(record, args[0], weight, bias)
            return self.forward(*args) if lazy is None else lazy
        rows = num_rows(product)
        with HeadMode(record, () if rows is None else (rows,), args[0].shape[:-1]):
            result: LazyLogits | LazyShards | Tensor = self.forward(*args, **kwargs)
        if not isinstance(result, Unevaluated) and is_dtensor(own_parameter(product, "weight")):
            record.not_captured = record.not_captured or (
                "its head is tensor-parallel and multiplied its part of the classes by itself"
            )
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

    def _linear(self, input: Any, weight: Any, bias: Any = None) -> LazyLogits | LazyShards | None:
        if weight.shape[0] not in self.num_classes:
            return None
        if self.weights is not None and not any(weight is known for known in self.weights):
            return None
        if (
            self.leading is not None
            and input.shape[:-1] != self.leading
            and not is_dtensor(input)  # of which the head itself got a part, perhaps
        ):
            return None
        return lazy_linear(self.record, input, weight, bias)


def lazy_linear(
    record: ForwardRecord, x: Any, weight: Any, bias: Any
) -> LazyLogits | LazyShards | None:
    """``F.linear(x, weight, bias)`` as lazy logits, or None where that is not possible."""
    if not isinstance(x, Tensor):
        record.not_captured = f"its head got {type(x).__name__}"
        return None
    device, dtype = x.device, x.dtype
    autocast_dtype = current_autocast(device.type)
    is_usual = (
        type(weight) is nn.Parameter  # what nearly every call has, without a look at the rest
        and dtype == weight.dtype
        and dtype.is_floating_point
        and type(x) is Tensor
        and x.shape[-1] == weight.shape[-1]
    )
    if not is_usual:
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
    if not is_usual and is_dtensor(weight):
        return lazy_shards(x, weight, bias, dtype, origin)
    return LazyLogits(Recipe(((x, weight),), bias), dtype, weight.shape[0], device, origin)


def _why_not(x: Any, weight: Any, autocast_dtype: torch.dtype | None) -> str | None:
    if not isinstance(weight, Tensor):
        return f"the weight of its head is no tensor but a {type(weight).__name__}"
    for tensor in (x, weight):
        if is_dtensor(tensor):
            reason = why_not_vocab_parallel(x, weight)
            if reason is not None:
                return reason
        if not tensor.is_floating_point():
            return f"its head is quantised ({tensor.dtype})"
    if x.dtype != weight.dtype and autocast_dtype is None:
        return f"its head got {x.dtype} for a weight of {weight.dtype}"
    if x.shape[-1] != weight.shape[-1]:
        return "its head got features of another size than its weight"
    return None


def install(head: nn.Module, gathers: bool) -> HeadForward:
    """Intercept the calls of ``head`` until :func:`remove` of the result; may be nested."""
    with _lock:
        attributes = product_of(head).__dict__
        forward = attributes.get("forward")
        if not isinstance(forward, HeadForward):
            forward = HeadForward(head, gathers)
            attributes["forward"] = forward
            if forward.defers:  # where nn.Module.__call__ looks before it runs any hook
                head.__dict__["_compiled_call_impl"] = forward.call
        forward.users += 1
        return forward


def remove(forward: HeadForward) -> None:
    """Undo one :func:`install`."""
    with _lock:
        forward.users -= 1
        if forward.users:
            return
        attributes = forward.product.__dict__
        if forward.defers:
            del forward.head.__dict__["_compiled_call_impl"]
        if forward.instance_forward is None:
            del attributes["forward"]
        else:
            attributes["forward"] = forward.instance_forward


def is_intercepted(head: nn.Module) -> bool:
    """Whether ``head`` is intercepted now."""
    return isinstance(product_of(head).__dict__.get("forward"), HeadForward)
