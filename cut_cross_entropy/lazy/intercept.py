"""Replaces the product of a head by lazy logits while a model computes its loss."""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cut_cross_entropy.device_support import current_autocast
from cut_cross_entropy.distributed.options import is_dtensor
from cut_cross_entropy.heads.head import Head
from cut_cross_entropy.heads.modules import UnknownHeadError, parts_of
from cut_cross_entropy.lazy.call import HeadCall, depends_on
from cut_cross_entropy.lazy.logits import LazyLogits, lazy_tensor
from cut_cross_entropy.lazy.recipe import CAST, Recipe, ScaledRows, Term, lazy_recipe
from cut_cross_entropy.lazy.record import (
    ForwardRecord,
    active_record,
    enter,
    inside_checkpoint,
    leave,
)
from cut_cross_entropy.lazy.sharded_heads import (
    gathers,
    num_rows,
    own_parameter,
    product_of,
    promised_dtype,
    why_not_intercept,
)
from cut_cross_entropy.lazy.tensor_parallel import (
    LazyShards,
    lazy_shards,
    why_not_vocab_parallel,
)
from cut_cross_entropy.lazy.traced import TracedLogits
from cut_cross_entropy.lazy.value import LazyValue, Unevaluated

Request = Callable[[Recipe], Tensor]

_lock = threading.Lock()


