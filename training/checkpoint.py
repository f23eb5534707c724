"""Checkpoints that are either complete or not there.

A checkpoint is a folder ``step-00000042`` with one file for each part and a manifest of their
sizes and SHA-256 sums. It is written under a temporary name and renamed when everything is on the
disk; only then do older ones go. Reading checks every sum before anything is loaded.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

FORMAT = 1
MANIFEST = "manifest.json"
_PREFIX = "step-"
_PARTIAL = ".partial-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is damaged."""


def save_checkpoint(root: Path, step: int, parts: Mapping[str, Any], keep: int) -> Path:
    """Write ``parts`` as the checkpoint of ``step`` and remove all but the ``keep`` newest.

    Args:
        root: folder of the checkpoints; made if missing.
        step: steps done.
        parts: what ``torch.save`` takes and ``torch.load(weights_only=True)`` gives back, by name.
        keep: complete checkpoints that stay, this one included; at least 1.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: it cannot be written (disk full, say). What was there before still is.
    """
    target = root / f"{_PREFIX}{step:08d}"
    partial = root / f"{_PARTIAL}{target.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_partial(root)
        partial.mkdir()
        files = {f"{name}.pt": _write_part(partial / f"{name}.pt", parts[name]) for name in parts}
        manifest = {"format": FORMAT, "step": step, "files": files}
        _write_synced(partial / MANIFEST, json.dumps(manifest, indent=2).encode())
        _sync_folder(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _sync_folder(root)
    except (OSError, RuntimeError) as error:  # torch.save wraps some I/O errors in RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        left = latest_checkpoint(root)
        kept = f"; the checkpoint {left} is intact" if left else ""
        raise CheckpointError(f"cannot write checkpoint {target}: {error}{kept}") from error
    for old in list_checkpoints(root)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The parts of the checkpoint in ``folder``, tensors on the CPU.

    Raises:
        CheckpointError: a file is missing or not as it was written; nothing has been loaded then.
    """
    manifest = _read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise _damaged(folder, f"{name} is missing")
        size = path.stat().st_size
        if size != expected["size"]:
            raise _damaged(folder, f"{name} has {size} bytes, written were {expected['size']}")
        if _sha256(path) != expected["sha256"]:
            raise _damaged(folder, f"the content of {name} has changed (SHA-256 differs)")
    return {
        name.removesuffix(".pt"): torch.load(folder / name, map_location="cpu", weights_only=True)
        for name in manifest["files"]
    }


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints in ``root``, oldest first."""
    return sorted(path for path in root.glob(f"{_PREFIX}*") if path.is_dir())


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint in ``root``, or None."""
    return next(reversed(list_checkpoints(root)), None)


def remove_partial(root: Path) -> None:
    """Remove what an earlier process left half-written."""
    for path in root.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        version, files = manifest["format"], manifest["files"]
        if version == FORMAT and not all({"size", "sha256"} <= set(f) for f in files.values()):
            raise ValueError("an entry lacks its size or sum")
    except FileNotFoundError as error:
        raise _damaged(folder, f"{MANIFEST} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read ({error})") from error
    if version != FORMAT:
        raise CheckpointError(f"checkpoint {folder} has format {version}, this code reads {FORMAT}")
    return manifest


def _damaged(folder: Path, what: str) -> CheckpointError:
    others = [str(path) for path in list_checkpoints(folder.parent) if path != folder]
    hint = f"; resume from another one: {', '.join(others)}" if others else ""
    return CheckpointError(f"checkpoint {folder} is damaged: {what}. Nothing was loaded{hint}")


class _HashingFile:
    """A file for ``torch.save`` that sums what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.file.write(data)
        self.sum.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _write_part(path: Path, part: Any) -> dict[str, Any]:
    with path.open("wb") as file:
        hashing = _HashingFile(file)
        torch.save(part, hashing)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    return {"size": hashing.size, "sha256": hashing.sum.hexdigest()}


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
