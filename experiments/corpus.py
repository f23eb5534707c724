"""Text to train on: what every machine with Python packages has, and prose in files."""

import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

SUFFIXES = frozenset({".py", ".pyi", ".md", ".rst", ".txt"})
LARGEST_FILE = 1 << 20
"""Bytes above which a file is left out: such files are tables, not text."""

SHORTEST_PARAGRAPH = 60
"""Characters below which a part of a page is a title, a menu or a label, not a paragraph."""

_INLINE = frozenset(
    {"a", "abbr", "acronym", "b", "big", "br", "cite", "code", "dfn", "em", "i", "img", "kbd", "q",
     "s", "samp", "small", "span", "strong", "sub", "sup", "tt", "u", "var", "wbr"}
)  # fmt: skip
_HIDDEN = frozenset({"head", "nav", "pre", "script", "style", "table"})

_DOCSTRING = re.compile(r'"""(.{80,}?)"""', re.DOTALL)


def installed_roots() -> list[Path]:
    """Return the folders of the standard library and of the installed packages."""
    paths = sysconfig.get_paths()
    return [Path(paths["stdlib"]), Path(paths["purelib"])]


def sources(
    roots: Sequence[Path], limit: int, held_out_share: float = 0.03
) -> tuple[list[str], list[str]]:
    """Return whole files below ``roots``, none twice: those to train on and those held out.

    A folder is held out as a whole: its files are more alike than others. Which folders, and the
    order of the files, is decided by hashes of the paths, so it is the same on every run.

    Args:
        roots: folders to search.
        limit: characters to train on; held out is that share of them or a little more.
        held_out_share: of the folders and of the text.

    Raises:
        ValueError: nothing found to train on or to hold out.
    """
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    missing = {"train": float(limit), "held_out": held_out_share * limit}
    for path, text in _texts(roots):
        part = "held_out" if _hash(str(path.parent)) < held_out_share * 2**64 else "train"
        if missing[part] > 0:
            parts[part].append(text)
            missing[part] -= len(text)
        elif max(missing.values()) <= 0:
            break
    for name, texts in parts.items():
        if not texts:
            raise ValueError(f"roots hold no text for {name}, got {[str(root) for root in roots]}")
    return parts["train"], parts["held_out"]


def docstrings(roots: Sequence[Path], limit: int) -> list[str]:
    """Return help topics and the docstrings below ``roots``, none twice, up to ``limit`` characters
    or a little more.
    """
    from pydoc_data.topics import topics

    texts = dict.fromkeys(topics[name] for name in sorted(topics))
    total = sum(map(len, texts))
    for path, source in _texts(roots):
        found = _DOCSTRING.findall(source) if path.suffix == ".py" else []
        for text in map(inspect.cleandoc, found):
            total += len(text) if text not in texts else 0
            texts[text] = None
        if total >= limit:
            break
    return list(texts)


def prose(path: Path) -> list[str]:
    """Return the text of each ``.txt`` and the paragraphs of each ``.html`` file, in the order of
    their names; no paragraph of a page comes twice.

    Args:
        path: such a file, or a folder that holds them.

    Raises:
        ValueError: there are no such files, or they hold no text.
        FileNotFoundError: there is no such path.
    """
    if not path.exists():
        raise FileNotFoundError(f"--text {str(path)!r}: there is no such file or folder")
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    texts, seen = [], set[str]()
    for file in files:
        if file.suffix == ".txt":
            texts.append(file.read_text(encoding="utf-8").strip())
        elif file.suffix in (".html", ".htm"):
            page = _Paragraphs()
            page.feed(file.read_text(encoding="utf-8"))
            page.close()
            page.end_part()
            texts.append("\n\n".join(part for part in page.parts if part not in seen))
            seen.update(page.parts)
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError(f"--text must name .txt or .html files with text, got {str(path)!r}")
    return texts


class _Paragraphs(HTMLParser):
    """Paragraphs of a page, without titles, menus, tables and listings."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._words: list[str] = []
        self._hidden = 0  # elements around that are not shown

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _INLINE:
            self.end_part()
        self._hidden += tag in _HIDDEN

    def handle_endtag(self, tag: str) -> None:
        if tag not in _INLINE:
            self.end_part()
        self._hidden = max(0, self._hidden - (tag in _HIDDEN))

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._words.append(data)

    def end_part(self) -> None:
        """Keep the text since the last part ended, if it is a paragraph."""
        text = " ".join("".join(self._words).split())
        self._words.clear()
        if len(text) >= SHORTEST_PARAGRAPH:
            self.parts.append(text)


def _texts(roots: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Yield the path relative to its root and the text of each file, ordered by hashes of paths."""
    found: dict[Path, Path] = {}
    for root in roots:
        for path in root.rglob("*"):
            name = path.relative_to(root)
            # The standard library's folder may hold the packages too: they are a root themselves.
            if path.suffix in SUFFIXES and "site-packages" not in name.parts:
                found.setdefault(name, path)
    seen = set()
    for name in sorted(found, key=lambda name: (_hash(str(name)), name)):
        try:
            large = found[name].stat().st_size > LARGEST_FILE
            text = "" if large else found[name].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # gone, or not text
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield name, text


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
