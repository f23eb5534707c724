"""``cce_patch``, ``cce_unpatch`` and their arguments."""

import copy
import inspect
import pickle
import subprocess
import sys
import types

import pytest
import torch
import transformers
from torch import nn

from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy
from cut_cross_entropy.implementations import chunked
from cut_cross_entropy.transformers import (
    CutCrossEntropyWarning,
    PatchOptions,
    call_count,
    cce_patch,
    cce_unpatch,
    is_patched,
)
from cut_cross_entropy.transformers.patch import AXOLOTL_CCE_FORK, PATCH_FNS
from cut_cross_entropy.transformers.utils import TransformersModelT, apply_lce
from tests.transformers.models import SIZES, VOCAB, assert_same_step, batch, llama, loss_and_grads


@pytest.mark.parametrize(
    ("config_name", "changes"),
    [
        ("LlamaConfig", {}),
        ("LlamaConfig", {"tie_word_embeddings": True}),
        ("Gemma2Config", {"final_logit_softcapping": 3.0}),
        ("CohereConfig", {"logit_scale": 0.37}),
        ("GraniteConfig", {"logits_scaling": 5.0}),
        ("GPT2Config", {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}),
        ("PhiConfig", {}),  # a bias on the head
        ("MixtralConfig", {"output_router_logits": True}),  # a loss on top of the loss
    ],
)
def test_loss_and_gradients_equal_those_of_the_model(config_name, changes):
    config = getattr(transformers, config_name)(**SIZES | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    patched = cce_patch(copy.deepcopy(model))
    assert_same_step(loss_and_grads(model), loss_and_grads(patched))
    assert call_count(patched) == 1


def test_the_same_object_comes_back_and_a_type_gives_none():
    model = llama()
    assert cce_patch(model) is model
    assert is_patched(model)
    assert cce_unpatch(model) is model
    assert not is_patched(model)
    assert cce_patch("llama") is None
    assert cce_unpatch("llama") is None


def test_a_type_patches_models_of_that_type_only():
    before = llama()
    cce_patch("llama")
    try:
        after = llama()
        assert is_patched("llama")
        assert is_patched(before)
        assert is_patched(after)
        assert not is_patched("mistral")
        loss_and_grads(after)
        assert call_count(after) == 1
    finally:
        cce_unpatch("llama")
    assert not is_patched(after)
    assert not is_patched("llama")
    assert "cce" not in repr(vars(transformers.LlamaForCausalLM.forward))


def test_a_config_stands_for_its_type():
    config = transformers.LlamaConfig()
    assert cce_patch(config) is None
    try:
        assert is_patched("llama")
    finally:
        cce_unpatch(config)
    assert not is_patched(config)


def test_an_instance_patched_over_its_type_uses_its_own_options():
    cce_patch("llama")
    try:
        model = cce_patch(llama(), reduction="none")
        assert model(**batch()).loss.shape == (2, 10)
    finally:
        cce_unpatch("llama")


def test_patching_twice_replaces_the_options_and_unpatching_once_restores():
    model = llama()
    original = type(model)
    cce_patch(model)
    cce_patch(model, reduction="none")
    assert model(**batch())[0].shape == (2, 10)
    cce_unpatch(model)
    assert type(model) is original
    assert "forward" not in model.__dict__
    cce_unpatch(model)
    assert type(model) is original
    assert model(**batch()).logits is not None


@pytest.mark.parametrize(
    "name", ["lama", "vit", "", "not-a-model-type"], ids=["typo", "vision", "empty", "unknown"]
)
def test_an_unknown_type_is_a_runtime_error(name):
    with pytest.raises(RuntimeError, match=r"model_or_type must be .*got the unknown model type"):
        cce_patch(name)
    with pytest.raises(RuntimeError, match="unknown model type"):
        is_patched(name)


def test_the_error_suggests_a_name():
    with pytest.raises(RuntimeError, match="Did you mean 'llama'"):
        cce_patch("lama")


def test_other_wrong_arguments_name_themselves():
    with pytest.raises(TypeError, match=r"model_or_type must be .*, got int"):
        cce_patch(3)
    with pytest.raises(RuntimeError, match=r"forward takes labels, got LlamaModel"):
        cce_patch(llama().model)
    with pytest.raises(RuntimeError, match=r"forward takes labels, got Linear"):
        cce_patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'avg'"):
        cce_patch(llama(), reduction="avg")
    with pytest.raises(ValueError, match="impl must be one of"):
        cce_patch(llama(), impl="fast")
    with pytest.raises(ValueError, match="filter_eps must be"):
        cce_patch(llama(), filter_eps=-1.0)


def test_the_order_of_the_arguments():
    parameters = inspect.signature(cce_patch).parameters
    names = [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
    assert names == [
        "model_or_type",
        "impl",
        "reduction",
        "filter_eps",
        "accum_e_fp32",
        "accum_c_fp32",
        "filter_e_grad",
        "filter_c_grad",
        "train_only",
        "remote_model_id",
    ]


@pytest.mark.parametrize(
    ("option", "value", "bad", "message"),
    [
        ("memory_budget", 1, 0, "memory_budget must be at least 1 byte, got 0"),
        ("filter_mass", 0.01, 2, "filter_mass must be None or a float from 0 to 1, got 2"),
    ],
)
def test_an_option_by_keyword_reaches_the_operator(option, value, bad, message, monkeypatch):
    model, seen = llama(), []
    expected = loss_and_grads(model)

    def spy(*args, **kwargs):
        seen.append(kwargs.get(option))
        return linear_cross_entropy(*args, **kwargs)

    monkeypatch.setattr("cut_cross_entropy.lazy.cross_entropy.linear_cross_entropy", spy)
    assert_same_step(expected, loss_and_grads(cce_patch(model, **{option: value})))
    assert_same_step(expected, loss_and_grads(cce_patch(model)))
    assert seen == [value, None]
    assert PatchOptions(**{option: value}).to_kwargs()[option] == value
    assert option not in PatchOptions().to_kwargs()
    with pytest.raises(ValueError, match=message):
        cce_patch(model, **{option: bad})


def test_recompute_leaves_no_gradients_in_the_forward(monkeypatch):
    model, backwards = llama(), []
    expected = loss_and_grads(model)

    def counted(*args):
        backwards.append(args)
        return backward(*args)

    backward = chunked.backward
    monkeypatch.setattr(chunked, "backward", counted)
    assert_same_step(expected, loss_and_grads(cce_patch(model, impl="chunked")))
    assert not backwards
    assert_same_step(expected, loss_and_grads(cce_patch(model, impl="chunked", recompute=True)))
    assert len(backwards) == 1
    assert PatchOptions(recompute=True).to_kwargs()["recompute"] is True
    assert "recompute" not in PatchOptions().to_kwargs()
    with pytest.raises(TypeError, match="recompute must be True or False, got 1"):
        cce_patch(model, recompute=1)


def test_train_only_leaves_evaluation_alone():
    model = cce_patch(llama(), train_only=True)
    assert model(**batch()).logits is None
    model.eval()
    assert type(model(**batch()).logits) is torch.Tensor
    assert call_count(model) == 1


def test_names_for_other_packages():
    assert AXOLOTL_CCE_FORK
    assert TransformersModelT.__bound__ is transformers.PreTrainedModel
    options = PatchOptions("cce_exact", "sum", None, True, True, False, False, True)
    assert options.to_kwargs() == {
        "impl": "cce_exact",
        "reduction": "sum",
        "filter_eps": None,
        "accum_e_fp32": True,
        "accum_c_fp32": True,
        "filter_e_grad": False,
        "filter_c_grad": False,
    }
    assert PatchOptions(LinearCrossEntropyImpl.CCE).impl == "cce"
    labels = torch.ones(1)
    assert options.use_lce(labels, True)
    assert not options.use_lce(labels, False)
    assert not options.use_lce(None, True)
    assert PatchOptions().use_lce(labels, False)


def test_patch_functions_answer_for_every_type_and_can_be_assigned():
    assert "llama" in PATCH_FNS
    assert "voxtral" in PATCH_FNS
    if "step3p5" in transformers.CONFIG_MAPPING:  # a type that no mapping lists
        assert "step3p5" in PATCH_FNS
    assert "vit" not in PATCH_FNS
    assert len(PATCH_FNS) == len(list(PATCH_FNS)) > 200
    with pytest.raises(KeyError, match="nothing"):
        PATCH_FNS["nothing"]
    seen = []
    PATCH_FNS["my_type"] = lambda model, options: seen.append((model, options))
    try:
        cce_patch("my_type", reduction="sum")
        assert "my_type" in PATCH_FNS
    finally:
        del PATCH_FNS["my_type"]
    assert seen == [("my_type", PatchOptions(reduction="sum"))]
    with pytest.raises(RuntimeError, match="unknown model type"):
        cce_patch("my_type")


def test_apply_lce_is_the_loss_of_a_model():
    model = llama()
    inputs = batch()
    hidden = model.model(inputs["input_ids"]).last_hidden_state
    weight, labels = model.lm_head.weight, inputs["labels"]
    loss = apply_lce(hidden, weight, labels, PatchOptions())
    torch.testing.assert_close(loss, model(**inputs).loss)
    scaled = apply_lce(hidden, weight, labels, PatchOptions(), num_items_in_batch=torch.tensor(7))
    torch.testing.assert_close(scaled, model(**inputs, num_items_in_batch=7).loss)
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    again = apply_lce(hidden, weight, None, PatchOptions(), shift_labels=shifted)
    torch.testing.assert_close(again, loss)
    none = apply_lce(hidden, weight, labels, PatchOptions(reduction="none"), num_items_in_batch=7)
    assert none.shape == (2, 10)


def test_perplexity_as_the_readme_of_the_first_release_computes_it():
    model = llama()
    input_ids = batch()["input_ids"]
    attention_mask = torch.ones_like(input_ids)  # integers, as a tokenizer gives
    attention_mask[1, 6:] = 0
    labels = input_ids.clone()
    labels[attention_mask == 0] = -100
    logits = model(input_ids, attention_mask).logits

    model = cce_patch(model, reduction="none")
    outputs = model(input_ids, attention_mask, labels=labels)
    loss = outputs[0]
    ppl = torch.exp(loss.sum(1) / (labels[:, 1:] != -100).count_nonzero(dim=1)).mean()

    assert loss.shape == (2, 10)
    per_token = nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
    )
    torch.testing.assert_close(loss, per_token)
    counts = (labels[:, 1:] != -100).sum(1)
    torch.testing.assert_close(ppl, torch.exp(per_token.sum(1) / counts).mean())


def test_sum_replaces_the_mean():
    model = llama()
    mean = model(**batch()).loss
    cce_patch(model, reduction="sum")
    count = (batch()["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(model(**batch()).loss, mean * count)
    torch.testing.assert_close(model(**batch(), num_items_in_batch=3).loss, mean * count)


def test_none_keeps_all_columns_of_a_model_that_does_not_shift():
    config = transformers.BertConfig(**SIZES | {"is_decoder": True})
    torch.manual_seed(0)
    model = cce_patch(transformers.BertForMaskedLM(config), reduction="none")
    assert model(**batch()).loss.shape == (2, 11)


def test_copies_and_pickles_stay_patched():
    model = cce_patch(llama())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_patched(other)
        assert other.lm_head.weight is not model.lm_head.weight
        assert_same_step(loss_and_grads(model), loss_and_grads(other))
        assert call_count(other) == 1
        cce_unpatch(other)
        assert type(other) is transformers.LlamaForCausalLM


def test_a_pickle_is_read_in_a_new_process(tmp_path):
    torch.save(cce_patch(llama()), tmp_path / "model.pt")
    code = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False);"
        "from cut_cross_entropy.transformers import is_patched; assert is_patched(model);"
        "print(type(model).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True
    )
    assert done.stdout.strip() == "LlamaForCausalLM", done.stderr


def test_the_class_looks_like_the_original():
    model = llama()
    cls, signature = type(model), inspect.signature(model.forward)
    cce_patch(model)
    assert isinstance(model, cls)
    assert type(model).__name__ == cls.__name__
    assert type(model).__module__ == cls.__module__
    assert inspect.signature(model.forward) == signature
    assert not hasattr(model.forward, "__wrapped__")


def test_positional_labels_are_found():
    model = cce_patch(llama())
    position = list(inspect.signature(model.forward).parameters).index("labels")
    inputs = batch()
    args = [inputs["input_ids"], inputs["attention_mask"], *[None] * (position - 2)]
    assert model(*args, inputs["labels"]).logits is None
    assert call_count(model) == 1


def test_calls_without_labels_are_not_touched():
    model = llama()
    ids = batch()["input_ids"]
    before = model(ids).logits
    cce_patch(model)
    output = model(ids)
    assert type(output.logits) is torch.Tensor
    assert output.loss is None
    torch.testing.assert_close(output.logits, before)
    assert call_count(model) == 0


def test_remote_code_is_patched(tmp_path):
    (tmp_path / "modeling_other.py").write_text(
        "from transformers import LlamaForCausalLM\n\n"
        "class OtherForCausalLM(LlamaForCausalLM):\n"
        "    def forward(self, input_ids, labels=None):\n"
        "        return super().forward(input_ids=input_ids, labels=labels)\n"
    )
    config = transformers.LlamaConfig(**SIZES)
    config.auto_map = {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}
    config.save_pretrained(tmp_path)
    llama().save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    cce_patch("llama", remote_model_id=str(tmp_path))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(model).__name__ == "OtherForCausalLM"
    assert is_patched(model)
    inputs = batch()
    model.train()(inputs["input_ids"], labels=inputs["labels"])
    assert call_count(model) == 1
    assert not is_patched("llama")


def test_a_repository_without_a_language_model_is_refused(tmp_path):
    (tmp_path / "modeling_body.py").write_text(
        "from transformers import LlamaModel\n\nclass Body(LlamaModel):\n    pass\n"
    )
    config = transformers.LlamaConfig(**SIZES)
    config.auto_map = {"AutoModelForCausalLM": "modeling_body.Body"}
    config.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="a repository with a model whose forward takes labels"):
        cce_patch("llama", remote_model_id=str(tmp_path))
    assert not is_patched("llama")


def test_importing_the_package_does_not_import_transformers():
    code = "import sys, cut_cross_entropy; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_warnings_are_of_one_class():
    assert issubclass(CutCrossEntropyWarning, UserWarning)


@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("bound", [False, True])
def test_an_own_forward_that_hands_on_all_arguments(positional, bound):
    """Its signature does not name ``labels``."""
    model = llama()
    plain = loss_and_grads(copy.deepcopy(model))
    of_class = model.forward
    if bound:
        model.forward = types.MethodType(lambda self, *args, **kw: of_class(*args, **kw), model)
    else:
        model.forward = lambda *args, **kw: of_class(*args, **kw)
    cce_patch(model)
    if positional:
        inputs = batch()
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        args = [inputs.get(name) for name in names[: names.index("labels") + 1]]
        torch.testing.assert_close(model(*args).loss, plain[0])
    else:
        assert_same_step(plain, loss_and_grads(model))
    assert call_count(model) == 1
    cce_unpatch(model)
    assert model(**batch()).logits is not None


@pytest.mark.parametrize("of_class", [False, True], ids=["all by itself", "by that of the class"])
def test_an_own_forward_that_takes_one_dictionary(of_class):
    def forward(self, inputs):
        if of_class:
            return type(self).forward(self, **inputs)
        hidden = self.model(input_ids=inputs["input_ids"])[0]
        return {"loss": self.loss_function(self.lm_head(hidden), inputs["labels"], VOCAB)}

    def step(model):
        model.zero_grad()
        loss = model(batch())["loss"]
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    model = llama()
    model.forward = types.MethodType(forward, model)
    expected = step(model)
    assert_same_step(expected, step(cce_patch(model)))
    assert call_count(model) == 1


def test_a_loss_without_labels_is_told():
    def forward(self, inputs):
        hidden = self.model(input_ids=inputs["input_ids"])[0]
        return {"loss": self.loss_function(self.lm_head(hidden), inputs["targets"], VOCAB)}

    model = llama()
    model.forward = types.MethodType(forward, model)
    inputs = {"input_ids": batch()["input_ids"], "targets": batch()["labels"]}
    expected = model(inputs)["loss"]
    cce_patch(model)
    with pytest.warns(CutCrossEntropyWarning, match="no labels were found .* did nothing"):
        loss = model(inputs)["loss"]
    assert torch.equal(loss, expected)
    model(inputs)  # and no second warning, an error here
