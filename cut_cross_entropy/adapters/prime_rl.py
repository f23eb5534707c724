"""prime-rl: its fused output layers, of Gemma and of the other models."""

import functools
from typing import Any

from torch import Tensor

from cut_cross_entropy.adapters.seam import Adapter, Seam, in_dtype_of
from cut_cross_entropy.token_logprobs import TokenLogprobs

_PARAMETERS = ("hidden", "weight", "labels", "inv_temperature", "chunk_size")

_seam = functools.partial(Seam, package="prime-rl", version="at commit 559b447", method="forward")

SEAM = _seam(
    module="prime_rl.trainer.models.layers.lm_head",
    name="_SequenceChunkedLogProbEntropyFn",
    parameters=_PARAMETERS,
    newer_parameters=("sampling_mask", "return_mask_logprobs"),
)

GEMMA_SEAM = _seam(
    module="prime_rl.trainer.models.layers.lm_head_gemma",
    name="_GemmaChunkedLogProbEntropyFn",
    parameters=(*_PARAMETERS, "softcap"),
)


def prime_rl(**options: Any) -> Adapter:
    """Compute prime-rl's log-probabilities and entropies with :func:`token_logprobs`.

    It replaces ``_SequenceChunkedLogProbEntropyFn`` and its twin for Gemma, which the output layer
    calls if ``model.fused_lm_head_token_chunk_size`` is set. Entropies have a gradient then; in
    prime-rl they have none. Where prime-rl passes a ``sampling_mask``, probabilities are normalised
    over its classes.

    Options, the result and errors: see :class:`~cut_cross_entropy.adapters.seam.Adapter`.
    """
    adapter = Adapter(options)

    def with_entropy(
        hidden: Tensor, weight: Tensor, labels: Tensor, inv_temperature: Tensor, **more: Any
    ) -> TokenLogprobs:
        weight, temperature = in_dtype_of(hidden, weight), inv_temperature.reciprocal()
        return adapter.compute(
            hidden, weight, labels, temperature=temperature, outputs=["entropy"], **more
        )

    def logprobs_and_entropy(
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        labels: Tensor,  # (N,)
        inv_temperature: Tensor,  # (N,)
        chunk_size: int,
        *mask: Any,  # of later versions: (N, K) ids or None, and whether to return their logprobs
    ) -> tuple[Any, ...]:
        support, wanted = mask or (None, False)
        candidates = support if wanted else None
        result = with_entropy(
            hidden, weight, labels, inv_temperature, support=support, candidates=candidates
        )
        if not mask:
            return result.logprobs, result.entropy
        if not wanted:
            return result.logprobs, result.entropy, None
        replayed = (support == labels[:, None]).any(1, keepdim=True)  # others have all classes
        return result.logprobs, result.entropy, result.candidate_logprobs * replayed

    def of_gemma(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        inv_temperature: Tensor,
        chunk_size: int,
        softcap: float,
    ) -> tuple[Any, ...]:
        result = with_entropy(hidden, weight, labels, inv_temperature, softcap=softcap)
        return result.logprobs, result.entropy

    return adapter.install((SEAM, logprobs_and_entropy), (GEMMA_SEAM, of_gemma))
