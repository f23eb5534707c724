"""Checkpoints that are either complete or not there.

A checkpoint is a folder ``checkpoint-42``, named after the steps done, of whatever files the
trainer writes, and a manifest of their sizes and SHA-256 sums. It is written under a temporary name
and renamed when everything is on the disk; only then do older ones go. Before a resume every sum
is checked.
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
_PARTIAL = ".partial-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is damaged."""


def begin_checkpoint(root: Path, step: int) -> Path:
    """The folder that the files of ``step`` are written to; what was half-written before goes."""
    root.mkdir(parents=True, exist_ok=True)
    remove_partial(root)
    partial = partial_folder(root, step)
    partial.mkdir()
    return partial


def partial_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is while it is written."""
    return root / f"{_PARTIAL}{_PREFIX}{step}"


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is when it is complete."""
    return root / f"{_PREFIX}{step}"


def commit_checkpoint(root: Path, step: int, keep: int, best: Path | None = None) -> Path:
    """Make what was written for ``step`` the checkpoint, and remove all but the ``keep`` newest.

    Args:
        root: folder of the checkpoints.
        step: as :func:`begin_checkpoint` had it.
        keep: complete checkpoints that stay, this one included; at least 1.
        best: one that stays in any case.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: it cannot be written; call :func:`abandon_checkpoint` then.
    """
    partial, target = partial_folder(root, step), checkpoint_folder(root, step)
    names = sorted(str(p.relative_to(partial)) for p in partial.rglob("*") if p.is_file())
    files = {name: _sync_and_sum(partial / name) for name in names}
    manifest = {"format": FORMAT, "step": step, "files": files}
    _write_synced(partial / MANIFEST, json.dumps(manifest, indent=2).encode())
    _sync_folder(partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _sync_folder(root)
    for old in list_checkpoints(root)[:-keep]:
        if best is None or old.name != best.name:
            shutil.rmtree(old)
    return target


def abandon_checkpoint(root: Path, step: int, error: BaseException) -> CheckpointError:
    """Remove what was written for ``step``; the error to raise, which names what is left."""
    free = shutil.disk_usage(root).free if root.exists() else 0
    # Some writers only say that something went wrong.
    full = f" ({free} bytes are left on the disk)" if free < ALMOST_FULL else ""
    shutil.rmtree(partial_folder(root, step), ignore_errors=True)
    left = latest_checkpoint(root)
    kept = f"; the checkpoint {left} is intact" if left else ""
    return CheckpointError(
        f"cannot write checkpoint {checkpoint_folder(root, step)}: {error}{full}{kept}"
    )


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
    """The checkpoints in ``root``, oldest first."""
    found = [p for p in root.glob(f"{_PREFIX}*") if p.is_dir() and p.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


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


def _sync_and_sum(path: Path) -> dict[str, Any]:
    descriptor = os.open(path, os.O_RDWR)  # Windows syncs only what may be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


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
