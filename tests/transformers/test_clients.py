"""Calls of trainers and forks, written as they write them; axolotl's are those of its plugin."""

import copy
import importlib
import sys
import types
import warnings
from dataclasses import replace as with_options
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers

from cut_cross_entropy.transformers import PatchOptions, call_count, cce_unpatch, is_patched
from cut_cross_entropy.transformers import utils as transformers_utils
from cut_cross_entropy.transformers.patch import PATCH_FNS, cce_patch
from tests.support import forget_warnings
from tests.transformers.models import assert_same_step, batch, llama, loss_and_grads


@pytest.fixture
def plain_folder(tmp_path):
    """A checkpoint without code of its own."""
    model = llama()
    model.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def clean():
    """Classes, assigned functions and module options as they were before."""
    cls = transformers.LlamaForCausalLM
    forward, assigned = cls.forward, dict(PATCH_FNS.assigned)
    yield
    cce_unpatch("llama")
    cls.forward = forward
    PATCH_FNS.assigned.clear()
    PATCH_FNS.assigned.update(assigned)
    module = sys.modules.get("cut_cross_entropy.transformers.llama")
    if module is not None:
        module._PATCH_OPTS = None


# --- axolotl: trust_remote_code passes the base model, whatever it is


def test_remote_model_id_of_a_model_without_code_of_its_own(plain_folder, clean):
    assert cce_patch("llama", remote_model_id=plain_folder) is None
    assert is_patched("llama")
    model = llama()
    loss_and_grads(model)
    assert call_count(model) == 1


def test_remote_model_id_of_an_unknown_type_without_code(plain_folder):
    with pytest.raises(RuntimeError, match="or model_or_type a type that transformers knows"):
        cce_patch("lama", remote_model_id=plain_folder)


def test_axolotl_passes_options_by_keyword(clean):
    """Only if the signature has them, which inspect.signature has to show."""
    import inspect

    from cut_cross_entropy import recommend_c_grad_chunk_size

    assert "c_grad_chunk_size" in inspect.signature(cce_patch).parameters
    chunk = recommend_c_grad_chunk_size(
        num_tokens=4 * 1024, vocab_size=151936, hidden_size=4096, device=0
    )
    cce_patch("llama", remote_model_id=None, accum_c_fp32=True, c_grad_chunk_size=chunk)
    assert is_patched("llama")
    with pytest.raises(ValueError, match="c_grad_chunk_size must be >= 0, got -1"):
        cce_patch("llama", c_grad_chunk_size=-1)


# --- functions in PATCH_FNS


def test_a_pair_of_names(monkeypatch, clean):
    """As a hook for a model type with a module of its own assigns it."""
    seen = []
    module = types.ModuleType("client_patch")
    module.patch_nemotron = lambda maybe_model, patch_options, remote_model_id=None: seen.append(
        (maybe_model, patch_options.reduction, remote_model_id)
    )
    monkeypatch.setitem(sys.modules, "client_patch", module)
    PATCH_FNS["nemotron_labs_diffusion"] = ("client_patch", "patch_nemotron")
    assert "nemotron_labs_diffusion" in PATCH_FNS
    assert PATCH_FNS["nemotron_labs_diffusion"] == ("client_patch", "patch_nemotron")
    cce_patch("nemotron_labs_diffusion", reduction="sum")
    cce_patch("nemotron_labs_diffusion", remote_model_id="folder")
    assert seen == [
        ("nemotron_labs_diffusion", "sum", None),
        ("nemotron_labs_diffusion", "mean", "folder"),
    ]


@pytest.mark.parametrize(
    "entry", [("no_such_module", "f"), ("json", "no_such_function"), ("a",), 3]
)
def test_an_entry_that_names_no_function(entry, clean):
    PATCH_FNS["t"] = entry
    with pytest.raises(RuntimeError, match=r"PATCH_FNS\['t'\] must be a function or a pair"):
        cce_patch("t")


def two(maybe_model, patch_options):
    return (maybe_model,)


def required(maybe_model, patch_options, remote_model_id):
    return (maybe_model, remote_model_id)


def optional(maybe_model, patch_options, remote_model_id=None):
    return (maybe_model, remote_model_id)


def third_by_position(maybe_model, patch_options, source, /):
    return (maybe_model, source)


def by_keyword(maybe_model, patch_options, **kwargs):
    return (maybe_model, kwargs["remote_model_id"])


@pytest.mark.parametrize("remote", [None, "folder"])
@pytest.mark.parametrize("function", [two, required, optional, third_by_position, by_keyword])
def test_assigned_functions_get_what_they_take(function, remote, clean):
    PATCH_FNS["t"] = function
    expected = ("t",) if function is two else ("t", remote)
    assert cce_patch("t", remote_model_id=remote) == expected
    PATCH_FNS["t"] = partial(function)
    assert cce_patch("t", remote_model_id=remote) == expected


def test_axolotl_puts_the_llama_forward_on_another_class(clean):
    """Its generic patch for types that are not in PATCH_FNS."""

    def patch_generic(maybe_model, patch_options, remote_model_id: str | None, model_type: str):
        import cut_cross_entropy.transformers.llama
        from cut_cross_entropy.transformers.llama import cce_forward

        module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
        cut_cross_entropy.transformers.llama._PATCH_OPTS = patch_options
        module.LlamaForCausalLM.forward = cce_forward

    assert "llama_like" not in PATCH_FNS
    PATCH_FNS["llama_like"] = partial(patch_generic, model_type="llama")
    model = llama()
    expected = loss_and_grads(model)
    cce_patch("llama_like", remote_model_id=None)
    assert_same_step(expected, loss_and_grads(model))
    assert call_count(model) == 1
    assert model(**batch()).logits is None


# --- names of Apple's modules


@pytest.mark.parametrize("family", ["gemma2", "llama", "mistral", "phi3", "qwen2"])
def test_modules_of_the_families(family):
    module = importlib.import_module(f"cut_cross_entropy.transformers.{family}")
    patch = getattr(module, f"patch_{family}")
    assert module._PATCH_OPTS is None
    options = PatchOptions(reduction="none")
    try:
        assert patch(family, options) is None
        assert is_patched(family)
        assert module._PATCH_OPTS is options
    finally:
        cce_unpatch(family)
        module._PATCH_OPTS = None
    if family == "llama":
        model = llama()
        assert patch(model, PatchOptions()) is model
        assert is_patched(model)
        module._PATCH_OPTS = None


def test_forward_of_a_family_bound_to_a_model(clean):
    from cut_cross_entropy.transformers import llama as llama_patch

    model, other = llama(), llama()
    expected = loss_and_grads(model)
    other.forward = types.MethodType(llama_patch.cce_forward, other)
    assert other(**batch()).logits is not None  # no options: the model's own forward
    assert call_count(other) == 0
    llama_patch._PATCH_OPTS = PatchOptions()
    assert_same_step(expected, loss_and_grads(other))
    assert call_count(other) == 1


# --- a replaced apply_lce


@pytest.fixture
def replaced():
    """Replace ``apply_lce`` in all modules that have the name, as trainers do."""
    importlib.import_module("cut_cross_entropy.transformers.llama")

    originals = {
        name: module.apply_lce
        for name, module in sys.modules.items()
        if name.startswith("cut_cross_entropy.transformers") and hasattr(module, "apply_lce")
    }
    assert "cut_cross_entropy.transformers.llama" in originals

    def replace(function, everywhere):
        transformers_utils.apply_lce = function
        for name in originals if everywhere else ():
            sys.modules[name].apply_lce = function

    yield replace
    for name, function in originals.items():
        sys.modules[name].apply_lce = function


WEIGHTS = torch.rand(2, 11, generator=torch.Generator().manual_seed(3))


def weighted_apply_lce(e, c, labels, opts, bias=None, softcap=None, **loss_kwargs):
    """Losses by token with weights of the targets, as prompt loss weights have it."""
    assert e.shape[:-1] == labels.shape
    unreduced = with_options(opts, reduction="none")
    losses = ORIGINAL(e, c, labels, unreduced, bias=bias, softcap=softcap)
    weights = WEIGHTS[:, 1:] * (labels[:, 1:] != -100)
    return (losses * weights).sum() / loss_kwargs.get("num_items_in_batch", weights.sum())


ORIGINAL = transformers_utils.apply_lce


def weighted_loss(logits, labels):
    losses = F.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none"
    )
    return (losses * WEIGHTS[:, 1:]).sum()


@pytest.mark.parametrize("everywhere", [False, True], ids=["utils", "everywhere"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_patched_models_call_a_replaced_apply_lce(replaced, everywhere, family):
    from tests.transformers.models import SIZES

    if family == "llama":
        model = llama()
    else:
        config = transformers.Gemma2Config(**SIZES, final_logit_softcapping=3.0)
        torch.manual_seed(0)
        model = transformers.Gemma2ForCausalLM(config).train()
    patched = cce_patch(copy.deepcopy(model))
    inputs = batch()
    labels = inputs.pop("labels")
    (weighted_loss(model(**inputs).logits, labels) / 7).backward()
    replaced(weighted_apply_lce, everywhere)
    output = patched(**inputs, labels=labels, num_items_in_batch=7)
    assert output.logits is None
    output.loss.backward()
    assert call_count(patched) == 1
    for (name, mine), (_, theirs) in zip(
        patched.named_parameters(), model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_models_call_a_replaced_apply_lce(replaced, training):
    """The forward runs eagerly then, and says so once; a later replacement counts as well."""
    from cut_cross_entropy.transformers import CutCrossEntropyWarning

    model = cce_patch(llama()).train(training)
    gradients = lambda of: {name: p.grad for name, p in of.named_parameters()}
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    inputs = batch()
    own_loss = compiled(**inputs).loss
    replaced(weighted_apply_lce, everywhere=False)
    forget_warnings()
    with pytest.warns(CutCrossEntropyWarning, match="forward .* is not compiled"):
        compiled(**inputs, num_items_in_batch=7)
    output = compiled(**inputs, num_items_in_batch=7)  # and no second warning, an error here
    output.loss.backward()
    expected = eager(**inputs, num_items_in_batch=7)
    expected.loss.backward()
    assert_same_step((output.loss, gradients(model)), (expected.loss, gradients(eager)))
    assert (output.logits is None) is training
    if not training:
        torch.testing.assert_close(output.logits, eager(inputs["input_ids"]).logits)
    replaced(ORIGINAL, everywhere=False)
    torch.testing.assert_close(compiled(**inputs).loss, own_loss)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*is not compiled")
def test_compiled_whole_models_refuse_a_replaced_apply_lce(replaced):
    replaced(weighted_apply_lce, everywhere=False)
    torch._dynamo.reset()
    compiled = torch.compile(cce_patch(llama()), backend="eager", fullgraph=True)
    inputs = batch()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(**inputs)
    torch._dynamo.reset()


def test_an_apply_lce_that_is_put_back_has_no_effect_any_more(replaced):
    model = cce_patch(llama())
    expected = model(**batch()).loss
    replaced(lambda *args, **kwargs: torch.tensor(7.0), everywhere=False)
    assert model(**batch()).loss == 7
    replaced(ORIGINAL, everywhere=False)
    torch.testing.assert_close(model(**batch()).loss, expected)


def test_a_model_that_cannot_call_a_replaced_apply_lce_says_so(replaced):
    """It has a loss of its own, which does not ask for ``loss_function``."""
    from cut_cross_entropy.transformers import CutCrossEntropyWarning

    config = transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)

    class OwnLoss(transformers.BloomForCausalLM):
        def forward(self, input_ids, labels=None):
            logits = self.lm_head(self.transformer(input_ids)[0])
            return (F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()),)

    model = cce_patch(OwnLoss(config).train())
    ids = torch.arange(12).reshape(2, 6)
    expected = model(ids, labels=ids)[0]
    replaced(weighted_apply_lce, everywhere=False)
    forget_warnings()
    with pytest.warns(CutCrossEntropyWarning, match="the replacement was not called"):
        torch.testing.assert_close(model(ids, labels=ids)[0], expected)


# --- nothing to learn from


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_step_without_any_label(as_tensor):
    """Transformers' own loss is 0 / 0 there."""
    from cut_cross_entropy.transformers import CutCrossEntropyWarning

    inputs = batch()
    inputs["labels"].fill_(-100)
    zero = torch.tensor(0) if as_tensor else 0
    assert llama()(**inputs, num_items_in_batch=zero).loss.isnan()
    model = cce_patch(llama())
    forget_warnings()
    with pytest.warns(CutCrossEntropyWarning, match="no token with a label"):
        loss = model(**inputs, num_items_in_batch=zero).loss
    loss.backward()
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        assert torch.count_nonzero(parameter.grad) == 0, name
    assert model(**inputs, num_items_in_batch=zero).loss.item() == 0  # and no second warning


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("time", [1, 2])
def test_short_rows(time, reduction):
    """Rows of one token have no next token."""
    model = cce_patch(llama(), reduction=reduction)
    inputs = batch(time=time)
    loss = model(**inputs).loss
    assert loss.shape == ((2, time - 1) if reduction == "none" else ())
    loss.sum().backward()
    if time == 1:
        assert torch.count_nonzero(loss) == 0
        assert torch.count_nonzero(model.lm_head.weight.grad) == 0


@pytest.mark.parametrize("num_items", [None, 0, 3, 0.5])
def test_apply_lce_without_a_prediction(num_items):

    e = torch.randn(2, 1, 8, requires_grad=True)
    c = torch.randn(11, 8, requires_grad=True)
    labels = torch.ones(2, 1, dtype=torch.long)
    forget_warnings()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = transformers_utils.apply_lce(
            e, c, labels, PatchOptions(), num_items_in_batch=num_items
        )
    assert len(caught) == (num_items == 0)
    loss.backward()
    assert loss.item() == 0
    assert torch.count_nonzero(e.grad) == torch.count_nonzero(c.grad) == 0
    long = transformers_utils.apply_lce(
        e.detach().expand(2, 4, 8), c, labels.expand(2, 4), PatchOptions(), num_items_in_batch=0.5
    )
    once = transformers_utils.apply_lce(
        e.detach().expand(2, 4, 8), c, labels.expand(2, 4), PatchOptions(reduction="sum")
    )
    torch.testing.assert_close(long, once / 0.5)


@pytest.mark.parametrize("what", ["lama", 5])
def test_call_count_of_something_else(what):
    with pytest.raises(TypeError, match=rf"model must be None or a model, got {what!r}"):
        call_count(what)


# --- where nothing can run


def test_kernels_on_a_machine_without_a_place_for_them(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = llama()
    with pytest.raises(RuntimeError, match=r"impl='cce' cannot run on this machine: .*cpu"):
        cce_patch(model, impl="cce")
    assert not is_patched(model)
    with torch.device("meta"):  # not placed yet
        assert is_patched(cce_patch(llama(), impl="cce"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert is_patched(cce_patch(model, impl="cce"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"train_only": "yes"}, "train_only must be True or False, got 'yes'"),
        ({"filter_e_grad": 1}, "filter_e_grad must be True or False, got 1"),
        ({"reduction": "meen"}, "Did you mean 'mean'"),
        ({"impl": "cee"}, "Did you mean 'cce'"),
        ({"label_smoothing": 0.1}, "unexpected keyword argument .label_smoothing."),
    ],
)
def test_options_are_checked_at_once(option, message):
    with pytest.raises((TypeError, ValueError), match=message):
        cce_patch("llama", **option)
    assert not is_patched("llama")
