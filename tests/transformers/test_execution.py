"""The ways that a model is run: compiled, checkpointed, generating, saved and loaded."""

import copy
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from cut_cross_entropy.transformers import (
    CutCrossEntropyWarning,
    call_count,
    cce_patch,
    cce_unpatch,
    is_patched,
)
from tests.transformers.models import SIZES, VOCAB, assert_same_step, batch, llama, loss_and_grads


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield lambda model, **kw: torch.compile(model, fullgraph=True, backend="aot_eager", **kw)
    torch._dynamo.reset()


def compiled_step(compiled):
    """A step with the names that the parameters have in the model itself."""
    loss, grads = loss_and_grads(compiled)
    return loss, {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}


@pytest.mark.parametrize("config_name", ["LlamaConfig", "Gemma2Config", "CohereConfig"])
def test_compile_fullgraph(compiler, config_name):
    changes = {"final_logit_softcapping": 3.0, "logit_scale": 0.37}
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**SIZES | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    expected = loss_and_grads(model)
    before = call_count()
    compiled = compiler(cce_patch(copy.deepcopy(model)))
    assert_same_step(expected, compiled_step(compiled))
    assert call_count() == before + 1
    for seed in (2, 3):  # no recompilation
        compiled(**batch(seed=seed)).loss.backward()
    assert call_count() == before + 1
    assert is_patched(compiled)


def test_compile_with_a_layer_that_breaks_the_graph():
    """What is behind it is compiled by itself, and still computes the loss without logits."""
    torch.compiler.reset()
    model, layer = llama(), Broken()
    layer.inner, model.model.layers[0].mlp = model.model.layers[0].mlp, layer
    expected, before = loss_and_grads(model), call_count()
    compiled = torch.compile(cce_patch(model), backend="aot_eager")
    assert_same_step(expected, compiled_step(compiled))
    assert call_count() - before == 1


class Broken(torch.nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return self.inner(x)


def test_compile_with_inductor_where_there_is_a_compiler():
    from cut_cross_entropy.implementations.full_logits import missing_compiler

    if missing_compiler("cpu") is not None:
        pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    model = llama(num_hidden_layers=1)
    expected = loss_and_grads(model)
    compiled = torch.compile(cce_patch(model), fullgraph=True)
    assert_same_step(expected, compiled_step(compiled))
    torch._dynamo.reset()


def test_compiled_logits(compiler):
    model = llama()
    with torch.no_grad():
        expected = model.eval()(**batch()).logits
    cce_patch(model)
    assert compiler(model.train())(**batch()).logits is None
    torch._dynamo.reset()
    with torch.no_grad():
        output = compiler(model.eval())(**batch())
    assert type(output.logits) is torch.Tensor
    torch.testing.assert_close(output.logits, expected)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiled_reductions(compiler, reduction):
    model = cce_patch(llama(), reduction=reduction)
    expected = model(**batch()).loss
    actual = compiler(model)(**batch()).loss
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected)


def test_a_compiled_type(compiler):
    cce_patch("llama")
    try:
        model = llama()
        expected = loss_and_grads(model)[0]
        torch.testing.assert_close(compiler(model)(**batch()).loss.detach(), expected)
    finally:
        cce_unpatch("llama")


def test_compiled_with_an_adapter_on_the_head(compiler):
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(llama(), config).train()
    expected = model(**batch()).loss
    cce_patch(model)
    with torch._dynamo.config.patch(error_on_recompile=False):
        compiled = compiler(model.get_base_model())
        output = compiled(**batch())
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected)


def test_compiled_code_is_loud_too(compiler):
    def z_loss(logits, labels, **kwargs):
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(logits, labels) + 0.1 * logits.logsumexp(-1).square().mean()

    model = llama()
    model.loss_function = z_loss
    expected = loss_and_grads(model)
    cce_patch(model)
    with pytest.warns(CutCrossEntropyWarning, match="because of 'logsumexp'"):
        actual = compiled_step(compiler(model))
    assert_same_step(expected, actual)


