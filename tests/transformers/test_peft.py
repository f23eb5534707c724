"""Adapters: on layers, on the head, and instead of the head."""

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model

from cut_cross_entropy.transformers import (
    CutCrossEntropyWarning,
    call_count,
    cce_patch,
    cce_unpatch,
    is_patched,
)
from tests.transformers.models import assert_same_step, batch, llama, loss_and_grads

# What these packages warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CASES = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "lora_on_head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    "modules_to_save": LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
    "dora": LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "dora_on_head": LoraConfig(
        r=4, target_modules=["q_proj", "lm_head"], use_dora=True, task_type="CAUSAL_LM"
    ),
    "trainable_tokens": LoraConfig(
        r=4,
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [5, 6]},
        task_type="CAUSAL_LM",
    ),
    "prompt_tuning": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
}


def adapted(name, **changes):
    model = llama(**changes)
    torch.manual_seed(1)
    model = get_peft_model(model, copy.deepcopy(CASES[name]))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:  # zeros at first: the adapter would do nothing
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CASES)
def test_an_adapted_model(name, when):
    expected = loss_and_grads(adapted(name))
    if when == "after":
        model = cce_patch(adapted(name))
    else:
        model = cce_patch(llama())
        torch.manual_seed(1)
        wrapped = get_peft_model(model, copy.deepcopy(CASES[name]))
        wrapped.load_state_dict(adapted(name).state_dict())
        model = wrapped.train()
    assert is_patched(model)
    assert_same_step(expected, loss_and_grads(model))
    assert call_count(model.get_base_model()) == call_count(model) == 1
    assert model(**batch()).logits is None
    model.eval()
    with torch.no_grad():
        logits = model(**batch()).logits
        cce_unpatch(model)
        torch.testing.assert_close(logits + 0, model(**batch()).logits)
    assert not is_patched(model)


@pytest.mark.parametrize("name", ["lora_on_head", "dora_on_head", "modules_to_save"])
def test_an_adapted_head_in_bf16_under_autocast(name):
    def step(model):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_and_grads(model)

    expected = step(adapted(name))
    model = cce_patch(adapted(name))
    assert_same_step(expected, step(model), rtol=0.1, atol=5e-3)
    assert call_count(model.get_base_model()) == call_count(model) == 1


def test_a_disabled_and_a_merged_adapter():
    model = cce_patch(adapted("lora_on_head"))
    plain = loss_and_grads(llama())[0]
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch()).loss.detach(), plain)
    adapted_loss = model(**batch()).loss.detach()
    assert not torch.allclose(adapted_loss, plain)
    merged = model.merge_and_unload()
    assert is_patched(merged)
    torch.testing.assert_close(merged(**batch()).loss.detach(), adapted_loss)
    assert call_count(merged) == 3


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_the_adapter_is_saved_and_loaded(tmp_path):
    from peft import PeftModel

    model = cce_patch(adapted("lora_on_head"))
    expected = loss_and_grads(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(cce_patch(llama()), tmp_path, is_trainable=True).train()
    assert_same_step(expected, loss_and_grads(loaded))


def test_an_activated_adapter_on_the_head():
    """It adds to a part of the logits in place, after it has taken a view of them."""
    config = LoraConfig(
        r=4, target_modules=["lm_head"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]
    )
    inputs = batch()
    inputs["input_ids"][:, 4:6] = torch.tensor([5, 6])

    def step(patch):
        model = llama().double()
        torch.manual_seed(1)
        model = get_peft_model(model, copy.deepcopy(config))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return loss_and_grads(patch(model.train()), **inputs)

    expected = step(lambda model: model)
    with pytest.warns(CutCrossEntropyWarning, match="logits were computed in full because of"):
        actual = step(cce_patch)
    assert_same_step(expected, actual, rtol=1e-10, atol=1e-12)
