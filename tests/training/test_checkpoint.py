"""Checkpoints are complete or not there."""

import errno
import json
import resource
import shutil
import sys

import pytest

from training import checkpoint
from training.checkpoint import (
    CheckpointError,
    abandon_checkpoint,
    checkpoint_folder,
    clear_step,
    commit_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    verify_checkpoint,
)


def save(root, step, keep=1, content=b"weights" * 100, best=None):
    """As the trainer does it."""
    try:
        clear_step(root, step)
        partial = checkpoint_folder(root, step)
        partial.mkdir(parents=True)
        (partial / "model.safetensors").write_bytes(content)
        (partial / "sub").mkdir()
        (partial / "sub/optimizer.pt").write_bytes(content[::-1])
        return commit_checkpoint(root, step, keep, best)
    except OSError as error:
        raise abandon_checkpoint(root, step, error) from error


def test_what_is_saved_verifies(tmp_path):
    folder = save(tmp_path, 7)
    assert folder == latest_checkpoint(tmp_path) == tmp_path / "checkpoint-7"
    verify_checkpoint(folder)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted(files) == ["model.safetensors", "sub/optimizer.pt"]


def test_only_the_newest_and_the_best_stay(tmp_path):
    for step in (8, 9, 10, 11, 100):
        save(tmp_path, step, keep=2, best=tmp_path / "checkpoint-9")
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["checkpoint-9", "checkpoint-11", "checkpoint-100"]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_run_resumed_from_an_older_one_keeps_what_it_writes(tmp_path):
    """The newer ones of the run before do not count, and stay."""
    for step in (8, 10):
        save(tmp_path, step, keep=2)
    save(tmp_path, 9, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


def test_a_step_that_is_written_again_is_no_checkpoint_meanwhile(tmp_path):
    """Files of both would be mixed under the sums of the first."""
    save(tmp_path, 1)
    clear_step(tmp_path, 1)
    assert list_checkpoints(tmp_path) == []
    assert not (tmp_path / "checkpoint-1").exists()


def test_same_step_again_replaces(tmp_path):
    save(tmp_path, 1, content=b"old")
    folder = save(tmp_path, 1, content=b"new")
    assert (folder / "model.safetensors").read_bytes() == b"new"
    verify_checkpoint(folder)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["model.safetensors", "sub/optimizer.pt"])
@pytest.mark.parametrize(
    ("damage", "what"),
    [(flip_a_bit, "has changed"), (truncate, "bytes"), (lambda path: path.unlink(), "missing")],
    ids=["bit", "truncated", "missing"],
)
def test_damaged_file_is_named(tmp_path, name, damage, what):
    save(tmp_path, 1, keep=2)
    folder = save(tmp_path, 2, keep=2)
    damage(folder / name)
    with pytest.raises(CheckpointError, match=r"is damaged: .*Nothing was loaded") as error:
        verify_checkpoint(folder)
    message = str(error.value)
    assert str(folder) in message
    assert name in message
    assert what in message
    assert str(tmp_path / "checkpoint-1") in message


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b'{"format": 2, "files": {"a": {}}}'], ids=repr
)
def test_damaged_manifest_is_named(tmp_path, content):
    folder = save(tmp_path, 1)
    manifest = folder / "manifest.json"
    manifest.unlink() if content is None else manifest.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged: manifest\.json"):
        verify_checkpoint(folder)


def test_other_format_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    with pytest.raises(CheckpointError, match="format 1, this code reads 2"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("failing", ["_sync", "write", "rename"])
def test_failed_write_leaves_what_was_there(tmp_path, monkeypatch, failing):
    before = save(tmp_path, 1)

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "rename":
        monkeypatch.setattr("pathlib.Path.rename", fail)
    elif failing == "write":
        monkeypatch.setattr("pathlib.Path.write_text", fail)
    else:
        monkeypatch.setattr(checkpoint, failing, fail)
    with pytest.raises(CheckpointError, match=r"No space left on device; the checkpoint .* intact"):
        save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [before]
    verify_checkpoint(before)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are a Unix thing")
def test_file_that_the_system_refuses(tmp_path):
    before = save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write checkpoint"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [before]
    verify_checkpoint(before)


def test_what_a_killed_process_left_is_ignored_and_cleaned(tmp_path):
    before = save(tmp_path, 1)
    partial = tmp_path / "checkpoint-2"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) == before
    save(tmp_path, 3, keep=2)
    assert not partial.exists()
    assert before.exists()


def test_an_error_on_a_full_disk_says_so(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=123))
    error = abandon_checkpoint(tmp_path, 2, RuntimeError("unexpected pos"))
    assert "unexpected pos (123 bytes are left on the disk); the checkpoint" in str(error)
