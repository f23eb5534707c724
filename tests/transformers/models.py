"""Small models and steps that several tests share."""

from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB = 131

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**changes: Any) -> Any:
    """A Llama in training mode."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes)).train()


def batch(size: int = 2, time: int = 11, seed: int = 1) -> dict[str, Tensor]:
    """Token ids, and labels with some tokens ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (size, time), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_and_grads(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one step, and the gradients of the parameters that have one."""
    model.zero_grad(set_to_none=True)
    loss = model(**(batch() | inputs))[0]
    loss.sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_same_step(expected: Any, actual: Any, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Loss and gradients of two steps agree."""
    torch.testing.assert_close(actual[0], expected[0], rtol=rtol, atol=atol)
    assert actual[1].keys() == expected[1].keys()
    assert expected[1], "a step without gradients proves nothing"
    for name, grad in expected[1].items():
        torch.testing.assert_close(actual[1][name], grad, rtol=rtol, atol=atol, msg=name)
