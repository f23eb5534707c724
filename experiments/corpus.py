"""Text that every machine with Python packages has: their sources, documents and docstrings."""

import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = frozenset({".py", ".pyi", ".md", ".rst", ".txt"})
LARGEST_FILE = 1 << 20
"""Bytes above which a file is left out: such files are tables, not text."""

_DOCSTRING = re.compile(r'"""(.{80,}?)"""', re.DOTALL)


@dataclass(frozen=True)
class Split:
    """Texts to train on and texts that training never sees."""

    train: list[str]
    held_out: list[str]


def installed_roots() -> list[Path]:
    """The folders of the standard library and of the installed packages."""
    paths = sysconfig.get_paths()
    return [Path(paths["stdlib"]), Path(paths["purelib"])]


def sources(roots: Sequence[Path], limit: int, held_out_share: float = 0.03) -> Split:
    """Whole files below ``roots``, none twice, split by folder.

    A folder is held out as a whole: its files are more alike than others. Which folders, and the
    order of the files, is decided by hashes of the paths, so it is the same on every run.

    Args:
        roots: folders to search.
        limit: characters to train on; what is held out is that share of them or a little more.
        held_out_share: of the folders and of the text.

    Raises:
        ValueError: nothing found to train on or to hold out.
    """
    split = Split([], [])
    missing = {"train": float(limit), "held_out": held_out_share * limit}
    for path, text in _texts(roots):
        part = "held_out" if _hash(str(path.parent)) < held_out_share * 2**64 else "train"
        if missing[part] > 0:
            getattr(split, part).append(text)
            missing[part] -= len(text)
        elif max(missing.values()) <= 0:
            break
    for name, texts in vars(split).items():
        if not texts:
            raise ValueError(f"roots hold no text for {name}, got {[str(root) for root in roots]}")
    return split


def docstrings(roots: Sequence[Path], limit: int) -> list[str]:
    """Help topics and the docstrings below ``roots``, none twice, about ``limit`` characters."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    total = sum(map(len, texts))
    seen = set()
    for path, text in _texts(roots):
        if path.suffix != ".py":
            continue
        for match in _DOCSTRING.finditer(text):
            cleaned = inspect.cleandoc(match[1])
            if cleaned in seen:
                continue
            seen.add(cleaned)
            texts.append(cleaned)
            total += len(cleaned)
        if total >= limit:
            break
    return texts


def _texts(roots: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Path relative to its root and text of each file, in the order of the paths' hashes."""
    found: dict[Path, Path] = {}
    for root in roots:
        for path in root.rglob("*"):
            name = path.relative_to(root)
            # The standard library's folder may hold the packages too: they are a root themselves.
            if path.suffix in SUFFIXES and "site-packages" not in name.parts:
                found.setdefault(name, path)
    names = sorted(found, key=lambda name: (_hash(str(name)), name))
    seen = set()
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, len(names), 256):
            some = names[start : start + 256]
            for name, text in zip(some, pool.map(_read, (found[n] for n in some)), strict=True):
                digest = hashlib.sha256(text.encode()).digest()
                if text.strip() and digest not in seen:
                    seen.add(digest)
                    yield name, text


def _read(path: Path) -> str:
    """The text of a file; nothing if it is large, gone or no UTF-8."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            return ""
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
