"""Logits that are not computed: what a lazy head returns while the model computes its loss.

:class:`LazyLogits` is a tensor without memory. What can be recorded (``operations``) gives new lazy
logits; ``F.cross_entropy`` becomes the operator (``cross_entropy``); everything else gets the
logits, computed by the operations that were recorded. There are three ways in, and each gets the
logits with their gradient:

- functions of PyTorch and methods, through ``__torch_function__``: they get ordinary tensors;
- C++ that dispatches operators (``autograd.Function.apply``, scripted functions, extensions),
  through ``__torch_dispatch__``: below autograd, which sees a tensor with the graph of the recipe;
- memory (``data_ptr``, ``numpy``): the first way, and from then on the memory counts.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils import _pytree as pytree

from cut_cross_entropy.lazy.call import tensor_version
from cut_cross_entropy.lazy.cross_entropy import cross_entropy
from cut_cross_entropy.lazy.operations import (
    COMMUTING,
    KEPT_AFTERWARDS,
    OPERATORS,
    RECORDED,
    record,
)
from cut_cross_entropy.lazy.recipe import replay
from cut_cross_entropy.lazy.record import ForwardRecord, in_recomputation, runs_in_function
from cut_cross_entropy.lazy.token_sums import SUMMARIES, summarise
from cut_cross_entropy.lazy.value import LazyValue, Storage, Unevaluated

_METADATA = frozenset(
    {"size", "dim", "numel", "nelement", "is_floating_point", "is_complex", "get_device", "stride"}
    | {"__len__", "element_size", "is_contiguous", "ndimension", "is_inference", "__hash__"}
    | {"storage_offset", "is_signed"}
)
_PROPERTIES = frozenset(
    {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_sparse", "is_meta"}
    | {"is_quantized", "is_mps", "is_xpu", "itemsize", "nbytes", "is_nested", "names", "grad"}
    | {"_base", "_version", "output_nr", "_backward_hooks"}
)
# After these the computed logits are what counts: others can change them, or their gradient.
_GIVING_OUT = frozenset(
    {"register_hook", "retain_grad", "requires_grad_", "register_post_accumulate_grad_hook"}
    | {"backward"}  # which sets the .grad of its inputs
    | {"detach_", "data_ptr", "untyped_storage", "storage", "numpy", "__array__", "__dlpack__"}
    | {
        "data",
        "grad_fn",
        "data =",
        "requires_grad =",
        "grad =",
        "__cuda_array_interface__",
        "set_",
        "share_memory_",
    }
)
# These ask for the whole gradient of the logits, which has to pass through their value then.
_HOOKS = frozenset({"register_hook", "retain_grad", "grad_fn"})
_LEAF = frozenset({"requires_grad_", "requires_grad ="})


class LazyLogits(Tensor, Unevaluated):
    """Logits (..., V) that are computed when somebody looks, and kept from then on."""

    _lazy: LazyValue

    @property
    def lazy(self) -> LazyValue:
        """The logits that this tensor stands for."""
        return self._lazy

    def materialise(self, operation: str = "outputs.logits") -> Tensor:
        """Return the logits as an ordinary tensor.

        Args:
            operation: what needs them, for the warning.
        """
        if _is_rewired(self):
            _adopt(self)
        lazy = self._lazy
        if lazy.is_changed:
            return lazy.compute()  # what changed them has said so
        with_grad = (
            is_attachable(lazy)
            or not lazy.requires_grad
            or torch.is_grad_enabled()
            or not runs_in_function(lazy.call.record)
        )
        return lazy.materialise(operation, with_grad)

    def as_subclass(self, cls: Any) -> Any:  # a method that PyTorch lets nobody override otherwise
        """As of a tensor."""
        return self.materialise("as_subclass").as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.compiler.is_compiling():  # code that is compiled by itself goes on without a trace
            torch._dynamo.graph_break()
        if _frame_callback() is None:
            return _call(func, args, kwargs or {})
        return _call_untraced(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__

        def real(logits: LazyLogits) -> Tensor:
            lazy = logits._lazy
            with_grad = is_attachable(lazy) or not lazy.requires_grad
            with torch._C._ForceDispatchKeyGuard(*lazy.call.record.dispatch_keys):
                return lazy.materialise(name, with_grad).detach()

        real_args, real_kwargs = pytree.tree_map_only(LazyLogits, real, (args, kwargs))
        with torch.no_grad():
            result = func(*real_args, **real_kwargs)
        if func._schema.is_mutable and isinstance(args[0], LazyLogits):
            args[0]._lazy.storage.given_out = True
            return args[0]
        return result


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function of PyTorch with lazy logits among its arguments."""
    name = _NAMES.get(func)
    if torch._C._are_functorch_transforms_active() and name not in _METADATA:
        return _ordinary(func, args, kwargs, name or func.__name__)
    if name in _METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    summary = _SUMMARIES.get(func)
    if summary is not None:
        result = _summarise(summary, args, kwargs)
        if result is not NotImplemented:
            return result
    if name is not None:
        result = _record(name, args, kwargs)
        if result is not NotImplemented:
            return result
    elif func is F.cross_entropy:
        result = _loss(args, kwargs)
        if result is not NotImplemented:
            return result
    else:
        name = func.__name__
        if name in ("__get__", "__set__") and type(args[0]) is LazyLogits:
            attribute = getattr(func.__self__, "__name__", "")
            if attribute == "_backward_hooks":  # autograd's own, of a tensor changed in place
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args)
            name = attribute if name == "__get__" else f"{attribute} ="
            if name == "requires_grad" or name == "is_leaf":
                requires_grad = _requires_grad(args[0])
                return requires_grad if name == "requires_grad" else not requires_grad
            if name == "grad":
                _check_grad(args[0])
            if name in _PROPERTIES and not (name == "grad" and _is_changed(args[0])):
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args)
    return _ordinary(func, args, kwargs, name or func.__name__)


