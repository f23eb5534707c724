"""Compatibility: a function that Apple's releases keep here. See ``full_logits``."""

from typing import Any

from torch import Tensor

from cut_cross_entropy.linear_cross_entropy import linear_cross_entropy


def torch_compile_linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | int | None = None,
    *args: Any,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`linear_cross_entropy` with ``impl="torch_compile"``."""
    options["impl"] = "torch_compile"
    result: Tensor | tuple[Tensor, Tensor]
    result = linear_cross_entropy(e, c, targets, bias, *args, **options)
    return result
