"""Compiles the kernels of a step side by side, before the first step of its kind.

Forward and backward run once on tensors of the meta device, which have shapes and no values, and
launch nothing (``launch.planning``). What they would have launched is then compiled.
"""

import threading
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from cut_cross_entropy.device_support import triton_is_interpreted
from cut_cross_entropy.filter_report import unrecorded
from cut_cross_entropy.kernels import BLOCK_T, pipeline
from cut_cross_entropy.kernels.launch import (
    Plan,
    compile_side_by_side,
    is_captured,
    kind_of,
    planning,
)
from cut_cross_entropy.kernels.selection import GROUP
from cut_cross_entropy.kernels.sums import FEW_GROUPS

_compiled: set[tuple[object, ...]] = set()
_compiling = threading.Lock()


@dataclass(frozen=True)
class Step:
    """A step as ``pipeline`` takes it; ``tolerance`` is 0 without a filter."""

    e: Tensor  # (N, D)
    c: Tensor  # (V, D)
    targets: Tensor  # (N,)
    bias: Tensor | None  # (V,)
    ignore_index: int
    softcap: float | None
    compute_dtype: torch.dtype
    memory_budget: int
    tolerance: float
    filter_mass: float
    training: bool

    def kind(self) -> tuple[object, ...]:
        """Steps of the same kind launch the same variants of the kernels."""
        tensors = (self.e, self.c, self.targets, self.bias)
        return (
            self.e.device,
            tuple(None if x is None else (x.dtype, x.is_contiguous()) for x in tensors),
            self.c.shape,
            self.compute_dtype,
            self.softcap is None,
            self.tolerance > 0,
            self.training,
            self._group_kind(),
            kind_of(self.e.shape[0], specialised=True),  # two kernels are, for it
        )

    def _group_kind(self) -> int:
        """Sums of dC end in registers, or wait between groups, in fewer bits or in more."""
        num_groups = -(-self.e.shape[0] // (BLOCK_T * GROUP))
        return (num_groups > 1) + (num_groups > FEW_GROUPS)

    def plan(self) -> Plan:
        """What it launches, all gradients included if it trains."""
        e, c, targets = (_like(x) for x in (self.e, self.c, self.targets))
        bias = None if self.bias is None else _like(self.bias)
        with planning(self.e.device) as plan, unrecorded():
            nll, lse, energy, spread, shard = pipeline.forward(
                e,
                c,
                targets,
                bias,
                self.ignore_index,
                self.softcap,
                self.compute_dtype,
                with_energy=self.training and self.tolerance > 0,
                compact=self.training,
            )
            # The data may be too flat for the filter.
            for tolerance in {self.tolerance, 0.0} if self.training else ():
                pipeline.backward(
                    nll,
                    lse,
                    e,
                    c,
                    targets,
                    bias,
                    nll,
                    lse,
                    energy,
                    spread,
                    shard,
                    self.ignore_index,
                    self.softcap,
                    self.compute_dtype,
                    self.memory_budget,
                    tolerance,
                    self.filter_mass,
                    filter_e=True,
                    filter_c=True,
                    need_e=True,
                    need_c=True,
                    need_bias=bias is not None,
                )
        return plan


def compile_ahead(step: Step) -> None:
    """Compile what steps of this kind launch, unless that has been done.

    Not ahead, but when they are first launched, are compiled: what rounds within the budget need
    (three small kernels, for large batches), gradients of shards of the vocabulary, and a frozen
    bias beside inputs that are trained.
    """
    if triton_is_interpreted() or step.e.shape[0] == 0 or step.c.shape[0] == 0:
        return
    kind = step.kind()
    if kind in _compiled:
        return
    if is_captured(step.e):
        return  # no thread may load machine code meanwhile
    with _compiling:  # another thread waits for what it would otherwise launch half loaded
        if kind in _compiled:
            return
        # It saves time and nothing else: without it kernels are compiled when they are launched.
        try:
            compile_side_by_side(step.plan())
        except Exception as error:
            warnings.warn(f"the kernels were not compiled ahead: {error!r}", stacklevel=2)
        finally:
            _compiled.add(kind)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=torch.device("meta")
    )
