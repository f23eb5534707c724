"""Functions that trainers compute from logits, with the calls of PyTorch that they make.

The shapes are those of a causal model: logits (B, T, V), labels or ids (B, T).
"""

import torch
import torch.nn.functional as F


def preference_logps(logits, labels, label_pad_token_id=-100, ld_alpha=None):
    """Sums of log-probabilities as in LLaMA-Factory: ``log_softmax``, ``gather``, a mask."""
    labels = labels[:, 1:].clone()
    logits = logits[:, :-1, :]
    is_counted = labels != label_pad_token_id
    labels[~is_counted] = 0
    picked = torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
    lengths = is_counted.sum(-1)
    if ld_alpha is None:
        return (picked * is_counted).sum(-1), lengths
    half = len(lengths) // 2
    shorter = torch.minimum(lengths[:half], lengths[half:]).repeat(2)
    ends = is_counted.int().argmax(1) + shorter
    is_shared = torch.arange(labels.shape[1]) < ends[:, None]
    weights = torch.where(is_shared, 1.0, ld_alpha) * is_counted
    return (picked * weights).sum(-1), lengths


@torch.compile
def compiled_entropy(logits):
    """Entropies as in OpenRLHF's actor."""
    probabilities = F.softmax(logits, dim=-1)
    return torch.logsumexp(logits, dim=-1) - torch.sum(probabilities * logits, dim=-1)


def chunked_logprobs(logits, labels, chunk_size=5):
    """Log-probabilities as in OpenRLHF where there is no flash-attn."""
    num_classes = logits.shape[-1]
    picked = torch.gather(logits, dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)
    flat = logits.reshape(-1, num_classes)
    lse = torch.zeros(len(flat), dtype=logits.dtype)
    for start in range(0, len(flat), chunk_size):
        end = min(start + chunk_size, len(flat))
        lse[start:end] = torch.logsumexp(flat[start:end], dim=-1)
    return picked - lse.view(logits.shape[:-1])


def actor(model, ids, temperature, dtype):
    """Log-probabilities and entropies of an actor: logits in an output, divided in place."""
    output = model(ids, attention_mask=torch.ones_like(ids))
    output["logits"] = output["logits"].to(dtype)
    if temperature != 1.0:
        output["logits"].div_(temperature)
    entropy = compiled_entropy(output["logits"])[:, :-1]
    logprobs = chunked_logprobs(output["logits"], ids.roll(-1, 1))[:, :-1]
    return logprobs, entropy


def selective_log_softmax(logits, ids):
    """Log-probabilities as in TRL, row by row."""
    picked = torch.gather(logits, dim=-1, index=ids.unsqueeze(-1)).squeeze(-1)
    return picked - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])


def entropy_from_log_softmax(logits):
    """Entropies as in TRL."""
    logprobs = F.log_softmax(logits, dim=-1)
    return -(torch.exp(logprobs) * logprobs).sum(-1)
