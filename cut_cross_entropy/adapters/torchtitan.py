"""torchtitan: a loss that stands for its ``ChunkedLossWrapper``."""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from cut_cross_entropy.adapters.seam import Adapter, Seam, in_dtype_of
from cut_cross_entropy.distributed.options import is_dtensor

_MODULE = "torchtitan.components.loss"

_seam = functools.partial(Seam, package="torchtitan", version="0.3.0", module=_MODULE)

WRAPPER_SEAM = _seam(
    name="ChunkedLossWrapper",
    method="__call__",
    parameters=("self", "pred", "labels", "global_valid_tokens", "loss_inputs"),
)

LOGPROBS_SEAM = _seam(
    name="compute_logprobs",
    parameters=("logits", "labels", "return_entropy"),
)

CROSS_ENTROPY_SEAM = _seam(
    name="CrossEntropyLoss",
    method="__call__",
    parameters=("self", "pred", "labels", "global_valid_tokens", "kwargs"),
)


class _Scores(NamedTuple):
    """Input of the inner loss in the place of logits."""

    logprobs: Tensor  # (B, T)
    entropy: Tensor  # (B, T)


def torchtitan(**options: Any) -> Any:
    """Return ``CutLoss``, a ``ChunkedLossWrapper`` of torchtitan without chunks and without logits.

    Its configuration is that of ``ChunkedLossWrapper``: ``CutLoss.Config(loss_fn=...)``, whose
    ``num_chunks`` is ignored. The inner loss is ``CrossEntropyLoss``, or one that gets its
    log-probabilities from ``compute_logprobs``, as ``DAPOLoss`` and ``GRPOLoss`` do. The head is
    called once, by its own ``__call__``, so that the hooks of FSDP gather its weight.

    Args:
        **options: ``impl``, ``filter_eps``, ``filter_mass`` and ``memory_budget`` of
            :func:`token_logprobs`.

    Returns:
        The class. Its attribute ``adapter`` has the number of ``calls``.

    Raises:
        ImportError: torchtitan is not installed.
        RuntimeError: torchtitan's classes or functions take other arguments than those known.
        TypeError: an unknown option.
    """
    counted = Adapter(options)
    original_logprobs = LOGPROBS_SEAM.original()
    cross_entropy_loss = CROSS_ENTROPY_SEAM.original()
    wrapper: Any = WRAPPER_SEAM.original()

    def compute_logprobs(logits: Any, labels: Tensor, *, return_entropy: bool = False) -> Any:
        if not isinstance(logits, _Scores):
            return original_logprobs(logits, labels, return_entropy=return_entropy)
        return tuple(logits) if return_entropy else logits.logprobs

    class CutLoss(wrapper):  # type: ignore[misc]
        """A loss from the hidden states, without logits."""

        adapter = counted

        @dataclass(kw_only=True, slots=True)
        class Config(wrapper.Config):  # type: ignore[misc]
            """That of ``ChunkedLossWrapper``; ``num_chunks`` is ignored."""

        def __init__(self, config: Any, *, compile_config: Any = None):
            super().__init__(config, compile_config=compile_config)
            inner = type(self.loss_fn)
            modules = [sys.modules[cls.__module__] for cls in inner.__mro__]
            self._modules = [
                module
                for module in modules
                if getattr(module, "compute_logprobs", None) is original_logprobs
                and module.__name__ != _MODULE
            ]
            if inner is not cross_entropy_loss and not self._modules:
                raise NotImplementedError(
                    "loss_fn must be CrossEntropyLoss or a loss that gets its log-probabilities "
                    f"from compute_logprobs of {_MODULE}, got {inner.__name__}"
                )

        def __call__(
            self,
            pred: Tensor,  # (B, T, D)
            labels: Tensor,  # (B, T)
            global_valid_tokens: Any = None,
            **loss_inputs: Any,
        ) -> tuple[Tensor, dict[str, Tensor]]:
            scores = self._scores(pred, labels)
            if not self._modules:
                loss = -scores.logprobs.sum()
                return loss if global_valid_tokens is None else loss / global_valid_tokens, {}
            with self._inner_gets_scores():
                result = self.loss_fn(scores, labels, global_valid_tokens, **loss_inputs)
            return result  # type: ignore[no-any-return]

        def _scores(self, hidden: Tensor, labels: Tensor) -> _Scores:
            head = self.lm_head
            if head is None:
                raise RuntimeError("set_lm_head must be called before the loss")
            _check_head(head, hidden)

            def forward(hidden: Tensor) -> tuple[Tensor, Tensor]:
                result = counted.compute(
                    hidden,
                    in_dtype_of(hidden, head.weight),
                    labels,
                    bias=in_dtype_of(hidden, head.bias),
                    outputs=["entropy"] if self._modules else [],
                )
                # A metric only, in torchtitan.
                entropy = result.logprobs if result.entropy is None else result.entropy
                return result.logprobs, entropy.detach()

            head.forward = forward
            try:
                return _Scores(*head(hidden))
            finally:
                del head.forward

        @contextmanager
        def _inner_gets_scores(self) -> Iterator[None]:
            for module in self._modules:
                module.compute_logprobs = compute_logprobs  # type: ignore[attr-defined]
            try:
                yield
            finally:
                for module in self._modules:
                    module.compute_logprobs = original_logprobs  # type: ignore[attr-defined]

    return CutLoss


def _check_head(head: Any, hidden: Tensor) -> None:
    """Refuse a head whose product is not that of its weight and bias alone.

    Raises:
        NotImplementedError: it is such a head.
    """
    if type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        raise NotImplementedError(
            "lm_head must be a linear layer without a forward of its own, got "
            f"{type(head).__name__}"
        )
    if is_dtensor(hidden):
        raise NotImplementedError("tensor parallelism of lm_head is not supported by CutLoss")
