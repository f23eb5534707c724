"""Compatibility: names that Apple's releases keep here. See ``linear_cross_entropy``."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.constants import IGNORE_INDEX
from cut_cross_entropy.distributed.options import VocabParallelOptions
from cut_cross_entropy.linear_cross_entropy import linear_cross_entropy
from cut_cross_entropy.options import Reduction


@dataclass
class CCEParams:
    """Arguments of a call whose tokens are flat already; the fields of releases 25.1 to 25.9.

    Args:
        targets: class ids, (N,).
        valids: positions of the tokens with a loss, as ``utils._build_flat_valids`` returns them.
        softcap: see :func:`linear_cross_entropy`, as for all that is not listed here.
        reduction: see there.
        filter_eps: a threshold, as ``utils._handle_eps`` returns it.
        shift: see there.
        batch_shape: shape of the targets before they were flattened.
        return_lse: whether the second result is the log-sum-exp or None.
    """

    targets: Tensor
    valids: Tensor | None
    softcap: float | None
    reduction: Reduction
    filter_eps: float | None
    shift: bool | int
    batch_shape: torch.Size
    accum_e_fp32: bool = False
    accum_c_fp32: bool = False
    filter_e_grad: bool = True
    filter_c_grad: bool = True
    vocab_parallel_options: VocabParallelOptions | None = None
    return_lse: bool = False


def linear_cross_entropy_apply(
    e: Tensor,  # (N, D)
    c: Tensor,  # (V, D)
    bias: Tensor | CCEParams | None,  # (V,)
    params: CCEParams | None = None,
) -> Any:
    """:func:`linear_cross_entropy` with ``impl="cce"`` for a :class:`CCEParams`.

    Returns:
        The loss and the log-sum-exp or None. As in release 25.1, the loss alone if ``params`` is
        the third argument.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`linear_cross_entropy`.
    """
    if isinstance(bias, CCEParams):
        return linear_cross_entropy_apply(e, c, None, bias)[0]
    if not isinstance(params, CCEParams):
        raise TypeError(f"params must be a CCEParams, got {type(params).__name__}")
    targets = params.targets
    if params.valids is not None:
        kept = params.valids.long() + int(params.shift)
        targets = torch.full_like(targets, IGNORE_INDEX).index_copy(0, kept, targets[kept])
    loss, lse = linear_cross_entropy(
        e.reshape(*params.batch_shape, e.shape[-1]),
        c,
        targets.reshape(params.batch_shape),
        bias,
        ignore_index=IGNORE_INDEX,
        softcap=params.softcap,
        reduction=params.reduction,
        shift=params.shift,
        return_lse=True,
        filter_eps=params.filter_eps,
        filter_e_grad=params.filter_e_grad,
        filter_c_grad=params.filter_c_grad,
        impl="cce",
        vocab_parallel_options=params.vocab_parallel_options,
    )
    return loss, lse if params.return_lse else None


def cce_linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | int | None = None,
    *args: Any,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`linear_cross_entropy` with ``impl="cce"``."""
    options["impl"] = "cce"
    result: Tensor | tuple[Tensor, Tensor]
    result = linear_cross_entropy(e, c, targets, bias, *args, **options)
    return result