_call_untraced = torch._dynamo.disable(_call)
_frame_callback = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: True)
"""Returns None where no code is compiled: then there is nothing to keep from tracing."""
torch._dynamo.decorators.skip(LazyLogits.__torch_function__.__func__)  # type: ignore[attr-defined]


def lazy_tensor(lazy: LazyValue) -> LazyLogits:
    """Return ``lazy`` as a tensor, whose graph is that of its recipe."""
    if lazy.requires_grad and is_attachable(lazy):
        logits: LazyLogits = _attach(lazy, *lazy.storage.recipe.leaves())
        return logits
    return _wrapper(lazy)


def _wrapper(lazy: LazyValue) -> LazyLogits:
    """Return a tensor with the shape, strides, dtype and device of ``lazy``."""
    geometry = lazy.geometry
    assert geometry is not None
    logits: LazyLogits = _make_wrapper_subclass(
        LazyLogits, geometry.shape, strides=geometry.stride(), dtype=lazy.dtype, device=lazy.device
    )
    # An error for C++ that skips the dispatcher.
    torch._C._set_throw_on_mutable_data_ptr(logits)
    logits._lazy = lazy
    lazy.storage.handles.append(weakref.ref(logits))
    return logits


_make_wrapper_subclass: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]


def is_attachable(lazy: LazyValue) -> bool:
    """Return whether all factors are known, so that autograd can reach them by itself."""
    return lazy.call.reenter is None and not lazy.recipe.is_divided


class _Attach(torch.autograd.Function):
    """Gives lazy logits a place in the graph, for whoever uses them without looking."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyValue, *leaves: Tensor) -> LazyLogits:  # type: ignore[override]
        _keep(ctx, lazy, leaves)
        return _wrapper(lazy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:  # type: ignore[override]
        return None, *_gradients(ctx, grad)


# Without the checks for transforms of torch.func, inside which nothing is lazy: half of the time.
_attach: Any = super(torch.autograd.Function, _Attach).apply


class _Reattach(torch.autograd.Function):
    """Gives logits that a recorded operation changed in place the graph of the new recipe."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: LazyLogits, lazy: LazyValue, *leaves: Tensor
    ) -> LazyLogits:
        _keep(ctx, lazy, leaves)
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:  # type: ignore[override]
        return None, None, *_gradients(ctx, grad)


