"""Heads in code that ``torch.compile`` traces.

What a head consists of, and how it makes rows, are objects of Python, which a graph cannot hold:
the call is left out of the graph. Where the caller wants one graph and no other, the tensors of the
head are joined to a matrix, a copy, which every operator takes.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from cut_cross_entropy.call_context import constant_in_traces
from cut_cross_entropy.heads.head import Head, Product
from cut_cross_entropy.heads.rows import requires_grad

P = ParamSpec("P")
T = TypeVar("T")


def outside_graphs_with_heads(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, which compiled code leaves out of its graph where an argument is a head."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        # torch.export traces by a compiler of its own, into one graph.
        if torch.compiler.is_dynamo_compiling() and not _wants_one_graph():
            for x in (*args, *kwargs.values()):
                if isinstance(x, Head):
                    return _untraced(function, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def _untraced(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    found: T = torch.compiler.disable(function)(*args, **kwargs)
    return found


# PyTorch has no public name for the question: without an answer the graph is broken, which an
# error says where it must not be.
@constant_in_traces
def _wants_one_graph() -> bool:
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        translator = InstructionTranslator.current_tx()
    except (ImportError, AttributeError):
        return False
    names = ("one_graph", "error_on_graph_break")
    return any(bool(getattr(translator, name, False)) for name in names)


def joined(products: list[Product], dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Return features (..., K), rows (V, K) and the number of frozen columns of one product.

    Args:
        products: the terms of the logits, frozen ones first.
        dtype: of the results.

    Raises:
        NotImplementedError: rows that are made on demand.
    """
    features, rows, frozen = [], [], 0
    for p in products:
        if not isinstance(p.rows, Tensor):
            raise NotImplementedError(
                "torch.compile(fullgraph=True) does not trace a Head whose rows are made on "
                "demand: compile with fullgraph=False, which leaves the call out of the graph, or "
                "compute the loss outside of the compiled region"
            )
        features.append(p.features.to(dtype))
        rows.append((p.rows if p.scale is None else p.rows * p.scale[:, None]).to(dtype))
        if not requires_grad(p):
            frozen += p.rows.shape[1]
    return torch.cat(features, -1), torch.cat(rows, 1), frozen
