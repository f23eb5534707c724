"""Models, tokenizers and data that do not fit together are named before the first step."""

import json

import pytest
import torch
import transformers

from tests.training.conftest import copy_model
from training.train import main


@pytest.fixture
def learned_positions(model_folder, tmp_path):
    """A model with 32 embedded positions, which has none for a longer sequence."""
    folder = tmp_path / "gpt2"
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    tokenizer.save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return ["--model", str(folder)]


@pytest.fixture
def few_positions(model_folder, tmp_path):
    """A model with rotary positions that was made for 8 of them."""
    return ["--model", str(copy_model(model_folder, tmp_path, max_position_embeddings=8))]


@pytest.mark.parametrize(
    "extra",
    [[], ["--streaming"], ["--streaming", "--isolate-documents"], ["--no-packing"]],
    ids=" ".join,
)
def test_a_sequence_longer_than_embedded_positions_is_refused(
    arguments, learned_positions, capsys, extra
):
    words = [*arguments, *learned_positions, *extra, "--steps", "1", "--no-export"]
    assert main([*words, "--sequence-length", "33"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "train.py: error: --sequence-length must be at most the 32 positions of the model, got 33\n"
    )
    assert main([*words, "--sequence-length", "32"]) == 0


def test_short_documents_in_a_long_row_have_positions_enough(
    arguments, learned_positions, tmp_path
):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document {i:9}"}) for i in range(60)))
    words = [*arguments, *learned_positions, "--data", str(path), "--isolate-documents"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(learned_positions[1])
    tokenizer.eos_token = "a"  # documents end there
    tokenizer.save_pretrained(tmp_path / "end")
    words += ["--tokenizer", str(tmp_path / "end"), "--no-export", "--steps", "1"]
    assert main([*words, "--sequence-length", "64"]) == 0


def test_a_sequence_longer_than_rotary_positions_is_warned_of(
    arguments, few_positions, tmp_path, capsys
):
    words = [*arguments, *few_positions, "--steps", "4", "--no-export"]
    assert main([*words, "--sequence-length", "16"]) == 0
    assert capsys.readouterr().err == (
        "train.py: warning: --sequence-length 16 exceeds the 8 positions that the model was made "
        "for\n"
    )
    assert main([*words, "--sequence-length", "8", "--output", str(tmp_path / "8")]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("extra", [[], ["--streaming"], ["--no-packing"]], ids=" ".join)
def test_a_token_beyond_the_embedding_is_refused(arguments, model_folder, tmp_path, capsys, extra):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_tokens(["work"])
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    assert main([*arguments, "--tokenizer", str(folder), *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: --tokenizer gives --data ")
    assert error.endswith("the token id 256, but the embedding of --model has 256 rows\n")
    # From scratch the tokenizer decides the number of rows.
    scratch = ["--tokenizer", str(folder), *extra, "--from-scratch", "--steps", "1", "--no-export"]
    assert main([*arguments, *scratch]) == 0


def test_padding_beyond_the_embedding_is_not_looked_up(arguments, model_folder, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 256
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": "a" * (3 + i % 5)}) for i in range(20)))
    words = ["--tokenizer", str(tmp_path / "tokenizer"), "--data", str(path), "--no-packing"]
    assert main([*arguments, *words, "--steps", "2", "--no-export"]) == 0


def test_the_trial_of_a_configuration_changes_no_number(arguments, tmp_path):
    """The model has dropout, and a trial must not draw from the generator."""
    losses = []
    for override in ([], ["--config-override", "num_hidden_layers=2"]):
        torch.rand(1)
        output = tmp_path / str(len(override))
        words = ["--from-scratch", *override, "--steps", "3", "--no-export"]
        assert main([*arguments, *words, "--output", str(output)]) == 0
        state = json.loads((output / "checkpoints/checkpoint-3/trainer_state.json").read_text())
        losses.append([row["loss"] for row in state["log_history"] if "loss" in row])
    assert losses[0] == losses[1]
