"""The operators under ``torch.func`` and in forward-mode differentiation.

A ``torch.library`` operator has no rule for ``vmap`` and no tangent: PyTorch refuses the first with
an internal error and takes the second for zero. While a transform or a dual level is active, an
autograd Function with both rules stands in for the operator; its forward runs the operator.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import Function, forward_ad

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


def refusal(message: str) -> Callable[..., Any]:
    """Return the autograd formula, in either mode, of an operator that computes derivatives.

    It raises NotImplementedError with ``message``, always.
    """

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(message)

    return refuse


refuse_second_derivative = refusal(
    "linear_cross_entropy has no second derivative in this implementation; impl='reference' has one"
)


def refusal_of_both(function: str) -> Callable[..., Any]:
    """Return a formula that refuses a second derivative and one in forward mode of ``function``."""
    return refusal(
        f"{function} has no second and no forward-mode derivative in this implementation; "
        "impl='reference' has both"
    )


class _Refused(Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    backward = staticmethod(refuse_second_derivative)


def refuse_to_differentiate(
    grads: Sequence[Tensor], inputs: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """``grads`` as functions of ``inputs`` that refuse to be differentiated."""
    return _Refused.apply(len(grads), *grads, *inputs)  # type: ignore[no-any-return]


def transformable(
    operator: Callable[..., tuple[Tensor, ...]],
    *,
    setup_context: Callable[..., None] = lambda ctx, inputs, output: None,
    backward: Callable[..., Any] = refuse_second_derivative,
    jvp: Callable[..., Any] = refuse_second_derivative,
) -> Callable[..., tuple[Tensor, ...]]:
    """``operator`` as a function that transforms and forward-mode differentiation understand.

    Args:
        operator: takes tensors and plain values, by position.
        setup_context, backward, jvp: as in :class:`torch.autograd.Function`. By default both
            derivatives are refused.
    """

    class Transformable(Function):
        @staticmethod
        def forward(*flat: Any) -> tuple[Tensor, ...]:
            return tuple(operator(*flat))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
            # Examples may differ in the classifier, and per-example gradients of it have a copy
            # each, so one call for all of them would not be cheaper in general.
            results = []
            for i in range(info.batch_size):
                pairs = zip(flat, in_dims, strict=True)
                example = [x if dim is None else x.select(dim, i) for x, dim in pairs]
                results.append(Transformable.apply(*example))
            stacked = tuple(torch.stack(x) for x in zip(*results, strict=True))
            return stacked, (0,) * len(stacked)

    for name, rule in (("setup_context", setup_context), ("backward", backward), ("jvp", jvp)):
        setattr(Transformable, name, staticmethod(rule))

    def call(*flat: Any) -> tuple[Tensor, ...]:
        if not is_transformed():
            return operator(*flat)  # less to do for the host, and one node for the compiler
        apply = Transformable.apply
        if "torch._dynamo" in sys.modules:
            # Where the compiler gives up on a transform, it would try the functions within again.
            apply = torch.compiler.disable(apply)
        return apply(*flat)  # type: ignore[no-any-return]

    return call