class HeadForward:
    """Stands in for ``head.forward`` while at least one labelled forward runs.

    It is an attribute of the head for that time only. Threads that are not in such a forward get
    the head's own. A head that gathers its weight is not called at first (see ``sharded_heads``).

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
        self.replaces_call = gathers and head.__dict__.get("_compiled_call_impl") is None

    @property
    def is_spread(self) -> bool:
        """Whether only all processes together can read its weight."""
        return self.gathers or is_dtensor(own_parameter(self.product, "weight"))

    def __call__(self, *args: Any, cce_request: Request | None = None, **kwargs: Any) -> Any:
        """Run the head's forward, or return its lazy logits.

        With ``cce_request``, return what that makes of the recipe of the lazy logits.
        """
        record = active_record(self)
        if record is None or (record.suspended and cce_request is None) or not args:
            return self.forward(*args, **kwargs)  # type: ignore[no-any-return]
        if cce_request is not None:
            return self._answer(record, cce_request, args, kwargs)
        record.heads_called += 1
        if _has_to_compute(record):
            return self.forward(*args, **kwargs)  # type: ignore[no-any-return]
        known = len(record.calls)
        result = self._capture(record, args, kwargs)
        if self.gathers and isinstance(result, LazyLogits):
            del record.calls[known:]  # in favour of the second call
            logits = self._deferred(record, args[0], result.lazy.dtype)
            return Hidden(logits) if self.replaces_call else logits
        return result

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the whole call of a head that gathers its weight.

        A plain head is not called at all: no hook of it runs yet.
        """
        record = active_record(self)
        if record is None or record.suspended or not self.is_plain or kwargs or len(args) != 1:
            result = self.head._call_impl(*args, **kwargs)
            return result.logits if isinstance(result, Hidden) else result
        x = args[0]
        record.heads_called += 1
        if _has_to_compute(record):
            return self.head._call_impl(*args)  # type: ignore[no-any-return]
        return self._deferred(
            record, x, promised_dtype(self.head, x, current_autocast(x.device.type))
        )

    def _deferred(self, record: ForwardRecord, x: Tensor, dtype: torch.dtype) -> LazyLogits:
        requires_grad = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.head.parameters())
        )
        recipe = lazy_recipe(x if requires_grad else x.detach().clone(), None, None)
        call = HeadCall(
            record,
            (record.new_call(requires_grad),),
            x.device.type,
            current_autocast(x.device.type),
            versions=depends_on(recipe.terms[0][0]),
            reenter=self.head,
        )
        num_classes = num_rows(self.product)
        assert num_classes is not None
        return lazy_tensor(_whole(recipe, dtype, num_classes, call))

    def _answer(
        self,
        record: ForwardRecord,
        request: Request,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Return what ``request`` makes of the recipe, while the weight is there."""
        suspended, record.suspended = record.suspended, 0
        try:
            known = len(record.calls)
            result = self._capture(record, args, kwargs)
            del record.calls[known:]  # it is the call that was noted before
        finally:
            record.suspended = suspended
        if not isinstance(result, LazyLogits):
            raise RuntimeError(
                f"{record.model_name}: its head did not give the product that it promised: "
                f"{record.not_captured}. Use cce_unpatch for this model"
            )
        return request(result.lazy.recipe)

    def _capture(self, record: ForwardRecord, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        product = self.product
        if self.is_plain and len(args) == 1 and not kwargs:
            weight, bias = own_parameter(product, "weight"), own_parameter(product, "bias")
            lazy = lazy_linear(record, args[0], weight, bias)
            return self.forward(*args) if lazy is None else lazy
        if len(args) == 1 and not kwargs and self._is_read(args[0]):
            try:
                head = parts_of(product)
            except UnknownHeadError:
                pass  # what it multiplies by itself is captured one by one
            else:
                return lazy_products(record, head, args[0])
        rows = num_rows(product)
        with HeadMode(record, () if rows is None else (rows,), args[0].shape[:-1]):
            result = self.forward(*args, **kwargs)
        if not isinstance(result, Unevaluated) and is_dtensor(own_parameter(product, "weight")):
            record.not_captured = record.not_captured or (
                "its head is tensor-parallel and multiplied its part of the classes by itself"
            )
        return result

    def _is_read(self, x: Any) -> bool:
        """Return whether a head may be read instead of called.

        Nobody may wait for a call of its parts, and its weights have to be here.
        """
        return (
            type(x) is Tensor
            and not self.gathers
            and self.instance_forward is None
            and not any(is_dtensor(parameter) for parameter in self.product.parameters())
            and not any(
                module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
                for module in self.product.modules()
                if module is not self.product
            )
        )


class Hidden:
    """Takes lazy logits past hooks of a sharded head, which look for tensors in its output.

    Hooks gather the weight again for the backward; the second call of the head has its own.
    """

    def __init__(self, logits: LazyLogits) -> None:
        self.logits = logits


def _part_of_other_code(function: Any) -> Any:
    """Have ``torch.compile`` trace ``function`` within what calls it only, never by itself.

    Behind a graph break PyTorch 2.13 would compile ``__torch_function__`` for the getter of one
    property and run that for every other: the device of a tensor became its shape.
    """
    frames = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):  # PyTorch 2.7, before which nothing is traced
        action = frames._FrameAction
        strategy = frames._FrameExecStrategy(action.SKIP, action.DEFAULT)
        frames.set_code_exec_strategy(function.__code__, strategy)
    return function


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

    @_part_of_other_code
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.pad and not self.record.suspended:
            self._note_padding(*args)
        if func is F.linear and not self.record.suspended:
            lazy = self._linear(*args, **kwargs)
            if lazy is not None:
                return lazy
        return func(*args, **kwargs)

    def _note_padding(self, input: Any = None, *_: Any) -> None:
        """Note that the model pads its labels, by which it says that they are shifted."""
        labels = self.record.labels
        if (
            isinstance(labels, Tensor)
            and isinstance(input, Tensor)
            and input.shape == labels.shape
            and input.dtype == labels.dtype
        ):
            self.record.labels_padded = True

    def _linear(self, input: Any, weight: Any, bias: Any = None) -> Any:
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
) -> "LazyLogits | LazyShards | TracedLogits | None":
    """Return ``F.linear(x, weight, bias)`` as lazy logits, or None where that is not possible."""
    if not isinstance(x, Tensor):
        record.not_captured = f"its head got {type(x).__name__}"
        return None
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._are_functorch_transforms_active():
        record.note_idle("its head runs inside a transform of torch.func")
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
    shards = not is_usual and is_dtensor(weight)
    features: Any = x.to_local() if shards else x  # type: ignore[attr-defined]
    recipe = lazy_recipe(features, weight, bias)
    requires_grad = len(recipe.leaves()) > 0
    if compiling or not requires_grad:  # PyTorch allows changes in place of these features
        recipe = recipe.on_features(torch.clone)
    call = HeadCall(
        record,
        (record.new_call(requires_grad),),
        device.type,
        autocast_dtype,
        () if compiling else depends_on(recipe.terms[0][0], weight, bias),
    )
    if autocast_dtype is not None and dtype != torch.float64:
        dtype = autocast_dtype
    tensor: Any = TracedLogits if compiling else lazy_tensor
    lazy = _whole(recipe, dtype, weight.shape[0], call, compiling)
    return lazy_shards(lazy, tensor) if shards else tensor(lazy)


def lazy_products(record: ForwardRecord, head: Head, x: Tensor) -> LazyLogits:
    """Return the logits of a head that is more than a matrix as lazy logits."""
    products = head.products(x)
    with_grad = torch.is_grad_enabled()
    terms: list[Term] = []
    for p in products:
        is_tensor = isinstance(p.rows, Tensor) and p.scale is None
        c: Any = p.rows if is_tensor else ScaledRows(p.rows, p.scale)
        terms.append((p.features if with_grad else p.features.detach(), c, not with_grad))
    bias = head.bias if with_grad or head.bias is None else head.bias.detach()
    autocast_dtype = current_autocast(x.device.type)
    is_cast = autocast_dtype is not None and x.dtype != torch.float64
    dtype = autocast_dtype if is_cast and autocast_dtype is not None else x.dtype
    recipe = Recipe(tuple(terms), bias).then(CAST, dtype)
    requires_grad = len(recipe.leaves()) > 0
    if not requires_grad:  # PyTorch allows changes in place of these features
        recipe = recipe.on_features(torch.clone)
    parts = [part for p in products for part in (p.features, p.rows, p.scale)]
    call = HeadCall(
        record,
        (record.new_call(requires_grad),),
        x.device.type,
        autocast_dtype,
        depends_on(*(part for part in (*parts, head.bias) if isinstance(part, Tensor))),
    )
    return lazy_tensor(_whole(recipe, dtype, head.weight.shape[0], call))


def _whole(
    recipe: Recipe, dtype: torch.dtype, num_classes: int, call: HeadCall, compiling: bool = False
) -> LazyValue:
    """Return the logits that a head gives, contiguous."""
    x = recipe.terms[0][0]
    geometry = None if compiling else _geometry(x.shape[:-1], num_classes)
    return LazyValue(recipe, dtype, num_classes, x.device, call=call, geometry=geometry)


@functools.lru_cache(64)
def _geometry(leading: torch.Size, num_classes: int) -> Tensor:
    return torch.empty((*leading, num_classes), device="meta")


def _has_to_compute(record: ForwardRecord) -> bool:
    """Return whether the backward will call the head again, where nothing intercepts it."""
    if not inside_checkpoint(record):
        return False
    record.note_idle(
        "its head runs inside a checkpoint, or another autograd.Function, that calls it again in "
        "the backward or differentiates by itself"
    )
    return True


def _why_not(x: Any, weight: Any, autocast_dtype: torch.dtype | None) -> str | None:
    if not isinstance(weight, Tensor):
        return f"the weight of its head is not a tensor but a {type(weight).__name__}"
    for tensor, name in ((x, "the features"), (weight, "the weight")):
        if is_dtensor(tensor):
            reason = why_not_vocab_parallel(x, weight)
            if reason is not None:
                return reason
        elif not _is_ordinary(tensor):
            return f"{name} of its head is a tensor subclass ({type(tensor).__name__})"
        if not tensor.is_floating_point():
            return f"its head is quantised ({tensor.dtype})"
        if tensor.layout != torch.strided:
            return f"{name} of its head is not dense ({tensor.layout})"
    if x.dtype != weight.dtype and autocast_dtype is None:
        return f"its head got {x.dtype} for a weight of {weight.dtype}"
    if x.shape[-1] != weight.shape[-1]:
        return "its head got features of another size than its weight"
    return None


def _is_ordinary(tensor: Tensor) -> bool:
    """Return whether PyTorch's own operators compute with the tensor: no subclass takes them."""
    cls = type(tensor)
    return cls in (Tensor, nn.Parameter) or (
        cls.__torch_dispatch__ == Tensor.__torch_dispatch__
        and cls.__torch_function__ == nn.Parameter.__torch_function__
    )


@contextmanager
def intercepted(
    record: ForwardRecord, heads: Iterable[nn.Module], depth: int = 3
) -> Iterator[None]:
    """Make ``record`` the active one and intercept the calls of ``heads`` for it; may be nested.

    Args:
        record: of the forward that runs in the block.
        heads: of its model.
        depth: see :func:`~cut_cross_entropy.lazy.record.enter`; by default the frame of the block,
            above this function's and that of ``__enter__``.
    """
    enter(record, depth)
    try:
        _install(record, heads)
        yield
    finally:
        leave(record)
        _remove(record)


def _install(record: ForwardRecord, heads: Iterable[nn.Module]) -> None:
    for head in heads:
        its_own = gathers(head)
        reason = why_not_intercept(head, its_own)
        if reason is not None:
            record.not_captured = reason
            continue
        with _lock:
            attributes = product_of(head).__dict__
            forward = attributes.get("forward")
            if not isinstance(forward, HeadForward):
                forward = HeadForward(head, its_own)
                attributes["forward"] = forward
                if forward.replaces_call:  # where nn.Module.__call__ looks before it runs any hook
                    head.__dict__["_compiled_call_impl"] = forward.call
            forward.users += 1
        record.heads.append(forward)


def _remove(record: ForwardRecord) -> None:
    for forward in record.heads:
        with _lock:
            forward.users -= 1
            if forward.users:
                continue
            attributes = forward.product.__dict__
            if forward.replaces_call:
                del forward.head.__dict__["_compiled_call_impl"]
            if forward.instance_forward is None:
                del attributes["forward"]
            else:
                attributes["forward"] = forward.instance_forward


def is_intercepted(head: nn.Module) -> bool:
    """Whether ``head`` is intercepted now."""
    return isinstance(product_of(head).__dict__.get("forward"), HeadForward)
