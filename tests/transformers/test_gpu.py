"""Patched models on a GPU, with the kernels, in bfloat16."""

import copy
import gc
import os
import warnings

import pytest
import torch

from cut_cross_entropy.transformers import CutCrossEntropyWarning, call_count, cce_patch
from tests.transformers.models import batch, llama

pytestmark = pytest.mark.gpu

DEVICE = "cuda"

# Large enough for the kernels to have several blocks of tokens and classes, a part of one included.
LARGE = {
    "vocab_size": 4099,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
SHAPE = {"size": 4, "time": 97}
# A gradient of the head may be off by this share of its norm: what the filter leaves out.
FILTERED, EXACT = 0.03, 0.005


def gemma2(**changes):
    """A Gemma 2 in training mode: its logits are capped, its head is its embedding."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        **LARGE
        | {"num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        | {"final_logit_softcapping": 5.0, "attn_implementation": "eager"}
        | changes
    )
    return transformers.Gemma2ForCausalLM(config).train()


def tiny_llama(**changes):
    return llama(**LARGE | changes)


MODELS = {"llama": tiny_llama, "gemma2": gemma2}


def inputs(**shape):
    data = batch(**SHAPE | shape)
    return {name: tensor.to(DEVICE) for name, tensor in data.items()}


def loss_and_grads(model, data):
    model.zero_grad(set_to_none=True)
    loss = model(**data).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.double() for n, p in model.named_parameters()}


def relative(grad, exact):
    return float((grad - exact).norm() / exact.norm().clamp_min(1e-12))


@pytest.fixture(params=MODELS)
def model(request):
    """A model whose head is a little trained-like: some classes are much likelier than others."""
    made = MODELS[request.param]()
    with torch.no_grad():
        made.lm_head.weight.mul_(4)
    return made.to(DEVICE)


@pytest.fixture(autouse=True)
def each_by_itself():
    """Only the warnings of this package count, and no test has the memory of another.

    Fails rather than skips without a GPU: who asks for these tests wants them run.
    """
    if not torch.cuda.is_available():
        pytest.fail("there is no GPU", pytrace=False)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        pytest.fail("kernels are interpreted: use pytest -m gpu", pytrace=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", CutCrossEntropyWarning)
        yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize(("impl", "allowed"), [("cce", FILTERED), ("cce_exact", EXACT)])
def test_loss_and_gradients_in_bfloat16(model, impl, allowed):
    data = inputs()
    model = model.to(torch.bfloat16)
    exact_loss, exact = loss_and_grads(copy.deepcopy(model).double(), data)
    plain_loss, plain = loss_and_grads(model, data)
    patched = cce_patch(model, impl=impl)
    loss, grads = loss_and_grads(patched, data)
    assert call_count(patched) == 1
    assert abs(loss - exact_loss) <= abs(plain_loss - exact_loss) + 2e-3 * exact_loss
    assert grads.keys() == exact.keys()
    for name, grad in grads.items():
        error, of_plain = relative(grad, exact[name]), relative(plain[name], exact[name])
        assert error <= 1.5 * of_plain + allowed, (name, error, of_plain)


def test_autocast_of_float32_weights(model):
    data = inputs()
    exact_loss, exact = loss_and_grads(copy.deepcopy(model).double(), data)
    with torch.autocast("cuda", torch.bfloat16):
        plain_loss, plain = loss_and_grads(model, data)
        loss, grads = loss_and_grads(cce_patch(model, impl="cce"), data)
    assert call_count(model) == 1
    assert abs(loss - exact_loss) <= abs(plain_loss - exact_loss) + 2e-3 * exact_loss
    for name, grad in grads.items():
        error, of_plain = relative(grad, exact[name]), relative(plain[name], exact[name])
        assert error <= 1.5 * of_plain + FILTERED, (name, error, of_plain)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_no_logits_in_memory():
    data = inputs(size=8, time=257)
    peaks = []
    model = tiny_llama(vocab_size=32003).to(DEVICE).to(torch.bfloat16)
    for patch in (lambda m: m, lambda m: cce_patch(m, impl="cce")):
        model = patch(model)
        for _ in range(2):  # the first call compiles, and allocates for that
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(**data).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    logits = 2 * 8 * 257 * 32003  # bytes, in bfloat16
    assert peaks[0] > 2 * logits
    assert peaks[1] < peaks[0] - 2 * logits, peaks


def test_evaluation_and_generate(model):
    data = inputs()
    model = model.to(torch.bfloat16).eval()
    prompt = {name: data[name][:, :5] for name in ("input_ids", "attention_mask")}
    generate = lambda: model.generate(**prompt, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        expected, tokens = model(**data), generate()
        cce_patch(model, impl="cce")
        output = model(**data)
        torch.testing.assert_close(output.loss, expected.loss, rtol=5e-3, atol=0)
        torch.testing.assert_close(output.logits + 0, expected.logits, rtol=1e-2, atol=1e-2)
        assert torch.equal(generate(), tokens)
    assert call_count(model) == 1


def test_compiled(model):
    data = inputs()
    model = cce_patch(model.to(torch.bfloat16), impl="cce")
    loss, grads = loss_and_grads(model, data)
    before = call_count()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    model.zero_grad(set_to_none=True)
    compiled_loss = compiled(**data).loss
    compiled_loss.backward()
    assert call_count() > before
    assert abs(float(compiled_loss.detach()) - loss) <= 5e-3 * loss
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad.double(), grads[name]) <= 0.05, name


def test_a_step_of_the_trainer(tmp_path):
    pytest.importorskip("accelerate")
    import transformers

    data = batch(size=4, time=33)
    rows = [{name: tensor[i] for name, tensor in data.items()} for i in range(4)]
    losses = []
    for patch in (lambda m: m, lambda m: cce_patch(m, impl="cce")):
        model = patch(tiny_llama())
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            bf16=True,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            dataloader_pin_memory=False,
            disable_tqdm=True,
            seed=0,
        )
        assert args.device.type == DEVICE
        args._n_gpu = 1  # no nn.DataParallel on a machine with several
        trainer = transformers.Trainer(model=model, args=args, train_dataset=rows)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert call_count(model) == 4
    assert len(losses[0]) == 2
    torch.testing.assert_close(losses[1], losses[0], rtol=5e-3, atol=0)
