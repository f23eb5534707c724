"""Settings of DeepSpeed for the precision of a run."""

import importlib.metadata
import json
from pathlib import Path

import pytest

from training.trainer_arguments import deepspeed_settings

ZERO3 = str(Path(__file__).parents[2] / "training/zero3.json")


@pytest.fixture
def file(tmp_path):
    def write(settings):
        path = tmp_path / "deepspeed.json"
        path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("dtype", "enabled"), [("autocast", True), ("float32", False), ("bfloat16", False)]
)
def test_autocast_follows_the_dtype(dtype, enabled):
    """The weights of ``--dtype autocast`` are float32 under ZeRO-3, as on one GPU."""
    settings, trainer_does = deepspeed_settings(ZERO3, dtype)
    assert settings["torch_autocast"] == {"enabled": enabled, "dtype": "bfloat16"}
    assert settings["bf16"] == {"enabled": "auto"}, "for the Trainer to fill in"
    assert trainer_does is False


@pytest.mark.parametrize("written", [{}, {"torch_autocast": {"enabled": False}}], ids=str)
def test_files_of_others_keep_their_mode(file, written):
    assert deepspeed_settings(file(written), "autocast") == (written, True)
    assert deepspeed_settings(file(written), "float32") == (written, False)


def test_autocast_that_a_file_demands(file):
    written = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
    assert deepspeed_settings(file(written), "float32") == (written, False)


def test_files_that_are_no_configuration(file):
    with pytest.raises(ValueError, match="is not valid JSON"):
        deepspeed_settings(file("{"), "float32")
    with pytest.raises(ValueError, match="must hold an object, got list"):
        deepspeed_settings(file([1]), "float32")
    with pytest.raises(FileNotFoundError, match=r"no file 'missing\.json'"):
        deepspeed_settings("missing.json", "float32")


@pytest.mark.parametrize(
    ("version", "fits"),
    [("0.15.1", False), ("0.17.1", False), ("0.17.2", True), ("0.19.8+x", True)],
)
def test_releases_that_pass_over_autocast_are_refused(version, fits, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    assert deepspeed_settings(ZERO3, "float32")
    if fits:
        assert deepspeed_settings(ZERO3, "autocast")[0]["torch_autocast"]["enabled"]
    else:
        with pytest.raises(ImportError, match=rf"needs DeepSpeed 0\.17\.2 or newer, got {version}"):
            deepspeed_settings(ZERO3, "autocast")
