"""Held-out loss and perplexity, the best model, the console and TensorBoard."""

import dataclasses
import json
import math

import pytest
import torch
import transformers

from training.checkpoint import list_checkpoints
from training.losses import CutLogits, FullLogits
from training.models import load_model
from training.packing import IGNORED
from training.train import main, set_up

EVAL = ["--eval-fraction", "0.15", "--batch-size", "4"]


def ragged_batch():
    """Sequences of several lengths, some of whose tokens are a prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(256, (3, 12), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :5] = labels[2, 7:] = IGNORED
    mask[2, 7:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@pytest.mark.parametrize("loss", [FullLogits(), CutLogits("chunked"), CutLogits("reference")])
def test_token_losses(loss, model_folder):
    model = load_model(str(model_folder), torch.float32, None)[0].eval()
    batch = ragged_batch()
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none"
    )
    loss.prepare(model)
    losses = loss.token_losses(model, batch)
    assert losses.shape == (3, 11)
    torch.testing.assert_close(losses, expected)
    # And the model is ready for the next step: its loss is a mean again.
    mean = model.train(False)(**batch).loss
    torch.testing.assert_close(mean, expected.sum() / (batch["labels"][:, 1:] != IGNORED).sum())


@pytest.mark.parametrize("dtype", ["float32", "autocast"])
@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_every_held_out_token_counts_the_same(config, tmp_path, loss, dtype):
    # Nine sequences in batches of 8: a mean of the batches' means would be another number.
    config = dataclasses.replace(config, eval_fraction=0.15, loss=loss, dtype=dtype, steps=4)
    config = dataclasses.replace(config, output=str(tmp_path))
    trainer = set_up(config).trainer
    trainer.train()
    metrics = trainer.evaluate()
    rows = torch.stack([row["input_ids"] for row in trainer.eval_dataset.rows])
    assert len(rows) == 9
    assert metrics["eval_tokens"] == 9 * 15
    plain = load_model(str(tmp_path / "checkpoints/checkpoint-4"), torch.float32, None)[0].eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        logits = plain(rows).logits[:, :-1].float().transpose(1, 2)
    expected = float(torch.nn.functional.cross_entropy(logits, rows[:, 1:]))
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-5 if dtype == "float32" else 5e-3)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))


def test_evaluation_changes_no_number_of_the_training(arguments, tmp_path):
    trained = []
    for name, held_out in (("with", True), ("without", False)):
        output = tmp_path / name
        path = tmp_path / "held_out.txt"
        path.write_text("Other words than those before. " * 20)
        extra = ["--eval-data", str(path)] if held_out else []
        assert main([*arguments, *extra, "--output", str(output), "--no-export"]) == 0
        state = json.loads((output / "checkpoints/checkpoint-10/trainer_state.json").read_text())
        trained.append([row["loss"] for row in state["log_history"] if "loss" in row])
    assert len(trained[0]) == 10
    assert trained[0] == trained[1]


@pytest.fixture
def unlike(tmp_path):
    """Held-out text of letters that training never shows: its loss rises while training goes on."""
    path = tmp_path / "unlike.txt"
    path.write_text("QXZ#+QZX$QX" * 20)
    fast = ["--learning-rate", "0.05", "--checkpoint-interval", "3", "--keep-checkpoints", "1"]
    return ["--eval-data", str(path), *fast]


def test_the_best_stays_and_is_exported(arguments, unlike, tmp_path, capsys):
    assert main([*arguments, *unlike, "--steps", "15"]) == 0
    folder = tmp_path / "run/checkpoints"
    newest = list_checkpoints(folder)[-1]
    assert newest.name == "checkpoint-15"
    state = json.loads((newest / "trainer_state.json").read_text())
    losses = {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert best < 15
    assert [path.name for path in list_checkpoints(folder)] == [f"checkpoint-{best}", newest.name]
    exported, kept = (
        transformers.AutoModelForCausalLM.from_pretrained(path)
        for path in (tmp_path / "run/model", folder / f"checkpoint-{best}")
    )
    for name, value in exported.state_dict().items():
        assert torch.equal(value, kept.state_dict()[name]), name
    printed = capsys.readouterr().out
    assert (
        f"held-out loss {losses[best]:.6f}, perplexity {math.exp(losses[best]):.3f} of " in printed
    )


def test_best_survives_a_resume(arguments, unlike, tmp_path):
    extra = [*unlike, "--no-export"]
    assert main([*arguments, *extra, "--steps", "9"]) == 0
    before = list_checkpoints(tmp_path / "run/checkpoints")[0].name
    assert before != "checkpoint-9"
    assert main([*arguments, *extra, "--steps", "15", "--resume"]) == 0
    names = [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")]
    assert names == [before, "checkpoint-15"]


def test_tensorboard(arguments, tmp_path):
    event = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    on = [word for word in arguments if word != "--no-tensorboard"]
    assert main([*on, *EVAL, "--steps", "4", "--no-export"]) == 0
    read = event.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    expected = {"train/loss", "train/learning_rate", "train/tokens_per_second"}
    assert expected | {"eval/loss", "eval/perplexity"} <= set(read.Tags()["scalars"])
    assert not {"train/train_loss", "train/total_flos"} & set(read.Tags()["scalars"])
    assert "args/text_summary" in read.Tags()["tensors"]  # the hyperparameters
    assert [scalar.step for scalar in read.Scalars("train/loss")] == [1, 2, 3, 4]


def test_pretraining_from_scratch(arguments, model_folder, tmp_path):
    extra = ["--from-scratch", "--config-override", "num_hidden_layers=1", "hidden_size=16"]
    assert main([*arguments, *extra, "--steps", "4"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert model.config.num_hidden_layers == 1
    assert model.lm_head.weight.shape == (256, 16)
    again = [*arguments, *extra, "--steps", "4", "--output", str(tmp_path / "again")]
    assert main(again) == 0
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again/model")
    assert torch.equal(model.lm_head.weight, other.lm_head.weight)  # the seed decides the start


def test_the_vocabulary_of_another_tokenizer(gguf_file, model_folder):
    model, tokenizer = load_model(
        str(gguf_file), torch.float32, None, tokenizer_source=str(model_folder), from_scratch=True
    )
    assert model.lm_head.weight.shape[0] == len(tokenizer) == 256
