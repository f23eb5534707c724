"""Checkpoints are complete or not there."""

import errno
import json
import random
import resource
import sys

import pytest
import torch

from training import checkpoint
from training.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


def parts(value=1.0):
    return {
        "model": {"weight": torch.full((1000,), value)},
        "progress": {"position": 3, "log": [{"step": 1, "loss": 0.1 + 0.2}]},
        "rng": {"python": random.getstate(), "cpu": torch.get_rng_state()},
    }


def test_what_is_saved_comes_back(tmp_path):
    saved = parts()
    folder = save_checkpoint(tmp_path, 7, saved, keep=1)
    assert folder == latest_checkpoint(tmp_path) == tmp_path / "step-00000007"
    loaded = load_checkpoint(folder)
    assert loaded.keys() == saved.keys()
    assert torch.equal(loaded["model"]["weight"], saved["model"]["weight"])
    assert loaded["progress"] == saved["progress"]
    assert loaded["rng"]["python"] == saved["rng"]["python"]


def test_only_the_newest_stay(tmp_path):
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, step, parts(), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000011"]
    assert len(list(tmp_path.iterdir())) == 2


def test_same_step_again_replaces(tmp_path):
    save_checkpoint(tmp_path, 1, parts(1.0), keep=1)
    folder = save_checkpoint(tmp_path, 1, parts(2.0), keep=1)
    assert load_checkpoint(folder)["model"]["weight"][0] == 2.0


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["model.pt", "progress.pt", "rng.pt"])
@pytest.mark.parametrize(
    ("damage", "what"),
    [(flip_a_bit, "has changed"), (truncate, "bytes"), (lambda path: path.unlink(), "missing")],
    ids=["bit", "truncated", "missing"],
)
def test_damaged_file_is_named_and_nothing_is_loaded(tmp_path, monkeypatch, name, damage, what):
    save_checkpoint(tmp_path, 1, parts(), keep=2)
    folder = save_checkpoint(tmp_path, 2, parts(), keep=2)
    damage(folder / name)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("something was loaded"))
    with pytest.raises(CheckpointError, match=r"is damaged: .*Nothing was loaded") as error:
        load_checkpoint(folder)
    message = str(error.value)
    assert str(folder) in message
    assert name in message
    assert what in message
    assert str(tmp_path / "step-00000001") in message


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b'{"format": 1, "files": {"a": {}}}'], ids=repr
)
def test_damaged_manifest_is_named(tmp_path, content):
    folder = save_checkpoint(tmp_path, 1, parts(), keep=1)
    manifest = folder / "manifest.json"
    manifest.unlink() if content is None else manifest.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged: manifest\.json"):
        load_checkpoint(folder)


def test_other_format_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path, 1, parts(), keep=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(CheckpointError, match="format 2, this code reads 1"):
        load_checkpoint(folder)


@pytest.mark.parametrize("failing", ["first", "last", "manifest", "rename"])
def test_failed_write_leaves_what_was_there(tmp_path, monkeypatch, failing):
    before = save_checkpoint(tmp_path, 1, parts(1.0), keep=1)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_):
        raise full

    if failing in ("first", "last"):
        write_part, written = checkpoint._write_part, []

        def write(path, part):
            if failing == "first" or len(written) == 2:
                path.write_bytes(b"half")
                fail()
            written.append(path)
            return write_part(path, part)

        monkeypatch.setattr(checkpoint, "_write_part", write)
    elif failing == "manifest":
        monkeypatch.setattr(checkpoint, "_write_synced", fail)
    else:
        monkeypatch.setattr("pathlib.Path.rename", fail)

    with pytest.raises(CheckpointError, match=r"No space left on device; the checkpoint .* intact"):
        save_checkpoint(tmp_path, 2, parts(2.0), keep=1)
    assert list(tmp_path.iterdir()) == [before]
    assert load_checkpoint(before)["model"]["weight"][0] == 1.0


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are a Unix thing")
def test_file_that_the_system_refuses(tmp_path):
    before = save_checkpoint(tmp_path, 1, parts(), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write checkpoint"):
            save_checkpoint(tmp_path, 2, parts(), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [before]
    load_checkpoint(before)


def test_what_a_killed_process_left_is_ignored_and_cleaned(tmp_path):
    before = save_checkpoint(tmp_path, 1, parts(), keep=1)
    partial = tmp_path / ".partial-step-00000002"
    partial.mkdir()
    (partial / "model.pt").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) == before
    save_checkpoint(tmp_path, 3, parts(), keep=2)
    assert not partial.exists()
    assert before.exists()
