"""Rows on demand of the quantised weights of other packages, which are not imported here.

A module is recognised by the names of its classes and read by the attributes that its package
documents. Shapes: V classes, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class _Rows:
    """Common part of all row sources.

    Args:
        shape, dtype, device: see :class:`~cut_cross_entropy.heads.RowSource`.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, eq=False)
class ChosenRows(_Rows):
    """A matrix of ones and zeros: row ``ids[k]`` has its one in column k.

    Args:
        ids: (K,) class ids, each once.
    """

    ids: Tensor = field(kw_only=True)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows of the classes from ``start`` up to ``stop``."""
        classes = torch.arange(start, stop, device=self.device)
        return (classes[:, None] == self.ids).to(self.dtype)


@dataclass(frozen=True, eq=False)
class DequantisedRows(_Rows):
    """Rows by the dequantisation of a package, of a tensor that can be sliced (torchao).

    Args:
        dequantise: of the first and the last class, returns the rows between.
    """

    dequantise: Callable[[int, int], Tensor] = field(kw_only=True)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows of the classes from ``start`` up to ``stop``."""
        return self.dequantise(start, stop).to(self.dtype)


@dataclass(frozen=True, eq=False)
class FourBitRows(_Rows):
    """Rows of a ``Params4bit`` of bitsandbytes (NF4 or FP4), whose blocks may span rows.

    Args:
        data: bytes of all weights, two each.
        absmax: (blocks,) float32, scale of each block.
        state: the ``QuantState``.
    """

    data: Tensor = field(kw_only=True)
    absmax: Tensor = field(kw_only=True)
    state: Any = field(kw_only=True)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows of the classes from ``start`` up to ``stop``."""
        from bitsandbytes import functional

        dim, block = self.shape[1], self.state.blocksize
        first = start * dim // block * block  # a block starts there, and a byte
        last = min(-(-stop * dim // block) * block, self.shape[0] * dim)
        state = functional.QuantState(
            absmax=self.absmax[first // block : -(-last // block)],
            shape=torch.Size((last - first, 1)),
            dtype=self.state.dtype,
            blocksize=block,
            quant_type=self.state.quant_type,
            code=self.state.code,
        )
        packed = self.data.reshape(-1, 1)[first // 2 : -(-last // 2)]
        flat = functional.dequantize_4bit(packed, state).reshape(-1)
        rows: Tensor = flat[start * dim - first : stop * dim - first]
        return rows.view(stop - start, dim).to(self.dtype)


@dataclass(frozen=True, eq=False)
class HqqRows(_Rows):
    """Rows of an ``HQQLinear``, whose groups lie along the features.

    With n numbers a byte, the byte i holds the groups i, i + G/n, ... of all G: the first of them
    in the highest bits.

    Args:
        data: (G/n, group) bytes.
        scale: (G, 1), like ``zero``.
        bits: of a number: 8, 4 or 2.
    """

    data: Tensor = field(kw_only=True)
    scale: Tensor = field(kw_only=True)
    zero: Tensor = field(kw_only=True)
    bits: int = field(kw_only=True)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows of the classes from ``start`` up to ``stop``."""
        per_row = self.shape[1] // self.data.shape[1]
        here = slice(start * per_row, stop * per_row)
        groups = torch.arange(here.start, here.stop, device=self.device)
        part = groups // self.data.shape[0]
        shift = (8 - self.bits * (part + 1)).to(torch.uint8)[:, None]
        numbers = self.data[groups % self.data.shape[0]] >> shift & (2**self.bits - 1)
        rows: Tensor = (numbers.to(self.scale.dtype) - self.zero[here]) * self.scale[here]
        return rows.reshape(stop - start, self.shape[1]).to(self.dtype)


