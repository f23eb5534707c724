"""Text and conversations from files, from Python itself or from ``datasets``, as they come."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BUILTIN = "builtin"
"""Name of the text that every Python has: the language reference behind ``help()``."""

SUFFIXES = (".txt", ".md", ".jsonl")
"""What is read of a folder."""

PIECE = 1 << 16
"""Characters of a text file that are read at a time, and then on to the end of the line."""

LONGEST_LINE = 1 << 20
"""Characters after which a line without an end is cut: a file need not have lines."""


@dataclass(frozen=True)
class Document:
    """A text, a piece of a long one, or a conversation."""

    text: str = ""
    messages: tuple[dict[str, Any], ...] | None = None
    ends: bool = True
    """False for a piece that the next document continues."""


def documents(
    source: str, split: str = "train", column: str = "text", streaming: bool = False
) -> Iterator[Document]:
    """What ``source`` names, read as it is asked for: no file is ever held as a whole.

    Args:
        source: ``"builtin"``; a UTF-8 text file; a ``.jsonl`` file, one object a line with a text
            under ``column`` or a conversation under ``messages``; a folder of such files; or a data
            set that ``datasets.load_dataset`` finds (``name`` or ``name:configuration``).
        split: split of a data set.
        column: column of a data set, or key of a ``.jsonl`` file, that holds a text or a
            conversation (a list of ``{"role": ..., "content": ...}``).
        streaming: whether a data set is downloaded as it is read.

    Raises:
        FileNotFoundError: neither a file nor a data set.
        ValueError: nothing but white space in it, no UTF-8, a damaged line, or no such split or
            column.
    """
    if source == BUILTIN:
        from pydoc_data.topics import topics

        yield Document("\n\n".join(topics[name] for name in sorted(topics)))
        return
    path = Path(source)
    if path.is_file():
        found = _file_documents(path, column)
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        found = (document for file in files for document in _file_documents(file, column))
    else:
        found = _dataset_documents(source, split, column, streaming)
    empty = True
    for document in found:
        empty = empty and not (document.messages or document.text.strip())
        yield document
    if empty:
        raise ValueError(f"data {source!r} holds no text")


def load_text(source: str, split: str = "train", column: str = "text") -> str:
    """All text that ``source`` names, in one piece; see :func:`documents`.

    Raises:
        FileNotFoundError, ValueError: as there; and conversations are no text.
    """
    parts = []
    for document in documents(source, split, column):
        if document.messages is not None:
            raise ValueError(f"data {source!r} holds conversations, not text")
        parts.append(document.text + ("\n\n" if document.ends else ""))
    return "".join(parts).removesuffix("\n\n")


def _file_documents(path: Path, column: str) -> Iterator[Document]:
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _json_document(line, column, f"data '{path}', line {number}")
                return
            piece = _read_piece(file)
            while piece:
                following = _read_piece(file)
                yield Document(piece, ends=not following)
                piece = following
    except UnicodeDecodeError as error:
        raise ValueError(f"data {str(path)!r} is not UTF-8 text: {error}") from error


def _read_piece(file: Any) -> str:
    piece: str = file.read(PIECE)
    return piece + file.readline(LONGEST_LINE) if piece else piece


def _json_document(line: str, column: str, where: str) -> Document:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: no JSON ({error})") from error
    value = row.get(column, row.get("messages")) if isinstance(row, dict) else None
    if value is None:
        raise ValueError(f"{where}: must be an object with {column!r} or 'messages'")
    return _document(value, where)


def _document(value: Any, where: str) -> Document:
    if isinstance(value, str):
        return Document(value)
    if isinstance(value, list) and value:
        wrong = [m for m in value if not (isinstance(m, dict) and {"role", "content"} <= set(m))]
        if not wrong:
            return Document(messages=tuple(value))
    raise ValueError(
        f"{where}: must be a text or a list of messages with 'role' and 'content', "
        f"got {str(value)[:60]!r}"
    )


def _dataset_documents(source: str, split: str, column: str, streaming: bool) -> Iterator[Document]:
    problem = (
        f"data must be {BUILTIN!r}, a file, a folder or the name of a data set, got {source!r}: "
        "there is no such file"
    )
    path = Path(source)
    if path.suffix in (*SUFFIXES, ".json", ".csv", ".gz") or path.is_absolute():
        raise FileNotFoundError(problem)  # a hub would be asked for long
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise FileNotFoundError(f"{problem}, and `datasets` is not installed") from error
    name, _, configuration = source.partition(":")
    try:
        dataset = load_dataset(name, configuration or None, streaming=streaming)
    except Exception as error:  # datasets and the hub client have no common class of errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"{problem}, and `datasets` says: {reason}") from error
    if split not in dataset:
        raise ValueError(f"data {source!r} has the splits {', '.join(dataset)}, got {split!r}")
    columns = dataset[split].column_names
    if columns is not None and column not in columns:  # a stream may not know its columns
        raise ValueError(f"data {source!r} has the columns {', '.join(columns)}, got {column!r}")
    for number, row in enumerate(dataset[split]):
        yield _document(row[column], f"data {source!r}, row {number}")


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """Token ids of ``text``, int64, one dimension, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


class Windows:
    """Windows of ``length`` tokens without overlap, in a new order each epoch.

    What comes at a position depends on the seed and the position alone.

    Args:
        tokens: one dimension.
        length: tokens a window, at least 2: the first has nothing to predict it.
        seed: decides the order.

    Raises:
        ValueError: fewer tokens than one window.
    """

    def __init__(self, tokens: Tensor, length: int, seed: int) -> None:
        self.count = len(tokens) // length
        if self.count == 0:
            raise ValueError(
                f"sequence length must be at most the {len(tokens)} tokens of the data, "
                f"got {length}"
            )
        self.windows = tokens[: self.count * length].view(self.count, length)
        self.seed = seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, position: int, size: int) -> Tensor:
        """The ``size`` windows from ``position`` on, (size, length); epochs follow each other."""
        return torch.stack([self._window(position + i) for i in range(size)])

    def fingerprint(self) -> str:
        """A hash of the tokens: tells whether two runs have the same data."""
        return hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()

    def _window(self, position: int) -> Tensor:
        epoch, index = divmod(position, self.count)
        if epoch != self._epoch:
            # Not the global generator: the order must not depend on what the model drew.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        return self.windows[self._order[index]]
