"""Losses of other packages, by the names under which the benchmark measures them."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.losses import FullLogits, hidden_states, plain_head

APPLE, LIGER, TRL = PEERS = ("apple", "liger", "trl")
OWN = "cut_cross_entropy"
"""Name of this package, which is also that of Apple's."""

TRL_CHUNK = 32768
"""Classes of a tile, as TRL's own forward passes them."""

HeadLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Mean loss of ``e`` (N, D), ``c`` (V, D) and targets (N,)."""


class PeerLoss(FullLogits):
    """Loss of the next-token prediction, by another package from the input of the output layer.

    Args:
        function: computes the loss; its inputs have the dtype of autocast, where that is on.
    """

    def __init__(self, function: HeadLoss) -> None:
        self.function = function

    def prepare(self, model: Any) -> None:
        """Check that logits of ``model`` are what the other package computes.

        Raises:
            ValueError: they have a bias, a softcap or a scale.
        """
        super().prepare(model)
        plain_head(model)

    def __call__(self, model: Any, input_ids: Tensor) -> Tensor:
        """See :class:`FullLogits`."""
        e = hidden_states(model, input_ids)[:, :-1].flatten(0, 1)
        c = model.get_output_embeddings().weight
        kind = input_ids.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            e, c = e.to(dtype), c.to(dtype)
        with torch.autocast(kind, enabled=False):
            return self.function(e, c, input_ids[:, 1:].flatten())


def peer_loss(name: str, apple: Path | None) -> PeerLoss:
    """Return the loss of the package ``name``; ``apple`` is a folder that holds Apple's.

    Raises:
        ImportError: it is not installed.
    """
    if name == APPLE:
        return PeerLoss(_apple(apple))
    return PeerLoss(_liger() if name == LIGER else _trl())


def _liger() -> HeadLoss:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise ImportError(f"method {LIGER} needs the package liger-kernel: {error}") from error
    module = LigerFusedLinearCrossEntropyLoss()
    return lambda e, c, targets: module(c, e, targets)


def _trl() -> HeadLoss:
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError as error:
        raise ImportError(f"method {TRL} needs the package trl: {error}") from error
    apply: Any = ChunkedLogProbFunction.apply
    return lambda e, c, targets: (
        -apply(e, c, None, targets, 1.0, TRL_CHUNK, None, 1.0, ())[0].mean()
    )


def _apple(folder: Path | None) -> HeadLoss:
    """Import Apple's package from ``folder`` in between; afterwards the name is this package's."""
    if folder is None or not (folder / OWN).is_dir():
        raise ImportError(
            f"method {APPLE} needs --apple FOLDER, a folder that holds Apple's {OWN} "
            f"(pip install --no-deps --target FOLDER cut-cross-entropy==25.1.1), got {folder}"
        )
    own = _forget()
    sys.path.insert(0, str(folder.resolve()))
    try:
        module = importlib.import_module(f"{OWN}.cce")
    finally:
        sys.path.remove(str(folder.resolve()))
        _forget()
        sys.modules.update(own)
    function: HeadLoss = module.cce_linear_cross_entropy
    return function


def _forget() -> dict[str, Any]:
    """Remove the modules of the package of this name from those imported, and return them."""
    names = [name for name in sys.modules if name.split(".")[0] == OWN]
    return {name: sys.modules.pop(name) for name in names}
