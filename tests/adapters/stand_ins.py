"""Modules with the functions that adapters replace, for trainers that are not installed.

Names and parameters are those of the trainers at the versions that the adapters know; what the
functions compute is plain PyTorch. ``with_trainers.py`` runs against the trainers themselves.
"""

import sys
import types
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.adapters.parity import plain


@contextmanager
def modules(**contents):
    """Modules by dotted name (``__`` for a dot), and the packages above them, for a while."""
    before = dict(sys.modules)
    for name, names in contents.items():
        dotted = name.replace("__", ".")
        parts = dotted.split(".")
        for length in range(1, len(parts)):
            package = ".".join(parts[:length])
            if package not in sys.modules:
                sys.modules[package] = types.ModuleType(package)
                sys.modules[package].__path__ = []
        module = sys.modules[dotted] = types.ModuleType(dotted)
        vars(module).update(names)
        for value in names.values():
            if isinstance(value, type):
                value.__module__ = dotted
    try:
        yield
    finally:
        roots = {name.partition("__")[0] for name in contents}
        for name in set(sys.modules) - set(before):
            if name.partition(".")[0] in roots:  # what PyTorch imports meanwhile stays
                del sys.modules[name]


# --- verl


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None
    ):
        raise RuntimeError("needs a GPU")


def verl():
    function = LinearCrossEntropy.apply
    return modules(
        verl__utils__kernel__linear_cross_entropy={"linear_cross_entropy": function},
        verl__models__mcore__model_forward_fused={"linear_cross_entropy": function},
    )


# --- VeOmni


class _Differentiable:
    """A function with the two methods of an ``autograd.Function``, differentiated by PyTorch."""

    @classmethod
    def apply(cls, *args):
        return cls.forward(None, *args)


class ChunkedLogProbs(_Differentiable):
    @staticmethod
    def forward(ctx, hidden_states, weight, labels, temperature, chunk_size, ignore_index):
        kept = labels != ignore_index
        found = plain(hidden_states, weight, labels.where(kept, 0), temperature)
        return tuple(x.where(kept, 0) for x in found)


class ChunkedTopkDistill(_Differentiable):
    @staticmethod
    def forward(
        ctx,
        hidden_states,
        weight,
        labels,
        teacher_topk_ids,
        teacher_topk_log_probs,
        temperature,
        chunk_size,
        ignore_index,
        log_prob_min_clamp,
    ):
        kept = labels != ignore_index
        results = ChunkedLogProbs.forward(
            ctx, hidden_states, weight, labels, temperature, chunk_size, ignore_index
        )
        logprobs = (hidden_states @ weight.T / temperature).log_softmax(-1)
        student, teacher = logprobs.gather(-1, teacher_topk_ids), teacher_topk_log_probs
        masses = [x.detach().exp().sum(-1) for x in (student, teacher)]
        if log_prob_min_clamp is not None:
            student, teacher = (x.clamp(min=log_prob_min_clamp) for x in (student, teacher))
        divergence = (teacher.exp() * (teacher - student)).sum(-1)
        return *results, *(x.where(kept, 0) for x in (divergence, *masses))


def veomni(function=ChunkedTopkDistill):
    folder = "veomni__ops__kernels__cross_entropy__"
    return modules(
        **{
            f"{folder}chunk_logprobs": {"_ChunkedLinearLogProbs": ChunkedLogProbs},
            f"{folder}chunk_topk_distill": {"_ChunkedLinearTopkDistill": function},
        }
    )


# --- prime-rl


class SequenceChunked(_Differentiable):
    @staticmethod
    def forward(ctx, hidden, weight, labels, inv_temperature, chunk_size):
        logprobs, entropy = plain(hidden, weight, labels, 1 / inv_temperature)
        return logprobs, entropy.detach()


