"""TRL's output layer, computed by ours: against its own function, and in its trainers."""

import itertools
from contextlib import nullcontext

import pytest
import torch
import transformers
from datasets import Dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils as trl_utils

from cut_cross_entropy import adapters
from cut_cross_entropy.transformers import cce_patch
from tests.transformers.models import llama
from tests.transformers.test_trainers import losses, tokenizer
from tests.transformers.tiny import tiny_inputs, tiny_model

# What these packages warn about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
CHUNK = 64  # of TRL's classes, so that its loop has several


def inputs(tokens=9, classes=150, dim=16, bias=True, dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=random, dtype=torch.float64)
    weight = torch.randn(classes, dim, generator=random, dtype=torch.float64) / dim**0.5 * 3
    shift = torch.randn(classes, generator=random, dtype=torch.float64) if bias else None
    targets = torch.randint(0, classes, (tokens,), generator=random)
    return [x if x is None else x.to(dtype) for x in (hidden, weight, shift)], targets


def step(function, tensors, targets, *options, entropy_weight=0.3):
    """Outputs of ``function.apply``, and gradients of a weighted sum of its first two."""
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in tensors]
    outputs = function.apply(*leaves, targets, *options)
    random = torch.Generator().manual_seed(1)
    weights = torch.randn(len(targets), generator=random)
    objective = (outputs[0] * weights).sum()
    if outputs[1] is not None:
        objective = objective + entropy_weight * (outputs[1] * weights.roll(1)).sum()
    objective.backward()
    return outputs, [x if x is None else x.grad for x in leaves]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.7, 0.5)])
def test_values_and_gradients_are_those_of_trl(bias, softcap, temperature, scale):
    tensors, targets = inputs(bias=bias)
    options = (temperature, CHUNK, softcap, scale, ("log_probs", *ALL))
    theirs, their_grads = step(ChunkedLogProbFunction, tensors, targets, *options)
    with adapters.trl() as adapter:
        ours, our_grads = step(trl_utils._ChunkedLogProbFunction, tensors, targets, *options)
    assert adapter.calls == 1
    for name, mine, other in zip(("log_probs", *ALL), ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5, msg=name)
        assert mine.dtype == other.dtype, name
        assert mine.requires_grad == other.requires_grad, name
    for mine, other in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outputs", [*itertools.combinations(ALL, 1), ("log_probs",)])
def test_outputs_that_are_not_asked_for_are_none(outputs):
    tensors, targets = inputs()
    theirs, their_grads = step(
        ChunkedLogProbFunction, tensors, targets, 1.0, CHUNK, None, 1.0, outputs
    )
    with adapters.trl():
        function = trl_utils._ChunkedLogProbFunction
        ours, our_grads = step(function, tensors, targets, 1.0, CHUNK, None, 1.0, outputs)
    assert [x is None for x in ours] == [x is None for x in theirs]
    for mine, other in zip((*ours, *our_grads), (*theirs, *their_grads), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_tie_with_an_earlier_class_is_not_the_first():
    hidden, weight = torch.ones(2, 4), torch.ones(6, 4)
    options = (1.0, CHUNK, None, 1.0, ("is_top1",))
    targets = torch.tensor([0, 3])
    theirs = ChunkedLogProbFunction.apply(hidden, weight, None, targets, *options)[4]
    with adapters.trl():
        ours = trl_utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, *options)[4]
    assert ours.tolist() == theirs.tolist() == [True, False]


def test_without_a_token_the_graph_stays_connected():
    tensors, targets = inputs(tokens=0)
    with adapters.trl():
        options = (1.0, CHUNK, None, 1.0, ("log_probs", "entropy"))
        outputs, grads = step(trl_utils._ChunkedLogProbFunction, tensors, targets, *options)
    assert outputs[0].shape == (0,)
    assert [x.count_nonzero().item() for x in grads] == [0, 0, 0]


