"""The circumstances of a call: active transforms, checkpoints, hooks and traces."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

Constant = TypeVar("Constant", bound=Callable[..., Any])


def constant_in_traces(function: Constant) -> Constant:
    """Let ``torch.compile`` call ``function`` while it traces and take the result for a constant.

    That is ``torch.compiler.assume_constant_result``, which would import the compiler. PyTorch 2.4
    stores the result as a global of the module whose code it compiles, under the name of the
    function's code: that must not be the name by which the module calls the function.
    """
    code = function.__code__  # type: ignore[attr-defined]
    function.__code__ = code.replace(co_name=f"result_of_{code.co_name}")  # type: ignore[attr-defined]
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_transformed() -> bool:
    """Whether a ``torch.func`` transform or a level of forward-mode differentiation is active."""
    return _within_functorch() or forward_ad._current_level >= 0


# The compiler of PyTorch 2.4 cannot trace the question. Transforms are part of what it traces, so
# the answer is a constant of the compiled code; of the level above it takes notice by itself.
@constant_in_traces
def _within_functorch() -> bool:
    levels = torch._C._functorch.get_interpreter_stack() or ()
    # An operator may be functionalised, an autograd Function may not.
    return any(level.key() != TransformType.Functionalize for level in levels)


def is_observed(values: Iterable[Any]) -> bool:
    """Whether PyTorch has to see an operator that is called with ``values``, not its body alone.

    That is where it compiles or traces, or has a mode or a profiler that is told of operators, and
    for tensors without memory of their own or whose memory holds the negative of their values.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
        or any(isinstance(x, Tensor) and not _is_plain(x) for x in values)
    )


def _is_plain(tensor: Tensor) -> bool:
    own = type(tensor) in (Tensor, torch.nn.Parameter)
    return own and not tensor.is_meta and not tensor.is_neg() and torch._C._has_storage(tensor)


def recordable(tensor: Tensor) -> Tensor:
    """Return a tensor with the same memory that autograd saves, even if inference mode made it."""
    if torch.compiler.is_compiling() or not tensor.is_inference() or not _is_plain(tensor):
        return tensor
    if torch.is_inference_mode_enabled():
        return tensor
    place = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    storage = tensor.untyped_storage()
    return place.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def is_computed_again() -> bool:
    """Whether a checkpoint is active that will drop what is saved and run the forward again.

    That is ``torch.utils.checkpoint`` with ``use_reentrant=False``; the other kind has gradients
    disabled the first time. False where PyTorch does not say: nothing but time is lost.
    """
    return _packing_function().startswith("_checkpoint_hook.")


def is_offloaded() -> bool:
    """Whether hooks of the caller pack what autograd saves, as those that offload activations do.

    Checkpoints have such hooks, and so has a classifier that is gathered again; these do not count.
    """
    ours = ("_checkpoint_hook.", "_recomputation_hook.", "gathered_again.")
    return bool(_packing_function()) and not _packing_function().startswith(ours)


def _packing_function() -> str:
    """Name of the function that packs what autograd saves; empty if there is none, or unknown."""
    find = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = None if find is None or torch.compiler.is_compiling() else find(True)
    return "" if hooks is None else getattr(hooks[0], "__qualname__", type(hooks[0]).__name__)


def is_traced() -> bool:
    """Whether ``make_fx`` records operations, as ``torch.func.linearize`` has it: no values."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def refuse_transforms() -> None:
    """Refuse a loss that several processes compute together while :func:`is_transformed`.

    Raises:
        NotImplementedError: a transform or a dual level is active.
    """
    if is_transformed():
        raise NotImplementedError(
            "a loss that several processes compute together cannot be transformed by torch.func "
            "or differentiated in forward mode; compute it in one process"
        )


def plain(tensor: Tensor) -> Tensor:
    """The tensor under all wrappers of ``torch.func``: with the values of every example."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor
