"""Checks of a head that a package has quantised."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.heads import head_of
from cut_cross_entropy.transformers import call_count, cce_patch
from tests.transformers.models import assert_same_step, llama, loss_and_grads

V, D = 700, 128
BUDGET = 2**18


def check_layer(quantise: Callable[[Tensor], Any]) -> None:
    """Rows of any slice, and loss and gradient of the layer itself."""
    torch.manual_seed(0)
    layer = quantise(torch.randn(V, D))
    e, targets = torch.randn(9, D, requires_grad=True), torch.randint(0, V, (9,))
    head: Any = head_of(layer)
    whole = head.weight.rows(0, V)
    for start, stop in ((0, 1), (1, 2), (128, 256), (V - 1, V), (7, 600)):
        torch.testing.assert_close(head.weight.rows(start, stop), whole[start:stop])
    loss: Any = linear_cross_entropy(e, head, targets, memory_budget=BUDGET)
    expected = F.cross_entropy(layer(e), targets)
    torch.testing.assert_close(loss, expected)
    (ours,), (theirs,) = (torch.autograd.grad(x, e) for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def check_qlora(quantise: Callable[[Tensor], Any], second: bool = False, **options: Any) -> None:
    """Loss, and gradients of adapters and magnitude, of a model whose head is quantised.

    Args:
        quantise: returns the head with some weight.
        second: whether two adapters are active.
        **options: of ``peft.LoraConfig``.
    """

    def model() -> Any:
        base = llama(hidden_size=D, vocab_size=V)
        base.lm_head = quantise(base.lm_head.weight.detach().clone())
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM", **options)
        adapted: Any = get_peft_model(base, config)
        if second:
            adapted.add_adapter("second", config)
            adapted.base_model.set_adapter(["default", "second"])
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return adapted.train()

    def step(model: Any) -> Any:
        torch.manual_seed(2)  # of dropout
        return loss_and_grads(model)

    expected = step(model())
    patched = cce_patch(model(), memory_budget=BUDGET)
    assert_same_step(expected, step(patched))
    assert call_count(patched) == 1
