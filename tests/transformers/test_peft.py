"""Adapters: on layers, on the head, and instead of the head."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model

from cut_cross_entropy.heads import head
from cut_cross_entropy.transformers import (
    CutCrossEntropyWarning,
    call_count,
    cce_patch,
    cce_unpatch,
    is_patched,
    utils,
)
from cut_cross_entropy.transformers.heads import find_heads
from tests.largest import Largest
from tests.transformers.models import assert_same_step, batch, llama, loss_and_grads

# What these packages warn about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
]

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
    "lora_with_dropout_on_head": LoraConfig(
        r=4, target_modules=["lm_head"], lora_dropout=0.5, task_type="CAUSAL_LM"
    ),
    "rslora_with_bias_on_head": LoraConfig(
        r=4, target_modules=["lm_head"], use_rslora=True, lora_bias=True, task_type="CAUSAL_LM"
    ),
    "dora_with_dropout_on_head": LoraConfig(
        r=4, target_modules=["lm_head"], lora_dropout=0.5, use_dora=True, task_type="CAUSAL_LM"
    ),
    "trainable_tokens_of_head": LoraConfig(
        r=4,
        target_modules=["q_proj"],
        trainable_token_indices={"lm_head": [5, 6, 130]},
        task_type="CAUSAL_LM",
    ),
    "trainable_tokens": LoraConfig(
        r=4,
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [5, 6]},
        task_type="CAUSAL_LM",
    ),
    "prompt_tuning": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
}


HEADS = [name for name in CASES if "head" in name] + ["modules_to_save"]


def adapted(name, dtype=torch.float32, more_adapters=(), **changes):
    model = llama(**changes).to(dtype)
    torch.manual_seed(1)
    model = get_peft_model(model, copy.deepcopy(CASES[name]), autocast_adapter_dtype=False)
    for other in more_adapters:
        model.add_adapter(other, copy.deepcopy(CASES[name]))
    if more_adapters:
        model.base_model.set_adapter(["default", *more_adapters])
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name or "trainable_tokens_delta" in parameter_name:
            # Zeros at first, or the rows of the weight: the adapter would do nothing.
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def dropped_step(model, **inputs):
    """One step, with the same random numbers for dropout each time."""
    torch.manual_seed(2)
    return loss_and_grads(model, **inputs)


def exact_step(model):
    """One step from the model's logits in float64, which its own loss would round to float32."""
    inputs = batch()
    labels = inputs.pop("labels")
    torch.manual_seed(2)
    logits = model(**inputs).logits[:, :-1]
    assert logits.dtype == torch.float64
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_same_gradients(expected, actual):
    """The loss of a patched model has the dtype of its own, float32; the gradients are wider."""
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-6, atol=0)
    assert_same_step(expected, (expected[0], actual[1]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CASES)
def test_an_adapted_model(name, when):
    expected = dropped_step(adapted(name))
    if when == "after":
        model = cce_patch(adapted(name))
    else:
        model = cce_patch(llama())
        torch.manual_seed(1)
        wrapped = get_peft_model(model, copy.deepcopy(CASES[name]))
        wrapped.load_state_dict(adapted(name).state_dict())
        model = wrapped.train()
    assert is_patched(model)
    assert_same_step(expected, dropped_step(model))
    assert call_count(model.get_base_model()) == call_count(model) == 1
    assert model(**batch()).logits is None
    model.eval()
    with torch.no_grad():
        logits = model(**batch()).logits
        cce_unpatch(model)
        torch.testing.assert_close(logits + 0, model(**batch()).logits)
    assert not is_patched(model)


CHUNKED = {"memory_budget": 64 * 2**10}
"""Several chunks of the 700 classes of these tests."""


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_an_adapted_head_in_float64(name, tied):
    """The gradients of adapters, magnitudes, biases and tokens are those of the model's own."""
    changes = {"vocab_size": 700, "dtype": torch.float64, "tie_word_embeddings": tied}
    expected = exact_step(adapted(name, **changes))
    actual = dropped_step(cce_patch(adapted(name, **changes), **CHUNKED))
    assert_same_gradients(expected, actual)
    assert any("lora" in x or "lm_head" in x or "trainable" in x for x in expected[1])


@pytest.mark.parametrize("name", ["lora_on_head", "dora_on_head", "lora_with_dropout_on_head"])
def test_a_base_that_trains_beside_its_adapter(name):
    changes = {"vocab_size": 700, "dtype": torch.float64}

    def model():
        found = adapted(name, **changes)
        found.get_base_model().lm_head.base_layer.weight.requires_grad_()
        return found

    expected = exact_step(model())
    assert_same_gradients(expected, dropped_step(cce_patch(model(), **CHUNKED)))
    assert any(key.endswith("lm_head.base_layer.weight") for key in expected[1])


class Unnamed(transformers.LlamaForCausalLM):
    """A model that does not say which of its layers is the head."""

    def get_output_embeddings(self):
        return None


@pytest.mark.parametrize("name", ["lora_on_head", "modules_to_save", "trainable_tokens_of_head"])
def test_a_head_that_the_model_does_not_name(name):
    """It is found by its size, once, with what PEFT has around it."""

    def model():
        base = Unnamed(llama().config)
        base.load_state_dict(llama().state_dict())
        torch.manual_seed(1)
        return get_peft_model(base, copy.deepcopy(CASES[name])).train()

    expected, patched = loss_and_grads(model()), cce_patch(model())
    assert find_heads(patched.get_base_model()) == [patched.get_base_model().lm_head]
    assert_same_step(expected, loss_and_grads(patched))
    assert call_count(patched) == 1


def test_several_active_adapters_on_the_head():
    changes = {"vocab_size": 700, "dtype": torch.float64, "more_adapters": ("second", "third")}
    expected = exact_step(adapted("lora_on_head", **changes))
    actual = loss_and_grads(cce_patch(adapted("lora_on_head", **changes), **CHUNKED))
    assert_same_gradients(expected, actual)
    assert sum("lm_head" in name for name in expected[1]) == 6


@pytest.mark.parametrize("name", ["lora_on_head", "dora_on_head", "trainable_tokens_of_head"])
def test_no_copy_of_the_weight(name, monkeypatch):
    """No tensor of a step has the size of the head's weight, neither ours nor PEFT's."""
    monkeypatch.setattr(head, "NORM_BYTES", 2**16)
    model = cce_patch(adapted(name, vocab_size=4096), memory_budget=2**18)
    with Largest() as largest:
        loss_and_grads(model)
    assert largest.elements <= 4096 * 32 / 4


def test_trainers_log_probabilities_of_an_adapted_head():
    """``log_softmax`` and ``gather`` of lazy logits: the numbers of the logits in full."""
    changes = {"vocab_size": 700, "dtype": torch.float64}
    inputs = batch()
    del inputs["labels"]
    ids = inputs["input_ids"][:, 1:, None]

    def step(model):
        logits = model(**inputs).logits[:, :-1]
        logprobs = (logits / 0.7).log_softmax(-1).gather(-1, ids)[..., 0]
        model.zero_grad()
        logprobs.mean().backward()
        named = model.named_parameters()
        return logprobs.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}

    for name in ("lora_on_head", "dora_on_head"):
        expected = step(adapted(name, **changes))
        actual = step(cce_patch(adapted(name, **changes), lazy_logits=True, **CHUNKED))
        assert_same_step(expected, actual, rtol=1e-9, atol=1e-12)