def quantised_rows(module: Any) -> "FourBitRows | HqqRows | DequantisedRows | str | None":
    """Return the rows of a quantised module.

    Returns:
        The source; a reason if the logits of ``module`` are not those of its weight; None if
        ``module`` is not known to be quantised.
    """
    weight: Any = getattr(module, "weight", None)
    name = type(weight).__name__
    if hasattr(module, "W_q") and hasattr(module, "dequantize"):
        return _hqq(module)
    if name == "Params4bit":
        return _four_bit(module)
    if name == "Int8Params":
        return (
            "a Linear8bitLt of bitsandbytes multiplies embeddings in 8 bits; pass "
            "Head(int8_rows(module)) for the product with the weight that it stands for"
        )
    if type(weight).__module__.startswith("torchao."):
        if getattr(weight, "act_quant_kwargs", None) is not None:
            return "a torchao weight that comes with quantised activations"
        if getattr(weight, "dequantize", None) is None or weight.requires_grad:
            return f"a torchao weight that trains or cannot be dequantised ({name})"
        return DequantisedRows(
            tuple(weight.shape),
            weight.dtype,
            weight.device,
            dequantise=lambda start, stop: weight[start:stop].dequantize(),
        )
    return None


def int8_rows(module: Any, dtype: torch.dtype | None = None) -> DequantisedRows:
    """Return the rows of a ``Linear8bitLt`` of bitsandbytes.

    The module itself multiplies them by embeddings that it rounds to 8 bits as well, which these
    rows do not repeat.

    Args:
        module: the layer.
        dtype: of the rows, in which the products are computed outside autocast; by default that
            of the bias, or float32.
    """
    weight = module.weight
    scales = module.state.SCB if module.state.SCB is not None else weight.SCB
    if dtype is None:
        dtype = torch.float32 if module.bias is None else module.bias.dtype

    def dequantise(start: int, stop: int) -> Tensor:
        rows = weight.new_empty((stop - start, weight.shape[1]), dtype=dtype)
        # The product is in float32 and rounded once, without a tensor of it.
        return torch.mul(weight.data[start:stop], scales[start:stop, None] / 127, out=rows)

    return DequantisedRows(tuple(weight.shape), dtype, weight.device, dequantise=dequantise)


def _hqq(module: Any) -> "HqqRows | str":
    meta = module.meta
    bits = {"8bit_u8": 8, "4bit_u8": 4, "2bit_u8": 2}.get(meta["packing"])
    shape = tuple(meta["shape"])
    if (
        bits is None
        or meta["axis"] != 1
        or meta["group_size"] is None
        or shape[1] % meta["group_size"]
        or shape[0] * shape[1] // meta["group_size"] % (8 // bits)
        or meta.get("quant_scale")
        or meta.get("quant_zero")
        or module.W_q.dtype != torch.uint8
    ):
        return (
            "an HQQ weight that is not of 8, 4 or 2 bits in groups along the features, with scales "
            "as floats: pass a RowSource of your own"
        )
    return HqqRows(
        shape,
        meta["compute_dtype"],
        module.W_q.device,
        data=module.W_q.data,
        scale=meta["scale"],
        zero=meta["zero"],
        bits=bits,
    )


def _four_bit(module: Any) -> "FourBitRows | str":
    from bitsandbytes import functional

    weight = module.weight
    state = weight.quant_state
    if state is None:
        return "a weight of bitsandbytes that is not quantised yet: move it to its device first"
    if weight.device.type == "cpu" and state.shape[1] % state.blocksize:
        return (
            f"a weight of bitsandbytes whose rows of {state.shape[1]} numbers are not whole blocks "
            f"of {state.blocksize}, which it reads otherwise on a CPU than it has written them"
        )
    absmax = state.absmax
    if state.nested:  # the scales are quantised too: 1/64 of the numbers of the weight
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return FourBitRows(
        tuple(state.shape),
        getattr(module, "compute_dtype", None) or state.dtype,
        weight.device,
        data=weight.data,
        absmax=absmax.float(),
        state=state,
    )
