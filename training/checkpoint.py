"""Checkpoints that are either complete or not there.

A checkpoint is a folder ``checkpoint-42``, named after the steps done, of the files that the
trainer wrote, and a manifest of their sizes and SHA-256 sums. The manifest is written last, when
everything else is on the disk: a folder without it is not a checkpoint. Only then do older ones go.
Before a resume every sum is checked.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

FORMAT = 2
MANIFEST = "manifest.json"
ALMOST_FULL = 1 << 26
"""Bytes under which an error says how many are left."""

_PREFIX = "checkpoint-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is damaged."""


def checkpoint_folder(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint of ``step``."""
    return root / f"{_PREFIX}{step}"


def step_of(folder: Path) -> int:
    """Return the step of the checkpoint in ``folder``, from its name."""
    return int(folder.name.removeprefix(_PREFIX))


def is_complete(folder: Path) -> bool:
    """Tell whether ``folder`` is a checkpoint; :func:`verify_checkpoint` checks its content."""
    return (folder / MANIFEST).is_file()


def clear_step(root: Path, step: int) -> None:
    """Remove what is there of ``step``, the manifest first."""
    folder = checkpoint_folder(root, step)
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def commit_checkpoint(root: Path, step: int, keep: int, best: Path | None = None) -> Path:
    """Make the files written for ``step`` a checkpoint, and remove all older but ``keep - 1``.

    Args:
        root: folder of the checkpoints.
        step: names the checkpoint's folder.
        keep: complete checkpoints to keep, this one included; at least 1.
        best: one to keep in any case.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: it cannot be written; call :func:`abandon_checkpoint` then.
    """
    folder = checkpoint_folder(root, step)
    written = sorted(folder.rglob("*"))
    for path in (*written, folder, root):
        _sync(path)
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in written
        if path.is_file()
    }
    unfinished = folder / f".{MANIFEST}"
    manifest = {"format": FORMAT, "step": step, "files": files}
    unfinished.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    _sync(unfinished)
    unfinished.rename(folder / MANIFEST)
    _sync(folder)
    older = [path for path in list_checkpoints(root) if step_of(path) <= step]
    kept = {path.name for path in (*older[-keep:], best) if path is not None}
    for path in _folders(root):
        if step_of(path) < step and path.name not in kept:
            shutil.rmtree(path)
    return folder


def abandon_checkpoint(root: Path, step: int, error: BaseException) -> CheckpointError:
    """Remove the files written for ``step``; return the error to raise."""
    free = shutil.disk_usage(root).free if root.exists() else 0
    # Some writers only say that something went wrong.
    full = f" ({free} bytes are left on the disk)" if free < ALMOST_FULL else ""
    folder = checkpoint_folder(root, step)
    shutil.rmtree(folder, ignore_errors=True)
    left = latest_checkpoint(root)
    kept = f"; the checkpoint {left} is intact" if left else ""
    return CheckpointError(f"cannot write checkpoint {folder}: {error}{full}{kept}")


def verify_checkpoint(folder: Path) -> None:
    """Check every file of the checkpoint in ``folder`` against its manifest.

    Raises:
        CheckpointError: a file is missing or not as it was written.
    """
    for name, expected in _read_manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise _damaged(folder, f"{name} is missing")
        size = path.stat().st_size
        if size != expected["size"]:
            raise _damaged(folder, f"{name} has {size} bytes, written were {expected['size']}")
        if _sha256(path) != expected["sha256"]:
            raise _damaged(folder, f"the content of {name} has changed (SHA-256 differs)")


def list_checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoints in ``root``, oldest first."""
    return sorted(filter(is_complete, _folders(root)), key=step_of)


def latest_checkpoint(root: Path) -> Path | None:
    """Return the newest complete checkpoint in ``root``, or None."""
    return next(reversed(list_checkpoints(root)), None)


def _folders(root: Path) -> list[Path]:
    found = root.glob(f"{_PREFIX}*")
    return [p for p in found if p.is_dir() and p.name.removeprefix(_PREFIX).isdigit()]


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


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    # Windows syncs only files open for writing.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
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
