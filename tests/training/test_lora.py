"""Adapters train as without the patch, are saved alone, and resume to the last bit."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.training.test_resume import logged_losses
from tests.training.test_run import rows_of
from training import models
from training.models import load_model
from training.train import main

peft = pytest.importorskip("peft")

TIED = "ignore:(Model has `tie_word_embeddings=True`|Setting `save_embedding_layers`)"
LORA = ["--lora", "4"]
BNB = "bitsandbytes"


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--lora-head"],
        ["--lora-targets", "q_proj", "--lora-alpha", "2", "--lora-head"],
        ["--gradient-checkpointing"],
    ],
    ids=" ".join,
)
@pytest.mark.filterwarnings(TIED)
def test_losses_are_those_of_full_logits(arguments, tmp_path, extra):
    found = {}
    for loss in ("full", "chunked"):
        output = tmp_path / loss
        words = [*LORA, *extra, "--loss", loss, "--output", str(output), "--no-export"]
        assert main([*arguments, *words]) == 0
        found[loss] = [float(row["loss"]) for row in rows_of(output)]
    assert len(found["full"]) == 10
    assert found["chunked"] == pytest.approx(found["full"], abs=1e-4)
    assert found["full"][-1] < found["full"][0] - 0.01


@pytest.mark.parametrize("extra", [[], ["--lora-head"]], ids=" ".join)
@pytest.mark.filterwarnings(TIED)
def test_resumed_losses_are_bit_identical(arguments, tmp_path, extra):
    common = [*arguments, *LORA, *extra]
    assert main([*common, "--output", str(tmp_path / "whole")]) == 0
    assert main([*common, "--steps", "4"]) == 0
    assert main([*common, "--resume"]) == 0
    assert logged_losses(tmp_path / "run") == logged_losses(tmp_path / "whole")
    name = "model/adapter_model.safetensors"
    parts, whole = (load_file(tmp_path / run / name) for run in ("run", "whole"))
    assert parts.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in parts.items())


FOUR_BITS = [*LORA, "--load-in-4bit"]


@pytest.mark.filterwarnings(TIED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("extra", [[], ["--lora-head"]], ids=" ".join)
def test_four_bits(arguments, tmp_path, capfd, extra):
    found = {}
    for loss, steps in (("full", "10"), ("chunked", "5")):
        output = tmp_path / loss
        words = [*arguments, *FOUR_BITS, *extra, "--loss", loss, "--output", str(output)]
        assert main([*words, "--steps", steps, "--no-export"]) == 0
        assert main([*words, "--resume", "auto"]) == 0
        found[loss] = [float(row["loss"]) for row in rows_of(output)]
    assert len(found["full"]) == 10
    assert found["chunked"] == pytest.approx(found["full"], abs=1e-4)
    assert found["full"][-1] < found["full"][0] - 0.01
    # Packed weights are counted by their elements, and take other values than the model's own.
    base = 256 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32) + 5 * 32
    trained = 4 * (2 * (64 + 48 + 48 + 64 + 3 * 96) + (32 + 256) * bool(extra))
    assert f"{base + trained:,} parameters, {trained:,} of them" in capfd.readouterr().out
    unquantized = [*arguments, *LORA, *extra, "--steps", "1", "--output", str(tmp_path / "32")]
    assert main([*unquantized, "--no-export"]) == 0
    assert abs(float(rows_of(tmp_path / "32")[0]["loss"]) - found["full"][0]) > 1e-5


def test_four_bits_need_their_package(arguments, capsys, monkeypatch):
    found = models.importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda name: found(name) if name != BNB else None
    )
    assert main([*arguments, *FOUR_BITS]) == 2
    assert capsys.readouterr().err == (
        "train.py: error: --load-in-4bit needs a package: pip install bitsandbytes\n"
    )


def test_four_bits_of_a_gguf_file_are_refused(arguments, gguf_file, capsys):
    assert main([*arguments, *FOUR_BITS, "--model", str(gguf_file)]) == 2
    assert "--load-in-4bit takes no .gguf file; save the model" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_only_adapters_are_trained_and_exported(arguments, model_folder, tmp_path, capsys):
    assert main([*arguments, *LORA, "--steps", "3"]) == 0
    # Rank 4 on layers of the shapes 32 -> 32, 16, 16, 32 and 32 -> 64, 64, 64 -> 32, twice.
    trained = 4 * 2 * (64 + 48 + 48 + 64 + 3 * 96)
    assert f", {trained:,} of them trained in adapters of rank 4\n" in capsys.readouterr().out
    folder = tmp_path / "run/model"
    saved = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved)
    assert sum(value.numel() for value in saved.values()) == trained
    assert not (folder / "model.safetensors").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 16

    base, _ = load_model(str(model_folder), torch.float32, torch.device("cpu"))
    start = base.model.layers[0].self_attn.q_proj.weight.clone()
    loaded = peft.PeftModel.from_pretrained(base, folder)
    layer = loaded.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.base_layer.weight, start)
    assert layer.lora_B["default"].weight.abs().max() > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--lora", "0"], "--lora must be at least 1, got 0"),
        (["--lora-head"], "--lora-targets and --lora-head need --lora RANK"),
        (["--load-in-4bit"], "--load-in-4bit needs --lora RANK"),
        ([*FOUR_BITS, "--from-scratch"], "--load-in-4bit needs --lora RANK, and weights to"),
        ([*LORA, "--fsdp"], "--lora excludes --fsdp and --deepspeed"),
        (
            [*LORA, "--lora-targets", "q_proj", "nope"],
            "--lora-targets: the model has no layer 'nope'",
        ),
        ([*LORA, "--lora-targets", "norm"], "--lora-targets norm: Target module LlamaRMSNorm"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_named(arguments, tmp_path, capsys, changed, message):
    assert main([*arguments, *changed]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_missing_package_is_named(arguments, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main([*arguments, *LORA]) == 2
    assert capsys.readouterr().err == (
        "train.py: error: --lora needs a package: pip install peft\n"
    )


def test_rank_of_a_resumed_run_is_fixed(arguments, capsys):
    assert main([*arguments, *LORA, "--steps", "1", "--no-export"]) == 0
    assert main([*arguments, "--lora", "8", "--resume"]) == 2
    assert "--lora must be 4, as in the run that is resumed, got 8" in capsys.readouterr().err
