"""The command line that a file of measurements keeps."""

import json
import sys

import pytest

from cut_cross_entropy.benchmark import __main__ as benchmark
from cut_cross_entropy.benchmark.output import command_line
from experiments.comparison import machine


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "gemma2", "--json", "/data/out/x.json"], "--data gemma2"),
        (["--csv=/data/x.csv", "--repetitions", "3"], "--repetitions 3"),
        (["--file", "/data/heads/smollm2.pt", "./qwen.pt"], "--file smollm2.pt qwen.pt"),
        (["--peer", "apple=/data/apple", "trl=~/trl"], "--peer apple=apple trl=trl"),
        (["--model", "nobody/no-model-of-this-name"], "--model nobody/no-model-of-this-name"),
        (
            ["--learning-rate", "5e-5", "--commit", "1d101d9"],
            "--learning-rate 5e-5 --commit 1d101d9",
        ),
        (["--json"], ""),
    ],
)
def test_a_command_is_kept_without_paths(arguments, expected):
    assert command_line("run", arguments) == f"run {expected}".strip()


def test_a_relative_path_that_exists_is_kept_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.gguf").touch()
    assert command_line("run", ["--model", "out/model.gguf"]) == "run --model model.gguf"


def test_records_of_experiments_keep_no_path(monkeypatch):
    arguments = ["/data/runs/finetune.py", "--model", "/data/x.gguf", "--out", "/data/out"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert machine("cpu", "1d101d9")["command"] == "finetune --model x.gguf"


def test_files_of_the_benchmark_keep_no_path(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    arguments = ["--data", "gpt2", "--one-process", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    monkeypatch.setattr(benchmark, "tasks", lambda *given: [])
    benchmark.main(arguments)
    expected = "python -m benchmark --data gpt2 --one-process"
    assert json.loads(path.read_text())["command"] == expected
