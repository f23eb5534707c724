"""Megatron-core: an output processor for ``GPTModel.forward``."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.distributed.collectives import group_name
from cut_cross_entropy.distributed.embeddings import gather_tokens
from cut_cross_entropy.distributed.options import VocabParallelOptions
from cut_cross_entropy.outputs import OutputName
from cut_cross_entropy.token_logprobs import TokenLogprobs, token_logprobs


@dataclass(frozen=True)
class MegatronContext:
    """Wishes of a caller of Megatron's model, passed as ``output_processor_context``.

    Args:
        temperature: a number, or one for each token, (B, T).
        outputs: names of further outputs, as :func:`token_logprobs` takes them.
        options: further arguments of :func:`token_logprobs`, such as ``candidates``, ``support`` or
            ``impl``; tensors have the shape (B, T, ...).
    """

    temperature: float | Tensor = 1.0
    outputs: Collection[OutputName] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def megatron_output_processor(
    *,
    hidden_states: Tensor,  # (T, B, D), or (T / R, B, D) under sequence parallelism
    output_layer: Any,
    output_weight: Tensor | None,  # (V / R, D): of an embedding that is the output layer too
    labels: Tensor | None,  # (B, T)
    context: MegatronContext | None,
    scale_logits: Callable[[Tensor], Tensor],
    config: Any,
    **others: Any,
) -> TokenLogprobs:
    """Per-token results of Megatron-core's last stage, without logits.

    Pass it to a model of Megatron-core 0.18 or newer::

        result = model(ids, positions, mask, labels=labels,
                       output_processor=adapters.megatron_output_processor,
                       output_processor_context=MegatronContext(temperature=0.9))

    The output layer may be tensor-parallel, the hidden states sequence-parallel. Labels are already
    shifted, as Megatron has them; -100 is ignored. ``loss_mask`` is left to the caller.

    Args:
        hidden_states: of the last layer; under sequence parallelism those of this rank's tokens.
        output_layer: a ``ColumnParallelLinear``.
        output_weight: its weight, if it is shared with the embedding.
        labels: class ids, the same on all tensor-parallel ranks.
        context: None stands for a temperature of 1 and no further output.
        scale_logits: the model's own scaling, a factor.
        config: the model's.
        **others: what else Megatron passes to a processor, not needed here.

    Returns:
        Results of the shape (B, T), the same on all tensor-parallel ranks.

    Raises:
        ValueError: no labels.
    """
    if labels is None:
        raise ValueError("labels must be passed to the model, got None")
    context = context or MegatronContext()
    weight = output_layer.weight if output_weight is None else output_weight
    group = output_layer.tp_group
    shards = None
    if group.size() > 1:
        start = group.rank() * len(weight)
        if config.sequence_parallel:
            hidden_states = gather_tokens(hidden_states, group_name(group))
        # Where tokens were gathered, the backward of that sums the parts of the gradient.
        shards = VocabParallelOptions(
            start, start + len(weight), group, reduce_e_grad=not config.sequence_parallel
        )
    return token_logprobs(
        hidden_states.transpose(0, 1),
        weight,
        labels,
        bias=getattr(output_layer, "bias", None),
        temperature=context.temperature,
        logit_scale=float(scale_logits(torch.ones(()))),
        outputs=context.outputs,
        vocab_parallel_options=shards,
        **context.options,
    )