@pytest.mark.filterwarnings("ignore")  # the graph breaks here, and says so
def test_compiled_code_loses_no_gradient_silently():
    class OwnLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, weight):
            return logits.float().logsumexp(-1).mean() + 0 * weight.sum()

        @staticmethod
        def backward(ctx, grad):
            return None, None

    torch._dynamo.reset()
    model = cce_patch(llama())
    model.loss_function = lambda logits, labels, **kw: OwnLoss.apply(logits, model.lm_head.weight)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(RuntimeError, match="gradient would be lost"):
        compiled(**batch())
    torch._dynamo.reset()


def test_compiling_parts_of_the_model():
    torch._dynamo.reset()
    model = llama()
    expected = loss_and_grads(model)
    cce_patch(model)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    assert_same_step(expected, loss_and_grads(model))
    assert call_count(model) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = llama()
    expected = loss_and_grads(model)
    cce_patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    recomputed = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: recomputed.append(1))
    if reentrant:
        model.enable_input_require_grads()
    assert_same_step(expected, loss_and_grads(model))
    assert len(recomputed) == 2
    assert call_count(model) == 1


def test_the_whole_model_checkpointed():
    model = llama()
    expected = loss_and_grads(model)
    cce_patch(model)
    loss = torch.utils.checkpoint.checkpoint(lambda: model(**batch()).loss, use_reentrant=False)
    model.zero_grad()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert_same_step(expected, (loss.detach(), grads))


def test_generate():
    model = llama().eval()
    ids = batch()["input_ids"][:, :4]
    generate = lambda: model.generate(ids, max_new_tokens=6, do_sample=False)
    expected = generate()
    cce_patch(model)
    assert torch.equal(generate(), expected)
    assert expected.shape[1] > 4
    assert call_count(model) == 0


def test_save_and_load(tmp_path):
    model = cce_patch(llama())
    expected = loss_and_grads(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert type(loaded) is transformers.LlamaForCausalLM
    assert_same_step(expected, loss_and_grads(loaded))
    assert_same_step(expected, loss_and_grads(cce_patch(loaded)))


def test_state_dict_has_nothing_new():
    model = llama()
    before = list(model.state_dict())
    attributes = set(vars(model))
    cce_patch(model)
    loss_and_grads(model)
    assert list(model.state_dict()) == before
    assert set(vars(model)) == attributes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_at_least_as_exact(dtype):
    model = llama()
    exact = loss_and_grads(model)
    model = model.to(dtype)
    exact_low = loss_and_grads(copy.deepcopy(model).float())
    plain, patched = loss_and_grads(model), loss_and_grads(cce_patch(model))
    assert patched[0].dtype == plain[0].dtype == torch.float32
    assert abs(patched[0] - exact_low[0]) <= 1.5 * abs(plain[0] - exact_low[0]) + 1e-3
    for name, grad in exact_low[1].items():
        errors = [float((g[1][name].float() - grad).norm() / grad.norm()) for g in (plain, patched)]
        assert errors[1] <= 1.5 * errors[0] + 1e-3, name
    assert exact[0].isfinite()


def test_autocast():
    model = llama()
    step = lambda m: torch.autocast("cpu", torch.bfloat16)(loss_and_grads)(m)
    expected, actual = step(model), step(cce_patch(copy.deepcopy(model)))
    assert actual[0].dtype == expected[0].dtype
    assert_same_step(expected, actual, rtol=0.05, atol=3e-3)


def test_every_implementation_by_name():
    model = llama()
    expected = loss_and_grads(model)
    for impl in ("chunked", "reference"):
        assert_same_step(expected, loss_and_grads(cce_patch(model, impl=impl)))


def test_data_parallel_replicas_stay_patched():
    model = cce_patch(llama())
    replica = model._replicate_for_data_parallel()
    assert is_patched(replica)
    assert type(replica) is type(model)


@pytest.mark.parametrize("wrapper", [torch.nn.DataParallel, lambda m: torch.compile(m)])
def test_wrappers_are_looked_through(wrapper):
    model = llama()
    wrapped = wrapper(model)
    assert cce_patch(wrapped) is wrapped
    assert is_patched(wrapped)
    assert is_patched(model)
    cce_unpatch(wrapped)
    assert not is_patched(model)


def test_the_vocabulary_of_the_test_is_used():
    assert cce_patch(llama()).lm_head.out_features == VOCAB