def test_a_replaced_apply_lce_gets_a_matrix(monkeypatch):
    """Others' functions know nothing of heads."""
    given = []

    def replacement(e, c, labels, opts, bias=None, softcap=None, **kwargs):
        given.append((tuple(e.shape), tuple(c.shape)))
        return utils.ORIGINAL_APPLY_LCE(e, c, labels, opts, bias, softcap, **kwargs)

    for name, width in (("lora_on_head", 36), ("dora_on_head", 36)):
        expected = loss_and_grads(adapted(name))
        model = cce_patch(adapted(name))
        monkeypatch.setattr(utils, "apply_lce", replacement)
        assert_same_step(expected, loss_and_grads(model))
        monkeypatch.undo()
        assert given.pop() == ((2, 11, width), (131, width))


ON_HEAD = {"target_modules": ["lm_head"], "task_type": "CAUSAL_LM"}
OTHER_TUNERS = {
    "ia3": peft.IA3Config(feedforward_modules=[], **ON_HEAD),
    "loha": peft.LoHaConfig(r=4, **ON_HEAD),
    "vera": peft.VeraConfig(r=4, **ON_HEAD),
    "oft": peft.OFTConfig(oft_block_size=4, r=0, **ON_HEAD),
    "adalora": peft.AdaLoraConfig(total_step=10, init_r=4, **ON_HEAD),
    "c3a": peft.C3AConfig(block_size=1, **ON_HEAD),
    "miss": peft.MissConfig(r=4, **ON_HEAD),
    "road": peft.RoadConfig(group_size=2, **ON_HEAD),
}
IN_FULL = ("adalora", "c3a", "miss", "road")
"""Tuners that change logits in ways that nothing but logits allows."""


