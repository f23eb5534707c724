"""NeMo-RL: the function behind ``use_fused_linear_logprobs`` of its Megatron workers."""

import functools
import inspect
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cut_cross_entropy.adapters.seam import Adapter, Seam, in_dtype_of
from cut_cross_entropy.distributed.collectives import group_name
from cut_cross_entropy.distributed.embeddings import gather_tokens
from cut_cross_entropy.distributed.options import VocabParallelOptions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_seam = functools.partial(Seam, package="nemo-rl", version="at commit 7ea279a")

SEAM = _seam(
    module="nemo_rl.distributed.model_utils",
    name="ChunkedDistributedHiddenStatesToLogprobs",
    method="forward",
    parameters=(
        "tensor_parallel_hidden_states",
        "target",
        "output_weight_layer",
        "vocab_start_index",
        "vocab_end_index",
        "chunk_size",
        "tp_group",
        "inference_only",
    ),
)

STEP_SEAM = _seam(
    module="nemo_rl.models.megatron.train",
    name="forward_with_post_processing_fn",
    parameters=(
        "data_iterator",
        "model",
        "post_processing_fn",
        "defer_fp32_logits",
        "global_valid_seqs",
        "global_valid_toks",
        "sampling_params",
        "straggler_timer",
        "draft_model",
        "enable_hidden_capture",
        "use_fused_linear_logprobs",
        "use_router_replay",
        "router_replay_train",
    ),
)


def nemo_rl(**options: Any) -> Adapter:
    """Compute NeMo-RL's fused log-probabilities with :func:`token_logprobs`.

    It replaces ``nemo_rl.distributed.model_utils.ChunkedDistributedHiddenStatesToLogprobs``, which
    Megatron workers call with ``policy.megatron_cfg.use_fused_linear_logprobs: true``.

    With that setting NeMo-RL divides the log-probabilities by the temperature, as if they were
    logits. Here the temperature divides the logits: ``forward_with_post_processing_fn`` is replaced
    for that, by a function that calls it with a temperature of 1 and keeps the real one.

    Options, the result and errors: see :class:`~cut_cross_entropy.adapters.seam.Adapter`.
    Each worker process needs its own.
    """
    adapter = Adapter(options)
    original_step = STEP_SEAM.original()
    temperature = ContextVar("temperature", default=1.0)

    def step(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original_step).bind(*args, **kwargs)
        sampling = call.arguments.get("sampling_params")
        if sampling is None or not call.arguments.get("use_fused_linear_logprobs"):
            return original_step(*args, **kwargs)
        call.arguments["sampling_params"] = replace(sampling, temperature=1.0)
        before = temperature.set(sampling.temperature)
        try:
            return original_step(*call.args, **call.kwargs)
        finally:
            temperature.reset(before)

    def logprobs(
        tensor_parallel_hidden_states: Tensor,  # (T / R, B, D)
        target: Tensor,  # (B, T), ids of the whole vocabulary
        output_weight_layer: Tensor,  # (V / R, D)
        vocab_start_index: int,
        vocab_end_index: int,
        chunk_size: int,
        tp_group: "ProcessGroup",
        inference_only: bool = False,
    ) -> Tensor:
        hidden, weight, shards = tensor_parallel_hidden_states, output_weight_layer, None
        if torch.distributed.get_world_size(tp_group) > 1:
            hidden = gather_tokens(hidden, group_name(tp_group))  # sums the parts of the gradient
            stop = vocab_start_index + len(weight)
            shards = VocabParallelOptions(vocab_start_index, stop, tp_group, reduce_e_grad=False)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only):
            result = adapter.compute(
                hidden.transpose(0, 1),
                in_dtype_of(hidden, weight),
                target,
                temperature=temperature.get(),
                vocab_parallel_options=shards,
            )
        return result.logprobs  # type: ignore[no-any-return]

    return adapter.install((SEAM, logprobs), (STEP_SEAM, step))