def _keep(ctx: Any, lazy: LazyValue, leaves: tuple[Tensor, ...]) -> None:
    # No saved tensors: the hooks of checkpoints and offloading would act on them for nothing.
    ctx.kept = lazy, lazy.storage.recipe, leaves
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of the factors of logits that were used without a look at them."""
    lazy, recipe, leaves = ctx.kept
    if grad is None:
        return (None,) * len(leaves)
    if lazy.is_hooked:  # whoever sent this gradient got the logits before the hook
        lazy.used = True
        lazy.check_unused("a hook")
    # Partial derivatives: a factor may depend on another, as features do on a tied classifier. So
    # the logits are computed again, from tensors that nothing else depends on.
    with torch.enable_grad():
        copies = [leaf.view_as(leaf) for leaf in leaves]
        value = lazy.call.compute(recipe.with_leaves(leaves, copies), replay)
        for view in lazy.views:
            value = view(value)
    return torch.autograd.grad(  # type: ignore[no-any-return]
        value, copies, grad, create_graph=torch.is_grad_enabled()
    )


class _Rebind(torch.autograd.Function):
    """Gives changed logits the graph of their value."""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits, value: Tensor) -> LazyLogits:  # type: ignore[override]
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, grad


class _Read(torch.autograd.Function):
    """Returns the value of logits that others have put into a graph of their own."""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits, value: Tensor) -> Tensor:  # type: ignore[override]
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad, None


def _requires_grad(logits: LazyLogits) -> bool:
    if _is_rewired(logits):
        _adopt(logits)
    lazy = logits._lazy
    return lazy.compute().requires_grad if lazy.is_changed else lazy.requires_grad


def is_untouched(logits: LazyLogits) -> bool:
    """Return whether a loss function may take the recipe for the logits, here and now."""
    return not (
        torch._C._are_functorch_transforms_active()
        or _is_changed(logits)
        or _is_over(logits._lazy.call.record)
    )


def _check_grad(logits: LazyLogits) -> None:
    """Refuse to show a gradient that ``backward(inputs=[logits])`` of older PyTorch has left."""
    lazy = logits._lazy
    with torch._C.DisableTorchFunctionSubclass():
        if logits.retains_grad and (lazy.used or lazy.storage.value is not None):
            lazy.used = True
            lazy.check_unused("backward(inputs=...)")


def _is_changed(logits: LazyLogits) -> bool:
    return _is_rewired(logits) or logits._lazy.is_changed


def _is_rewired(logits: LazyLogits) -> bool:
    """Return whether an autograd.Function has returned the logits, or changed them in place."""
    with torch._C.DisableTorchFunctionSubclass():
        node = logits.grad_fn
    return node is not None and type(node) not in _OWN_NODES


def _adopt(logits: LazyLogits) -> None:
    """Make the value of logits part of the graph that others have put them into."""
    lazy = logits._lazy
    value = lazy.materialise("autograd.Function", is_attachable(lazy)).detach()
    storage = Storage(lazy.recipe, lazy.call)
    with torch.enable_grad():
        storage.value = _Read.apply(logits, value)  # type: ignore[no-untyped-call]
    storage.given_out = True
    logits._lazy = LazyValue(
        *(lazy.recipe, lazy.dtype, lazy.num_classes, lazy.device, lazy.call, lazy.geometry), storage
    )


def _sharing(storage: Storage) -> list[LazyLogits]:
    """Return the tensors that stand for the logits of ``storage``, or views of them."""
    handles = [handle() for handle in storage.handles]
    return [logits for logits in handles if logits is not None and logits._lazy.storage is storage]


def _rebind(storage: Storage) -> None:
    """Give all tensors that share changed logits the graph of the value."""
    for logits in _sharing(storage):
        value = logits._lazy.compute()
        if value.requires_grad and is_attachable(logits._lazy):
            counted = () if logits.is_inference() else logits  # inference mode counts no versions
            with torch.enable_grad(), _unsafe_preserve_version_counter(counted):
                _Rebind.apply(logits, value)  # type: ignore[no-untyped-call]


def _record(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record a method; the result is ``NotImplemented`` where the logits have to be computed."""
    if not args:
        return NotImplemented
    if type(args[0]) is not LazyLogits:
        if name not in COMMUTING or kwargs or len(args) != 2:
            return NotImplemented
        args = (args[1], args[0])
    logits = args[0]
    values: list[Any] = []
    for arg in args:
        if type(arg) is LazyLogits:
            if _is_changed(arg):
                return NotImplemented
            arg = arg._lazy
        values.append(arg)
    lazy: LazyValue = values[0]
    if _is_over(lazy.call.record) and name not in KEPT_AFTERWARDS:
        return NotImplemented
    if kwargs and any(isinstance(value, Tensor) for value in kwargs.values()):
        return NotImplemented
    try:
        result = record(name, lazy, tuple(values[1:]), kwargs)
    except TypeError:  # other arguments than the functions there know
        return NotImplemented
    if result is NotImplemented:
        return NotImplemented
    if result is not lazy:
        return lazy_tensor(result)
    if name.endswith("_") and not name.endswith("__") and lazy.requires_grad:
        _Reattach.apply(logits, lazy, *lazy.storage.recipe.leaves())  # type: ignore[no-untyped-call]
    return logits