class SequenceChunkedWithMask(_Differentiable):
    """Of later versions: probabilities may be normalised over the classes of a mask."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        labels,
        inv_temperature,
        chunk_size,
        sampling_mask=None,
        return_mask_logprobs=False,
    ):
        logits = hidden @ weight.T * inv_temperature[:, None]
        logprobs, entropy = plain(hidden, weight, labels, 1 / inv_temperature)
        if sampling_mask is None:
            return logprobs, entropy.detach(), None
        own, of_masks = [], []
        for row, label, mask, full in zip(logits, labels, sampling_mask, logprobs, strict=True):
            ids = mask[mask >= 0]
            if label not in ids:
                own.append(full)
                of_masks.append(torch.zeros(len(mask)))
                continue
            kept = row[ids].log_softmax(0)
            own.append(kept[ids == label][0])
            of_masks.append(F.pad(kept, (0, len(mask) - len(kept))))
        third = torch.stack(of_masks) if return_mask_logprobs else None
        return torch.stack(own), entropy.detach(), third


class GemmaChunked(_Differentiable):
    @staticmethod
    def forward(ctx, hidden, weight, labels, inv_temperature, chunk_size, softcap):
        logprobs, entropy = plain(hidden, weight, labels, 1 / inv_temperature, softcap)
        return logprobs, entropy.detach()


def prime_rl(function=SequenceChunked):
    layers = "prime_rl__trainer__models__layers__"
    return modules(
        **{
            f"{layers}lm_head": {"_SequenceChunkedLogProbEntropyFn": function},
            f"{layers}lm_head_gemma": {"_GemmaChunkedLogProbEntropyFn": GemmaChunked},
        }
    )


# --- NeMo-RL


class HiddenStatesToLogprobs(_Differentiable):
    @staticmethod
    def forward(
        ctx,
        tensor_parallel_hidden_states,
        target,
        output_weight_layer,
        vocab_start_index,
        vocab_end_index,
        chunk_size,
        tp_group,
        inference_only=False,
    ):
        hidden = tensor_parallel_hidden_states.transpose(0, 1)
        return plain(hidden, output_weight_layer, target)[0]


@dataclass
class SamplingParams:
    temperature: float = 1.0


def forward_with_post_processing_fn(
    data_iterator,
    model,
    post_processing_fn,
    defer_fp32_logits=False,
    global_valid_seqs=None,
    global_valid_toks=None,
    sampling_params=None,
    straggler_timer=None,
    draft_model=None,
    enable_hidden_capture=False,
    use_fused_linear_logprobs=False,
    use_router_replay=False,
    router_replay_train=False,
):
    output = model(next(data_iterator))
    if sampling_params is not None and sampling_params.temperature != 1.0:
        output.div_(sampling_params.temperature)
    return output, post_processing_fn


STEP = {"forward_with_post_processing_fn": forward_with_post_processing_fn}


def nemo_rl():
    return modules(
        nemo_rl__distributed__model_utils={
            "ChunkedDistributedHiddenStatesToLogprobs": HiddenStatesToLogprobs
        },
        nemo_rl__models__megatron__train=STEP,
    )


# --- axolotl


class TopKLogprobs(_Differentiable):
    """Its gradient lacks the square of the temperature that its value has."""

    @staticmethod
    def forward(
        ctx,
        student_input,
        student_lm_head_weight,
        target_token_ids,
        target_logprobs,
        target_mask,
        true_labels,
        student_lm_head_bias=None,
        weight_hard_loss=0.5,
        weight_soft_loss=0.5,
        ignore_index=-100,
        temperature=1.0,
        beta=0.0,
        compiled=False,
        chunk_size=1024,
        compute_ce_loss=True,
        normalize_topk=True,
    ):
        logits = F.linear(student_input, student_lm_head_weight, student_lm_head_bias)
        log_p = (logits / temperature).log_softmax(-1).gather(-1, target_token_ids)
        if normalize_topk:
            log_p = log_p.log_softmax(-1)
        mask = target_mask.bool()
        log_p, log_q = log_p[mask], target_logprobs[mask]
        p, q = log_p.exp(), log_q.exp()
        log_m = ((1 - beta) * p + beta * q).log()
        if beta == 0:
            soft = q * (log_q - log_p)
        elif beta == 1:
            soft = p * (log_p - log_q)
        else:
            soft = beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)
        soft = soft.sum()
        loss = weight_soft_loss * (soft + (temperature**2 - 1) * soft.detach())
        if compute_ce_loss and weight_hard_loss > 0:
            labels = true_labels[:, 1:].flatten()
            hard = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels, ignore_index=ignore_index, reduction="sum"
            )
            loss = loss + weight_hard_loss * hard
        return loss


def axolotl(function=TopKLogprobs):
    return modules(
        axolotl__integrations__kd__kernels__liger={
            "LigerFusedLinearKLTopKLogprobFunction": function
        }
    )


# --- torchtitan


def compute_logprobs(logits, labels, *, return_entropy=False):
    logits = logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    if not return_entropy:
        return -losses.view_as(labels)
    with torch.no_grad():
        shares = logits.softmax(-1)
        entropy = logits.logsumexp(-1) - (shares * logits).sum(-1)
    return -losses.view_as(labels), entropy


class CrossEntropyLoss:
    @dataclass(kw_only=True)
    class Config:
        def build(self, compile_config=None):
            return CrossEntropyLoss()

    def __call__(self, pred, labels, global_valid_tokens=None, **kwargs):
        loss = F.cross_entropy(pred.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}


class ChunkedLossWrapper:
    @dataclass(kw_only=True)
    class Config:
        num_chunks: int = 8
        loss_fn: Any = field(default_factory=CrossEntropyLoss.Config)

    def __init__(self, config, *, compile_config=None):
        self.num_chunks = config.num_chunks
        self.loss_fn = config.loss_fn.build(compile_config=compile_config)
        self.lm_head: nn.Module | None = None

    def set_lm_head(self, lm_head):
        self.lm_head = lm_head

    def __call__(self, pred, labels, global_valid_tokens=None, **loss_inputs):
        return self.loss_fn(self.lm_head(pred), labels, global_valid_tokens, **loss_inputs)


class PolicyLoss:
    """A loss that gets its log-probabilities from ``compute_logprobs`` of its own module."""

    @dataclass(kw_only=True)
    class Config:
        def build(self, compile_config=None):
            return PolicyLoss()

    def __call__(
        self, logits, labels, global_valid_tokens=None, *, generator_logprobs, advantages, loss_mask
    ):
        function = sys.modules[type(self).__module__].compute_logprobs
        logprobs, entropy = function(logits, labels, return_entropy=True)
        ratio = (logprobs - generator_logprobs).exp()
        loss = -(ratio * advantages * loss_mask).sum() / global_valid_tokens
        return loss, {"entropy/mean": (entropy * loss_mask).sum() / global_valid_tokens}


class LossOnLogits:
    @dataclass(kw_only=True)
    class Config:
        def build(self, compile_config=None):
            return LossOnLogits()


def torchtitan():
    return modules(
        torchtitan__components__loss={
            "compute_logprobs": compute_logprobs,
            "CrossEntropyLoss": CrossEntropyLoss,
            "ChunkedLossWrapper": ChunkedLossWrapper,
        },
        torchtitan__experiments__rl__losses__dapo={
            "compute_logprobs": compute_logprobs,
            "DAPOLoss": PolicyLoss,
        },
        own_losses={"LossOnLogits": LossOnLogits},
    )
