"""Functions of Apple's releases that other packages call; nothing in this package uses them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.distributed.options import is_dtensor
from cut_cross_entropy.options import FilterEps, check_filter_eps


@dataclass
class TensorInfo:
    """Properties of a tensor that outlive it.

    Args:
        dtype: of the tensor.
        requires_grad: whether it is part of a graph.
    """

    dtype: torch.dtype
    requires_grad: bool


def to_full_tensor(tensor: Tensor) -> Tensor:
    """Gather a DTensor; any other tensor is returned as it is."""
    whole: Any = tensor
    return whole.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[no-any-return]


def handle_eps(filter_eps: FilterEps, dtype: torch.dtype) -> float | None:
    """Convert ``filter_eps`` to a threshold on probabilities.

    Returns:
        None without a filter, a float as it is, ``"auto"`` as 1/32 of the precision of ``dtype``,
        ``"high"`` as half of that.

    Raises:
        TypeError, ValueError: as :func:`linear_cross_entropy`.
    """
    check_filter_eps(filter_eps)
    if filter_eps == "auto":
        return torch.finfo(dtype).eps / 32
    if filter_eps == "high":
        return torch.finfo(dtype).eps / 64
    return None if filter_eps is None else float(filter_eps)


def build_flat_valids(targets: Tensor, ignore_index: int, shift: bool | int) -> Tensor | None:
    """Find the tokens that have a loss.

    Returns:
        Their positions among all tokens, flattened, int32; a token counts if the one ``shift``
        positions later is not ignored. None if there is no shift and every token counts.
    """
    shift = int(shift)
    positions = torch.arange(targets.numel(), device=targets.device, dtype=torch.int32)
    if shift:
        positions = positions.reshape(targets.shape)[..., : max(targets.shape[-1] - shift, 0)]
        return positions[targets[..., shift:] != ignore_index]
    valid = targets.flatten() != ignore_index
    return None if bool(valid.all()) else positions[valid]


def handle_reduction_none(
    batch_shape: torch.Size, valids: Tensor | None, shift: bool | int, loss: Tensor
) -> Tensor:
    """Put losses of valid tokens at the places of their targets.

    Args:
        batch_shape: shape of the targets.
        valids: result of :func:`build_flat_valids`.
        shift: the shift it was made with.
        loss: a value for each valid token.

    Returns:
        Values of shape ``batch_shape``, 0 elsewhere.
    """
    if valids is None:
        return loss.reshape(batch_shape)
    full = loss.new_zeros(batch_shape.numel())
    return full.index_put((valids.long() + int(shift),), loss).reshape(batch_shape)


def recommend_c_grad_chunk_size(
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    *,
    device: torch.device | str | int | None = None,
    target_programs: int | None = None,
    max_scratch_bytes: int = 1 << 30,
) -> int:
    """Recommend a ``c_grad_chunk_size``: always 0, since ``memory_budget`` bounds scratch memory.

    Raises:
        ValueError: a size that is not an int, or too small.
    """
    for name, value, least in (
        ("num_tokens", num_tokens, 0),
        ("vocab_size", vocab_size, 1),
        ("hidden_size", hidden_size, 1),
        ("target_programs", 1 if target_programs is None else target_programs, 1),
        ("max_scratch_bytes", max_scratch_bytes, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    return 0
