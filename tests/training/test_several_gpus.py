"""The same training in one process and in two: FSDP2, and embeddings whose rows are divided."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

from docs import training_runs
from docs.make import ROOT
from experiments import several_gpus

METHODS = [
    "full", "full_reordered", "full_fsdp2", "chunked_fsdp2", "chunked_vocab_parallel"
]  # fmt: skip


@pytest.fixture(scope="module")
def record(tmp_path_factory, model_folder):
    """The record of a model whose embeddings are scaled, next to other files of the run."""
    out = tmp_path_factory.mktemp("several")
    config = transformers.Gemma3TextConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config)
    with torch.no_grad():  # so that a wrong input shows
        model.get_input_embeddings().weight.mul_(10)
    model.save_pretrained(out / "gemma")
    for path in model_folder.glob("tokenizer*"):
        shutil.copy(path, out / "gemma")
    (out / "text.txt").write_text("All work and no play makes a dull test. " * 25)
    options = ["--smoke", "--device", "cpu", "--commit", "abc", "--out", out]
    options += ["--model", out / "gemma", "--text", out / "text.txt", "--methods", *METHODS]
    options += ["--batch-size", "4", "--steps", "4", "--warmup-steps", "0"]
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            *command,
            "experiments.several_gpus",
            *options,
            "--learning-rate=0.01",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("held_out_loss") == len(METHODS)  # the first process alone prints
    return out / "several_gpus_gemma_cpu.json"


def test_several_processes_train_as_one(record):
    content = json.loads(record.read_text())
    assert content["settings"]["processes"] == 2
    runs = {run["method"]: run for run in content["runs"]}
    assert list(runs) == METHODS
    full = runs["full"]
    start, end = content["before"]["held_out_loss"], full["judged"][-1]["held_out_loss"]
    assert end < start - 0.5
    for run in runs.values():  # autocast computes in bfloat16; each step adds differences
        assert run["losses"][:3] == pytest.approx(full["losses"][:3], abs=0.02)
        assert run["losses"] == pytest.approx(full["losses"], abs=0.04)
        assert run["judged"][-1]["held_out_loss"] == pytest.approx(end, abs=0.02)


def test_tables_of_the_record(record):
    text = training_runs.section("several_gpus", training_runs.read(record.parent))
    assert text.startswith("### gemma on 2 processes")
    assert text.count("\n| `chunked_vocab_parallel` | 1 |") == 1


@pytest.mark.parametrize("option", [["--time-limit", "9"], ["--largest"], ["--resume"]])
def test_what_processes_would_decide_differently_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        several_gpus.main(option)
    assert f"{option[0]} is not possible with several processes" in capsys.readouterr().err
