"""Compiles the kernels of a step side by side, before the first step of its kind.

Forward and backward run once on tensors of the meta device, which have shapes and no values, and
launch nothing (``launch.planning``). What they would have launched is then compiled.
"""

import threading
import warnings

import torch
from torch import Tensor

from cut_cross_entropy.device_support import triton_is_interpreted
from cut_cross_entropy.kernels import BLOCK_T, pipeline
from cut_cross_entropy.kernels.launch import Plan, compile_side_by_side, planning
from cut_cross_entropy.kernels.selection import GROUP

_compiled: set[tuple[object, ...]] = set()
_compiling = threading.Lock()


def compile_step(
    e: Tensor,  # (N, D)
    c: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    ignore_index: int,
    softcap: float | None,
    compute_dtype: torch.dtype,
    memory_budget: int,
    tolerance: float,
    filter_mass: float,
    with_energy: bool,
    training: bool,
) -> None:
    """Compile what a step on tensors like these launches, unless that has been done.

    Not ahead, but when they are first launched, are compiled: what rounds within the budget need
    (three small kernels, for large batches), gradients of shards of the vocabulary, and a frozen
    bias beside inputs that are trained.
    """
    if triton_is_interpreted() or e.shape[0] == 0 or c.shape[0] == 0:
        return
    tensors = (e, c, targets, bias)
    kinds = tuple(None if x is None else (x.dtype, x.is_contiguous()) for x in tensors)
    many = e.shape[0] > BLOCK_T * GROUP
    key = (e.device, kinds, c.shape, compute_dtype, softcap is None, with_energy, training, many)
    if key in _compiled or torch.cuda.is_current_stream_capturing():
        return  # while a graph is captured no thread may load machine code
    with _compiling:  # another thread waits for what it would otherwise launch half loaded
        if key in _compiled:
            return
        # It saves time and nothing else: without it kernels are compiled when they are launched.
        try:
            plan = plan_step(
                e,
                c,
                targets,
                bias,
                ignore_index,
                softcap,
                compute_dtype,
                memory_budget,
                tolerance if with_energy else 0.0,
                filter_mass,
                training,
            )
            compile_side_by_side(plan)
        except Exception as error:
            warnings.warn(f"the kernels were not compiled ahead: {error!r}", stacklevel=2)
        finally:
            _compiled.add(key)


def plan_step(
    e: Tensor,  # (N, D)
    c: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    ignore_index: int,
    softcap: float | None,
    compute_dtype: torch.dtype,
    memory_budget: int,
    tolerance: float,
    filter_mass: float,
    training: bool,
) -> Plan:
    """What a step launches, all gradients included if ``training``; a filter if ``tolerance``."""
    e_like, c_like, targets_like = (_like(x) for x in (e, c, targets))
    bias_like = None if bias is None else _like(bias)
    with planning(e.device) as plan:
        nll, lse, energy, spread, shard = pipeline.forward(
            e_like,
            c_like,
            targets_like,
            bias_like,
            ignore_index,
            softcap,
            compute_dtype,
            with_energy=training and tolerance > 0,
            compact=training,
        )
        if training:
            for own_tolerance in {tolerance, 0.0}:  # the data may be too flat for the filter
                pipeline.backward(
                    nll,
                    lse,
                    e_like,
                    c_like,
                    targets_like,
                    bias_like,
                    nll,
                    lse,
                    energy,
                    spread,
                    shard,
                    ignore_index,
                    softcap,
                    compute_dtype,
                    memory_budget,
                    own_tolerance,
                    filter_mass,
                    filter_e=True,
                    filter_c=True,
                    need_e=True,
                    need_c=True,
                    need_bias=bias is not None,
                )
    return plan


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=torch.device("meta")
    )
