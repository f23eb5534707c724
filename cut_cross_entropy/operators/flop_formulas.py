"""Floating point operations of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

That module imports Triton, so the formulas are registered when an operator is called and somebody
else has imported it. As for the attention of PyTorch, products that a backward pass computes again
count, and what depends on values does not: a filter skips, and ignored tokens cost, nothing.
Nor does what depends on the memory budget: kernels may walk twice for a divergence from a mixture.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.divergence_problem import DivergenceGrads, DivergenceState
from cut_cross_entropy.problem import Problem


def register_flop_formulas() -> None:
    """Register the formulas, also with counters that are active, unless that has been done.

    A compiler that traces the call leaves them to the next one.
    """
    global _registered
    if torch.compiler.is_compiling():
        return
    registry = getattr(sys.modules.get("torch.utils.flop_counter"), "flop_registry", None)
    if _registered or not registry:  # empty while the module is being imported
        return
    formulas = {getattr(torch.ops.cut_cross_entropy, name): f for name, f in _FORMULAS.items()}
    # The decorator of PyTorch 2.4 registers overloads, which its counter does not look up.
    registry.update(formulas)
    for counter in _active_counters():  # a counter copies the registry when it is made
        counter.flop_registry.update(formulas)
    _registered = True


_registered = False


def _active_counters() -> list[Any]:
    stack = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    counters = [getattr(mode, "counter", mode) for mode in stack]  # of newer releases, or older
    return [counter for counter in counters if hasattr(counter, "flop_registry")]


@torch.library.custom_op(
    "cut_cross_entropy::counted", mutates_args=(), schema="(Tensor e, int flops) -> ()"
)
def _counted(e: Tensor, flops: int) -> None:
    """Do nothing: a counter looks at the arguments."""


@contextlib.contextmanager
def counted(e: Tensor, num_classes: int, columns: int) -> Iterator[None]:
    """Count products that kernels compute in the block, which is not within an operator.

    What else runs in the block is not counted, as in the body of an operator.

    Args:
        e: (N, D) features of the tokens.
        num_classes: V.
        columns: features of all products of N tokens and V classes together.
    """
    counters = _active_counters()
    if not counters:
        yield
        return
    register_flop_formulas()
    _counted(e, 2 * e.shape[0] * num_classes * columns)
    registries = [counter.flop_registry for counter in counters]
    for counter in counters:
        counter.flop_registry = {}
    try:
        yield
    finally:
        for counter, registry in zip(counters, registries, strict=True):
            counter.flop_registry = registry


_FROZEN_COLUMNS = [x.name for x in fields(Problem)].index("frozen_columns")


def _product(e: Any, c: Any) -> int:
    return int(2 * e.shape[0] * c.shape[0] * c.shape[1])


def _forward(e: Any, c: Any, *others: Any, out_val: Any = None) -> int:
    return _product(e, c)


def _sum(e: Any, c: Any, *flat: Any, out_val: Any = None) -> int:
    need_e, need_c, _, _, loss_only = flat[-5:]
    return _product(e, c) * (1 if loss_only else sum((1, need_e, need_c)))


def _backward(num_state: int) -> Callable[..., int]:
    """Of a backward operator whose schema has ``num_state`` tensors ahead of the problem."""

    def formula(*flat: Any, out_val: Any = None) -> int:
        e, c = flat[num_state : num_state + 2]
        need_e, need_c, _ = flat[-3:]
        frozen = flat[num_state + _FROZEN_COLUMNS]
        trained = 2 * e.shape[0] * c.shape[0] * (c.shape[1] - frozen)
        return int(_product(e, c) * (1 + need_e) + trained * need_c)

    return formula


def _tangents(tangent_e: Any, tangent_c: Any, *flat: Any, out_val: Any = None) -> int:
    e, c = flat[3:5]
    return _product(e, c) * (1 + (tangent_e is not None) + (tangent_c is not None))


def _of_both(flat: tuple[Any, ...], with_teacher: bool = True) -> tuple[int, int]:
    """Products of the student, and of the teacher too, from the inputs of a divergence."""
    num_fields = (len(flat) - 3) // 2
    student = _product(*flat[:2])
    teacher = _product(*flat[num_fields : num_fields + 2])
    return student, student + (teacher if with_teacher else 0)


def _divergence(*flat: Any, out_val: Any = None) -> int:
    by_kernels: bool = flat[-1]
    return _of_both(flat)[1] * (1 if by_kernels else 2)


def _divergence_sum(*flat: Any, out_val: Any = None) -> int:
    *inputs, _, _, need_e, need_c, _, loss_only = flat
    student, both = _of_both(tuple(inputs))
    return both + (0 if loss_only else student * (int(need_e) + int(need_c)))


def _divergence_backward(*flat: Any, out_val: Any = None) -> int:
    grad_divergence, (by_kernels, need_e, need_c, _) = flat[0], flat[-4:]
    inputs = flat[len(DivergenceGrads._fields) + len(DivergenceState._fields) : -3]
    student, both = _of_both(inputs, by_kernels or grad_divergence is not None)
    return both + student * (int(need_e) + int(need_c))


_FORMULAS: dict[str, Callable[..., int]] = {
    "counted": lambda e, flops, out_val=None: flops,
    "chunked": _forward,
    "chunked_backward": _backward(4),
    "chunked_sum": _sum,
    "cce_sum": _sum,
    "cce": _forward,
    "cce_backward": _backward(8),
    "tangents": _tangents,
    "divergence": _divergence,
    "divergence_sum": _divergence_sum,
    "divergence_backward": _divergence_backward,
}