@pytest.mark.parametrize("case", ["bfloat16", "autocast", "float32 head"])
def test_half_precision_is_at_least_as_exact(case):
    """The same order of dtypes as TRL's: autocast decides, else the hidden states do."""
    tensors, targets = inputs(dtype=torch.float32 if case == "autocast" else torch.bfloat16)
    if case == "float32 head":  # TRL's cast_lm_head_to_fp32: hidden states in float32 alone
        tensors[0] = tensors[0].float()
    exact = [x.double() for x in tensors]
    if case == "autocast":  # the product is in bfloat16; TRL rounds the bias too, ours does not
        exact[:2] = [x.bfloat16().double() for x in tensors[:2]]
    options = (0.8, CHUNK, None, 1.0, ("entropy",))
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        theirs = step(ChunkedLogProbFunction, tensors, targets, *options)
        with adapters.trl():
            ours = step(trl_utils._ChunkedLogProbFunction, tensors, targets, *options)
    logits = (exact[0] @ exact[1].T + exact[2]) / 0.8
    truth = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    errors = [float((outputs[0].detach() - truth).abs().max()) for outputs, _ in (ours, theirs)]
    assert ours[0][0].dtype == torch.float32
    assert errors[0] <= errors[1] + 1e-5
    assert errors[0] < 1e-5
    assert [x.dtype for x in ours[1]] == [x.dtype for x in tensors]


def test_an_output_that_a_newer_trl_may_ask_for_is_refused():
    (hidden, weight, _), targets = inputs()
    with adapters.trl(), pytest.raises(NotImplementedError, match=r"among .*'max_logits'"):
        trl_utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, ("max_logits",)
        )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Gemma2ForCausalLM", "gemma2"),  # a softcap
        ("CohereForCausalLM", "cohere"),  # logits are multiplied
        ("GraniteForCausalLM", "granite"),  # and divided
        ("PhiForCausalLM", "phi"),  # a bias
    ],
)
def test_what_heads_do_to_logits(name, kind):
    model = tiny_model(getattr(transformers, name), kind)
    inputs = tiny_inputs(model)
    trl_utils.add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", *ALL))
    results = []
    for active in (False, True):
        model.zero_grad()
        with adapters.trl() if active else nullcontext():
            output = model(**inputs, fused_lm_head=True)
        output.loss.backward()
        results.append((output, [p.grad for p in model.parameters()]))
    (theirs, their_grads), (ours, our_grads) = results
    for field in ("loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits"):
        torch.testing.assert_close(ours[field], theirs[field], rtol=1e-5, atol=2e-6)
    assert torch.equal(ours.is_top1, theirs.is_top1)
    for mine, other in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_compiled_code_is_counted_when_it_is_traced():
    (hidden, weight, _), targets = inputs()

    def loss(hidden):
        options = (targets, 0.7, CHUNK, None, 1.0, ("entropy",))
        logprobs, entropy, *_ = trl_utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, *options
        )
        return (logprobs + 0.1 * entropy).sum()

    torch._dynamo.reset()
    with adapters.trl() as adapter:
        leaf = hidden.clone().requires_grad_()
        loss(leaf).backward()
        compiled = torch.compile(loss, backend="eager", fullgraph=True)
        for _ in range(3):
            other = hidden.clone().requires_grad_()
            compiled(other).backward()
    assert adapter.calls == 2
    torch.testing.assert_close(other.grad, leaf.grad)
    torch._dynamo.reset()


# --- trainers


def common(folder, **changes):
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "optim": "sgd",  # Adam divides by gradients that may be nothing but rounding
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    } | changes


TEXTS = [" ".join(f"w{3 + (7 * i + j) % 120}" for j in range(8)) for i in range(4)]


def sft(model, folder, **changes):
    data = Dataset.from_dict({"text": TEXTS})
    args = SFTConfig(**common(folder, **changes))
    return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer())


