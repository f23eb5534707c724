"""TRL: the fused output layer of its SFT, DPO, KTO, GRPO, RLOO and AsyncGRPO trainers."""

from typing import Any

from torch import Tensor

from cut_cross_entropy.adapters.seam import Adapter, Seam, in_dtype_of

SEAM = Seam(
    package="trl",
    version="1.16.0",
    module="trl.trainer.utils",
    name="_ChunkedLogProbFunction",
    method="forward",
    parameters=(
        "hidden",
        "weight",
        "bias",
        "targets",
        "temperature",
        "chunk_size",
        "final_logit_softcapping",
        "logit_scale",
        "outputs",
    ),
)

# TRL's names of outputs, in the order of the tuple that its function returns, and ours.
_OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq",
    "mean_logits": "mean_logit",
    "is_top1": "rank",
}


def trl(**options: Any) -> Adapter:
    """Compute the log-probabilities of TRL's trainers with :func:`token_logprobs`.

    It replaces ``trl.trainer.utils._ChunkedLogProbFunction``, the function between the last hidden
    states and the numbers of each token. Masks, sharded heads and losses stay TRL's. The
    distillation trainers compare whole distributions by another function, which stays as it is.

    Args:
        **options: ``impl``, ``filter_eps``, ``filter_mass`` and ``memory_budget`` of
            :func:`token_logprobs`.

    Returns:
        The active adapter. Its ``remove()`` or the end of a ``with`` block puts TRL's function
        back; ``calls`` counts the calls.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: TRL's function has moved or takes other arguments, or is replaced already.
        TypeError: an unknown option.
    """
    adapter = Adapter(options)

    def logprobs(
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(_OUTPUTS),
    ) -> tuple[Tensor | None, ...]:
        known = ("log_probs", *_OUTPUTS)
        if not set(outputs) <= set(known):
            raise NotImplementedError(f"outputs must be among {known}, got {tuple(outputs)}")
        result = adapter.compute(
            hidden,
            in_dtype_of(hidden, weight),
            targets,
            bias=in_dtype_of(hidden, bias),
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            outputs=[ours for theirs, ours in _OUTPUTS.items() if theirs in outputs],
        )
        # TRL gives these two no gradient.
        log_sum_sq = None if result.log_sum_sq is None else result.log_sum_sq.detach()
        mean_logit = None if result.mean_logit is None else result.mean_logit.detach()
        is_top1 = None if result.rank is None else result.rank == 0
        return result.logprobs, result.entropy, log_sum_sq, mean_logit, is_top1

    return adapter.install((SEAM, logprobs))