@pytest.mark.parametrize("name", OTHER_TUNERS)
def test_another_tuner_on_the_head(name):
    """Its own code makes the logits; where they are made in full, a warning says so."""

    def model():
        torch.manual_seed(3)
        adapted = get_peft_model(llama(vocab_size=132), copy.deepcopy(OTHER_TUNERS[name])).train()
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.01 * torch.randn_like(parameter)
        return adapted

    expected, patched = loss_and_grads(model()), cce_patch(model())
    assert expected[1], "the adapter has gradients"
    if name in IN_FULL:
        with pytest.warns(CutCrossEntropyWarning, match="logits were computed in full because of"):
            actual = loss_and_grads(patched)
    else:
        actual = loss_and_grads(patched)
    assert_same_step(expected, actual)
    assert call_count(patched) == (name not in IN_FULL)


COMPILED = {
    "lora_on_head": 1,
    "lora_with_dropout_on_head": 1,
    "rslora_with_bias_on_head": 1,
    "modules_to_save": 1,
    "trainable_tokens_of_head": 0,  # the layer computes its product in a way of its own
}
"""Heads that PEFT lets be compiled as a whole, and how many losses of theirs are the patch's."""


@pytest.mark.filterwarnings("ignore:LlamaForCausalLM. the patch did nothing")
@pytest.mark.parametrize("name", COMPILED)
def test_an_adapted_head_in_a_compiled_model(name):
    """Without a graph break, wherever the model has none itself."""
    torch.compiler.reset()  # each test is a first compilation of the same code
    expected, before = dropped_step(adapted(name)), call_count()
    model = cce_patch(adapted(name))
    loss, grads = dropped_step(torch.compile(model, backend="aot_eager", fullgraph=True))
    grads = {key.removeprefix("_orig_mod."): grad for key, grad in grads.items()}
    assert_same_step(expected, (loss, grads))
    assert call_count() - before == COMPILED[name]


def test_dora_on_the_head_in_a_compiled_model():
    """PEFT's code breaks the graph, with the patch or without, and gets the logits there."""
    torch.compiler.reset()
    expected = dropped_step(adapted("dora_on_head"))
    model = torch.compile(cce_patch(adapted("dora_on_head")), backend="aot_eager")
    with pytest.warns(CutCrossEntropyWarning, match="logits were computed in full because of"):
        loss, grads = dropped_step(model)
    grads = {key.removeprefix("_orig_mod."): grad for key, grad in grads.items()}
    assert_same_step(expected, (loss, grads))


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
