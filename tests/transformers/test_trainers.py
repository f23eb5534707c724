"""The patch inside Trainer, TRL's SFTTrainer and accelerate."""

import copy
import gc

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from cut_cross_entropy.transformers import (
    CutCrossEntropyWarning,
    call_count,
    cce_patch,
    is_patched,
)
from tests.transformers.models import VOCAB, assert_same_step, batch, llama, loss_and_grads

# What these packages warn about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Rows(torch.utils.data.Dataset):
    """Rows of different lengths in labels, so that batches count different numbers of tokens."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = {name: value[0] for name, value in batch(1, seed=index).items()}
        row["labels"][: 1 + index] = -100
        return row


def train(model, tmp_path, **changes):
    args = TrainingArguments(
        output_dir=str(tmp_path),
        **(
            {
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "max_steps": 3,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "report_to": [],
                "use_cpu": True,
                "save_strategy": "no",
                "disable_tqdm": True,
                "seed": 0,
            }
            | changes
        ),
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Rows(),
        eval_dataset=Rows(),
        compute_metrics=metrics,
    )
    trainer.train()
    return trainer


def metrics(prediction):
    picked = prediction.predictions.argmax(-1)[:, :-1]
    labels = prediction.label_ids[:, 1:]
    return {
        "accuracy": float((picked == labels)[labels != -100].mean()),
        "logit": float(prediction.predictions.mean()),
    }


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_with_gradient_accumulation(tmp_path):
    plain, patched = llama(), cce_patch(llama())
    expected = train(plain, tmp_path / "plain")
    actual = train(patched, tmp_path / "patched")
    assert expected.model_accepts_loss_kwargs  # num_items_in_batch is passed
    assert actual.model_accepts_loss_kwargs
    assert call_count(patched) == 6
    assert losses(actual) == pytest.approx(losses(expected), rel=1e-4)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(patched.get_parameter(name), parameter, rtol=1e-3, atol=1e-4)


def test_trainer_in_bf16(tmp_path):
    plain, patched = llama(), cce_patch(llama())
    expected = train(plain, tmp_path / "plain", bf16=True)
    actual = train(patched, tmp_path / "patched", bf16=True)
    assert call_count(patched) == 6
    assert losses(actual) == pytest.approx(losses(expected), rel=5e-3)
    assert is_patched(actual.accelerator.unwrap_model(actual.model_wrapped))


@pytest.mark.parametrize("changes", [{}, {"bf16_full_eval": True}], ids=["float32", "bf16"])
def test_trainer_evaluates_with_metrics(tmp_path, changes):
    model = llama()
    plain = train(
        copy.deepcopy(model), tmp_path / "plain", max_steps=1, learning_rate=0.0, **changes
    )
    cce_patch(model)
    patched = train(model, tmp_path / "patched", max_steps=1, learning_rate=0.0, **changes)
    expected, actual = plain.evaluate(), patched.evaluate()
    for name in ("eval_loss", "eval_accuracy", "eval_logit"):
        assert actual[name] == pytest.approx(expected[name], rel=2e-2 if changes else 1e-5)
    assert call_count(model) > 2


def test_trainer_with_label_smoothing_is_an_ordinary_call(tmp_path):
    model = cce_patch(llama())
    expected = train(llama(), tmp_path / "plain", label_smoothing_factor=0.1)
    actual = train(model, tmp_path / "patched", label_smoothing_factor=0.1)
    assert losses(actual) == pytest.approx(losses(expected), rel=1e-4)


def test_trainer_saves_and_loads(tmp_path):
    model = cce_patch(llama())
    trainer = train(model, tmp_path / "run")
    trainer.save_model(str(tmp_path / "saved"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(loaded) is transformers.LlamaForCausalLM
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    expected = loss_and_grads(loaded.train())
    assert_same_step(expected, loss_and_grads(model.train()))


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(3, VOCAB)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    fast = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


class PatchedSFTTrainer(SFTTrainer):
    """Ask the model for its own loss."""

    compute_loss = Trainer.compute_loss


def sft(model, tmp_path, trainer_class=SFTTrainer, **changes):
    texts = [" ".join(f"w{3 + (7 * i + j) % 120}" for j in range(8)) for i in range(4)]
    trainer = trainer_class(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            logging_steps=1,
            learning_rate=1e-2,
            optim="sgd",  # Adam divides by gradients that may be nothing but rounding
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
            dataset_num_proc=None,
            **changes,
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
    )
    trainer.train()
    return trainer


def test_sft_trainer_trains_and_says_that_its_own_head_is_used(tmp_path):
    expected = sft(llama(), tmp_path / "plain")
    model = cce_patch(llama())
    with pytest.warns(CutCrossEntropyWarning, match="for those calls the patch is idle"):
        actual = sft(model, tmp_path / "patched")
    assert losses(actual) == pytest.approx(losses(expected), rel=1e-5)
    assert call_count(model) == 0
    # Any other call of the trained model is patched still.
    assert model.train()(**batch()).logits is None
    assert call_count(model) == 1


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"packing": True}])
def test_sft_trainer_that_asks_the_model_for_its_loss_uses_the_patch(changes, tmp_path):
    expected = sft(llama(), tmp_path / "plain", **changes)
    model = cce_patch(llama())
    with pytest.warns(CutCrossEntropyWarning, match="fused head of its own"):
        actual = sft(model, tmp_path / "patched", PatchedSFTTrainer, **changes)
    assert losses(actual) == pytest.approx(losses(expected), rel=1e-5)
    assert call_count(model) >= 2 * changes.get("gradient_accumulation_steps", 1)
    for name, parameter in expected.model.named_parameters():
        torch.testing.assert_close(
            dict(actual.model.named_parameters())[name], parameter, rtol=1e-4, atol=1e-6
        )


def test_patching_what_sft_trainer_has_prepared_says_so_too(tmp_path):
    trainer = sft(llama(), tmp_path)
    with pytest.warns(CutCrossEntropyWarning, match="fused head of its own"):
        cce_patch(trainer.model)
    assert trainer.model.train()(**batch()).logits is None


@pytest.fixture(params=["no", "bf16"])
def accelerator(request):
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True, mixed_precision=request.param)
    AcceleratorState._reset_state(True)
    gc.collect()


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_prepares(accelerator, when):
    expected = accelerator.prepare(llama())
    model = llama()
    if when == "before":
        model = accelerator.prepare(cce_patch(model))
    else:
        model = cce_patch(accelerator.prepare(model))
    bf16 = accelerator.mixed_precision == "bf16"
    tolerance = {"rtol": 0.05, "atol": 3e-3} if bf16 else {}
    assert_same_step(loss_and_grads(expected), loss_and_grads(model), **tolerance)
    assert call_count(model) == 1

    expected.eval(), model.eval()
    with torch.no_grad():
        real, logits = expected(**batch()).logits, model(**batch()).logits
    assert logits.dtype == real.dtype == torch.float32
    torch.testing.assert_close(logits + 0, real)

    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert is_patched(unwrapped)
    assert unwrapped.train()(**batch()).logits is None
    other = copy.deepcopy(unwrapped)
    assert other(**batch()).logits is None
    assert call_count(other) == 1