def dpo(model, folder, **changes):
    data = Dataset.from_dict(
        {"prompt": TEXTS, "chosen": [" w7 w8 w9"] * 4, "rejected": [" w20 w4"] * 4}
    )
    args = DPOConfig(**common(folder, **changes))
    return DPOTrainer(
        model=model, ref_model=llama(), args=args, train_dataset=data, processing_class=tokenizer()
    )


def kto(model, folder, **changes):
    data = Dataset.from_dict(
        {"prompt": TEXTS, "completion": [" w7 w8 w9", " w4 w5"] * 2, "label": [True, False] * 2}
    )
    args = KTOConfig(**common(folder, **changes))
    return KTOTrainer(
        model=model, ref_model=llama(), args=args, train_dataset=data, processing_class=tokenizer()
    )


def reward(completions, **_):
    """The share of even words, so that completions of a group differ."""
    return [
        sum(int(word[1:]) % 2 == 0 for word in text.split() if word[1:].isdigit()) / 8
        for text in completions
    ]


SAMPLED = {
    "num_generations": 2,
    "max_completion_length": 8,
    "temperature": 0.9,
    "beta": 0.1,
}


def grpo(model, folder, trainer_class=GRPOTrainer, config_class=GRPOConfig, **changes):
    model.save_pretrained(folder / "model")  # where the trainer loads the reference model from
    return trainer_class(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder / "model"),
        reward_funcs=reward,
        args=config_class(**common(folder, **SAMPLED, **changes)),
        train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tokenizer(),
    )


def rloo(model, folder, **changes):
    return grpo(model, folder, RLOOTrainer, RLOOConfig, **changes)


RUNS = {
    "SFT": (sft, {}),
    "SFT packed": (sft, {"packing": True}),
    "SFT accumulated": (sft, {"gradient_accumulation_steps": 2}),
    "SFT dft": (sft, {"loss_type": "dft"}),
    "DPO": (dpo, {}),
    "DPO wpo": (dpo, {"use_weighting": True}),
    "KTO": (kto, {}),
    "GRPO": (grpo, {}),
    "RLOO": (rloo, {}),
}


def run(make, model, folder, changes):
    torch.manual_seed(0)
    trainer = make(model, folder, **changes)
    trainer.train()
    return trainer


def numbers(trainer):
    """Everything that the trainer logged, but times."""
    return [
        {
            name: value
            for name, value in entry.items()
            if "time" not in name and "runtime" not in name and "per_second" not in name
        }
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize("name", RUNS)
def test_trainers_log_and_learn_the_same(name, tmp_path):
    make, changes = RUNS[name]
    expected = run(make, llama(), tmp_path / "theirs", changes)
    with adapters.trl() as adapter:
        actual = run(make, llama(), tmp_path / "ours", changes)
    assert adapter.calls >= 2 * changes.get("gradient_accumulation_steps", 1)
    assert len(losses(expected)) == 2
    for mine, other in zip(numbers(actual), numbers(expected), strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5, nan_ok=True)
    for parameter, value in expected.model.named_parameters():
        mine = dict(actual.model.named_parameters())[parameter]
        torch.testing.assert_close(mine, value, rtol=1e-3, atol=1e-5)


def test_a_patched_model_is_active_in_sft_trainer_and_no_warning_says_otherwise(tmp_path):
    expected = run(sft, llama(), tmp_path / "plain", {})
    model = cce_patch(llama())
    with adapters.trl() as adapter:
        actual = run(sft, model, tmp_path / "patched", {})  # a warning would be an error
    assert adapter.calls == 2
    assert losses(actual) == pytest.approx(losses(expected), rel=1e-5)


def test_calls_stop_when_the_adapter_is_removed(tmp_path):
    adapter = adapters.trl()
    run(sft, llama(), tmp_path / "first", {})
    calls = adapter.calls
    assert calls == 2
    adapter.remove()
    assert trl_utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    run(sft, llama(), tmp_path / "second", {})
    assert adapter.calls == calls