def _summarise(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute a sum over the classes, or record a softmax, for logits that left their forward."""
    if not args or type(args[0]) is not LazyLogits or not args[0]._lazy.call.record.stays_open:
        return NotImplemented
    logits = [arg for arg in args if type(arg) is LazyLogits]
    if any(_is_changed(each) for each in logits):
        return NotImplemented
    lazy = args[0]._lazy
    if lazy.requires_grad and not is_attachable(lazy):
        return NotImplemented
    values = [arg._lazy if type(arg) is LazyLogits else arg for arg in args[1:]]
    try:
        result = summarise(name, lazy, values, kwargs)
    except TypeError:  # other arguments than the functions there know
        return NotImplemented
    if isinstance(result, LazyValue):
        return lazy_tensor(result)
    if isinstance(result, tuple):
        return tuple([lazy_tensor(part) for part in result])
    return result


def _is_over(record: ForwardRecord) -> bool:
    """Return whether the forward is over; a checkpoint runs parts of it again in the backward."""
    return record.finished and not in_recomputation()


def _loss(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``F.cross_entropy`` by the operator, if its logits are lazy still."""
    logits = args[0] if args else kwargs.get("input")
    if type(logits) is not LazyLogits or _is_over(logits._lazy.call.record):
        return NotImplemented
    if _is_rewired(logits):
        _adopt(logits)
    if args:
        return cross_entropy(logits._lazy, *args[1:], **kwargs)
    return cross_entropy(**(kwargs | {"input": logits._lazy}))


def _ordinary(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """Call ``func`` with the logits themselves."""
    if name in _HOOKS or func in (torch.autograd.grad, torch.autograd.backward):
        _prepare_hooks(func, args, kwargs, name)
    used: list[tuple[LazyLogits, Tensor, int | None]] = []

    def real(logits: LazyLogits) -> Tensor:
        value = logits.materialise(name)
        used.append((logits, value, tensor_version(value)))
        return value

    real_args, real_kwargs = pytree.tree_map_only(LazyLogits, real, (args, kwargs))
    if name in _LEAF and used:
        for view in _sharing(used[0][0]._lazy.storage):
            view._lazy.compute()  # views from before do not belong to the graph of the leaf
    result = func(*real_args, **real_kwargs)
    for logits, value, version in used:
        storage = logits._lazy.storage
        # A tensor of inference mode does not count its changes.
        if name in _GIVING_OUT or version is None or tensor_version(value) != version:
            storage.given_out = True
            _rebind(storage)
    for logits, value, _ in used:
        if result is value:
            return logits
    return result


def _prepare_hooks(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
    """Make sure that the whole gradient of logits passes through their value from now on."""
    if func in (torch.autograd.grad, torch.autograd.backward):
        name = f"torch.autograd.{name}"
        place = 1 if func is torch.autograd.grad else 5
        inputs = args[place] if len(args) > place else kwargs.get("inputs")
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    else:
        args = args[:1]
    for logits in args:
        if type(logits) is LazyLogits:
            logits._lazy.check_unused(name)
            logits._lazy.hooked = True


_OWN_NODES = tuple(
    function._backward_cls  # type: ignore[attr-defined]
    for function in (_Attach, _Reattach, _Rebind)
)


def _names() -> dict[Callable[..., Any], str]:
    """Return the functions that need no logits, and the method that each stands for."""
    names: dict[Any, str] = {}
    for name in (*RECORDED, *_METADATA):
        for namespace in (Tensor, torch):
            function = getattr(namespace, name, None)
            if callable(function) and not isinstance(function, type):
                names[function] = name
    for operator, name in OPERATORS.items():
        names[getattr(Tensor, operator)] = name
    names[Tensor.swapaxes] = names[Tensor.swapdims] = "transpose"
    return names


_NAMES = _names()
_SUMMARIES = {
    function: name
    for name in SUMMARIES
    for namespace in (Tensor, torch, F)
    if (function := getattr(namespace, name, None)) is not None
} | {Tensor.__mul__: "mul", Tensor.__rmul__: "mul"}
